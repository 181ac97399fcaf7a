"""Our safetensors files against the package that defines the format, and what is not one refused."""

import json
import struct
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from pipeline.store import Store, open_store
from pipeline.tensors import (
    TensorEntry,
    TensorFileError,
    deserialize,
    file_order,
    gather,
    layout_bytes,
    parse_header,
    read_header,
    read_pieces,
    read_tensor,
    serialize,
    tensor_bytes,
    write_lazily,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.fixture
def store() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}")


def samples() -> dict[str, Tensor]:
    """Every dtype, with shapes that leave later tensors unaligned if they are written in order of their names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"a.{str(d)[6:]}": torch.randint(0, 2, (3, 5), generator=generator).to(d) for d in FLOATS + INTEGERS}
    tensors |= {f"b.{str(d)[6:]}": torch.randn(7, generator=generator).to(d) for d in FLOATS}
    return tensors | {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
        "ü n": torch.arange(3),
        "z": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape), name
        assert bytes(tensor_bytes(tensor)) == bytes(tensor_bytes(right[name])), name


def file_bytes(tensors: dict[str, Tensor]) -> bytes:
    return b"".join(serialize(tensors))


def header_of(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def raw_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_parts_of_tensors_are_kept_alone_however_the_file_comes_in_pieces(store: Store) -> None:
    tensors = {"cut": torch.arange(10, dtype=torch.int16).view(2, 5), "whole": torch.arange(3.0)}
    store.put("file", file_bytes(tensors))

    def middle(name: str, entry: TensorEntry) -> TensorEntry:
        return TensorEntry(entry.dtype, (4,), entry.start + 6, entry.start + 14) if name == "cut" else entry

    size = store.size("file")
    for piece in (1, 5, size):
        found = gather(read_pieces(store, "file", size, piece), size, middle)
        assert_same(found, {"cut": torch.arange(3, 7, dtype=torch.int16), "whole": tensors["whole"]})


# --- the format ------------------------------------------------------------------------------------------------------


def test_the_package_reads_our_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(file_bytes(samples()))
    assert_same(load_file(tmp_path / "x"), samples())


def test_we_read_the_package_s_file(tmp_path: Path) -> None:
    save_file(samples(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert_same(deserialize((tmp_path / "x.safetensors").read_bytes()), samples())
    store = open_store(str(tmp_path))
    entries = read_header(store, "x.safetensors")
    assert_same({name: read_tensor(store, "x.safetensors", entry) for name, entry in entries.items()}, samples())


def test_a_file_of_no_tensors() -> None:
    assert deserialize(file_bytes({})) == {}
    assert load(file_bytes({})) == {}


def test_every_tensor_is_aligned() -> None:
    data = file_bytes(samples())
    (length,) = struct.unpack("<Q", data[:8])
    entries = parse_header(data[8 : 8 + length])
    assert len(entries) == len(samples())
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in entries.values())


def test_equal_tensors_give_equal_bytes_in_any_order() -> None:
    tensors = samples()
    assert file_bytes(dict(reversed(tensors.items()))) == file_bytes(tensors)


def test_views_are_written_as_what_they_show() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {"transposed": base.T, "column": base[:, 2], "expanded": torch.ones(1, 3).expand(2, 3)}
    assert_same(deserialize(file_bytes(views)), {name: view.contiguous() for name, view in views.items()})


def test_a_dimension_of_size_one_may_have_any_stride() -> None:
    """As a word of packed zero points has, and such a tensor counts as contiguous."""
    tensor = torch.arange(8, dtype=torch.int32).as_strided((1, 1), (1, 8), 3)
    assert tensor.is_contiguous()
    assert bytes(tensor_bytes(tensor)) == struct.pack("<i", 3)


def test_bytes_of_a_contiguous_tensor_are_not_copied() -> None:
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    view = tensor_bytes(tensor)
    tensor[0] = 1
    assert bytes(view[:2]) == b"\x80\x3f"


def test_metadata_is_there_and_no_tensor() -> None:
    layout = {"a": (torch.float32, (2,))}
    data = b"".join(write_lazily(layout, lambda name: torch.ones(2), {"format": "pt"}))
    assert header_of(data)["__metadata__"] == {"format": "pt"}
    assert deserialize(data).keys() == {"a"}


def test_layout_bytes_is_the_file_without_its_header() -> None:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in samples().items()}
    pieces = list(write_lazily(layout, samples().__getitem__))
    assert layout_bytes(layout) == sum(len(piece) for piece in pieces[1:])


# --- lazy writing ----------------------------------------------------------------------------------------------------


def test_tensors_are_asked_for_one_at_a_time_in_file_order() -> None:
    layout = {"narrow": (torch.int8, (3,)), "b": (torch.float32, (2,)), "a": (torch.float32, (2,))}
    asked: list[str] = []

    def produce(name: str) -> Tensor:
        asked.append(name)
        return torch.zeros(layout[name][1], dtype=layout[name][0])

    for number, _ in enumerate(write_lazily(layout, produce)):
        assert len(asked) == number
    assert asked == file_order(layout) == ["a", "b", "narrow"]


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float16), torch.zeros(6)], ids=["shape", "dtype", "flat"]
)
def test_write_lazily_refuses_what_was_not_promised(wrong: Tensor) -> None:
    with pytest.raises(TensorFileError, match=r"^w is .* expected torch.float32 \[2, 3\]"):
        list(write_lazily({"w": (torch.float32, (2, 3))}, lambda name: wrong))


# --- damage ----------------------------------------------------------------------------------------------------------

SMALL = file_bytes({"a": torch.arange(6, dtype=torch.int16), "b": torch.ones(2, 2)})


@pytest.mark.parametrize("length", range(len(SMALL)))
def test_every_truncation_is_refused(store: Store, length: int) -> None:
    store.put("x", SMALL[:length])
    with pytest.raises(TensorFileError):
        deserialize(SMALL[:length])
    with pytest.raises(TensorFileError, match=store.url):
        read_header(store, "x")


def test_a_file_that_is_too_long_is_refused(store: Store) -> None:
    store.put("x", SMALL + b"\0")
    with pytest.raises(TensorFileError, match="truncated or damaged"):
        read_header(store, "x")
    with pytest.raises(TensorFileError, match="truncated or damaged"):
        deserialize(SMALL + b"\0")


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


BROKEN_HEADERS = {
    "not JSON": b"<html>no such model</html>",
    "not UTF-8": b"\xff\xfe{}",
    "list": [],
    "number": 3,
    "deep": b"[" * 100_000,
    "entry is text": {"w": "F32"},
    "no shape": {"w": {"dtype": "F32", "data_offsets": [0, 8]}},
    "unknown dtype": entry(dtype="F7"),
    "dtype is a list": entry(dtype=["F32"]),
    "one offset": entry(offsets=[8]),
    "offsets are text": entry(offsets=["0", "8"]),
    "negative start": entry(offsets=[-8, 0]),
    "shape is not the bytes": entry(shape=[3]),
    "negative shape": entry(shape=[-1, -2]),
    "fractional shape": entry(shape=[2.0]),
    "end before start": entry(offsets=[8, 0]),
}


@pytest.mark.parametrize("header", BROKEN_HEADERS.values(), ids=BROKEN_HEADERS.keys())
def test_broken_headers_are_refused(store: Store, header: Any) -> None:
    data = raw_file(header, bytes(8))
    store.put("x", data)
    with pytest.raises(TensorFileError):
        deserialize(data)
    with pytest.raises(TensorFileError, match=store.url):
        read_header(store, "x")


@pytest.mark.parametrize("claimed", [len(SMALL) - 7, 200 << 20, 2**64 - 1])
def test_header_longer_than_the_file_is_not_read(store: Store, claimed: int) -> None:
    data = struct.pack("<Q", claimed) + SMALL[8:]
    store.put("x", data)
    with pytest.raises(TensorFileError, match=f"the header claims {claimed} bytes, the file has {len(SMALL)}"):
        read_header(store, "x")
    with pytest.raises(TensorFileError, match=f"the header claims {claimed} bytes"):
        deserialize(data)


@given(st.binary(max_size=64))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(TensorFileError):
        deserialize(data)


# --- ranged reads ----------------------------------------------------------------------------------------------------


class CountingStore(Store):
    """Counts the bytes that leave it."""

    bytes_read = 0

    def get(self, key: str) -> bytes:
        raise AssertionError(f"{key} was read whole")

    def read_range(self, key: str, start: int, end: int) -> bytes:
        self.bytes_read += end - start
        return super().read_range(key, start, end)


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.s3)])
def counting(request: pytest.FixtureRequest) -> CountingStore:
    url = request.getfixturevalue("s3_url") if request.param == "s3" else f"memory://{uuid.uuid4().hex}"
    return CountingStore(url)


def test_only_the_header_and_the_tensor_are_read(counting: CountingStore) -> None:
    tensors = {"large": torch.ones(1000), "small": torch.arange(3, dtype=torch.int16), "empty": torch.empty(0)}
    counting.put("x", list(serialize(tensors)))
    entries = read_header(counting, "x")
    assert counting.bytes_read < 400
    before = counting.bytes_read
    assert torch.equal(read_tensor(counting, "x", entries["small"]), tensors["small"])
    assert counting.bytes_read - before == 6
    assert read_tensor(counting, "x", entries["empty"]).shape == (0,)
    read_tensor(counting, "x", entries["small"]).zero_()
    assert torch.equal(read_tensor(counting, "x", entries["small"]), tensors["small"])


def test_object_that_shrank_is_noticed(store: Store) -> None:
    store.put("x", SMALL)
    entries = read_header(store, "x")
    store.put("x", SMALL[:-1])
    with pytest.raises(EOFError, match="the object ends at"):
        read_tensor(store, "x", max(entries.values(), key=lambda entry: entry.end))
