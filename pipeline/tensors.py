"""safetensors without a second copy: written as a header and memory views, read whole, by ranges or in pieces.

The safetensors package reads paths or bytes; object stores want neither, so the format's frame (eight bytes of length, a JSON
header, raw little-endian data) is handled here. Everything else about it is in the package's specification.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lsi.engine import Later
from pipeline.store import Store

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MAX_HEADER = 100 << 20


class TensorFileError(ValueError):
    """The bytes are not a whole safetensors file."""


class UnknownDtypeError(TensorFileError):
    """The file is whole, and holds numbers of a kind that is not read."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: byte positions count from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor, not copied."""
    whole = tensor.detach().contiguous()
    # A dimension of size one may have any stride, and a view as bytes asks for one.
    flat = whole.as_strided((whole.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def file_order(layout: Layout) -> list[str]:
    """The order of tensors in a file: widest dtype first, which keeps every tensor aligned, then by name."""
    return sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout, without the header."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def write_lazily(
    layout: Layout, produce: Callable[[str], Tensor], metadata: dict[str, str] | None = None
) -> Iterator[memoryview]:
    """A safetensors file in pieces: header, then one tensor after another, asked for when its turn comes.

    Raises TensorFileError if a produced tensor is not what the layout promised.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name in file_order(layout):
        dtype, shape = layout[name]
        end = offset + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for name in file_order(layout):
        tensor = produce(name)
        if (tensor.dtype, tuple(tensor.shape)) != layout[name]:
            raise TensorFileError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {layout[name][0]} {list(layout[name][1])}"
            )
        yield tensor_bytes(tensor)


def serialize(tensors: Mapping[str, Tensor | Later]) -> Iterator[memoryview]:
    """A safetensors file of tensors, in pieces, those that are not in memory being made one by one. Equal tensors give equal
    bytes."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def produce(name: str) -> Tensor:
        tensor = tensors[name]
        return tensor.make() if isinstance(tensor, Later) else tensor

    return write_lazily(layout, produce)


def parse_header(text: bytes) -> dict[str, TensorEntry]:
    """Entries from the JSON header (without the eight length bytes before it)."""
    try:
        raw = json.loads(text)
        return {name: _parse_entry(name, e, 8 + len(text)) for name, e in raw.items() if name != "__metadata__"}
    except UnknownDtypeError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TensorFileError(f"unreadable safetensors header: {type(error).__name__}: {error}") from error


def _parse_entry(name: str, raw: dict[str, Any], base: int) -> TensorEntry:
    if raw["dtype"] not in _DTYPES:
        raise UnknownDtypeError(f"{name} is {raw['dtype']}, and only {', '.join(_DTYPES)} are read")
    dtype, shape, (start, end) = _DTYPES[raw["dtype"]], tuple(raw["shape"]), raw["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start)) or end - start != dtype.itemsize * math.prod(
        shape
    ):
        raise ValueError(f"{name}: bytes {start} to {end} are not {raw['dtype']} {raw['shape']}")
    return TensorEntry(dtype, shape, base + start, base + end)


def _header_length(first: bytes, size: int, where: str) -> int:
    """Length of the JSON header, from a file's first eight bytes and its size."""
    if size < 8:
        raise TensorFileError(f"{where}: {size} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", first)
    if length > min(size - 8, _MAX_HEADER):
        raise TensorFileError(
            f"{where}: the header claims {length} bytes, the file has {size}: it is truncated or not safetensors"
        )
    return int(length)


def _check_end(entries: Mapping[str, TensorEntry], length: int, size: int, where: str) -> None:
    promised = max((entry.end for entry in entries.values()), default=8 + length)
    if promised != size:
        raise TensorFileError(
            f"{where}: the header describes {promised} bytes, the file has {size}: it is truncated or damaged"
        )


def read_header(store: Store, key: str) -> dict[str, TensorEntry]:
    """The entries of a file in two ranged reads; the file's size must be what the header promises."""
    size, where = store.size(key), store.describe(key)
    length = _header_length(store.read_range(key, 0, min(8, size)), size, where)
    try:
        entries = parse_header(store.read_range(key, 8, 8 + length))
    except TensorFileError as error:
        raise type(error)(f"{where}: {error}") from error
    _check_end(entries, length, size, where)
    return entries


def read_tensor(store: Store, key: str, entry: TensorEntry) -> Tensor:
    """One tensor by a ranged read."""
    return _from_buffer(store.read_range(key, entry.start, entry.end), entry)


def deserialize(data: bytes) -> dict[str, Tensor]:
    """All tensors of a file that is in memory."""
    length = _header_length(data[:8], len(data), "tensors")
    entries = parse_header(data[8 : 8 + length])
    _check_end(entries, length, len(data), "tensors")
    view = memoryview(data)
    return {name: _from_buffer(view[e.start : e.end], e) for name, e in entries.items()}


def read_pieces(store: Store, key: str, size: int, piece: int) -> Iterator[tuple[int, bytes]]:
    """An object of a known size in ranged reads: (start, bytes); the first one holds the whole header."""
    first = store.read_range(key, 0, min(size, max(piece, 8)))
    end = 8 + _header_length(first[:8], size, store.describe(key))
    if end > len(first):
        first += store.read_range(key, len(first), end)
    yield 0, first
    for start in range(len(first), size, piece):
        yield start, store.read_range(key, start, min(start + piece, size))


# What of a tensor is wanted, as an entry within its own.
Part = Callable[[str, TensorEntry], TensorEntry]


def all_of(name: str, entry: TensorEntry) -> TensorEntry:
    """The tensor as it is."""
    return entry


def gather(pieces: Iterator[tuple[int, bytes]], size: int, part: Part = all_of) -> dict[str, Tensor]:
    """The tensors of a file, or parts of them, from its pieces, in memory once. Raises TensorFileError; checks no content."""
    first = next(pieces)[1]
    length = _header_length(first[:8], size, "tensors")
    entries = parse_header(first[8 : 8 + length])
    _check_end(entries, length, size, "tensors")
    if sum(entry.end - entry.start for entry in entries.values()) > size:
        raise TensorFileError("its tensors overlap")
    entries = {name: part(name, entry) for name, entry in entries.items()}
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
    for start, data in chain([(0, first)], pieces):
        for name, entry in entries.items():
            low, high = max(entry.start, start), min(entry.end, start + len(data))
            if low < high:
                into = tensor_bytes(tensors[name])
                into[low - entry.start : high - entry.start] = memoryview(data)[low - start : high - start]
    return tensors


def _from_buffer(data: bytes | memoryview, entry: TensorEntry) -> Tensor:
    # Into memory of torch's own: some kernels sum in another order where a buffer is aligned otherwise.
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    if len(data):
        tensor_bytes(tensor)[:] = data
    return tensor
