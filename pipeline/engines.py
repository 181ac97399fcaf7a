"""Which engine a worker trains its blocks with (`lsi.engine`), from the configuration."""

from __future__ import annotations

from typing import Literal

from lsi.engine import Engine, TorchEngine
from lsi.group import GroupEngine
from pipeline.config_sections import ComputeConfig


def make_engine(compute: ComputeConfig, adam: Literal["torch", "cpu_adam"], batch_size: int) -> Engine:
    """adam: what `compute.adam` came to. The processes of a group must have joined each other (`pipeline.members`)."""
    if compute.engine == "torch":
        return GroupEngine(batch_size) if compute.group > 1 else TorchEngine()
    from pipeline.deepspeed_engine import DeepSpeedEngine, Offload

    return DeepSpeedEngine(compute.device, Offload(compute.offloads_parameters, compute.offloads_optimizer, adam))


def home_of(compute: ComputeConfig) -> str:
    """The device that a block is built on before its engine takes it over."""
    return "cpu" if compute.offloads_parameters else compute.device
