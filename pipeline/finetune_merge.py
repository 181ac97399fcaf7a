"""Stage `merge` of a fine-tune: the checkpoint's own shards, tensor by tensor, with new ones for the linears that were trained.

Names, dtypes, shapes and shards stay; what was not trained is copied byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.artifacts import Artifact
from pipeline.merge import Results, shard_file, write_shard, written_before
from pipeline.model_source import ModelSource
from pipeline.packed_format import loadable, pack_linear
from pipeline.packed_source import SHAPE, PackedSource
from pipeline.skeleton import Skeleton, stored_name
from pipeline.worker import Worker

Shard = tuple[str, tuple[str, ...], tuple[int, ...]]


def packed_owners(
    skeleton: Skeleton, source: PackedSource, linears: Mapping[int, list[str]]
) -> dict[str, tuple[int, str]]:
    """The checkpoint's names of some blocks' linears, with the block and the name in it."""
    owners = {}
    for block, names in linears.items():
        for name in names:
            full = f"{skeleton.block_prefix(block)}.{name}.weight"
            owners[stored_name(full, source, skeleton.model).removesuffix(".weight")] = block, name
    return owners


def copied_shards(source: PackedSource, owners: Mapping[str, tuple[int, str]]) -> list[Shard]:
    """The new checkpoint's files: name, tensors, and the trained blocks that some of these are of."""
    places = sorted({shard for shard, _ in source.stored.values()})
    shards = []
    for index, place in enumerate(places):
        names = tuple(sorted(name for name, (shard, _) in source.stored.items() if shard == place))
        blocks = {owners[name.rpartition(".")[0]][0] for name in names if name.rpartition(".")[0] in owners}
        shards.append((shard_file(index, len(places)), names, tuple(sorted(blocks))))
    return shards


@dataclass(frozen=True)
class CopyTask:
    """One shard: `names` are the checkpoint's tensors, `results` those of the trained blocks that some belong to."""

    file: str
    names: tuple[str, ...]
    results: Mapping[int, Artifact]
    out: Artifact

    def __call__(self, worker: Worker) -> dict[str, Any]:
        if done := written_before(worker, self.file, self.out):
            return done
        source = worker.source
        assert isinstance(source, PackedSource)
        stored = {name: source.stored[name][1] for name in self.names}
        layout = {name: (entry.dtype, entry.shape) for name, entry in stored.items()}
        return write_shard(worker, self.file, self.out, layout, Copier(worker, source, self.results))


class Copier:
    """Makes a tensor of the new checkpoint by its name; keeps the result of one block and the packed tensors of one linear."""

    def __init__(self, worker: Worker, source: PackedSource, results: Mapping[int, Artifact]) -> None:
        self.leave_if_asked = worker.leave_if_asked
        self.source = source
        self.results = Results(worker.store, results)
        self.owners = packed_owners(worker.skeleton, source, {block: worker.linears(block) for block in results})
        self.packed: tuple[str, dict[str, Tensor]] | None = None

    def __call__(self, name: str) -> Tensor:
        self.leave_if_asked()
        owner = name.rpartition(".")[0]
        if owner not in self.owners:
            return self.source.read_stored(name)
        if self.packed is None or self.packed[0] != owner:
            self.packed = (owner, self._pack(owner))
        # Its bias is not trained, and its shape stays.
        trained = name in self.packed[1] and not name.endswith(SHAPE)
        return self.packed[1][name] if trained else self.source.read_stored(name)

    def _pack(self, owner: str) -> dict[str, Tensor]:
        block, name = self.owners[owner]
        weight, grid = self.results[block].weights[name], self.source.grid
        zero = None if grid.symmetric else weight.zero_point
        return pack_linear(owner, weight.codes, weight.scale, zero, grid.bits)


def copied_config(source: ModelSource) -> bytes:
    """The checkpoint's own configuration, such that transformers loads it."""
    raw = json.loads(source.side_files["config.json"])
    raw["quantization_config"] = loadable(raw["quantization_config"])
    return json.dumps(raw, indent=2, sort_keys=True).encode()
