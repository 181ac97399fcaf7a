"""What a run will take, before any work: from the configuration and the model's config.json, without its weights."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lsi.block import get_linear, linear_names
from pipeline.block_state import steps_per_epoch
from pipeline.checks import check_run
from pipeline.config import RunConfig
from pipeline.costs import Costs, Device, Shape, placeholder_inputs
from pipeline.errors import UserError
from pipeline.graph import Graph, Inputs, build_graph
from pipeline.merge import plan_shards, scheme_layout, shards_with_blocks, unpublished
from pipeline.model_source import DTYPES, INDEX, SINGLE, locate, open_model, parse_model_config, read_side_files
from pipeline.presets import SECTIONS
from pipeline.simulate import Network, Simulated, simulate
from pipeline.skeleton import Skeleton, make_skeleton
from pipeline.tensors import Layout, layout_bytes
from pipeline.weights import block_tensors

# Only the order of events matters here, and it hardly depends on this.
ASSUMED = Device(flops=4e14, memory=2.4e12)


def open_skeleton(config: RunConfig) -> tuple[Skeleton, torch.dtype]:
    """The model without weights, and the result's dtype."""
    if config.model.source.endswith(".gguf"):
        from pipeline.gguf_import import local_copy, read_config

        with tempfile.TemporaryDirectory() as scratch:
            model_config = read_config(local_copy(config.model.source, config.storage.options, Path(scratch)))
        return make_skeleton(model_config), DTYPES.get(config.model.dtype, torch.bfloat16)
    trust = config.model.trust_remote_code
    store = locate(config.model, config.storage.options)
    files = read_side_files(store, code=trust)
    if store.exists(SINGLE) or store.exists(INDEX):
        source = open_model(store, trust_remote_code=trust)
        return make_skeleton(source.config, trust_remote_code=trust), source.dtype(config.model.dtype)
    found = parse_model_config(files, store.url, trust_remote_code=trust)
    wanted = getattr(found, "dtype", None) or torch.bfloat16
    return make_skeleton(found, trust_remote_code=trust), DTYPES.get(config.model.dtype, wanted)


def shape_of(skeleton: Skeleton, config: RunConfig, dtype: torch.dtype) -> Shape:
    """The sizes that costs are reckoned from; blocks count as equal to the first that is quantized."""
    skip = config.scheme.skip
    named = ((block, linear_names(block, skeleton.block_prefix(i), skip)) for i, block in enumerate(skeleton.blocks))
    block, names = next((both for both in named if both[1]), (skeleton.blocks[0], []))
    found = skeleton.model.config
    heads = getattr(found, "num_attention_heads", 1)
    head = getattr(found, "head_dim", None) or found.hidden_size // heads
    return Shape(
        blocks=len(skeleton),
        hidden=found.hidden_size,
        linears=tuple(
            (weight.shape[0], weight.shape[1]) for name in names for weight in [get_linear(block, name).weight]
        ),
        attention=head * heads,
        outer=sum(tensor.numel() for tensor in block_tensors(skeleton, None).values()),
        itemsize=dtype.itemsize,
    )


@dataclass(frozen=True)
class Outline:
    """A run that is checked and laid out, without weights and texts. `layout`: the checkpoint's tensors, none if none is published."""

    skeleton: Skeleton
    dtype: torch.dtype
    unpublished: str | None
    layout: list[tuple[str, Layout]]
    inputs: Inputs
    graph: Graph
    shape: Shape

    @property
    def checkpoint(self) -> int:
        """Bytes of the checkpoint."""
        return sum(layout_bytes(sizes) for _, sizes in self.layout)

    @property
    def costs(self) -> Costs:
        return self.costs_on(ASSUMED)

    def costs_on(self, device: Device) -> Costs:
        return Costs(self.inputs, self.shape, device, self.checkpoint)


def outline(config: RunConfig) -> Outline:
    """The run that a configuration asks for. Raises UserError for one that cannot run."""
    if config.is_finetune:
        raise UserError(
            f"finetune.blocks {config.finetune.blocks}: lsi plan reckons what lsi quantize does, and no fine-tunes; leave section "
            "finetune out for a plan of quantizing model.source"
        )
    skeleton, dtype = open_skeleton(config)
    check_run(config, skeleton)
    return lay_out(config, skeleton, dtype)


def lay_out(config: RunConfig, skeleton: Skeleton, dtype: torch.dtype) -> Outline:
    """The same of a model that is open, and checked."""
    reason = unpublished(config, skeleton)
    layout = [] if reason else scheme_layout(skeleton, config.scheme, dtype)
    shards = plan_shards(layout, config.outputs.max_shard_mib << 20)
    inputs = placeholder_inputs(config, len(skeleton), shards_with_blocks(shards, skeleton))
    return Outline(skeleton, dtype, reason, layout, inputs, build_graph(inputs), shape_of(skeleton, config, dtype))


def simulated(found: Outline, workers: int, device: Device = ASSUMED) -> Simulated:
    """The run in simulated time. Which activations are there at once depends on the schedule and on how many blocks are under
    way, hardly on the speed."""
    storage, costs = found.inputs.config.storage, found.costs_on(device)
    return simulate(
        found.graph,
        {node.name: costs.of(node) for node in found.graph.nodes},
        workers,
        Network(cache=float(storage.cache_mib << 20)),
        keeps_activations=storage.keep_activations,
    )


def estimate(config: RunConfig, workers: int | None = None, found: Outline | None = None) -> dict[str, Any]:
    """Units by stage, optimizer steps, bytes. Raises UserError for a configuration that cannot run.

    The high-water mark is that of a simulated run on `workers` (default: the configuration's, or one).
    """
    found = found or outline(config)
    skeleton, dtype, shape, costs = found.skeleton, found.dtype, found.shape, found.costs
    blocks = len(skeleton)
    units: dict[str, int] = {"inspect": blocks + 1}
    for node in found.graph.nodes:
        units[node.stage] = units.get(node.stage, 0) + 1
    steps = steps_per_epoch(config) * config.optimizer.epochs
    boundary = config.data.samples * config.data.sequence_length * skeleton.model.config.hidden_size * dtype.itemsize
    captures = bool(config.optimizer.epochs or config.end_to_end.epochs)
    played = simulated(found, workers or config.cluster.workers or 1)
    return {
        "scheme": config.scheme.words,
        "unpublished": found.unpublished,
        "preset": config.preset,
        **{name: getattr(config, name).model_dump(mode="json") for name in SECTIONS},
        "blocks": blocks,
        "units": units,
        "steps_per_block": steps,
        "steps": steps * blocks,
        "workers": played.workers,
        "cache_mib": config.storage.cache_mib,
        "trained_per_block": costs.trained if config.optimizer.epochs else 0,
        "bytes": {
            "one_boundary": boundary * captures,
            "all_boundaries": boundary * (blocks + 1) * captures,
            "one_block_state": costs.state_bytes(False) if config.optimizer.epochs else 0,
            "block_results": shape.weights * blocks * (2 if config.end_to_end.epochs else 1),
            "factors": int(costs.factor_bytes() * blocks) if config.optimizer.epochs else 0,
            "checkpoint": found.checkpoint,
            "high_water": int(played.high_water),
        },
    }


def human_bytes(value: float) -> str:
    """Such as 4.3 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def cache_lines(found: dict[str, Any]) -> list[str]:
    """What to set so that epochs do not read activations again; nothing where that is so already."""
    needed = math.ceil(2 * found["bytes"]["one_boundary"] / 2**20)
    if needed <= found["cache_mib"]:
        return []
    return [
        f"memory        storage.cache_mib {found['cache_mib']} holds a part of a block's inputs and targets, and every pass reads the rest "
        f"from storage again; {needed} MiB of each worker's memory hold all"
    ]


def settings_lines(found: dict[str, Any]) -> list[str]:
    """What is trained and how, defaults and a preset's values with the rest."""
    preset = [f"preset        {found['preset']}"] if found["preset"] else []
    values = {
        name: ", ".join(f"{key} {value}" for key, value in found[name].items() if value not in (None, []))
        for name in SECTIONS
    }
    return preset + [f"{name:<13} {text}" for name, text in values.items()]


def estimate_lines(found: dict[str, Any]) -> list[str]:
    """For a person."""
    size = {name: human_bytes(value) for name, value in found["bytes"].items()}
    without = [f"checkpoint    none is published: {found['unpublished']}"]
    return [
        f"scheme        {found['scheme']}",
        *settings_lines(found),
        f"blocks        {found['blocks']}",
        f"units         {', '.join(f'{stage} {count}' for stage, count in found['units'].items())}",
        f"steps         {found['steps']} ({found['steps_per_block']} a block, {found['trained_per_block']} trained numbers in each)",
        f"activations   {size['one_boundary']} a block boundary, {size['all_boundaries']} if all are there at once",
        f"state         {size['one_block_state']} a block in training",
        *([f"factors       {size['factors']}, kept for the next run"] if found["bytes"]["factors"] else []),
        f"results       {size['block_results']}",
        *(without if found["unpublished"] else [f"checkpoint    {size['checkpoint']}"]),
        f"storage       {size['high_water']} at most at one time, on {found['workers']} {'worker' if found['workers'] == 1 else 'workers'}",
        *cache_lines(found),
    ]
