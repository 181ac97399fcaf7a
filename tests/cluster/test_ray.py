"""The same on real Ray processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import handlers
import psutil
import pytest

from cluster import guard
from cluster.group import Setup
from cluster.loop import run_units
from cluster.ray_group import RayGroup
from cluster.retry import immediate
from cluster.scheduler import Event, Instruction, UnitFailed, WorkerLost
from cluster.session import default_workers, ray_session
from cluster.units import ClusterError, Unit

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session("local", cpus=2):
        yield


@pytest.fixture(scope="module")
def group(session: None) -> Iterator[RayGroup]:
    group = RayGroup(handlers.setup, workers=2, cpus_per_worker=0.5)
    yield group
    group.close()


def do(name: str, action: str, *depends_on: str, **payload: Any) -> Unit:
    return Unit(name, {"do": action, **payload}, depends_on)


def test_units_with_dependencies_run_in_other_processes(group: RayGroup) -> None:
    plan = [do("c", "nothing", "a", "b"), do("a", "nothing"), do("b", "nothing")]
    outcome = run_units(group, plan)
    assert outcome.status == "done"
    assert list(outcome.results)[-1] == "c"
    assert os.getpid() not in {result["pid"] for result in outcome.results.values()}


@pytest.mark.parametrize(("kind", "status"), [("replan", "replan"), ("fatal", "failed")])
def test_kinds_come_through(group: RayGroup, kind: str, status: str) -> None:
    outcome = run_units(group, [do("a", "fail", kind=kind, message="shard 3 is missing")])
    assert (outcome.status, outcome.reason) == (status, "Unit a: shard 3 is missing")


def test_other_failures_are_tried_again_and_keep_their_traceback(group: RayGroup) -> None:
    events: list[Event | Instruction] = []
    plan = [do("a", "crash")]
    outcome = run_units(group, plan, max_attempts=2, backoff=immediate, on_event=events.append)
    assert outcome.reason == "Unit a failed 2 times; the last time: ZeroDivisionError: by nothing"
    assert all("handlers.py" in event.traceback for event in events if isinstance(event, UnitFailed))


def test_a_result_that_cannot_travel_is_a_failure(group: RayGroup) -> None:
    outcome = run_units(group, [do("a", "unpicklable")], max_attempts=1)
    assert outcome.status == "failed"
    assert "pickle" in outcome.reason


def _kill_when_reported(mark: Path) -> None:
    while not mark.exists():
        time.sleep(0.02)
    os.kill(int(mark.read_text()), signal.SIGKILL)


def test_a_unit_whose_worker_is_killed_is_redone(group: RayGroup, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    killer = threading.Thread(target=_kill_when_reported, args=[mark])
    killer.start()
    events: list[Event | Instruction] = []
    plan = [do("a", "sleep", mark=str(mark)), do("b", "nothing", "a")]
    outcome = run_units(group, plan, on_event=events.append)
    killer.join()
    assert outcome.status == "done"
    assert outcome.results["a"]["pid"] != int(mark.read_text())
    assert [event for event in events if isinstance(event, WorkerLost)]


def _poll_until(group: RayGroup, wanted: type) -> Event:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for event in group.poll(0.2):
            if isinstance(event, wanted):
                return event
    raise AssertionError(f"no {wanted.__name__} came")


def test_the_loss_of_an_idle_worker_costs_no_attempt(group: RayGroup) -> None:
    result = run_units(group, [do("a", "nothing")]).results["a"]
    os.kill(result["pid"], signal.SIGKILL)
    lost = _poll_until(group, WorkerLost)
    assert isinstance(lost, WorkerLost)
    assert lost.worker == result["worker"]
    assert "worker process has died" in lost.reason
    assert run_units(group, [do("b", "nothing")], max_attempts=1).status == "done"


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (handlers.refusing_setup, "cannot start: this driver is too old"),
        (handlers.failing_setup, "failed to start 3 times in a row; the last time: OSError: no such device"),
    ],
)
def test_a_setup_that_fails_does_not_loop(session: None, setup: Setup, message: str) -> None:
    group = RayGroup(setup, workers=1, cpus_per_worker=0.01)
    try:
        with pytest.raises(ClusterError, match=message):
            run_units(group, [do("a", "nothing")])
    finally:
        group.close()


def test_too_much_is_refused_at_once(session: None) -> None:
    with pytest.raises(ClusterError, match=r"3 workers of 1 CPUs and 0 GPUs each .* room for 2"):
        RayGroup(handlers.setup, workers=3, cpus_per_worker=1)
    with pytest.raises(ClusterError, match="room for 0"):
        RayGroup(handlers.setup, workers=1, cpus_per_worker=1, gpus_per_worker=100)
    with pytest.raises(ClusterError, match="at least one worker"):
        RayGroup(handlers.setup, workers=0, cpus_per_worker=1)
    assert default_workers(cpus_per_worker=0.5, gpus_per_worker=0) == 4


def test_a_private_ray_listens_on_loopback_alone(session: None) -> None:
    family = psutil.Process().children(recursive=True)
    ports = [c for process in family for c in _listening(process)]
    assert ports
    assert {c.laddr.ip for c in ports} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def _listening(process: psutil.Process) -> list[Any]:
    with contextlib.suppress(psutil.Error):
        return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return []


def test_nobody_at_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = time.monotonic()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with (
            pytest.raises(ClusterError, match=f"No Ray cluster answers at {address} .* `ray start --head`"),
            ray_session(address),
        ):
            pass
    assert time.monotonic() - before < 5
    with pytest.raises(ClusterError, match="is no address of a Ray cluster"), ray_session("somewhere"):
        pass


DRIVER = """
import sys, tempfile
sys.path[:0] = {path!r}
import handlers
from cluster.ray_group import RayGroup
from cluster.session import ray_session
from cluster.loop import run_units
from cluster.units import Unit
with ray_session(None, cpus=1):
    group = RayGroup(handlers.setup, 1, 1)
    run_units(group, [Unit("a", {{"do": "sleep", "mark": {mark!r}}})])
"""


def test_a_killed_driver_leaves_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = DRIVER.format(path=[str(Path(guard.__file__).parents[1]), str(Path(__file__).parent)], mark=str(mark))
    driver = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not mark.exists() and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    family = psutil.Process(driver.pid).children(recursive=True)
    assert int(mark.read_text()) in {process.pid for process in family}
    directory = next(command[-1] for p in family if guard.__file__ in (command := p.cmdline()))
    assert guard.holders(directory) >= {driver.pid, int(mark.read_text())}
    driver.kill()
    driver.wait()
    _, left = psutil.wait_procs([process for process in family if process.is_running()], timeout=10)
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []
    assert not Path(directory).exists()
    assert guard.holders(directory) == set()
