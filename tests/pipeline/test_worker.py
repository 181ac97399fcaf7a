"""An actor's memory: chunks kept up to a limit, the next ones read ahead."""

from concurrent.futures import wait
from pathlib import Path

import pytest
import torch

from cluster.units import UnitError
from pipeline.artifacts import RECORD, Artifact, CorruptArtifactError, Writer, discard
from pipeline.capture import CHUNK_FILE, write_chunk
from pipeline.store import Store, open_store
from pipeline.worker import Chunk, ChunkCache

BYTES = 4 * 2 * 3 * 4


class Counting(Store):
    """A store that remembers which objects were read."""

    def get(self, key: str) -> bytes:
        self.__dict__.setdefault("read", []).append(key)
        return super().get(key)


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    return Counting(str(tmp_path))


def make_chunks(store: Store, count: int) -> list[Chunk]:
    chunks = []
    for index in range(count):
        artifact = Artifact("hidden", f"c{index}", f"{index:064x}"[::-1])
        writer = Writer(store, artifact)
        write_chunk(writer, CHUNK_FILE, torch.full((4, 2, 3), float(index)))
        writer.commit({})
        chunks.append(Chunk(artifact, CHUNK_FILE))
    return chunks


def data_reads(store: Counting) -> int:
    return sum(key.endswith(CHUNK_FILE) for key in store.__dict__["read"])


def test_a_chunk_that_fits_is_read_once(store: Counting) -> None:
    chunks = make_chunks(store, 3)
    cache = ChunkCache(store, 3 * BYTES)
    for _ in range(2):
        assert [cache.get(chunk).mean().item() for chunk in chunks] == [0, 1, 2]
    assert data_reads(store) == 3


def test_no_more_than_the_limit_is_kept_and_part_of_a_larger_set_still_helps(store: Counting) -> None:
    chunks = make_chunks(store, 4)
    cache = ChunkCache(store, 2 * BYTES)
    for _ in range(3):
        for chunk in chunks:
            cache.get(chunk)
            assert sum(t.nbytes for t in cache.kept.values()) <= 2 * BYTES
    assert data_reads(store) < 12


def test_nothing_is_kept_without_memory(store: Counting) -> None:
    (chunk,) = make_chunks(store, 1)
    cache = ChunkCache(store, 0)
    cache.get(chunk)
    assert not cache.kept


def test_prefetched_chunks_are_read_once_and_equal(store: Counting) -> None:
    chunks = make_chunks(store, 2)
    cache = ChunkCache(store, 2 * BYTES)
    cache.prefetch(chunks)
    cache.prefetch(chunks)
    assert [cache.get(chunk).mean().item() for chunk in chunks] == [0, 1]
    assert data_reads(store) == 2
    assert not cache.coming


def test_a_damaged_chunk_is_reported_when_it_is_asked_for(store: Counting) -> None:
    (chunk,) = make_chunks(store, 1)
    key = next(key for key in store.list(chunk.artifact.path) if key.endswith(CHUNK_FILE))
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(key, bytes(data))
    cache = ChunkCache(store, BYTES)
    cache.prefetch([chunk])
    with pytest.raises(CorruptArtifactError):
        cache.get(chunk)


def test_other_artifacts_chunks_are_forgotten(store: Counting) -> None:
    first, second = make_chunks(store, 2)
    cache = ChunkCache(store, 2 * BYTES)
    cache.get(first)
    cache.get(second)
    cache.drop_except({second.artifact.path})
    assert list(cache.kept) == [second]


def test_a_unit_that_meets_damage_discards_it_and_asks_for_a_new_plan(tmp_path: Path) -> None:
    from pipeline.worker import handle_unit

    store = open_store(str(tmp_path))
    (chunk,) = make_chunks(store, 1)

    def unit(worker: object) -> dict[str, object]:
        raise CorruptArtifactError(chunk.artifact, "flipped")

    with pytest.raises(UnitError) as caught:
        handle_unit(unit, FakeWorker(store))  # type: ignore[arg-type]
    assert caught.value.kind == "replan"
    assert not store.exists(f"{chunk.artifact.path}/{RECORD}")


class FakeWorker:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.name = "worker"


def test_a_read_that_failed_before_the_chunk_was_made_anew_is_asked_again(store: Counting) -> None:
    (chunk,) = make_chunks(store, 1)
    discard(store, chunk.artifact)
    cache = ChunkCache(store, BYTES)
    cache.prefetch([chunk])
    wait(cache.coming.values())
    make_chunks(store, 1)
    assert cache.get(chunk).mean().item() == 0
