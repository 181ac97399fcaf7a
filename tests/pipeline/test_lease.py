"""One driver a run: who gets the lease, who is refused, and who finds out that it is gone."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from running import Silent, checkpoint_hashes, run, tiny_config

from cluster.units import UnitError
from pipeline.errors import UserError
from pipeline.graph import Node
from pipeline.lease import (
    FOLDER,
    Holder,
    Lease,
    LeaseLostError,
    acquire,
    check_same_place,
    check_term,
    hold,
    is_gone,
    key_of,
    myself,
    newest,
    parse_holder,
)
from pipeline.prepare import prepare
from pipeline.run import leased
from pipeline.store import Store, open_store
from pipeline.worker import make_handler

SHORT = 0.4


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "root"))
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_url"))
    return open_store(f"memory://{uuid.uuid4().hex}")


def quiet(text: str) -> None:
    pass


def stranger(seconds: float = SHORT) -> Holder:
    """A driver on another machine."""
    return replace(myself(seconds), host="elsewhere", machine="another boot", nonce="n")


def put_holder(store: Store, term: int, holder: Holder) -> None:
    store.put(key_of(term, "json"), json.dumps(asdict(holder)).encode())


@pytest.fixture
def beating(store: Store) -> Iterator[None]:
    """A driver elsewhere that holds term 1 and is alive, with a clock of its own that nobody asks for."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(SHORT / 4):
            count += 1
            store.put(key_of(1, "beat"), str(count).encode())

    put_holder(store, 1, replace(stranger(5), since="1970-01-01T00:00:00+00:00"))
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    ended.set()
    thread.join()


# --- taking and giving back --------------------------------------------------------------------------------------------


def test_a_free_run_is_taken_and_given_back_leaving_one_object(store: Store) -> None:
    for term in range(1, 4):
        with hold(store, SHORT, quiet) as lease:
            assert lease.term == term
            assert set(store.list(FOLDER)) >= {key_of(term, "json")}
            lease.check()
        assert list(store.list(FOLDER)) == [key_of(term, "end")]


def test_it_is_given_back_after_an_error_and_after_ctrl_c(store: Store) -> None:
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), hold(store, SHORT, quiet):
            raise error
        assert not newest(store).open


def test_it_is_renewed_while_held(store: Store) -> None:
    with hold(store, SHORT, quiet):
        for _ in range(200):
            # Empty for the moment in which a local file is rewritten.
            if store.exists(key_of(1, "beat")) and store.get(key_of(1, "beat")) not in (b"", b"1"):
                return
            time.sleep(0.05)
        pytest.fail("no second beat within ten seconds")


def test_a_live_driver_is_named_and_the_run_refused(store: Store, beating: None) -> None:
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"the driver on host elsewhere \(process \d+, since 1970.*\) is working on this run; wait"
    ):
        acquire(store, SHORT, said.append)
    assert "watching for up to 5 s whether the driver on host elsewhere" in said[0]
    assert set(store.list(FOLDER)) == {key_of(1, "json"), key_of(1, "beat")}


@pytest.mark.parametrize("since", ["1970-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"], ids=["behind", "ahead"])
def test_a_silent_driver_is_taken_over_whatever_its_clock_said(store: Store, since: str) -> None:
    put_holder(store, 7, replace(stranger(), since=since))
    store.put(key_of(7, "beat"), b"12")
    said: list[str] = []
    lease = acquire(store, SHORT, said.append)
    assert lease.term == 8
    assert "gave no sign of life" in said[1]
    assert key_of(7, "json") not in store.list(FOLDER)
    lease.release()


def test_a_torn_lease_is_watched_and_taken_over(store: Store) -> None:
    store.put(key_of(1, "json"), b'{"host": "el')
    lease = acquire(store, SHORT, quiet)
    assert lease.term == 2
    lease.release()


@pytest.mark.parametrize(
    "change",
    [{"seconds": 1e9}, {"seconds": -1}, {"host": "x\x1b[2J"}, {"host": "x" * 1000}, {"pid": "one"}, {"more": 1}],
    ids=str,
)
def test_a_lease_that_claims_nonsense_is_no_holder(change: dict[str, Any]) -> None:
    assert parse_holder(json.dumps(asdict(stranger())).encode()) == stranger()
    assert parse_holder(json.dumps({**asdict(stranger()), **change}).encode()) is None


def test_a_driver_of_this_machine_that_was_killed_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pipeline.lease import acquire; from pipeline.store import open_store\n"
        "acquire(open_store(sys.argv[1]), 600, print); print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    store = open_store(str(tmp_path))
    holder = newest(store).holder
    assert holder is not None
    assert not is_gone(holder)
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, though nobody has asked for its status yet
    said: list[str] = []
    lease = acquire(store, 600, said.append)
    assert lease.term == 2
    assert "has ended without giving the run back" in said[0]
    lease.release()
    process.stdout.close()
    process.wait()


def test_a_process_number_that_another_process_has_now_is_gone() -> None:
    assert not is_gone(myself(1))
    assert is_gone(replace(myself(1), process="1"))
    assert not is_gone(replace(myself(1), process="1", machine="another boot"))


def test_of_many_that_come_at_once_one_gets_the_run(store: Store) -> None:
    def contend(_: int) -> Lease | str:
        try:
            return acquire(Store(store.url), 8, quiet)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(contend, range(4)))
    (winner,) = [result for result in results if isinstance(result, Lease)]
    winner.check()
    assert sum("is working on this run" in str(result) for result in results) == 3
    winner.release()


def test_a_late_taker_of_a_term_that_has_ended_starts_over(store: Store) -> None:
    """It read the folder before the others took terms 1 and 2 and ended them; the object of its term is gone again."""
    from pipeline.lease import _take

    for _ in range(2):
        with hold(store, SHORT, quiet):
            pass
    assert _take(store, 1, SHORT) is None
    assert _take(store, 2, SHORT) is None
    assert list(store.list(FOLDER)) == [key_of(2, "end")]


# --- losing it -----------------------------------------------------------------------------------------------------------


def wait_until_lost(lease: Lease) -> str:
    for _ in range(200):
        if lease.lost:
            return lease.lost
        time.sleep(0.05)
    raise AssertionError("not lost within ten seconds")


def test_a_driver_that_was_taken_over_finds_out_and_leaves_the_other_alone(store: Store) -> None:
    with hold(store, SHORT, quiet) as lease:
        put_holder(store, 2, stranger())
        assert "the driver on host elsewhere" in wait_until_lost(lease)
        with pytest.raises(LeaseLostError, match="has taken this run over"):
            lease.check()
    assert newest(store).term == 2
    assert newest(store).open


def test_the_fence_closes_with_the_turn_and_stays_closed(store: Store) -> None:
    with hold(store, SHORT, quiet) as first:
        check_term(store, first.term)
    for _ in range(3):
        with pytest.raises(LeaseLostError):
            check_term(store, first.term)
        with hold(store, SHORT, quiet), pytest.raises(LeaseLostError):
            check_term(store, first.term)


def test_storage_that_is_away_for_longer_than_the_lease_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    with hold(store, SHORT, quiet) as lease:

        def away(self: Store, prefix: str = "") -> dict[str, int]:
            raise PermissionError("token expired")

        monkeypatch.setattr(Store, "list", away)
        assert "could not be renewed" in wait_until_lost(lease)
        assert "token expired" in wait_until_lost(lease)


def test_a_removed_run_directory_ends_the_lease(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "run"))
    with hold(store, SHORT, quiet) as lease:
        store.delete_all(FOLDER)
        with pytest.raises(LeaseLostError, match="has ended or was removed"):
            lease.check()


# --- a run -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("lease") / "model", blocks=1)


class TakenOver(Silent):
    """Another driver takes the run when the first block is done."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        super().finished(node, result)
        if node.stage == "optimize" and not self.store.exists(key_of(2, "json")):
            put_holder(self.store, 2, stranger(30))


def test_a_driver_that_was_taken_over_commits_nothing_more(model: Path, short_text: Path, tmp_path: Path) -> None:
    config = tiny_config(model, short_text, tmp_path / "run", storage={"lease_seconds": 30})
    store = open_store(str(tmp_path / "run"))
    report = TakenOver(store)
    # The driver renews its lease every 7.5 s: it is the worker that notices, and the driver says the same of it as of itself.
    with pytest.raises(LeaseLostError, match=rf"^{store.url}: the driver on host elsewhere .* has taken this run over"):
        run(config, report)
    assert not [unit for unit in report.units if unit.startswith("merge/")]
    assert not store.exists("checkpoint/config.json")
    assert not store.exists("result.json")
    store.put(key_of(2, "end"), b"")
    finished, _ = run(config)
    plain, _ = run(tiny_config(model, short_text, tmp_path / "plain"))
    assert checkpoint_hashes(finished.prepared.checkpoint) == checkpoint_hashes(plain.prepared.checkpoint)


def test_a_paused_driver_that_wakes_publishes_nothing(model: Path, short_text: Path, tmp_path: Path) -> None:
    """The new driver came between the last unit and the publication; no thread of the old one has noticed yet."""
    from pipeline.report import publish_checkpoint, write_result
    from pipeline.run import inline_workers, run_to_goals

    config = tiny_config(model, short_text, tmp_path / "run", optimizer={"epochs": 0}, storage={"lease_seconds": 600})
    prepared = prepare(config, Silent())
    with leased(prepared, Silent()):
        finished = run_to_goals(prepared, Silent(), inline_workers)
        put_holder(prepared.store, 2, stranger())
        for publish in (publish_checkpoint, write_result):
            with pytest.raises(LeaseLostError):
                publish(finished)
    assert not prepared.checkpoint.exists("config.json")
    assert not prepared.store.exists("result.json")


def test_a_second_driver_is_refused_with_one_sentence_and_status_is_not(
    model: Path, short_text: Path, tmp_path: Path
) -> None:
    import yaml
    from running import tiny_tree
    from typer.testing import CliRunner

    from pipeline.cli import app

    tree = tiny_tree(model, short_text, tmp_path / "run", optimizer={"epochs": 0}, storage={"lease_seconds": SHORT})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    prepare(tiny_config(model, short_text, tmp_path / "run", optimizer={"epochs": 0}), Silent())
    with hold(open_store(str(tmp_path / "run")), 4, quiet):
        for command in (["quantize", str(tmp_path / "c.yaml")], ["merge", str(tmp_path / "run")]):
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 2
            assert f"the driver on host {socket.gethostname()}" in " ".join(result.output.split())
        assert CliRunner().invoke(app, ["status", str(tmp_path / "run")]).exit_code == 0


def test_scheduled_runs_leave_one_object_of_the_lease(model: Path, short_text: Path, tmp_path: Path) -> None:
    config = tiny_config(model, short_text, tmp_path / "run", optimizer={"epochs": 0})
    for _ in range(3):
        finished, _ = run(config)
    assert list(finished.prepared.store.list(FOLDER)) == [key_of(3, "end")]
    assert threading.active_count() < 20


# --- workers -----------------------------------------------------------------------------------------------------------------


def test_a_worker_that_sees_another_place_is_refused(model: Path, short_text: Path, tmp_path: Path) -> None:
    prepared = prepare(tiny_config(model, short_text, tmp_path / "run"), Silent())
    with leased(prepared, Silent()):
        make_handler(prepared.context, "here")
        (tmp_path / "other").mkdir()
        elsewhere = replace(prepared.context, run_url=str(tmp_path / "other"))
        with pytest.raises(
            UnitError, match=rf"host {socket.gethostname()} does not see the run directory .*one place"
        ) as caught:
            make_handler(elsewhere, "elsewhere")
        assert caught.value.kind == "fatal"


def test_an_older_copy_of_the_run_directory_is_not_the_drivers(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    put_holder(store, 1, stranger())
    check_same_place(store, 1, "n")
    with pytest.raises(UserError, match="it holds another driver's lease"):
        check_same_place(store, 1, "of the driver")


def test_a_zombie_worker_of_an_earlier_driver_commits_nothing(model: Path, short_text: Path, tmp_path: Path) -> None:
    config = tiny_config(model, short_text, tmp_path / "run")
    prepared = prepare(config, Silent())
    with leased(prepared, Silent()):
        zombie = make_handler(prepared.context, "zombie")
    finished, _ = run(config)
    store = finished.prepared.store
    before = {key: store.get(key) for key in store.list()}
    for stage in ("merge", "optimize", "capture"):
        node = next(node for node in finished.graph.nodes if node.stage == stage)
        with pytest.raises(UnitError) as caught:
            zombie(node.task)
        assert caught.value.kind in ("fatal", "replan")
    after = {key: store.get(key) for key in store.list()}
    assert {key: after[key] for key in before} == before
    assert not [key for key in after if key not in before and key.endswith("commit.json")]
