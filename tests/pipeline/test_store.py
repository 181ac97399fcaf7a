"""One contract for all backends: a local disk, memory, and a real S3 server on loopback."""

import errno
import pickle
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pipeline import faults
from pipeline.errors import UserError
from pipeline.store import StorageFullError, Store, iter_pieces, open_store


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield open_store(str(tmp_path / "root"))
    elif request.param == "s3":
        yield open_store(request.getfixturevalue("s3_url"))
    else:
        memory = open_store(f"memory://{uuid.uuid4().hex}")
        yield memory
        memory.fs.rm(memory.root, recursive=True) if memory.fs.exists(memory.root) else None


def another_process(store: Store) -> Store:
    """The same place through a file system of its own, which shares no cache of listings."""
    return Store(store.url, {**store.options, "skip_instance_cache": True})


# --- objects ---------------------------------------------------------------------------------------------------------


def test_what_was_put_is_got(store: Store) -> None:
    store.put("a", b"one")
    store.put("deep/er/b", memoryview(b"two"))
    assert store.get("a") == b"one"
    assert store.get("deep/er/b") == b"two"


def test_pieces_become_one_object(store: Store) -> None:
    store.put("a", lambda: (piece for piece in (b"one", memoryview(b"two"), b"", b"three")))
    assert store.get("a") == b"onetwothree"


@pytest.mark.parametrize("data", [b"", []], ids=["no bytes", "no pieces"])
def test_empty_object_exists(store: Store, data: bytes | list[bytes]) -> None:
    store.put("empty", data)
    assert store.exists("empty")
    assert (store.get("empty"), store.size("empty"), store.list()) == (b"", 0, {"empty": 0})


def test_every_byte_value_survives(store: Store) -> None:
    data = bytes(range(256)) * 9
    store.put("a", data)
    assert store.get("a") == data


@pytest.mark.parametrize("second", [b"x", b"much longer than the first", b""])
def test_put_replaces_the_whole_object(store: Store, second: bytes) -> None:
    store.put("a", b"the first")
    store.put("a", second)
    assert store.get("a") == second
    assert store.size("a") == len(second)


def test_missing_object(store: Store) -> None:
    store.put("folder/a", b"1")
    for key in ("folder/b", "elsewhere/a", "folder"):
        assert not store.exists(key)
    for ask in (store.get, store.size, store.stamp, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(FileNotFoundError):
            ask("folder/b")


@pytest.mark.parametrize(("start", "end"), [(0, 10), (0, 1), (9, 10), (3, 7), (0, 0), (5, 5), (10, 10)])
def test_range_within_the_object(store: Store, start: int, end: int) -> None:
    store.put("a", b"0123456789")
    assert store.read_range("a", start, end) == b"0123456789"[start:end]


@pytest.mark.parametrize(("start", "end"), [(0, 11), (9, 11), (10, 11), (50, 60)])
def test_range_past_the_end_is_an_error(store: Store, start: int, end: int) -> None:
    store.put("a", b"0123456789")
    with pytest.raises(EOFError, match=f"bytes {start} to {end}"):
        store.read_range("a", start, end)


def test_stamp_changes_with_the_object_only(store: Store) -> None:
    store.put("a", b"one")
    first = store.stamp("a")
    assert store.stamp("a") == first
    time.sleep(0.01)
    store.put("a", b"two")
    assert store.stamp("a") != first


@pytest.mark.parametrize("key", ["../a", "a/../b", "/a", "a//b", "a/", "", ".", "a/./b", "a\\b", ".."])
def test_unsafe_keys_are_refused(store: Store, key: str) -> None:
    for use in (store.get, store.exists, store.size, store.delete, store.delete_all, store.child, store.stamp):
        with pytest.raises(ValueError, match="unsafe storage key"):
            use(key)
    with pytest.raises(ValueError, match="unsafe storage key"):
        store.put(key, b"x")
    assert store.list() == {}


def test_create_never_replaces(store: Store) -> None:
    assert store.create("folder/a", b"first")
    assert not store.create("folder/a", b"second")
    assert not another_process(store).create("folder/a", b"third")
    assert store.get("folder/a") == b"first"
    assert store.create("folder/a", b"first"), "a try whose answer was lost is repeated"
    store.delete("folder/a")
    assert store.create("folder/a", b"second")


def test_of_many_that_create_at_once_one_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: store.create("a", b"%d" % n), range(16)))
    assert store.get("a") == b"%d" % won.index(True)
    assert won.count(True) == 1


def test_create_refuses_unsafe_keys(store: Store) -> None:
    with pytest.raises(ValueError, match="unsafe storage key"):
        store.create("../a", b"x")


# --- folders ---------------------------------------------------------------------------------------------------------


def test_list_is_nested_sorted_and_with_sizes(store: Store) -> None:
    for key in ("b/c/three", "a", "b/two", "bb/not-in-b"):
        store.put(key, key.encode())
    assert list(store.list().items()) == [("a", 1), ("b/c/three", 9), ("b/two", 5), ("bb/not-in-b", 11)]
    assert store.list("b") == {"b/c/three": 9, "b/two": 5}
    assert store.list("b/c") == {"b/c/three": 9}


def test_list_of_a_missing_folder_is_empty(store: Store) -> None:
    assert store.list() == {}
    assert store.list("nowhere/at/all") == {}


def test_what_another_process_does_is_seen(store: Store) -> None:
    other = another_process(store)
    store.put("folder/a", b"1")
    store.list()
    assert not store.exists("folder/b")
    other.put("folder/b", b"22")
    other.put("folder/a", b"four")
    assert store.exists("folder/b")
    assert store.size("folder/a") == 4
    assert store.stamp("folder/a") == other.stamp("folder/a")
    assert store.list() == {"folder/a": 4, "folder/b": 2}
    other.delete("folder/a")
    assert not store.exists("folder/a")
    assert store.list() == {"folder/b": 2}


def test_delete_twice(store: Store) -> None:
    store.put("a", b"1")
    store.put("b", b"2")
    store.delete("a")
    store.delete("a")
    assert store.list() == {"b": 1}


def test_delete_all_takes_a_folder_and_nothing_beside_it(store: Store) -> None:
    for key in ("b/one", "b/c/two", "bb/three", "a"):
        store.put(key, b"x")
    store.delete_all("b")
    store.delete_all("b")
    assert store.list() == {"a": 1, "bb/three": 1}


def test_child_is_a_folder_of_the_parent(store: Store) -> None:
    child = store.child("x/y")
    child.put("a", b"1")
    assert store.list() == {"x/y/a": 1}
    assert child.list() == {"a": 1}
    assert child.describe("a") == store.describe("x/y/a")


def test_pickle_opens_the_same_place(store: Store) -> None:
    store.put("a", b"1")
    copy = pickle.loads(pickle.dumps(store))
    copy.put("b", b"2")
    assert copy.get("a") == b"1"
    assert store.get("b") == b"2"


@pytest.mark.s3
def test_child_process_reaches_the_server_without_options(s3_url: str) -> None:
    open_store(s3_url).put("a", b"1")
    code = f"from pipeline.store import open_store; s = open_store({s3_url!r}); s.put('b', s.get('a') + b'2')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert open_store(s3_url).get("b") == b"12"


# --- failures --------------------------------------------------------------------------------------------------------


class ProducerError(Exception):
    pass


def failing(before: list[bytes]) -> Iterator[bytes]:
    yield from before
    raise ProducerError


def left_behind(store: Store, key: str) -> bytes | None:
    try:
        return another_process(store).get(key)
    except FileNotFoundError:
        return None


# A handle whose destructor still tries to publish says so in a warning.
quietly = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


@quietly
@pytest.mark.parametrize("old", [None, b"the old one"], ids=["new", "overwrite"])
def test_producer_that_fails_never_publishes_a_whole_object(store: Store, old: bytes | None) -> None:
    """An object store keeps what it had. A disk and memory hold a torn object, which is why there are commit records."""
    if old is not None:
        store.put("a", old)
    with pytest.raises(ProducerError):
        store.put("a", lambda: failing([b"half "]))
    assert left_behind(store, "a") == (old if store.url.startswith("s3://") else b"half ")
    store.put("a", b"whole")
    assert store.get("a") == b"whole"


@quietly
@pytest.mark.s3
@pytest.mark.parametrize("old", [None, b"the old one"], ids=["new", "overwrite"])
def test_failed_multipart_upload_is_given_up(s3_url: str, old: bytes | None) -> None:
    store = open_store(s3_url, {"default_block_size": 5 << 20})
    if old is not None:
        store.put("a", old)
    with pytest.raises(ProducerError):
        store.put("a", lambda: failing([bytes(3 << 20)] * 5))
    assert left_behind(store, "a") == old
    uploads = store.fs.call_s3("list_multipart_uploads", Bucket=store.root.split("/")[0])
    assert uploads.get("Uploads", []) == []


@pytest.mark.s3
def test_multipart_upload_is_whole(s3_url: str) -> None:
    store = open_store(s3_url, {"default_block_size": 5 << 20})
    pieces = [bytes([number]) * (3 << 20) for number in range(4)]
    store.put("a", pieces)
    assert store.get("a") == b"".join(pieces)
    assert store.read_range("a", (6 << 20) - 1, (6 << 20) + 1) == b"\1\2"


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_full_disk_is_named(full_disk: Path) -> None:
    store = open_store(str(full_disk / "run"))
    store.put("small", bytes(1000))
    with pytest.raises(StorageFullError, match=r"no room left at .*run while writing big") as caught:
        store.put("big", lambda: iter_pieces(memoryview(bytes(2 << 20)), 1 << 16))
    assert caught.value.errno == errno.ENOSPC
    assert store.get("small") == bytes(1000)
    with pytest.raises(UserError, match="no space left on the device; free some"):
        store.check_writable()
    store.delete("big")
    store.check_writable()


def test_check_writable_leaves_nothing(store: Store) -> None:
    store.check_writable()
    assert store.list() == {}


@pytest.mark.parametrize("place", ["/proc/lsi-run", "/sys/lsi-run", "/dev/null/lsi-run"])
def test_unwritable_place_is_a_user_error(place: str) -> None:
    with pytest.raises(UserError, match=f"{place}: cannot write there .* choose another storage.run"):
        open_store(place).check_writable()


@pytest.mark.s3
def test_missing_bucket_is_a_user_error(s3: str) -> None:
    with pytest.raises(UserError, match="cannot write there"):
        open_store(f"{s3}-that-nobody-made/run").check_writable()


@pytest.mark.s3
def test_unreachable_server_is_a_user_error(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FIRST_DELAY", 0.0)
    # Port 1 is not listened on; without this setting s3fs asks again for half a minute.
    options = {"endpoint_url": "http://127.0.0.1:1", "config_kwargs": {"retries": {"max_attempts": 0}}}
    store = open_store(f"{s3}/run", options)
    store.fs.retries = 1
    with pytest.raises(UserError, match="cannot write there"):
        store.check_writable()


def test_unknown_protocol_is_a_user_error() -> None:
    with pytest.raises(UserError, match="gopher://x: not a storage address that fsspec knows"):
        open_store("gopher://x")


def test_protocol_without_its_package_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(UserError, match="needs a package that is not installed"):
        open_store("abfs://container/x")


def test_options_are_not_shown() -> None:
    store = open_store(
        "memory://x", {"secret": "hunter2", "client_kwargs": {"aws": "nested", "endpoint_url": "http://h"}}
    )
    assert "hunter2" not in repr(store)
    assert store.clean("key hunter2 of nested at http://h") == "key *** of *** at http://h"


# --- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 3, 4, 7])
def test_iter_pieces_covers_the_buffer_without_copying(length: int) -> None:
    data = torch.arange(length, dtype=torch.uint8)
    pieces = list(iter_pieces(memoryview(data.numpy()), 3))
    data += 1
    assert b"".join(pieces) == bytes(data.tolist())
    assert all(len(piece) <= 3 for piece in pieces)
