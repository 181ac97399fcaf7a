"""Storage that fails for a moment: what is tried again, what is not, and what is said in the end."""

import errno
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import FAULTS, FaultyProxy, Plan, faulty_proxy
from running import Silent, checkpoint_hashes, run, tiny_config

from pipeline import faults
from pipeline.artifacts import Artifact, Writer, read_file
from pipeline.errors import UserError
from pipeline.faults import StorageError, delays, is_transient, persist
from pipeline.store import Store, open_store


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits between tries take no time."""
    monkeypatch.setattr(faults, "FIRST_DELAY", 0.0)


def caused(error: Exception, status: int, code: str = "") -> Exception:
    """As s3fs hands over what botocore raised."""
    from botocore.exceptions import ClientError

    error.__cause__ = ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )
    return error


def passing() -> list[Exception]:
    import aiohttp
    from botocore import exceptions as boto

    return [
        ConnectionResetError("reset"),
        BrokenPipeError("pipe"),
        TimeoutError("slow"),
        OSError(errno.EIO, "input/output error"),
        OSError(errno.ESTALE, "stale file handle"),
        OSError(errno.ETIMEDOUT, "timed out"),
        caused(OSError(errno.EBUSY, "slow down"), 503, "SlowDown"),
        caused(OSError(errno.EINVAL, "incomplete"), 400, "IncompleteBody"),
        caused(OSError(errno.EIO, "conflict"), 409, "ConditionalRequestConflict"),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError("cut"),
        boto.EndpointConnectionError(endpoint_url="http://x"),
        boto.ReadTimeoutError(endpoint_url="http://x"),
    ]


def lasting() -> list[Exception]:
    from botocore import exceptions as boto

    return [
        FileNotFoundError("none"),
        PermissionError("no"),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EINVAL, "bad request"),
        OSError(errno.EROFS, "read-only"),
        caused(OSError(errno.EIO, "unknown code"), 400, "InvalidSomething"),
        caused(PermissionError("denied"), 403, "AccessDenied"),
        boto.NoCredentialsError(),
        StorageError("tried already"),
        ValueError("a defect"),
        KeyboardInterrupt(),  # type: ignore[list-item]
    ]


@pytest.mark.parametrize("number", range(13))
def test_what_may_pass_is_tried_again(number: int) -> None:
    assert is_transient(passing()[number])


@pytest.mark.parametrize("number", range(11))
def test_what_will_not_pass_is_not_tried_again(number: int) -> None:
    assert not is_transient(lasting()[number])


def test_waits_double_and_add_up_to_fifteen_seconds_at_most() -> None:
    for _ in range(100):
        waits = list(delays())
        assert len(waits) == faults.TRIES - 1
        assert all(0 <= wait <= 0.5 * 2**attempt for attempt, wait in enumerate(waits))
        assert sum(waits) <= 15.5


def test_the_last_error_names_operation_address_and_reason(hurried: None) -> None:
    tries = []

    def fails() -> None:
        tries.append(1)
        raise ConnectionResetError("peer of hunter2")

    with pytest.raises(
        StorageError, match=r"reading s3://b/x failed 6 times in \d+ s.*ConnectionResetError: peer of \*\*\*"
    ):
        persist("reading s3://b/x", fails, lambda text: text.replace("hunter2", "***"))
    assert len(tries) == 6


def test_repetitions_are_said_once_a_minute(hurried: None, caplog: pytest.LogCaptureFixture) -> None:
    counter = faults.Counter()
    with caplog.at_level(logging.WARNING, "lsi.storage"):
        for _ in range(50):
            counter.add("reading x", "reset")
    assert counter.total == 50
    assert [record.getMessage() for record in caplog.records] == [
        "1 storage requests had to be repeated; the latest: reading x: reset"
    ]


def test_a_write_that_fails_half_way_is_made_again_from_the_start(
    hurried: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    breaks = [True, True]

    def pieces() -> Iterator[bytes]:
        yield b"one"
        if breaks and breaks.pop():
            raise OSError(errno.EIO, "input/output error")
        yield b"two"

    writer = Writer(store, Artifact("block", "b", "a" * 64))
    writer.write("data.bin", pieces)
    record = writer.commit({})
    assert read_file(store, writer.artifact, "data.bin", record) == b"onetwo"


# --- a real server behind a proxy that fails ---------------------------------------------------------------------------


@pytest.fixture
def faulty(s3: str) -> Iterator[FaultyProxy]:
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], Plan(0.2, seed=3)) as proxy:
        yield proxy


def through(proxy: FaultyProxy, s3: str) -> Store:
    """One folder by way of the proxy; the client's own retries are off, so that ours are what is tested."""
    options = {
        "endpoint_url": proxy.url,
        "config_kwargs": {"retries": {"max_attempts": 0}},
        "skip_instance_cache": True,
    }
    store = open_store(f"{s3}/{uuid.uuid4().hex}", options)
    store.fs.retries = 1
    return store


@pytest.mark.s3
def test_one_request_in_five_fails_and_nothing_is_lost(hurried: None, faulty: FaultyProxy, s3: str) -> None:
    store = through(faulty, s3)
    for number in range(30):
        store.put(f"folder/{number}", lambda number=number: iter([b"%d" % number, b"!"]))
    assert [store.get(f"folder/{number}") for number in range(30)] == [b"%d!" % number for number in range(30)]
    assert store.list("folder") == {f"folder/{n}": len(f"{n}!") for n in sorted(range(30), key=str)}
    assert all(faulty.plan.done[fault] for fault in FAULTS)
    store.delete_all("folder")
    assert store.list() == {}


@pytest.mark.s3
def test_every_commit_is_whole_though_uploads_are_cut(hurried: None, faulty: FaultyProxy, s3: str) -> None:
    store = through(faulty, s3)
    faulty.plan.faults = ("cut",)
    for number in range(15):
        writer = Writer(store, Artifact("block", f"b{number}", f"{number:x}" * 64))
        writer.write("data.bin", [b"some data", b"%d" % number])
        writer.commit({"number": number})
        assert read_file(store, writer.artifact, "data.bin") == b"some data%d" % number
    assert faulty.plan.done["cut"] > 5


@pytest.mark.s3
def test_exclusive_creation_holds_though_answers_are_lost(hurried: None, faulty: FaultyProxy, s3: str) -> None:
    store = through(faulty, s3)
    faulty.plan.faults = ("error", "reset")
    assert [store.create(f"a{n}", b"mine") for n in range(20)] == [True] * 20
    assert [store.create(f"a{n}", b"theirs") for n in range(20)] == [False] * 20


@pytest.mark.s3
def test_a_run_on_failing_storage_ends_with_the_bytes_of_a_local_one(
    hurried: None, tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path, faulty: FaultyProxy, s3: str
) -> None:
    faulty.plan.rate = 0.05
    model = tiny_model(tmp_path / "model", blocks=1)
    more: dict[str, Any] = {"data": {"samples": 4}}
    local, _ = run(tiny_config(model, short_text, tmp_path / "run", **more))
    storage = {"options": {"endpoint_url": faulty.url}}
    config = tiny_config(model, short_text, f"{s3}/{uuid.uuid4().hex}", storage=storage, **more)
    remote, _ = run(config)
    assert checkpoint_hashes(remote.prepared.checkpoint) == checkpoint_hashes(local.prepared.checkpoint)
    assert sum(faulty.plan.done[fault] for fault in FAULTS)


# --- secrets -------------------------------------------------------------------------------------------------------------


SECRET = "wJalrXUtnFEMI-K7MDENG"


@pytest.mark.s3
def test_no_secret_is_stored_or_said(
    hurried: None,
    tiny_model: Callable[..., Path],
    short_text: Path,
    tmp_path: Path,
    s3: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model(tmp_path / "model", blocks=1)
    options = {"key": "AKIDEXAMPLE", "secret": SECRET, "endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    url = f"{s3}/{uuid.uuid4().hex}"
    config = tiny_config(model, short_text, url, storage={"options": options}, optimizer={"epochs": 0})
    report = Silent()
    finished, result = run(config, report)
    store = finished.prepared.store
    said = [json.dumps(result), repr(finished.prepared), repr(config), caplog.text, *report.messages]
    assert not [text for text in said if SECRET in text]
    assert not [key for key in store.list() if SECRET.encode() in store.get(key)]


def test_no_secret_is_in_the_error_of_a_failing_storage(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://secretive", {"token": SECRET})

    def fails(*args: object, **more: object) -> None:
        raise ConnectionResetError(f"https://host/?sig={SECRET}")

    monkeypatch.setattr(store.fs, "cat_file", fails)
    monkeypatch.setattr(store.fs, "open", fails)
    with pytest.raises(StorageError) as failed:
        store.get("x")
    with pytest.raises(UserError) as refused:
        store.check_writable()
    assert SECRET not in f"{failed.value}{refused.value}"
