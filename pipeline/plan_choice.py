"""Which engine and which micro-batch a worker's memory allows, and what would make a unit fit that fits nowhere.

What the configuration says explicitly stays. Everything else is a proposal: micro-batches and engines are part of every
content address, so nothing is changed behind the user's back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.memory_plan import GIB, MemoryPlan, Peak, Place, UnitPeaks, worker_peak
from pipeline.memory_terms import Engine
from pipeline.plan_shapes import BlockShape

Device = Literal["cpu", "cuda"]
# A step's time with it over that without (benchmarks/results/2026-11-24-large-block.md).
RECOMPUTATION, CHECKPOINTING = "a step takes 21 % longer", "a step takes 13 % longer beside recomputation"


@dataclass(frozen=True)
class Limits:
    """What one worker has, bytes; None: not known, and so no limit."""

    memory: float | None = None
    gpu_memory: float | None = None

    def of(self, place: Place) -> float | None:
        return self.memory if place == "host" else self.gpu_memory


@dataclass(frozen=True)
class Choice:
    """An engine that a worker has memory for. `lines`: what to set in the configuration, and why; empty where nothing."""

    engine: Engine
    units: Mapping[str, UnitPeaks]
    lines: tuple[tuple[str, str], ...] = ()


def present_engine(config: RunConfig, device: Device | None = None) -> Engine:
    """As the configuration has it."""
    compute = config.compute
    device = device or compute.device
    return Engine(
        device=device,
        micro_batch=min(compute.micro_batch or config.samples_of_a_step, config.samples_of_a_step),
        recompute=compute.recompute,
        checkpoint=compute.checkpoint,
        name=compute.engine,
        products=products(config, device),
        offload_parameters=compute.offloads_parameters,
        offload_optimizer=compute.offloads_optimizer,
        parts=compute.group if compute.partitions else 1,
    )


def products(config: RunConfig, device: Device) -> int:
    """Bytes of a number in products. On this machine's processor, where `auto` is to be resolved for CPUs."""
    if config.compute.dtype != "auto":
        return 2 if config.compute.dtype == "bfloat16" else 4
    return 2 if device == "cuda" or torch.cpu._is_avx512_bf16_supported() else 4


def candidates(
    shape: BlockShape, config: RunConfig, engine: Engine
) -> Iterator[tuple[Engine, tuple[tuple[str, str], ...]]]:
    """Ways to train a block, what costs least first; explicit values stay."""
    explicit = config.compute.model_fields_set
    sizes = [engine.micro_batch]
    while "micro_batch" not in explicit and sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    engines = [engine]
    # Where all is in host memory anyway, one process holds more with it and not less.
    several = engine.device == "cuda" or config.compute.group > 1
    if "engine" not in explicit and several and takes_deepspeed(shape, config, config.compute.group):
        engines.append(offloaded(engine, config.compute.group))
    for base in engines:
        for recompute, checkpoint in _repetitions(explicit, base):
            for size in sizes:
                found = replace(base, micro_batch=size, recompute=recompute, checkpoint=checkpoint)
                yield found, (*_device_lines(config, engine), *_lines(engine, found))


def takes_deepspeed(shape: BlockShape, config: RunConfig, group: int) -> bool:
    """No equivalent transformation, no checkpoints, and no experts in parts."""
    return not config.method.equivalence and not config.compute.checkpoint and (group == 1 or shape.passes == 1)


def offloaded(engine: Engine, parts: int) -> Engine:
    """By DeepSpeed, as its defaults are."""
    return replace(engine, name="deepspeed", offload_parameters=True, offload_optimizer=True, parts=parts)


def _repetitions(explicit: set[str], engine: Engine) -> list[tuple[bool | None, bool]]:
    found = [(engine.recompute, engine.checkpoint)]
    if "recompute" not in explicit:
        found.append((True, engine.checkpoint))
    if "checkpoint" not in explicit and engine.name == "torch":
        found.append((found[-1][0], True))
    return found


def _device_lines(config: RunConfig, engine: Engine) -> Iterator[tuple[str, str]]:
    if engine.device != config.compute.device:
        yield f"compute.device: {engine.device}", "the workers have GPUs"
    if engine.device == "cuda" and not config.cluster.gpus_per_worker:
        yield "cluster.gpus_per_worker: 1", "or a part of one, where workers share it"


def _lines(before: Engine, now: Engine) -> Iterator[tuple[str, str]]:
    if now.micro_batch != before.micro_batch:
        why = f"fewer activations at once than with {before.micro_batch} sequences; the weights are quantized once for each"
        yield f"compute.micro_batch: {now.micro_batch}", why
    if now.name != before.name:
        why = "weights, factors and the optimizer stay in host memory and are fetched linear by linear; a step waits for that"
        if now.parts > 1:
            why = f"each of the {now.parts} actors holds a part of the block, and linears are put together for every use; a step waits for that"
        yield "compute.engine: deepspeed", why
    if now.recompute != before.recompute:
        yield "compute.recompute: true", f"no weight-sized tensor is kept between the passes; {RECOMPUTATION}"
    if now.checkpoint != before.checkpoint:
        yield "compute.checkpoint: true", f"activations of half a block at once; {CHECKPOINTING}"


def fits(units: Mapping[str, UnitPeaks], limits: Limits) -> bool:
    return not missing(units, limits)


def missing(units: Mapping[str, UnitPeaks], limits: Limits) -> dict[Place, tuple[str, Peak, float]]:
    """By place where memory does not do: the stage, its peak, and how much is missing."""
    found: dict[Place, tuple[str, Peak, float]] = {}
    for place in _places(units):
        limit = limits.of(place)
        stage, peak = worker_peak(units, place)
        if limit is not None and peak.total > limit:
            found[place] = (stage, peak, peak.total - limit)
    return found


def _places(units: Mapping[str, UnitPeaks]) -> list[Place]:
    return ["host", "device"] if any(unit.device for unit in units.values()) else ["host"]


def choose(shape: BlockShape, config: RunConfig, limits: Limits, device: Device | None = None) -> Choice:
    """The way that costs least of those that fit. Raises UserError if none does, with what is missing and what would help."""
    smallest: tuple[float, Choice] | None = None
    for engine, lines in candidates(shape, config, present_engine(config, device)):
        choice = Choice(engine, MemoryPlan(shape, config, engine).units(), lines)
        short = sum(entry[2] for entry in missing(choice.units, limits).values())
        if not short:
            return choice
        if smallest is None or short < smallest[0]:
            smallest = short, choice
    assert smallest is not None
    raise UserError(refusal(shape, config, limits, smallest[1]))


def refusal(shape: BlockShape, config: RunConfig, limits: Limits, smallest: Choice) -> str:
    """One sentence: the unit, how much is missing for the smallest choice, and the knobs with their prices."""
    place, (stage, peak, short) = next(iter(missing(smallest.units, limits).items()))
    limit = limits.of(place)
    assert limit is not None
    where = "host memory" if place == "host" else "GPU memory"
    largest = max(peak.terms, key=lambda name: peak.terms[name])
    engine = smallest.engine
    options = "; ".join(_knobs(shape, config, limits, engine, place)) or "none of the settings saves enough to name"
    return (
        f"a unit of stage {stage} needs {peak.total / GIB:.1f} GiB of {where} at the least (engine {engine.name}, micro-batch "
        f"{engine.micro_batch}; most of it {largest}, {peak.terms[largest] / GIB:.1f} GiB, while {peak.moment}), {short / GIB:.1f} GiB "
        f"more than the {limit / GIB:.1f} GiB of a worker: give workers that much, or set {options}"
    )


# Settings that take less memory, and what that costs; each as a change of sections.
def _changes(shape: BlockShape, config: RunConfig) -> Iterator[tuple[str, dict[str, dict[str, Any]], str]]:
    method, storage, data = config.method, config.storage, config.data
    if method.increment == "dense" and method.rank is None:
        yield "method.increment diagonal", {"method": {"increment": "diagonal"}}, "trains singular values, not weights"
    if method.increment in ("diagonal", "corner", "band") or method.rank:
        full = min(shape.largest)
        rank = max(16, method.increments.reach, (method.rank or full) // 4)
        if rank < (method.rank or full):
            yield f"method.rank {rank}", {"method": {"rank": rank}}, "trains fewer singular values"
        if method.factor_dtype != "bfloat16":
            yield "method.factor_dtype bfloat16", {"method": {"factor_dtype": "bfloat16"}}, "no loss was measurable"
    group = 2 * config.compute.group
    if group <= config.fewest_samples[1] and takes_deepspeed(shape, config, group):
        both = {"compute": {"group": group, "engine": "deepspeed"}}
        yield (
            f"compute.group {group} with compute.engine deepspeed",
            both,
            f"{group} actors hold a part of a block each",
        )
    if method.rounding == "learned":
        yield "method.rounding none", {"method": {"rounding": "none"}}, "worse at 2 bits"
    if method.equivalence:
        yield "method.equivalence []", {"method": {"equivalence": []}}, "outliers are not moved"
    if method.look_ahead or method.quantized_stream_loss:
        off = {"look_ahead": 0, "quantized_stream_loss": 0.0}
        yield "method.look_ahead 0 and quantized_stream_loss 0", {"method": off}, "the plain loss"
    if config.end_to_end.epochs and config.end_to_end.resident:
        not_kept = {"end_to_end": {"resident": False}}
        yield "end_to_end.resident false", not_kept, "blocks are read twice by every unit of the last stage"
    if config.end_to_end.epochs:
        yield "end_to_end.epochs 0", {"end_to_end": {"epochs": 0}}, "scales stay as each block by itself left them"
    if config.optimizer.steps == "adamw":
        yield "optimizer.steps signed", {"optimizer": {"steps": "signed"}}, "no moments; other learning rates are right"
    if storage.chunk_samples > config.optimizer.batch_size:
        smaller = {"storage": {"chunk_samples": config.optimizer.batch_size}}
        yield f"storage.chunk_samples {config.optimizer.batch_size}", smaller, "more and smaller files"
    if storage.cache_mib:
        yield "storage.cache_mib 0", {"storage": {"cache_mib": 0}}, "every pass reads its inputs again"
    if data.sequence_length > 256:
        half = data.sequence_length // 2
        yield f"data.sequence_length {half}", {"data": {"sequence_length": half}}, "shorter texts"
    if config.evaluation.texts and config.evaluation.length > 256:
        half = config.evaluation.length // 2
        yield f"evaluation.length {half}", {"evaluation": {"length": half}}, "perplexities of shorter windows"


def _knobs(shape: BlockShape, config: RunConfig, limits: Limits, engine: Engine, place: Place) -> Iterator[str]:
    """Settings that save at least a twentieth, with what is needed then."""
    before = worker_peak(MemoryPlan(shape, config, engine).units(), place)[1].total
    found = []
    for words, sections, price in _changes(shape, config):
        after = changed(config, sections)
        units = MemoryPlan(shape, after, _engine_after(engine, sections, after)).units()
        peak = worker_peak(units, place)[1].total
        if peak < 0.95 * before:
            enough = ", which is enough" if fits(units, limits) else ""
            found.append((peak, f"{words} ({price}; {peak / GIB:.1f} GiB{enough})"))
    yield from (text for _, text in sorted(found))


def _engine_after(engine: Engine, sections: Mapping[str, Mapping[str, Any]], config: RunConfig) -> Engine:
    """Changes are of the method but for a larger group."""
    if "compute" not in sections:
        return engine
    smaller = replace(engine, micro_batch=min(engine.micro_batch, config.samples_of_a_step))
    return offloaded(smaller, config.compute.group)


def changed(config: RunConfig, sections: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """The configuration with some values replaced; not checked again."""
    update = {name: getattr(config, name).model_copy(update=dict(values)) for name, values in sections.items()}
    return config.model_copy(update=update)
