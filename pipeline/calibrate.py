"""The speed of this machine, from a few steps on one block with random weights: what `lsi plan --calibrate` reckons time with.

Three figures, each from what is nothing but that: products from the largest linear on a step's tokens, decompositions from the
factors of a small matrix, elementwise work from what is left of a whole step.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lsi.block import linear_names
from lsi.factors import Factors, factors_of
from lsi.objective import products_in
from lsi.reconstruct import Reconstruction
from pipeline.block_state import make_method
from pipeline.call_arguments import made_up_arguments
from pipeline.config import RunConfig
from pipeline.costs import Costs, Device, factor_work
from pipeline.errors import UserError
from pipeline.estimate import Outline, outline
from pipeline.fit import free_memory
from pipeline.memory_plan import GIB, MemoryPlan
from pipeline.plan_choice import present_engine
from pipeline.plan_shapes import block_shape
from pipeline.worker import Context, limit_threads

STEPS = 2
SMALL = (2048, 1024, 128)  # out, in, rank of the matrix whose factors are timed


def calibrated(config: RunConfig) -> Device:
    """What one worker achieves here. Raises UserError where a step of the configuration does not fit this machine."""
    found = outline(config)
    check_memory(config, found)
    limit_threads(config.compute.threads)
    device = torch.device(config.compute.device)
    autocast = torch.bfloat16 if present_engine(config).products == 2 else None
    flops = product_speed(found, config, device, autocast)
    decompositions = decomposition_speed(device) / flops
    step = step_seconds(found, config, device, autocast)
    ideal = Device(flops, float("inf"), decompositions)
    # The part of a step that is elementwise; what the products take is known.
    left = max(step - costs_of_step(found, ideal), 0.1 * step)
    return Device(flops, elementwise_bytes(found) / left, decompositions)


def check_memory(config: RunConfig, found: Outline) -> None:
    engine = present_engine(config)
    unit = MemoryPlan(block_shape(found.skeleton, config, found.dtype), config, engine).optimize()
    peak = unit.device if unit.device else unit.host
    free = free_memory(config.compute.device)
    if peak.total > free:
        raise UserError(
            f"--calibrate: a step of this configuration needs {peak.total / GIB:.1f} GiB and {free / GIB:.1f} GiB are free here: "
            "run it where the workers will be, or leave it out"
        )


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds, the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def product_speed(found: Outline, config: RunConfig, device: torch.device, autocast: torch.dtype | None) -> float:
    """Operations a second of a step's products."""
    out, width = max(found.shape.linears, key=lambda shape: shape[0] * shape[1])
    tokens = (config.compute.micro_batch or config.optimizer.batch_size) * config.data.sequence_length
    weight, inputs = torch.randn(out, width, device=device), torch.randn(tokens, width, device=device)

    def multiply() -> None:
        with products_in(autocast, device):
            nn.functional.linear(inputs, weight)

    multiply()
    return 2.0 * tokens * out * width / timed(multiply, device)


def decomposition_speed(device: torch.device) -> float:
    out, width, rank = SMALL
    weight = torch.randn(out, width, device=device)
    return factor_work(out, width, rank) / timed(lambda: factors_of(weight, rank, torch.float32), device)


def step_seconds(found: Outline, config: RunConfig, device: torch.device, autocast: torch.dtype | None) -> float:
    """Of one optimizer step on a block of random weights and made-up factors, after a first one."""
    skeleton, length = found.skeleton, config.data.sequence_length
    block = random_block(skeleton.blocks[0], found.dtype, device)
    names = linear_names(skeleton.blocks[0], skeleton.block_prefix(0), config.scheme.skip)
    context = Context(config, "", "", "", found.dtype, autocast)
    trained = Reconstruction(block, names, make_method(context), factorizer=random_factors)
    arguments = made_up_arguments(skeleton, length, found.dtype, device.type)[0]
    hidden = torch.randn(config.optimizer.batch_size, length, found.shape.hidden, device=device, dtype=found.dtype)
    trained.step(hidden, hidden, arguments)
    return min(timed(lambda: trained.step(hidden, hidden, arguments), device) for _ in range(STEPS))


def random_block(meta: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A block in place of one without weights."""
    block = copy.deepcopy(meta).to_empty(device=device).to(dtype).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def random_factors(weight: Tensor, rank: int | None, dtype: torch.dtype) -> Factors:
    """Of the right shapes: a step's time does not depend on what they hold."""
    size = rank or min(weight.shape)
    left, right = torch.randn(weight.shape[0], size), torch.randn(size, weight.shape[1])
    return left.to(weight.device, dtype), right.to(weight.device, dtype)


def costs_of_step(found: Outline, device: Device) -> float:
    """Seconds of one step, as the simulation reckons them."""
    costs: Costs = found.costs_on(device)
    return costs.step()


def elementwise_bytes(found: Outline) -> float:
    """Bytes of elementwise work in one step."""
    return found.costs_on(Device(float("inf"), 1.0)).step()
