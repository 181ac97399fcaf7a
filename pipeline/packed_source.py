"""A packed checkpoint as a model source: its linears are read dequantized, as a loader computes with them, one at a time.

Codes, scales and zero points stay at hand for who goes on from them, and so does every stored tensor as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lsi.grid import Grid, QuantizedWeight
from pipeline.errors import UserError
from pipeline.model_source import DTYPES, ModelSource, parse_model_config, read_index, read_side_files
from pipeline.packed_format import packed_layout, read_scheme, unpack_linear
from pipeline.store import Store
from pipeline.tensors import TensorEntry

Index = dict[str, tuple[str, TensorEntry]]
PACKED, SCALE, SHAPE, ZERO = ".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point"
BITS = (2, 3, 4, 6, 8)
TAKES = (
    "lsi finetune takes weight-only integer checkpoints in compressed-tensors pack-quantized form, one grid for all linears, "
    "without activation order: those of `lsi quantize`, and llm-compressor's (GPTQ with actorder none, weight or static)"
)


@dataclass
class PackedSource(ModelSource):
    """`index` has a dequantized weight in the place of each packed one, `stored` what the shards hold."""

    grid: Grid = field(kw_only=True)
    stored: Index = field(kw_only=True, repr=False)

    def is_packed(self, name: str) -> bool:
        """Whether a tensor of `index` is the weight of a packed linear."""
        return name.removesuffix(".weight") + PACKED in self.stored

    def read(self, name: str) -> Tensor:
        """One tensor as a loader has it: a packed weight dequantized, in the dtype of its scales."""
        if not self.is_packed(name):
            return self.read_stored(name)
        weight = self.quantized(name)
        return weight.dequantize().to(weight.scale.dtype)

    def read_stored(self, name: str) -> Tensor:
        """One tensor as it is stored, by its own name."""
        return self.read_at(*self.stored[name])

    def pieces(self, name: str) -> Mapping[str, Tensor]:
        """All that is stored of a tensor of `index`: a packed weight's parts, else itself."""
        if not self.is_packed(name):
            return {"": self.read_stored(name)}
        owner = name.removesuffix(".weight")
        parts = [part for part in (PACKED, SCALE, SHAPE, ZERO) if owner + part in self.stored]
        return {part.removeprefix(".weight"): self.read_stored(owner + part) for part in parts}

    def quantized(self, name: str) -> QuantizedWeight:
        """Codes, scale and zero point of a packed weight. Raises UserError if its parts are not there or do not fit."""
        owner = name.removesuffix(".weight")
        tensors = {f"{owner}.weight{part}": tensor for part, tensor in self.pieces(name).items()}
        try:
            codes, scale, zero = unpack_linear(owner, tensors, self.grid.bits, self.grid.symmetric)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{self.store.url}: {owner} cannot be unpacked: {error}") from error
        constant = torch.full(scale.shape, self.grid.middle, dtype=torch.uint8)
        return QuantizedWeight(codes, scale, constant if zero is None else zero)

    def dtype(self, wanted: str) -> torch.dtype:
        """The dtype that most elements have, packed ones and their scales left out."""
        plain = {n: place for n, place in self.stored.items() if not n.endswith((PACKED, SCALE, SHAPE, ZERO))}
        return ModelSource(self.store, self.config, self.side_files, plain).dtype(wanted)


def open_packed(store: Store, *, trust_remote_code: bool = False) -> PackedSource:
    """Open a packed checkpoint: configuration, side files and shard headers, and the shapes of linears with a scale a channel.

    Raises UserError for what is no such checkpoint.
    """
    files = read_side_files(store, code=trust_remote_code)
    document = _quantization_config(files["config.json"], store.url)
    try:
        grid = read_scheme(document)
    except ValueError as error:
        raise UserError(f"{store.url}: {error}; {TAKES}") from error
    if grid.bits not in BITS:
        raise UserError(f"{store.url}: its weights have {grid.bits} bits, and only {BITS} are trained; {TAKES}")
    plain = files | {"config.json": _without_quantization(files["config.json"])}
    config = parse_model_config(plain, store.url, trust_remote_code=trust_remote_code)
    source = PackedSource(store, config, files, {}, grid=grid, stored=read_index(store))
    source.index = _dequantized_index(source)
    return source


def _quantization_config(config: bytes, where: str) -> object:
    try:
        raw = json.loads(config)
    except ValueError as error:
        raise UserError(f"{where}/config.json: not valid JSON: {error}") from error
    found = raw.get("quantization_config") if isinstance(raw, dict) else None
    if not found:
        raise UserError(f"{where}: not a quantized checkpoint (config.json has no quantization_config); {TAKES}")
    return found


def _without_quantization(config: bytes) -> bytes:
    raw = json.loads(config)
    del raw["quantization_config"]
    return json.dumps(raw).encode()


def _dequantized_index(source: PackedSource) -> Index:
    """Names, shapes and dtypes as the full-precision model has them. Raises UserError if no linear is packed, or one wrongly."""
    stored = source.stored
    owners = [name.removesuffix(PACKED) for name in stored if name.endswith(PACKED)]
    if not owners:
        raise UserError(f"{source.store.url}: no shard holds a packed weight (NAME{PACKED}); {TAKES}")
    if ordered := [name for name in stored if name.endswith(("_g_idx", ".g_idx"))]:
        raise UserError(
            f"{source.store.url}: its groups are in activation order (it holds {ordered[0]}): quantize again with actorder static; {TAKES}"
        )
    index = {f"{owner}.weight": _dequantized_entry(source, owner) for owner in owners}
    parts = {owner + part for owner in owners for part in (PACKED, SCALE, SHAPE, ZERO)}
    return index | {name: place for name, place in stored.items() if name not in parts}


def _dequantized_entry(source: PackedSource, owner: str) -> tuple[str, TensorEntry]:
    """Where the codes are; shape and dtype are the weight's."""
    needed = [SCALE, SHAPE] + ([] if source.grid.symmetric else [ZERO])
    if missing := [owner + part for part in needed if owner + part not in source.stored]:
        raise UserError(
            f"{source.store.url}: {owner} is packed, but no shard holds {missing[0]}; get the checkpoint again"
        )
    grid = source.grid
    shard, packed = source.stored[owner + PACKED]
    scale = source.stored[owner + SCALE][1]
    if scale.dtype not in DTYPES.values():
        raise UserError(f"{source.store.url}: the scales of {owner} are {scale.dtype}, not of {', '.join(DTYPES)}")
    # A row's codes fill whole words, so that the packed width does not tell it exactly.
    size = grid.group_size
    width = int(source.read_stored(owner + SHAPE)[-1]) if size is None else scale.shape[-1] * size
    layout = packed_layout(owner, packed.shape[0], width, grid.bits, size, grid.symmetric, scale.dtype)
    for name, (dtype, shape) in layout.items():
        found = source.stored[name][1]
        # Any integers tell a shape, and they are copied.
        if found.shape != shape or (found.dtype is not dtype and not name.endswith(SHAPE)):
            raise UserError(
                f"{source.store.url}: {name} is {found.dtype} {list(found.shape)}, and a linear of this grid ({grid.bits} bits) has "
                f"{dtype} {list(shape)}; {TAKES}"
            )
    return shard, TensorEntry(scale.dtype, (packed.shape[0], width), packed.start, packed.end)
