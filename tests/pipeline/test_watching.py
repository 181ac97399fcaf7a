"""A run on Ray with its dashboard: what a person is told, what answers, and who can reach it."""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import ray
from running import Silent, run, tiny_config

from cluster.group import WorkerGroup
from pipeline.config import RunConfig
from pipeline.reporter import Reporter
from pipeline.run import ray_workers
from pipeline.worker import Context

pytestmark = pytest.mark.ray

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def answer(url: str, token: str = "") -> tuple[int, str]:
    """Status and text."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def listening(processes: list[psutil.Process]) -> dict[int, str]:
    """Port and address of every listening socket."""
    found = {}
    for process in processes:
        with suppress(psutil.Error):
            connections = process.net_connections("tcp")
            found |= {c.laddr.port: c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def values(text: str) -> dict[str, float]:
    """Metrics of ours by name."""
    return {m[1]: float(m[2]) for m in re.finditer(r"^ray_(lsi_\w+)\{.*\} (\S+)$", text, re.MULTILINE)}


@dataclass
class Seen:
    """What there was to see before Ray ended."""

    units: int = 0
    page: tuple[int, str] = (0, "")
    without_token: int = 0
    with_token: tuple[int, str] = (0, "")
    metrics: dict[str, float] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    sockets: dict[int, str] = field(default_factory=dict)
    token: str = ""


@pytest.fixture(scope="module")
def seen_and_said(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Seen, list[str]]:
    """A whole run on one actor, looked at between its last unit and the end of Ray."""
    folder, report, seen = tmp_path_factory.mktemp("watching"), Silent(), Seen()

    @contextmanager
    def watched(config: RunConfig, context: Context, reporter: Reporter) -> Iterator[WorkerGroup]:
        with ray_workers(config, context, reporter) as group:
            yield group
            seen.units = sum(not unit.startswith("inspect/") for unit in report.units)  # those were a plan of their own
            look(seen, report.messages)

    model = tiny_model(folder / "model", blocks=1)
    cluster = {"workers": 1, "dashboard": True}
    config = tiny_config(model, short_text, folder / "run", optimizer={"epochs": 0}, cluster=cluster)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "200")
        run(config, report, watched)
    return seen, report.messages


def look(seen: Seen, messages: list[str]) -> None:
    page, token_file = told(messages, r"Ray dashboard: (http://\S+) \(it asks for the token, which is in (\S+)\)")
    (metrics,) = told(messages, r"metrics for Prometheus: (http://\S+)")
    seen.token = Path(token_file).read_text()
    seen.page = answer(page)
    seen.without_token = answer(f"{page}/api/version")[0]
    seen.with_token = answer(f"{page}/api/version", seen.token)
    seen.sockets = listening(psutil.Process().children(recursive=True))
    node = ray.nodes()[0]
    assert metrics == f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    for _ in range(300):  # Ray passes them on from time to time
        seen.metrics = values(answer(metrics)[1])
        if seen.metrics.get("lsi_units_done") == seen.units:
            return
        time.sleep(0.1)


def told(messages: list[str], pattern: str) -> tuple[str, ...]:
    return next(match.groups() for text in messages if (match := re.fullmatch(pattern, text)))


def test_the_dashboard_answers_at_the_link_that_was_told(seen_and_said: tuple[Seen, list[str]]) -> None:
    seen, _ = seen_and_said
    assert seen.page[0] == 200
    assert "Ray Dashboard" in seen.page[1]


def test_the_dashboard_tells_nothing_without_the_token(seen_and_said: tuple[Seen, list[str]]) -> None:
    seen, said = seen_and_said
    assert seen.without_token == 401
    assert seen.with_token[0] == 200
    assert json.loads(seen.with_token[1])["ray_version"] == ray.__version__
    assert seen.token
    assert not [text for text in said if seen.token in text]


def test_prometheus_sees_the_units(seen_and_said: tuple[Seen, list[str]]) -> None:
    seen, _ = seen_and_said
    assert seen.metrics["lsi_units_done"] == seen.units == 5
    assert seen.metrics["lsi_workers"] == 1
    assert seen.metrics["lsi_units_waiting"] == seen.metrics["lsi_units_failed"] == 0


def test_a_session_with_dashboard_listens_on_loopback_alone(seen_and_said: tuple[Seen, list[str]]) -> None:
    seen, said = seen_and_said
    ports = {
        int(told(said, rf"{what}: http://127\.0\.0\.1:(\d+).*")[0])
        for what in ("Ray dashboard", "metrics for Prometheus")
    }
    assert ports <= seen.sockets.keys()
    assert set(seen.sockets.values()) <= LOOPBACK
