"""The same on real Ray processes."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import handlers
import psutil
import pytest
import ray
from ray._private.utils import push_error_to_driver
from ray._private.worker import global_worker

from cluster import guard, seat, versions
from cluster.events import Event, Instruction, UnitFailed, UnitReturned, WorkerJoined, WorkerLeaving, WorkerLost
from cluster.group import Setup
from cluster.loop import run_units
from cluster.pools import Pool
from cluster.ray_group import RayGroup
from cluster.retry import immediate
from cluster.session import ray_session
from cluster.units import ClusterError, Unit

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session("local", cpus=2):
        yield


@pytest.fixture(scope="module")
def group(session: None) -> Iterator[RayGroup]:
    group = RayGroup(handlers.setup, [Pool(cpus=0.5, most=2)])
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


def _signal_when_reported(mark: Path, number: int) -> threading.Thread:
    def wait_and_signal() -> None:
        while not mark.exists():
            time.sleep(0.02)
        os.kill(int(mark.read_text()), number)

    thread = threading.Thread(target=wait_and_signal)
    thread.start()
    return thread


def _ended(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def _until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_a_worker_told_to_end_gives_its_unit_back_and_leaves(group: RayGroup, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    thread = _signal_when_reported(mark, signal.SIGTERM)
    events: list[Event | Instruction] = []
    outcome = run_units(group, [do("a", "yield", mark=str(mark))], max_attempts=1, on_event=events.append)
    thread.join()
    assert outcome.status == "done"
    assert outcome.results["a"]["went on from"] == int(mark.read_text())
    told = [event for event in events if isinstance(event, WorkerLeaving | UnitReturned | WorkerLost)]
    worker = told[0].worker
    assert told == [
        WorkerLeaving(worker),
        UnitReturned("a", worker),
        WorkerLost(worker, told[-1].reason, on_request=True),
    ]  # type: ignore[union-attr]
    assert _until(lambda: _ended(int(mark.read_text())))


def test_a_unit_that_does_not_give_up_is_lost_with_its_worker(group: RayGroup, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    thread = _signal_when_reported(mark, signal.SIGTERM)
    events: list[Event | Instruction] = []
    outcome = run_units(group, [do("a", "sleep", mark=str(mark))], max_attempts=1, on_event=events.append)
    thread.join()
    assert outcome.status == "done"
    assert not [event for event in events if isinstance(event, UnitReturned)]
    assert [event for event in events if isinstance(event, WorkerLost)]
    assert _until(lambda: _ended(int(mark.read_text())), 5)  # driver and actor count their seconds apart


@pytest.mark.parametrize("reachable", [True, False])
def test_a_stopped_worker_is_lost_and_its_late_answer_does_not_count(
    session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    if not reachable:  # a process on another machine, that no signal of ours reaches
        monkeypatch.setattr(seat, "machine", lambda: "another machine")
    mark = tmp_path / "pid"
    group = RayGroup(handlers.setup, [Pool(cpus=0.1, most=1)], deadline=4)
    try:
        thread = _signal_when_reported(mark, signal.SIGSTOP)
        events: list[Event | Instruction] = []
        outcome = run_units(group, [do("a", "linger", mark=str(mark))], max_attempts=1, on_event=events.append)
        thread.join()
        stopped = int(mark.read_text())
        assert [event.reason for event in events if isinstance(event, WorkerLost)] == ["has not answered for 4 s"]
        assert outcome.results["a"]["pid"] != stopped
        if reachable:
            assert _until(lambda: _ended(stopped))
        else:
            assert psutil.Process(stopped).status() == psutil.STATUS_STOPPED
            os.kill(stopped, signal.SIGCONT)
            assert run_units(group, [do("b", "nothing")]).results["b"]["pid"] == outcome.results["a"]["pid"]
            assert _until(lambda: _ended(stopped))
    finally:
        group.close()


def test_a_worker_that_started_joins_once_it_has_said_where_it_is(
    session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    withheld: set[Any] = set()
    ready = RayGroup._ready
    monkeypatch.setattr(RayGroup, "_ready", lambda group, timeout: ready(group, timeout) - withheld)
    group = RayGroup(handlers.setup, [Pool(cpus=0.1, most=1)])
    try:
        withheld |= {process.word for each in group._seats.values() for process in each.processes}
        assert _until(lambda: (group.poll(0.1), not any(each.busy for each in group._seats.values()))[1])
        assert group.workers() == []
        withheld.clear()
        assert isinstance(_poll_until(group, WorkerJoined), WorkerJoined)
        assert not any(isinstance(event, WorkerJoined) for event in group.poll(0.2))
    finally:
        group.close()


def test_other_versions_are_refused(session: None) -> None:
    group = RayGroup(handlers.setup, [Pool(cpus=0.01, most=1)], versions=versions.here(["ray"]) | {"torch": "1.0"})
    try:
        with pytest.raises(ClusterError, match=r"driver and worker on .* differ \(torch 1.0 here, .* there\); install"):
            run_units(group, [do("a", "nothing")])
    finally:
        group.close()


def test_fewer_than_asked_go_on_and_say_so(session: None) -> None:
    said: list[str] = []
    group = RayGroup(handlers.setup, [Pool("train", cpus=0.3, most=9)], on_message=said.append)
    try:
        assert run_units(group, [do("a", "nothing")]).status == "done"
    finally:
        group.close()
    assert re.match("the cluster has room for [1-6] of 9 train workers of 0.3 CPUs and 0 GPUs each", said[0])


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (handlers.refusing_setup, "cannot start: this driver is too old"),
        (handlers.failing_setup, "failed to start 3 times in a row; the last time: OSError: no such device"),
    ],
)
def test_a_setup_that_fails_does_not_loop(session: None, setup: Setup, message: str) -> None:
    group = RayGroup(setup, [Pool(cpus=0.01, most=1)])
    try:
        with pytest.raises(ClusterError, match=message):
            run_units(group, [do("a", "nothing")])
    finally:
        group.close()


def test_what_fits_nowhere_is_refused_at_once(session: None) -> None:
    with pytest.raises(
        ClusterError,
        match=r"Any workers of 3 CPUs .* no machine .* room for one \(1 machines, 2 CPUs, 0 GPUs\): ask for smaller",
    ):
        RayGroup(handlers.setup, [Pool(None, cpus=3)])
    with pytest.raises(ClusterError, match=r"Train workers of 1 CPUs and 0.5 GPUs .* add machines with GPUs"):
        RayGroup(handlers.setup, [Pool("train", cpus=1, gpus=0.5)])
    with pytest.raises(ClusterError, match="at least one worker"):
        RayGroup(handlers.setup, [Pool(most=0)])


def test_a_private_ray_listens_on_loopback_alone(session: None) -> None:
    family = psutil.Process().children(recursive=True)
    ports = [c for process in family for c in _listening(process)]
    assert ports
    assert {c.laddr.ip for c in ports} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def _listening(process: psutil.Process) -> list[Any]:
    with contextlib.suppress(psutil.Error):
        return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return []


def test_what_ray_says_of_dead_processes_goes_to_the_log(
    session: None, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Standard output is for results; Ray would put a page there for every process that ends."""
    with caplog.at_level("INFO", logger="lsi.ray"):
        push_error_to_driver(global_worker, "test", "a process has ended", global_worker.current_job_id)
        deadline = time.monotonic() + 30
        while "raylet: a process has ended" not in caplog.messages and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "raylet: a process has ended" in caplog.messages
    assert capsys.readouterr().out == ""


OUTSIDER = """
import sys
from ray._raylet import GcsClient
try:
    print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)))
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("environment", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}])
def test_a_private_ray_takes_nobody_without_its_token(session: None, environment: dict[str, str]) -> None:
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", OUTSIDER, address]
    answer = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "AuthenticationError"


def test_nobody_at_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = time.monotonic()
    with (
        pytest.raises(ClusterError, match=r"address of Ray Client.*give host:port"),
        ray_session(f"ray://127.0.0.1:{port}"),
    ):
        pass
    for address in (f"127.0.0.1:{port}", f"localhost:{port}"):
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
from cluster.pools import Pool
from cluster.ray_group import RayGroup
from cluster.session import ray_session
from cluster.loop import run_units
from cluster.units import Unit
with ray_session(None, cpus=1):
    group = RayGroup(handlers.setup, [Pool(most=1)])
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


@pytest.fixture(scope="module")
def pairs(session: None) -> Iterator[RayGroup]:
    """Workers of two processes each."""
    group = RayGroup(handlers.setup, [Pool(cpus=0.3, most=1, members=2)])
    yield group
    group.close()


def test_a_worker_of_two_processes_answers_once_and_can_meet_on_loopback(pairs: RayGroup) -> None:
    outcome = run_units(pairs, [do("a", "nothing"), do("b", "nothing", "a")])
    a, b = outcome.results["a"], outcome.results["b"]
    assert (a["worker"], a["pid"]) == (b["worker"], b["pid"])
    assert re.fullmatch(r"127\.0\.0\.1:\d+", a["address"])


def test_a_failure_in_any_of_its_processes_is_the_units_and_they_begin_anew(pairs: RayGroup, tmp_path: Path) -> None:
    """The first one, which waits for the other for good here, is ended too."""
    failing = {"do": "fail", "kind": "retry", "message": "no second half"}
    mark = tmp_path / "pid"
    plan = [do("a", "sleep", mark=str(mark), others=failing)]
    outcome = run_units(pairs, plan, max_attempts=2)
    assert outcome.reason == "Unit a failed 2 times; the last time: no second half"
    assert _until(lambda: _ended(int(mark.read_text())))
    assert run_units(pairs, [do("b", "nothing")]).status == "done"


def test_the_loss_of_any_of_its_processes_is_the_workers_and_no_attempt(pairs: RayGroup, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    thread = _signal_when_reported(mark, signal.SIGKILL)
    events: list[Event | Instruction] = []
    plan = [do("a", "nothing", others={"do": "sleep", "mark": str(mark)})]
    outcome = run_units(pairs, plan, max_attempts=1, on_event=events.append)
    thread.join()
    assert outcome.status == "done"
    assert [event.on_request for event in events if isinstance(event, WorkerLost)] == [False]


def test_told_by_any_of_its_processes_the_first_gives_the_unit_back(pairs: RayGroup, tmp_path: Path) -> None:
    marks = [tmp_path / "first", tmp_path / "second"]
    thread = _signal_when_reported(marks[1], signal.SIGTERM)
    events: list[Event | Instruction] = []
    others = {"do": "linger", "mark": str(marks[1])}
    outcome = run_units(
        pairs, [do("a", "yield", mark=str(marks[0]), others=others)], max_attempts=1, on_event=events.append
    )
    thread.join()
    assert outcome.status == "done"
    assert [event for event in events if isinstance(event, UnitReturned)]
    assert outcome.results["a"]["went on from"] == int(marks[0].read_text())
