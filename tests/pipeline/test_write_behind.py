"""Files written behind their maker: the same bytes, one on its way at most, and no error that a commit could miss."""

import threading
from pathlib import Path

import pytest
import torch

from pipeline.artifacts import Artifact, Writer, read_tensors
from pipeline.store import Data, Store
from pipeline.write_behind import behind

ARTIFACT = Artifact("stream", "s", "0" * 64)


class Gated(Store):
    """A store whose puts wait for leave, and fail where they are told to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.leave, self.fails = threading.Semaphore(0), ""
        self.under_way, self.most = 0, 0

    def put(self, key: str, data: Data) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        assert self.leave.acquire(timeout=60)
        self.under_way -= 1
        if self.fails and key.endswith(self.fails):
            raise OSError("no room")
        super().put(key, data)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"hidden": torch.full((2, 3), value)}


def test_what_is_written_behind_is_what_is_written(tmp_path: Path) -> None:
    plain, other = (Writer(Store(str(tmp_path / name)), ARTIFACT) for name in ("plain", "behind"))
    with behind(other) as files:
        for index in range(5):
            plain.write_tensors(f"f{index}", tensors(index))
            files.write_tensors(f"f{index}", tensors(index))
    assert [file[:2] for file in other.files.values()] == [file[:2] for file in plain.files.values()]
    other.commit({})
    assert torch.equal(read_tensors(other.store, ARTIFACT, "f3")["hidden"], tensors(3)["hidden"])


def test_the_maker_goes_on_while_one_file_is_on_its_way(tmp_path: Path) -> None:
    store = Gated(str(tmp_path))
    with behind(Writer(store, ARTIFACT)) as files:
        files.write_tensors("a", tensors(1))  # returns though nothing may be written yet
        store.leave.release(2)
        files.write_tensors("b", tensors(2))
    assert store.most == 1
    assert len(store.list()) == 2


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_an_error_comes_up_before_the_commit(tmp_path: Path, name: str) -> None:
    store = Gated(str(tmp_path))
    store.fails = name
    store.leave.release(3)
    writer = Writer(store, ARTIFACT)
    with pytest.raises(OSError, match="no room"), behind(writer) as files:  # noqa: PT012  (whichever comes next)
        for file in "abc":
            files.write_tensors(file, tensors(1))
    assert not store.list(), "what there was of the attempt went"


def test_nothing_is_being_written_after_an_error_of_the_maker(tmp_path: Path) -> None:
    store = Gated(str(tmp_path))
    with pytest.raises(ZeroDivisionError), behind(Writer(store, ARTIFACT)) as files:  # noqa: PT012
        files.write_tensors("a", tensors(1))
        threading.Timer(0.05, store.leave.release).start()
        raise ZeroDivisionError
    assert store.under_way == 0
    assert len(store.list()) == 1
