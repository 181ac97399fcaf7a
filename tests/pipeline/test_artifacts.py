"""The commit protocol under crashes and damage: an artifact is there whole, or it is not there."""

import hashlib
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import (
    RECORD,
    Artifact,
    CorruptArtifactError,
    Record,
    Writer,
    collect_garbage,
    committed,
    digest,
    discard,
    parse_record,
    put_hashed,
    read_file,
    read_record,
    read_tensors,
)
from pipeline.lease import LeaseLostError
from pipeline.store import Store, open_store

ARTIFACT = Artifact("block", "b003", digest("inputs"))


def verify(store: Store, artifact: Artifact, record: Record) -> None:
    """Read everything once."""
    for name in record.files:
        read_file(store, artifact, name, record)


META: dict[str, Any] = {"loss": 0.25, "status": "ok", "worst": float("inf"), "überschrift": None}
DATA = b"some data"


@pytest.fixture
def store() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}")


def commit(store: Store, artifact: Artifact = ARTIFACT) -> Record:
    writer = Writer(store, artifact)
    writer.write("data.bin", [DATA[:4], DATA[4:]])
    writer.write("empty.bin", [])
    return writer.commit(META)


def data_key(store: Store, artifact: Artifact = ARTIFACT, name: str = "data.bin") -> str:
    """Where a file of the only attempt lies."""
    (key,) = [key for key in store.list(artifact.path) if key.endswith(f"/{name}")]
    return key


def record_key(artifact: Artifact = ARTIFACT) -> str:
    return f"{artifact.path}/{RECORD}"


# --- commit ----------------------------------------------------------------------------------------------------------


def test_committed_artifact_is_read_back(store: Store) -> None:
    made = commit(store)
    assert read_record(store, ARTIFACT) == made
    assert (made.key, made.meta, made.size) == (ARTIFACT.key, META, len(DATA))
    assert read_file(store, ARTIFACT, "data.bin") == DATA
    assert read_file(store, ARTIFACT, "empty.bin", made) == b""
    verify(store, ARTIFACT, made)


def test_path_says_kind_name_and_sixteen_digits_of_the_key() -> None:
    assert ARTIFACT.path == f"block/b003-{digest('inputs')[:16]}"


def test_without_a_record_nothing_is_there(store: Store) -> None:
    assert read_record(store, ARTIFACT) is None
    writer = Writer(store, ARTIFACT)
    writer.write("data.bin", [DATA])
    assert read_record(store, ARTIFACT) is None
    assert committed(store, ["block"]) == {}
    with pytest.raises(CorruptArtifactError, match=r"data\.bin is not committed"):
        read_file(store, ARTIFACT, "data.bin")


def test_record_is_written_after_all_data(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    put, create = Store.put, Store.create

    def note_put(self: Store, key: str, data: Any) -> None:
        put(self, key, data)
        written.append(key.rpartition("/")[2])

    def note_create(self: Store, key: str, data: bytes) -> bool:
        written.append(key.rpartition("/")[2])
        return create(self, key, data)

    monkeypatch.setattr(Store, "put", note_put)
    monkeypatch.setattr(Store, "create", note_create)
    commit(store)
    assert written == ["data.bin", "empty.bin", RECORD]


def test_file_that_is_not_in_the_record_is_refused(store: Store) -> None:
    record = commit(store)
    store.put(f"{ARTIFACT.path}/stray.bin", b"left by a crash")
    with pytest.raises(CorruptArtifactError, match=r"stray\.bin is not committed"):
        read_file(store, ARTIFACT, "stray.bin", record)


def test_tensors_come_back(store: Store) -> None:
    tensors = {"codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3), "scale": torch.tensor([0.1, 0.2])}
    writer = Writer(store, ARTIFACT)
    writer.write_tensors("t.safetensors", tensors)
    writer.commit({})
    read = read_tensors(store, ARTIFACT, "t.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
def test_large_files_are_read_in_pieces_and_verified(store: Store, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr("pipeline.artifacts.PIECE", piece)
    tensors = {"a": torch.arange(40.0).view(5, 8), "b": torch.arange(9).to(torch.uint8), "none": torch.empty(0, 3)}
    writer = Writer(store, ARTIFACT)
    writer.write_tensors("t.safetensors", tensors)
    writer.commit({})
    found = read_tensors(store, ARTIFACT, "t.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    key = data_key(store, name="t.safetensors")
    whole = store.get(key)
    for damaged in (whole[:-1], whole + b"!", b"", b"\xff" * len(whole), whole[:-1] + b"!"):
        store.put(key, damaged)
        with pytest.raises(CorruptArtifactError, match=f"has {len(damaged)} bytes that differ from"):
            read_tensors(store, ARTIFACT, "t.safetensors")


def test_equal_contents_give_equal_bytes(store: Store) -> None:
    first, second = Artifact("x", "one", "a" * 64), Artifact("x", "two", "b" * 64)
    tensors = {"w": torch.ones(3), "v": torch.zeros(2, dtype=torch.int8)}
    for artifact, given_tensors in ((first, tensors), (second, dict(reversed(tensors.items())))):
        writer = Writer(store, artifact)
        writer.write_tensors("t", given_tensors)
        writer.commit({})
    assert store.get(data_key(store, first, "t")) == store.get(data_key(store, second, "t"))


def test_put_hashed_counts_and_hashes_all_pieces(store: Store) -> None:
    assert put_hashed(store, "a", [DATA]) == put_hashed(store, "b", [DATA[:1], memoryview(DATA)[1:], b""])
    assert put_hashed(store, "c", [b"abc"]) == (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


# --- damage ----------------------------------------------------------------------------------------------------------


def test_record_torn_at_any_byte_is_corrupt(store: Store) -> None:
    commit(store)
    whole = store.get(record_key())
    for length in range(len(whole)):
        store.put(record_key(), whole[:length])
        with pytest.raises(CorruptArtifactError, match="damaged commit record") as caught:
            read_record(store, ARTIFACT)
        assert caught.value.artifact == ARTIFACT
    store.put(record_key(), whole)
    assert read_record(store, ARTIFACT) is not None


def test_no_flipped_bit_of_a_record_changes_what_it_says(store: Store) -> None:
    """A flip within white space may do nothing; any other is noticed."""
    made = commit(store)
    whole = bytearray(store.get(record_key()))
    noticed = 0
    for place in range(len(whole)):
        for bit in range(8):
            whole[place] ^= 1 << bit
            try:
                assert parse_record(bytes(whole)) == made
            except ValueError:
                noticed += 1
            whole[place] ^= 1 << bit
    assert noticed > 0.98 * 8 * len(whole)


@given(st.binary())
def test_garbage_is_no_record(text: bytes) -> None:
    with pytest.raises(ValueError, match="commit record"):
        parse_record(text)


@pytest.mark.parametrize("value", [None, 3, [], {}, "body", {"body": 1, "checksum": digest(1)}, {"body": {}}])
def test_other_json_is_no_record(value: object) -> None:
    with pytest.raises(ValueError, match="it is not a whole commit record"):
        parse_record(json.dumps(value).encode())


def test_altered_record_is_refused_even_if_it_is_whole_json(store: Store) -> None:
    commit(store)
    record = json.loads(store.get(record_key()))
    record["body"]["meta"]["loss"] = 0.125
    with pytest.raises(ValueError, match="checksum does not match"):
        parse_record(json.dumps(record).encode())


def test_every_flipped_bit_of_the_data_is_noticed(store: Store) -> None:
    record = commit(store)
    key = data_key(store)
    for place in range(len(DATA)):
        for bit in range(8):
            damaged = bytearray(DATA)
            damaged[place] ^= 1 << bit
            store.put(key, bytes(damaged))
            with pytest.raises(CorruptArtifactError, match="differ from the 9 committed ones"):
                verify(store, ARTIFACT, record)


@pytest.mark.parametrize("data", [DATA[:-1], b"", DATA + b"!"], ids=["torn", "emptied", "longer"])
def test_data_of_another_length_is_noticed(store: Store, data: bytes) -> None:
    record = commit(store)
    store.put(data_key(store), data)
    with pytest.raises(CorruptArtifactError, match=f"data.bin has {len(data)} bytes"):
        verify(store, ARTIFACT, record)


def test_lost_data_is_noticed(store: Store) -> None:
    record = commit(store)
    store.delete(data_key(store))
    with pytest.raises(CorruptArtifactError, match="missing though it was committed"):
        verify(store, ARTIFACT, record)


def test_record_of_another_key_is_refused(store: Store) -> None:
    """Keys whose first sixteen digits agree share a folder."""
    commit(store)
    twin = Artifact(ARTIFACT.kind, ARTIFACT.name, ARTIFACT.key[:16] + "0" * 48)
    assert twin.path == ARTIFACT.path
    with pytest.raises(CorruptArtifactError, match="its commit record belongs to"):
        read_record(store, twin)


# --- discard and list ------------------------------------------------------------------------------------------------


def test_discard_removes_everything_of_one_artifact(store: Store) -> None:
    other = Artifact("block", "b004", "c" * 64)
    commit(store)
    commit(store, other)
    discard(store, ARTIFACT)
    discard(store, ARTIFACT)
    assert read_record(store, ARTIFACT) is None
    assert set(committed(store, ["block"])) == {other.path}
    assert all(key.startswith(other.path) for key in store.list())


def test_discard_that_is_cut_short_leaves_no_record(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(store)

    def crash(self: Store, prefix: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "delete_all", crash)
    with pytest.raises(KeyboardInterrupt):
        discard(store, ARTIFACT)
    assert read_record(store, ARTIFACT) is None
    assert store.exists(data_key(store))


def test_committed_lists_the_asked_kinds_that_have_a_record(store: Store) -> None:
    done, other = Artifact("block", "b1", "a" * 64), Artifact("capture", "c1", "b" * 64)
    for artifact in (done, other, Artifact("blocks", "not-a-block", "d" * 64)):
        commit(store, artifact)
    Writer(store, Artifact("block", "b2", "c" * 64)).write("data.bin", [DATA])
    size = len(DATA) + store.size(record_key(done))
    assert committed(store, ["block"]) == {done.path: size}
    assert set(committed(store, ["block", "capture", "merge"])) == {done.path, other.path}


# --- attempts --------------------------------------------------------------------------------------------------------


def attempt(store: Store, data: bytes = DATA) -> Writer:
    writer = Writer(store, ARTIFACT)
    writer.write("data.bin", [data])
    return writer


def test_the_first_record_stays_and_a_late_attempt_takes_its_files_away(store: Store) -> None:
    early, late = attempt(store), attempt(store)
    made = early.commit(META)
    before = {key: store.get(key) for key in store.list() if late.token not in key}
    assert late.commit({"from": "the late one"}) == made
    assert {key: store.get(key) for key in store.list()} == before
    assert read_record(store, ARTIFACT) == made


def test_a_zombies_files_do_not_touch_what_is_committed(store: Store) -> None:
    made = attempt(store).commit(META)
    attempt(store, b"of another attempt, torn")
    assert read_file(store, ARTIFACT, "data.bin", made) == DATA


@pytest.mark.parametrize("damage", [b"", b'{"body"', b"{}"])
def test_a_torn_record_makes_room(store: Store, damage: bytes) -> None:
    attempt(store).commit(META)
    store.put(record_key(), damage)
    late = attempt(store)
    made = late.commit(META)
    assert made.files["data.bin"].token == late.token
    assert read_record(store, ARTIFACT) == made


def test_a_record_whose_data_is_gone_makes_room(store: Store) -> None:
    early = attempt(store)
    early.commit(META)
    early.drop()
    late = attempt(store)
    assert late.commit(META).files["data.bin"].token == late.token


def test_what_was_redone_elsewhere_is_found_behind_a_remembered_record(store: Store) -> None:
    attempt(store).commit(META)
    assert read_file(store, ARTIFACT, "data.bin") == DATA
    elsewhere = Store(store.url)
    for key in elsewhere.list(ARTIFACT.path):
        elsewhere.delete(key)
    # Another process, which remembers nothing, so nothing here is told to forget.
    other = attempt(elsewhere)
    body = {"key": ARTIFACT.key, "files": {n: list(f) for n, f in other.files.items()}, "meta": {}}
    elsewhere.put(record_key(), json.dumps({"body": body, "checksum": digest(body)}).encode())
    assert read_file(store, ARTIFACT, "data.bin") == DATA


def test_a_record_is_read_once_for_many_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(store).commit(META)
    read: list[str] = []
    get = Store.get
    monkeypatch.setattr(Store, "get", lambda self, key: (read.append(key), get(self, key))[1])
    for _ in range(3):
        read_file(store, ARTIFACT, "data.bin")
    assert sum(key.endswith(RECORD) for key in read) == 0


def test_a_write_that_fails_takes_its_attempt_away(store: Store) -> None:
    writer = attempt(store)

    def breaks() -> Iterator[bytes]:
        yield b"half"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        writer.write("more.bin", breaks)
    assert store.list() == {}


def test_a_lost_lease_lets_nothing_be_committed_or_discarded(store: Store) -> None:
    made = attempt(store).commit(META)

    def fence() -> None:
        raise LeaseLostError("another driver has taken over")

    late = Store(store.url)
    late.check_fence = fence
    with pytest.raises(LeaseLostError):
        discard(late, ARTIFACT)
    other = Artifact("block", "b009", "e" * 64)
    with pytest.raises(LeaseLostError):
        commit(late, other)
    assert set(committed(store, ["block"])) == {ARTIFACT.path}
    assert read_file(store, ARTIFACT, "data.bin", made) == DATA


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("data.bin", "../../secrets0000"),
        ("data.bin", "/etc"),
        ("data.bin", r"..\..\x"),
        ("data.bin", ""),
        ("../../../passwd", "0" * 16),
        ("/etc/passwd", "0" * 16),
        (r"a\b", "0" * 16),
        ("", "0" * 16),
    ],
)
def test_a_record_that_points_out_of_its_folder_is_damaged(store: Store, name: str, token: str) -> None:
    body = {"key": ARTIFACT.key, "files": {name: [9, "0" * 64, token]}, "meta": {}}
    store.put(record_key(), json.dumps({"body": body, "checksum": digest(body)}).encode())
    with pytest.raises(CorruptArtifactError, match="which no run writes"):
        read_file(store, ARTIFACT, name)


@pytest.mark.parametrize("path", ["../../x-" + "0" * 16, "/etc/x-" + "0" * 16, r"a\b/c-" + "0" * 16, "block/b", ""])
def test_paths_that_no_artifact_has_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not the path of an artifact"):
        Artifact.parse(path)
    assert Artifact.parse(ARTIFACT.path).path == ARTIFACT.path


# --- garbage ---------------------------------------------------------------------------------------------------------


def test_garbage_is_what_no_record_names(store: Store) -> None:
    attempt(store).commit(META)
    kept = store.list()
    attempt(store)
    other = Writer(store, Artifact("block", "b010", "f" * 64))
    other.write("data.bin", [DATA])
    store.put("elsewhere/b011-0000000000000000/x/data.bin", DATA)
    assert collect_garbage(store, ["block"]) == 2 * len(DATA)
    assert set(store.list()) == {*kept, "elsewhere/b011-0000000000000000/x/data.bin"}
    assert collect_garbage(store, ["block"]) == 0


def test_garbage_beside_a_torn_record_waits_until_that_is_told(store: Store) -> None:
    attempt(store).commit(META)
    attempt(store)
    store.put(record_key(), b"torn")
    assert collect_garbage(store, ["block"]) == 0
    with pytest.raises(CorruptArtifactError):
        read_record(store, ARTIFACT)


# --- content addresses -----------------------------------------------------------------------------------------------


def test_digest_is_the_same_for_any_order_of_keys() -> None:
    assert digest({"a": 1, "b": {"d": [1, 2], "c": None}}) == digest({"b": {"c": None, "d": [1, 2]}, "a": 1})


def test_digest_is_sha256_of_the_canonical_text() -> None:
    """Run directories outlive this code: another canonical form would redo every unit of all of them."""
    text = rb'{"a":"\u00fc","b":[1,0.5,null]}'
    assert digest({"b": [1, 0.5, None], "a": "ü"}) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1, 1.0),
        (1, True),
        (1, "1"),
        (None, "null"),
        ([], {}),
        (["a", "b"], ["ab"]),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 2}),
    ],
)
def test_different_values_have_different_digests(left: object, right: object) -> None:
    assert digest(left) != digest(right)
