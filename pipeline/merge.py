"""Stage `merge`: the packed checkpoint, shard by shard, made visible all at once.

Shards are written where they will stay. `config.json` is written last and removed first: a loader finds a whole checkpoint
or none, on object stores too, where nothing can be renamed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lsi.block import linear_names
from lsi.grid import Grid
from pipeline.artifacts import Artifact, Record, Writer, put_hashed, read_record
from pipeline.block_state import BlockResult, read_result
from pipeline.config import RunConfig
from pipeline.config_sections import SchemeConfig
from pipeline.mixture import has_mixture, original_names
from pipeline.model_source import ModelSource
from pipeline.packed_format import pack_linear, packed_layout, quantization_config, refusal
from pipeline.skeleton import Skeleton, stored_name, tensor_names
from pipeline.store import DamagedObjectError, Store
from pipeline.tensors import Layout, layout_bytes, write_lazily
from pipeline.worker import Worker

CONFIG_FILE = "config.json"
CHECKPOINT_MANIFEST = "lsi_manifest.json"
INDEX_FILE = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
Sizes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def quantized_linears(skeleton: Skeleton, skip: list[str]) -> dict[str, int]:
    """Full name of every quantized linear, with its block."""
    return {
        f"{skeleton.block_prefix(index)}.{name}": index
        for index, block in enumerate(skeleton.blocks)
        for name in linear_names(block, skeleton.block_prefix(index), skip)
    }


def unpublished(config: RunConfig, skeleton: Skeleton) -> str | None:
    """Why a run publishes no checkpoint and ends with its evaluation; None if it publishes one."""
    scheme = config.scheme
    if reason := refusal(scheme.bits, scheme.activation_grid, operands=scheme.quantize_qkv):
        return reason
    if scheme.activation_bits and has_mixture(skeleton.model):
        # It fuses experts, quantized or not, from tensors of the packed form alone, and into tensors that are no linears,
        # whose inputs the library does not quantize.
        return "transformers loads no mixture of experts with quantized activations"
    return None


def checkpoint_layout(
    skeleton: Skeleton, grid: Grid, skip: list[str], dtype: torch.dtype, *, integers: bool = False
) -> list[tuple[str, Layout]]:
    """What the checkpoint holds, in the model's order: (name of a parameter, its tensors' names, dtypes and shapes).

    integers: codes in bytes of their own, as where activations are quantized too (`packed_format.pack_linear`).
    """
    linears, tensors = quantized_linears(skeleton, skip), tensor_names(skeleton.model)
    saved = original_names(list(tensors), skeleton.model)
    layout: list[tuple[str, Layout]] = []
    for name, tensor in tensors.items():
        if name.removesuffix(".weight") in linears:
            out, width = tensor.shape
            owner = saved[name].removesuffix(".weight")
            sizes: Layout = packed_layout(
                owner, out, width, grid.bits, grid.group_size, grid.symmetric, dtype, integers=integers
            )
        else:
            sizes = {saved[name]: (dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))}
        layout.append((name, sizes))
    return layout


def scheme_layout(skeleton: Skeleton, scheme: SchemeConfig, dtype: torch.dtype) -> list[tuple[str, Layout]]:
    """`checkpoint_layout` of a configured scheme."""
    return checkpoint_layout(skeleton, scheme.grid, scheme.skip, dtype, integers=scheme.activation_bits is not None)


def plan_shards(layout: list[tuple[str, Layout]], limit: int) -> list[list[str]]:
    """Parameters in shards of at most `limit` bytes, in order; one that is larger has a shard of its own."""
    shards: list[list[str]] = []
    used = 0
    for name, sizes in layout:
        size = layout_bytes(sizes)
        if not shards or used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def shard_file(index: int, count: int) -> str:
    """The file names that loaders expect."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def shards_with_blocks(
    shards: list[list[str]], skeleton: Skeleton
) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """The checkpoint's files: name, parameters, blocks whose results they hold (norms may be folded into)."""
    files = []
    for index, names in enumerate(shards):
        places = (skeleton.place(name) for name in names)
        blocks = {place[0] for place in places if place is not None}
        files.append((shard_file(index, len(shards)), tuple(names), tuple(sorted(blocks))))
    return files


def write_shard(
    worker: Worker, file: str, out: Artifact, layout: Layout, make: Callable[[str], Tensor]
) -> dict[str, Any]:
    """Write a shard whose tensors are made one by one, and commit its record."""
    size, checksum = put_hashed(worker.checkpoint, file, partial(write_lazily, layout, make, {"format": "pt"}))
    meta = {"file": file, "size": size, "sha256": checksum, "tensors": sorted(layout), "stamp": worker.stamp()}
    Writer(worker.store, out).commit(meta)
    return {"file": file, "size": size}


def written_before(worker: Worker, file: str, out: Artifact) -> dict[str, Any] | None:
    """What a unit returns whose shard is there already, done by another while this worker slept: shards have one place, so
    writing would tear what is published."""
    worker.release()
    worker.store.check_fence()
    earlier = read_record(worker.store, out)
    if earlier is not None and shard_intact(worker.checkpoint, earlier):
        return {"file": file, "size": earlier.meta["size"]}
    return None


class Results:
    """Blocks' results by their index, the last one kept."""

    def __init__(self, store: Store, artifacts: Mapping[int, Artifact]) -> None:
        self.store = store
        self.artifacts = artifacts
        self.kept: tuple[int, BlockResult] | None = None

    def __getitem__(self, index: int) -> BlockResult:
        if self.kept is None or self.kept[0] != index:
            self.kept = None
            self.kept = (index, read_result(self.store, self.artifacts[index]))
        return self.kept[1]


@dataclass(frozen=True)
class MergeTask:
    """One shard: `names` are parameters of the model, `quantized` the results of the blocks that they come from."""

    file: str
    names: tuple[str, ...]
    quantized: Mapping[int, Artifact]
    out: Artifact

    def __call__(self, worker: Worker) -> dict[str, Any]:
        if done := written_before(worker, self.file, self.out):
            return done
        layouts = dict(scheme_layout(worker.skeleton, worker.config.scheme, worker.context.dtype))
        layout = {key: size for name in self.names for key, size in layouts[name].items()}
        return write_shard(worker, self.file, self.out, layout, Packer(worker, self.quantized))


class Packer:
    """Makes a checkpoint tensor by its name; keeps the result of one block and the packed tensors of one linear."""

    def __init__(self, worker: Worker, quantized: Mapping[int, Artifact]) -> None:
        self.worker = worker
        self.results = Results(worker.store, quantized)
        self.linears = quantized_linears(worker.skeleton, worker.config.scheme.skip)
        saved = original_names(list(tensor_names(worker.skeleton.model)), worker.skeleton.model)
        self.names = {theirs: ours for ours, theirs in saved.items()}
        self.packed: tuple[str, dict[str, Tensor]] | None = None

    def __call__(self, name: str) -> Tensor:
        self.worker.leave_if_asked()
        if name in self.names and self.names[name].removesuffix(".weight") not in self.linears:
            return self._unquantized(self.names[name])
        owner = name.rpartition(".")[0]
        if self.packed is None or self.packed[0] != owner:
            self.packed = (owner, self._pack(owner))
        return self.packed[1][name]

    def _unquantized(self, name: str) -> Tensor:
        worker = self.worker
        place = worker.skeleton.place(name)
        if place is not None and place[1] in (folded := self.results[place[0]].folded):
            return folded[place[1]]
        tensor = worker.source.read(stored_name(name, worker.source, worker.skeleton.model))
        return tensor.to(worker.context.dtype) if tensor.is_floating_point() else tensor

    def _pack(self, owner: str) -> dict[str, Tensor]:
        linear = self.names[f"{owner}.weight"].removesuffix(".weight")
        index = self.linears[linear]
        weight = self.results[index].weights[linear.removeprefix(self.worker.skeleton.block_prefix(index) + ".")]
        scheme = self.worker.config.scheme
        zero = None if scheme.symmetric else weight.zero_point
        integers = scheme.activation_bits is not None
        return pack_linear(owner, weight.codes, weight.scale, zero, scheme.bits, integers=integers)


def shard_intact(checkpoint: Store, record: Record) -> bool:
    """Whether a committed shard is still what was written, by reading it all."""
    file, size, checksum = str(record.meta.get("file")), record.meta.get("size"), record.meta.get("sha256")
    if not isinstance(size, int) or not SHARD_NAME.fullmatch(file):
        return False
    try:
        if checkpoint.size(file) != size:
            return False
    except FileNotFoundError:
        return False
    hasher = hashlib.sha256()
    for start in range(0, size, 1 << 26):
        hasher.update(checkpoint.read_range(file, start, min(start + (1 << 26), size)))
    return hasher.hexdigest() == checksum


def withdraw(checkpoint: Store) -> None:
    """Make an older checkpoint invisible before any of it is replaced."""
    checkpoint.check_fence()
    checkpoint.delete(CONFIG_FILE)


def published_config(
    source: ModelSource, config: RunConfig, linears: Mapping[str, int], skeleton: Skeleton, dtype: torch.dtype
) -> bytes:
    """The model's own configuration with the quantization's description."""
    raw = json.loads(source.side_files["config.json"])
    # Routers are linears to engines that write the model down anew.
    matrices = {name for name, t in tensor_names(skeleton.model).items() if t.ndim == 2 and skeleton.place(name)}
    matrices |= {f"{n}.weight" for n, module in skeleton.model.named_modules() if isinstance(module, torch.nn.Linear)}
    others = [name for name in matrices if name.removesuffix(".weight") not in linears]
    others = sorted(name.removesuffix(".weight") for name in original_names(others, skeleton.model).values())
    scheme = config.scheme
    raw["quantization_config"] = quantization_config(
        scheme.bits, scheme.group_size, scheme.symmetric, others, scheme.activation_bits
    )
    raw.pop("torch_dtype", None)
    raw["dtype"] = str(dtype).removeprefix("torch.")
    return json.dumps(raw, indent=2, sort_keys=True).encode()


def publish(
    checkpoint: Store, source: ModelSource, shards: list[Record], config_bytes: bytes, extra: Mapping[str, bytes]
) -> None:
    """Write everything beside the shards, `config.json` last. A checkpoint that is there in full is left alone.

    Shards and indices of an earlier one go first: loaders prefer a single file to an index.
    """
    files = {name: data for name, data in source.side_files.items() if name != CONFIG_FILE} | dict(extra)
    if len(shards) > 1:
        weight_map = {tensor: record.meta["file"] for record in shards for tensor in record.meta["tensors"]}
        total = sum(record.meta["size"] for record in shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        files[INDEX_FILE] = json.dumps(index, indent=1).encode()
    files[CONFIG_FILE] = config_bytes
    if all(_holds(checkpoint, name, data) for name, data in files.items()):
        return
    withdraw(checkpoint)
    wanted = {record.meta["file"] for record in shards} | set(files)
    for key in checkpoint.list():
        if (SHARD_NAME.fullmatch(key) or key == INDEX_FILE) and key not in wanted:
            checkpoint.delete(key)
    for name, data in files.items():
        checkpoint.check_fence()
        checkpoint.put(name, data)


def _holds(store: Store, key: str, data: bytes) -> bool:
    try:
        return store.get(key) == data
    except (FileNotFoundError, DamagedObjectError):
        return False
