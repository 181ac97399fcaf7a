"""`lsi plan`: memory, engine, storage, time and money of a run, before any of it, from the configuration of a model.

`estimate` says what a run comes to; here stand what each kind of unit holds at its peak, what a worker's memory allows, and
what time and money the whole takes on workers of an assumed or a measured speed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from pipeline.config import RunConfig
from pipeline.costs import Cost, Device
from pipeline.errors import UserError
from pipeline.estimate import Outline, estimate, outline, simulated
from pipeline.memory_plan import BASE, Peak, driver_memory, worker_peak
from pipeline.optimize import TrainTask
from pipeline.plan_choice import Choice, Limits, choose
from pipeline.plan_shapes import block_shape

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)", re.IGNORECASE)
UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
# Assumptions, not measurements: 40 % of an H100's 989 dense bfloat16 TFLOP/s and 70 % of its 3.35 TB/s.
GPU = Device(flops=0.40 * 989e12, memory=0.70 * 3.35e12, decompositions=0.05)
# One thread of a 2-core EPYC of 2024, measured: products in float32 (in bfloat16 twice that), and a step's elementwise passes.
THREAD = Device(flops=95e9, memory=8e9)
# What the time may come to, as parts of the reckoned one.
ASSUMED, CALIBRATED = (0.4, 2.5), (0.75, 1.5)


def parse_size(text: str, option: str) -> float:
    """Bytes. Raises UserError for anything but a number with a unit."""
    match = SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"{option} {text}: write a size above zero with its unit, such as 80GiB or 64000MB")
    return float(match[1]) * UNITS[match[2].lower()]


@dataclass(frozen=True)
class Workers:
    """What a run is planned for. `price`: of one worker for one hour, in whatever currency."""

    count: int | None = None
    limits: Limits = field(default_factory=Limits)
    price: float | None = None


def plan(config: RunConfig, workers: Workers, speed: Device | None = None) -> dict[str, Any]:
    """All that `lsi plan` says. `speed`: what a calibration measured. Raises UserError for what cannot run, or fits nowhere."""
    found = outline(config)
    choice = choose_for(config, found, workers.limits)
    if speed is not None and choice.engine.device != config.compute.device:
        raise UserError(
            f"--calibrate measures compute.device {config.compute.device}, and the plan is for workers on {choice.engine.device}: "
            f"set compute.device to {choice.engine.device} and run it where the workers will be, or leave it out"
        )
    whole = estimate(config, workers.count, found)
    whole["memory"] = memory_record(choice, workers.limits)
    whole["traffic"] = traffic(found)
    whole["time"] = duration(found, whole["workers"], choice, config, speed, workers.price)
    return whole


def choose_for(config: RunConfig, found: Outline, limits: Limits) -> Choice:
    """The engine for workers with these limits, on a GPU where they have one and the configuration does not say otherwise."""
    device = config.compute.device
    if limits.gpu_memory is not None and "device" not in config.compute.model_fields_set:
        device = "cuda"
    return choose(block_shape(found.skeleton, config, found.dtype), config, limits, device)


def memory_record(choice: Choice, limits: Limits) -> dict[str, Any]:
    """Peaks by kind of unit with their terms, for JSON; bytes."""

    def record(peak: Peak | None) -> dict[str, Any] | None:
        return (
            None
            if peak is None
            else {
                "bytes": int(peak.total),
                "moment": peak.moment,
                "terms": {n: int(s) for n, s in peak.terms.items()},
            }
        )

    stage, host = worker_peak(choice.units, "host")
    return {
        "engine": choice.engine.name,
        "device": choice.engine.device,
        "micro_batch": choice.engine.micro_batch,
        "recompute": choice.engine.recompute,
        "checkpoint": choice.engine.checkpoint,
        "proposal": [list(line) for line in choice.lines],
        "limits": {"host": limits.memory, "device": limits.gpu_memory},
        "units": {s: {"host": record(u.host), "device": record(u.device)} for s, u in choice.units.items()},
        "worker": {"stage": stage, "host": int(host.total)},
        "driver": int(driver_memory(choice.engine)),
        "process": int(BASE),
    }


def traffic(found: Outline) -> dict[str, dict[str, float]]:
    """Bytes that the largest unit of each kind reads and writes, its weights among them, and what it has in the run directory
    besides: commits in its midst, the next one beside the last."""
    config, shape, costs = found.inputs.config, found.shape, found.costs
    cache = float(config.storage.cache_mib << 20)
    most = {"inspect": {"read": float(shape.weights * shape.itemsize), "written": 0.0, "scratch": 0.0}}
    for node in found.graph.nodes:
        kind, cost = node.name.partition("/")[0], costs.of(node)
        now = {"read": read_bytes(cost, cache), "written": sum(size for _, size in cost.writes), "scratch": 0.0}
        if isinstance(node.task, TrainTask):
            now["scratch"] = 2 * costs.state_bytes(node.task.comparison == "goes_on")
        before = most.setdefault(kind, now)
        most[kind] = {name: max(size, before[name]) for name, size in now.items()}
    return most


def read_bytes(cost: Cost, cache: float) -> float:
    """What a unit reads whose worker holds nothing of it."""
    passes = [sum(sizes) for sizes in zip_longest(*(read.passes for read in cost.reads), fillvalue=0.0)]
    state = cost.state.size if cost.state else 0.0
    return cost.weights + state + sum(passes[:1]) + sum(max(0.0, size - cache) for size in passes[1:])


def duration(
    found: Outline, workers: int, choice: Choice, config: RunConfig, speed: Device | None, price: float | None
) -> dict[str, Any]:
    """A range of seconds, and of money."""
    threads = config.compute.threads
    assumed = GPU if choice.engine.device == "cuda" else Device(THREAD.flops * threads, THREAD.memory * threads)
    seconds = simulated(found, workers, speed or assumed).makespan
    low, high = (seconds * part for part in (CALIBRATED if speed else ASSUMED))
    money = None if price is None else [round(bound / 3600 * workers * price, 2) for bound in (low, high)]
    return {
        "seconds": [round(low, 1), round(high, 1)],
        "calibrated": speed is not None,
        "workers": workers,
        "money": money,
    }
