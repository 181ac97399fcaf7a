"""What a run will take, before any work: from the configuration and the model's headers, without its weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from lsi.block import get_linear, linear_names
from pipeline.artifacts import Artifact
from pipeline.block_state import steps_per_epoch
from pipeline.config import RunConfig
from pipeline.graph import Inputs, build_graph
from pipeline.merge import checkpoint_layout, plan_shards, shard_file
from pipeline.model_source import DTYPES, locate, open_model
from pipeline.prepare import check_scheme
from pipeline.skeleton import Skeleton, make_skeleton
from pipeline.tensors import layout_bytes


def open_skeleton(config: RunConfig) -> tuple[Skeleton, torch.dtype]:
    """The model without weights, and the result's dtype."""
    if config.model.source.endswith(".gguf"):
        from pipeline.gguf_import import local_copy, read_config

        with tempfile.TemporaryDirectory() as scratch:
            model_config = read_config(local_copy(config.model.source, config.storage.options, Path(scratch)))
        return make_skeleton(model_config), DTYPES.get(config.model.dtype, torch.bfloat16)
    trust = config.model.trust_remote_code
    source = open_model(locate(config.model, config.storage.options), trust_remote_code=trust)
    return make_skeleton(source.config, trust_remote_code=trust), source.dtype(config.model.dtype)


def trained_elements(config: RunConfig, skeleton: Skeleton) -> int:
    """Trained numbers in one block."""
    grid = config.scheme.grid
    block = skeleton.blocks[0]
    total = 0
    for name in linear_names(block, skeleton.block_prefix(0), config.scheme.skip):
        out, width = get_linear(block, name).weight.shape
        total += config.method.increments.entries(out, width)
        total += out * width if config.method.rounding == "learned" else 0
        total += 2 * out * grid.groups(width) if config.method.clipping != "none" else 0
    return total


def estimate(config: RunConfig) -> dict[str, Any]:
    """Units by stage, optimizer steps, bytes. Raises UserError for a configuration that cannot run."""
    skeleton, dtype = open_skeleton(config)
    check_scheme(config, skeleton)
    grid = config.scheme.grid
    layout = checkpoint_layout(skeleton, grid, config.scheme.skip, dtype)
    shards = plan_shards(layout, config.outputs.max_shard_mib << 20)
    blocks = len(skeleton)
    placeholder = Artifact("tokens", "plan", "")
    graph = build_graph(
        Inputs(
            config=config,
            blocks=blocks,
            tokens=placeholder,
            texts=dict.fromkeys(config.evaluation.texts, placeholder),
            block_digests=[""] * blocks,
            outer_digest="",
            model_config_digest="",
            compute={},
            shards=[(shard_file(i, len(shards)), tuple(names), ()) for i, names in enumerate(shards)],
        )
    )
    units: dict[str, int] = {"inspect": blocks + 1}
    for node in graph.nodes:
        units[node.stage] = units.get(node.stage, 0) + 1
    steps = steps_per_epoch(config) * config.optimizer.epochs
    boundary = config.data.samples * config.data.sequence_length * skeleton.model.config.hidden_size * dtype.itemsize
    trained = trained_elements(config, skeleton)
    return {
        "blocks": blocks,
        "units": units,
        "steps_per_block": steps,
        "steps": steps * blocks,
        "trained_per_block": trained if config.optimizer.epochs else 0,
        "bytes": {
            "one_boundary": boundary if config.optimizer.epochs else 0,
            "all_boundaries": boundary * (blocks + 1) if config.optimizer.epochs else 0,
            "one_block_state": 12 * trained if config.optimizer.epochs else 0,
            "block_results": _codes(skeleton, config) * blocks,
            "checkpoint": sum(layout_bytes(sizes) for _, sizes in layout),
        },
    }


def _codes(skeleton: Skeleton, config: RunConfig) -> int:
    """Bytes of a block's result: a byte a code (scales and zero points are small beside them)."""
    block = skeleton.blocks[0]
    names = linear_names(block, skeleton.block_prefix(0), config.scheme.skip)
    return sum(get_linear(block, name).weight.numel() for name in names)


def human_bytes(value: float) -> str:
    """Such as 4.3 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def estimate_lines(found: dict[str, Any]) -> list[str]:
    """For a person."""
    size = {name: human_bytes(value) for name, value in found["bytes"].items()}
    return [
        f"blocks        {found['blocks']}",
        f"units         {', '.join(f'{stage} {count}' for stage, count in found['units'].items())}",
        f"steps         {found['steps']} ({found['steps_per_block']} a block, {found['trained_per_block']} trained numbers in each)",
        f"activations   {size['one_boundary']} a block boundary, {size['all_boundaries']} if all are there at once",
        f"state         {size['one_block_state']} a block in training",
        f"results       {size['block_results']}",
        f"checkpoint    {size['checkpoint']}",
    ]
