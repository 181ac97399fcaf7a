"""`lsi status`: what a run leaves in storage, and what a person or a program is told of it."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from running import Silent, run, tiny_config
from typer.testing import CliRunner

from cluster.events import UnitReturned, WorkerLeaving
from cluster.scheduler import Assign, UnitDone, UnitFailed, WorkerJoined, WorkerLost
from pipeline.cli import app
from pipeline.driver import StoppedError
from pipeline.errors import UserError
from pipeline.lease import Holder, hold, key_of, myself, process_start
from pipeline.lease_view import LeaseWatch
from pipeline.progress import LineReporter, event_fields, event_name, open_log, trouble
from pipeline.run import Finished
from pipeline.status import read_status
from pipeline.status_view import duration, status_lines, status_view
from pipeline.store import Store, open_store
from pipeline.watch import FAILURES, PROGRESS_FILE, Watch, read_progress


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("status") / "model", blocks=2)


@pytest.fixture(scope="module")
def finished(model: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run(tiny_config(model, short_text, tmp_path_factory.mktemp("done") / "run"))[0]


@pytest.fixture(scope="module")
def stopped_run(model: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its training."""
    report, folder = Silent(), tmp_path_factory.mktemp("stopped") / "run"

    def in_training() -> bool:
        return any(unit.startswith("optimize/") for unit in report.units)

    with pytest.raises(StoppedError):
        run(tiny_config(model, short_text, folder), report, should_stop=in_training)
    return folder


@pytest.fixture
def stopped(stopped_run: Path, tmp_path: Path) -> Store:
    """A copy of it."""
    return open_store(str(shutil.copytree(stopped_run, tmp_path / "run")))


def edit(store: Store, **changes: Any) -> None:
    store.put(PROGRESS_FILE, json.dumps(read_progress(store) | changes).encode())


def text_of(store: Store) -> str:
    return "\n".join(status_lines(read_status(store)))


def test_a_finished_run(finished: Finished) -> None:
    found = read_status(finished.prepared.store)
    assert found["state"] == "finished"
    assert found["driver"]["state"] == "ended"
    assert all(stage["left"] == stage["running"] == 0 for stage in found["stages"].values())
    assert (len(found["blocks"]), found["blocks_total"]) == (2, 2)
    assert found["flagged_blocks"] == found["quarantined"] == found["workers"] == found["failures"] == []
    lines = status_lines(found)
    assert lines[0] == f"{finished.prepared.store.url}: W3 group 32, asymmetric; finished"
    assert any(line.split() == ["optimize", "4", "of", "4"] for line in lines)


def test_a_run_that_was_stopped(stopped: Store) -> None:
    found = read_status(stopped)
    assert found["state"] == "unfinished"
    assert found["stages"]["optimize"] == {
        "total": 4,
        "left": 2,
        "running": 0,
        "per_minute": pytest.approx(found["stages"]["optimize"]["per_minute"]),
        "seconds_left": pytest.approx(found["stages"]["optimize"]["seconds_left"]),
    }
    text = text_of(stopped)
    assert "not driven now; the last driver" in text
    assert "Stopped on request." in text
    assert "about" not in text, "nobody drives it, so no time is left to tell"


TERM = 2  # the first one ended with the run that was stopped


def elsewhere(seconds: float = 60) -> Holder:
    """A driver on another machine, whose clock nobody asks."""
    return replace(myself(seconds), host="head", pid=7, machine="another boot", since="1999-12-31T23:59:00+00:00")


def hold_as(store: Store, holder: Holder, beat: int = 0) -> None:
    store.put(key_of(TERM, "json"), json.dumps(asdict(holder)).encode())
    if beat:
        store.put(key_of(TERM, "beat"), str(beat).encode())


def drive(store: Store, **more: Any) -> None:
    """As if its driver were at work: one of two workers trains, since half a minute."""
    hold_as(store, elsewhere(), beat=40)
    now = time.time()
    workers = {
        "worker-0": {"host": "a", "unit": "optimize/001/000", "since": now - 30},
        "worker-1": {"host": None, "unit": None, "since": now},
    }
    driver = {"host": "head", "pid": 7, "since": now - 600}
    units = [[f"optimize/000/{e:03d}", "worker-0", "a", 1, now - 100 + 40 * e, now - 60 + 40 * e, 9.0] for e in (0, 1)]
    edit(store, **{"driver": driver, "written": now, "end": None, "workers": workers, "units": units} | more)


def test_a_run_that_is_driven_tells_its_pace(stopped: Store) -> None:
    drive(stopped)
    found = read_status(stopped)
    # Two units of 40 s one after another, so that one worker's pace is what counts, and two are left.
    assert found["stages"]["optimize"]["running"] == 1
    assert found["stages"]["optimize"]["per_minute"] == pytest.approx(1.5, abs=0.01)
    assert found["stages"]["optimize"]["seconds_left"] == pytest.approx(80, abs=1)
    assert found["stages"]["merge"] == {"total": 1, "left": 1, "running": 0, "per_minute": None, "seconds_left": None}
    text = text_of(stopped)
    assert "held by host head, process 7, since 1999-12-31T23:59:00+00:00; last sign of life: beat 40" in text
    assert "about 80 s" in text
    assert ["worker-0", "a", "optimize/001/000", "30", "s"] in [line.split() for line in text.splitlines()]
    assert "(idle)" in text


def test_time_left_counts_the_workers_that_have_had_work(stopped: Store) -> None:
    now = time.time()
    units = [[f"optimize/00{w}/000", f"worker-{w}", "a", w, now - 100, now - 60, 9.0] for w in (0, 1)]
    drive(stopped, units=units)
    assert read_status(stopped)["stages"]["optimize"]["seconds_left"] == pytest.approx(40, abs=1)


def test_units_of_earlier_drivers_say_nothing_of_the_pace(stopped: Store) -> None:
    drive(stopped, driver={"host": "head", "pid": 7, "since": time.time() - 10})
    assert read_status(stopped)["stages"]["optimize"]["per_minute"] is None


def test_a_driver_elsewhere_is_alive_when_its_beat_goes_on(stopped: Store) -> None:
    drive(stopped, written=0)  # by its clock 1970: nothing is concluded from that
    watch = LeaseWatch(stopped)
    assert read_status(stopped, watch)["driver"]["state"] == "held"
    assert read_status(stopped, watch)["driver"]["state"] == "held"
    hold_as(stopped, elsewhere(), beat=41)
    found = read_status(stopped, watch)
    assert found["driver"]["state"] == "alive"
    assert found["driver"]["lease"] == {
        "term": TERM,
        "host": "head",
        "pid": 7,
        "since": "1999-12-31T23:59:00+00:00",
        "beat": 41,
        "state": "alive",
    }
    assert "driven by host head, process 7, since 1999-12-31T23:59:00+00:00: alive, beat 41" in status_lines(found)[1]


def test_a_driver_elsewhere_whose_beat_stands_still_is_silent(stopped: Store) -> None:
    drive(stopped)
    watch = LeaseWatch(stopped)
    assert read_status(stopped, watch)["driver"]["state"] == "held"
    assert watch.last
    watch.last = replace(watch.last, at=watch.last.at - 61)  # it has watched for longer than the lease lasts
    found = read_status(stopped, watch)
    assert found["driver"]["state"] == "silent"
    assert "whose beat stands still at 40: dead or cut off" in status_lines(found)[1]
    assert "worker-0" not in "\n".join(status_lines(found))


def test_a_driver_of_this_machine_is_there_or_not(stopped: Store) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    hold_as(stopped, replace(myself(60), pid=other.pid, process=process_start(other.pid)), beat=3)
    who = f"host {socket.gethostname()}, process {other.pid}, since "
    assert f"driven by {who}" in text_of(stopped)
    other.kill()
    other.communicate()
    found = read_status(stopped)
    assert found["driver"]["state"] == "gone"
    assert f"was held by {who}" in status_lines(found)[1]
    assert "a process that has ended without giving it back" in status_lines(found)[1]


def test_a_driver_that_neither_ended_nor_holds_the_lease(stopped: Store) -> None:
    edit(stopped, driver={"host": "head", "pid": 7, "since": 0.0}, end=None)
    assert read_status(stopped)["driver"]["state"] == "lost"
    assert "not driven now; the last driver, host head, process 7, was lost without a word" in text_of(stopped)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"host": 1}'])
def test_a_torn_lease_says_what_the_driver_itself_left(stopped: Store, damage: bytes) -> None:
    drive(stopped)
    stopped.put(key_of(TERM, "json"), damage)
    stopped.put(key_of(TERM, "beat"), damage)
    driver = read_status(stopped)["driver"]
    assert (driver["host"], driver["pid"], driver["state"], driver["lease"]["beat"]) == ("head", 7, "held", 0)
    assert status_lines(read_status(stopped))


def test_a_run_that_is_held_before_its_driver_left_a_word(stopped: Store) -> None:
    stopped.delete(PROGRESS_FILE)
    with hold(stopped, 60, lambda text: None):
        assert f"driven by host {socket.gethostname()}, process " in text_of(stopped)
    assert "no driver has left word" in text_of(stopped)


def test_failures_are_told_with_the_last_ones_shown(stopped: Store) -> None:
    failures = [{"time": time.time(), "unit": f"u{i}", "worker": "w", "reason": "no [room]"} for i in range(9)]
    edit(stopped, failures=failures)
    lines = status_lines(read_status(stopped))
    assert [line.split(", ")[1] for line in lines if "no [room]" in line] == [
        f"u{i} on w: no [room]" for i in range(4, 9)
    ]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", None], ids=["empty", "torn", "another", "missing"])
def test_what_the_driver_left_may_be_torn_or_missing(stopped: Store, damage: bytes | None) -> None:
    stopped.delete(PROGRESS_FILE) if damage is None else stopped.put(PROGRESS_FILE, damage)
    found = read_status(stopped)
    assert found["stages"]["optimize"]["left"] == 2
    assert "no driver has left word" in "\n".join(status_lines(found))


def test_before_there_is_a_plan(model: Path, short_text: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run(tiny_config(model, short_text, tmp_path / "run"), should_stop=lambda: True)
    found = read_status(open_store(str(tmp_path / "run")))
    assert found["state"] == "weights not inspected yet"
    pace = {name: found["stages"]["inspect"][name] for name in ("running", "per_minute", "seconds_left")}
    assert found["stages"]["inspect"] == {"total": 3, "left": 2} | pace
    assert status_lines(found)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        read_status(open_store(str(tmp_path)))


def test_a_terminal_shows_the_same_in_tables(stopped: Store) -> None:
    drive(stopped)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(status_view(read_status(stopped)))
    shown = console.export_text()
    for piece in (
        "unfinished",
        "held by host head",
        "optimize",
        "2 of 4",
        "about 80 s",
        "worker-0",
        "blocks done: 1 of 2",
    ):
        assert piece in shown


def test_watching_ends_with_the_run(finished: Finished) -> None:
    result = CliRunner().invoke(app, ["status", finished.prepared.store.url, "--watch", "1"])
    assert result.exit_code == 0
    assert result.stdout.count("finished") == 1


def test_durations() -> None:
    assert [duration(s) for s in (None, 5, 89, 90, 3599, 3700, 90_000)] == [
        "",
        "5 s",
        "89 s",
        "2 min",
        "1 h 00 min",
        "1 h 02 min",
        "1 d 1 h",
    ]


RESULT = {"worker": "w0", "host": "h", "pid": 1, "started": 1.0, "ended": 3.5, "peak_rss_mib": 9.0, "notes": []}


def test_the_watch_follows_workers_and_failures(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    watch = Watch(store)
    for event in (WorkerJoined("w0"), WorkerJoined("w1"), Assign("merge/a", "w0"), Assign("merge/b", "w1")):
        watch.event(event)
    watch.event(WorkerLost("w1", "its machine is gone\nadvice"))
    watch.event(UnitDone("merge/a", "w0", RESULT))
    for number in range(FAILURES + 3):
        watch.event(UnitFailed(f"u{number}", "w0", "retry", "no room"))
    for event in (WorkerJoined("w2"), Assign("merge/c", "w2"), WorkerLeaving("w2")):
        watch.event(event)
    assert watch.workers["w2"]["unit"] == "merge/c", "it goes on until it has handed its unit back"
    failures = list(watch.failures)
    watch.event(UnitReturned("merge/c", "w2"))
    watch.event(WorkerLost("w2", "it left", on_request=True))
    assert list(watch.failures) == failures
    watch.write(None)
    found = read_progress(store)
    assert {name: (w["unit"], w["host"]) for name, w in found["workers"].items()} == {"w0": (None, "h")}
    assert len(found["failures"]) == FAILURES
    assert found["failures"][-1]["unit"] == f"u{FAILURES + 2}"
    assert watch.failures[0]["reason"] == "no room"


def test_a_watch_writes_when_something_changed_and_not_always(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    watch = Watch(store)
    watch.tick()
    first = store.get(PROGRESS_FILE)
    watch.event(WorkerJoined("w0"))
    watch.tick()
    assert store.get(PROGRESS_FILE) == first, "within five seconds"
    watch.last -= 5
    watch.tick()
    assert "w0" in read_progress(store)["workers"]


def test_storage_that_takes_nothing_does_not_stop_a_watch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    Watch(open_store(str(tmp_path / "file" / "run"))).write("done")


def test_the_manifest_has_every_unit_with_who_did_it(finished: Finished) -> None:
    manifest = json.loads(finished.prepared.store.get("manifest.json"))
    entries = manifest["timeline"]
    assert {entry["unit"] for entry in entries} >= {node.name for node in finished.graph.nodes}
    starts = [entry["started"] for entry in entries]
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert all(entry["ended"] >= entry["started"] and entry["peak_rss_mib"] > 0 for entry in entries)


def test_units_that_no_driver_noted_are_found_in_their_records(
    finished: Finished, model: Path, short_text: Path
) -> None:
    """As after the kill of a driver: what it had not written is read from what the units committed."""
    store = finished.prepared.store
    store.delete(PROGRESS_FILE)
    again, _ = run(finished.prepared.config)
    units = {entry["unit"] for entry in json.loads(store.get("manifest.json"))["timeline"]}
    kept = [node for node in again.graph.nodes if node.stage in ("optimize", "evaluate", "merge")]
    assert units == {node.name for node in kept}


def test_log_lines_are_named_after_events_and_flat(tmp_path: Path) -> None:
    assert event_name(Assign("a", "w")) == "unit_started"
    assert event_name(WorkerLost("w", "r")) == "worker_lost"
    done = event_fields(UnitDone("a", "w0", RESULT | {"loss": 0.5}))
    assert done == {
        "unit": "a",
        "worker": "w0",
        "host": "h",
        "pid": 1,
        "seconds": 2.5,
        "peak_rss_mib": 9.0,
        "loss": 0.5,
    }
    failed = event_fields(UnitFailed("a", "w", "retry", "no room", "Traceback"))
    assert failed == {"unit": "a", "worker": "w", "kind": "retry", "reason": "no room", "traceback": "Traceback"}
    assert event_name(UnitReturned("a", "w")) == "unit_returned"
    assert event_fields(WorkerLost("w", "r", on_request=True)) == {"worker": "w", "reason": "r", "on_request": True}
    log = tmp_path / "log.jsonl"
    for _ in range(2):  # a run that goes on adds to the file
        with open_log(str(log)) as stream:
            LineReporter(stream).event(WorkerJoined("w"))
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()] == ["worker_joined"] * 2


def test_who_left_on_request_is_not_told_as_lost() -> None:
    assert (
        trouble(WorkerLost("w", "its machine is gone"))
        == "w was lost (its machine is gone); what it ran goes to another"
    )
    assert trouble(WorkerLost("w", "it left", on_request=True)) == "w left, as it was asked to"
    assert trouble(UnitReturned("a", "w")) == "a was handed back by w, which leaves; another goes on with it"
    assert trouble(WorkerLeaving("w")) is None


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--log .*: cannot write there \(Is a directory\)"):
        open_log(str(tmp_path))
