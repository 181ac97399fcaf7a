"""Optimizers and their learning-rate schedules, as functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Steps = Literal["adamw", "signed"]
Bounds = tuple[float, float] | None


class SignedSteps(torch.optim.Optimizer):
    """p ← p − rate · sign(gradient) (SignRound, arXiv 2309.05516). No state: a step is as long as the schedule says.

    Leaves signs in the place of the gradients, which takes no memory beside them.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign_(), alpha=-group["lr"])


def cosine(step: int, total: int) -> float:
    """Learning rate factor, 1 at step 0, falling to 0 at `total`."""
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / max(total, 1)))


def linear(step: int, total: int) -> float:
    """The same along a straight line: so a signed parameter can move by half of rate × total in all."""
    return 1 - min(step, total) / max(total, 1)


DECAY = {"adamw": cosine, "signed": linear}


@dataclass(frozen=True)
class Group:
    """Parameters, by name, that are stepped alike. bounds: where they are put back after a step, None for anywhere.

    start: they join after so many steps of the others; their decay goes from there to the last step of all.
    """

    names: tuple[str, ...]
    rate: float
    bounds: Bounds = None
    start: int = 0


def as_groups(groups: Sequence[Group], parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The groups as torch's optimizers take them; `base` is the rate that a schedule's factor is of."""
    # Nothing trained is an empty group: torch refuses an empty list.
    return [
        {
            "params": [parameters[name] for name in group.names],
            "lr": group.rate,
            "base": group.rate,
            "bounds": group.bounds,
            "start": group.start,
        }
        for group in groups or [Group((), 0.0)]
    ]


def make_optimizer(
    kind: Steps, groups: Sequence[Group], parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW without weight decay (the papers'), or signed steps. Either puts parameters back into their group's bounds."""
    optimizer: torch.optim.Optimizer
    if kind == "adamw":
        # In one pass over memory, without temporaries.
        optimizer = torch.optim.AdamW(as_groups(groups, parameters), weight_decay=0.0, fused=True)
    else:
        optimizer = SignedSteps(as_groups(groups, parameters))
    optimizer.register_step_post_hook(lambda stepped, arguments, keywords: project(stepped))
    return optimizer


@torch.no_grad()
def project(optimizer: torch.optim.Optimizer) -> None:
    """Every parameter back into the bounds of its group."""
    for group in optimizer.param_groups:
        if group["bounds"] is not None:
            for parameter in group["params"]:
                parameter.clamp_(*group["bounds"])


def set_rates(optimizer: Any, kind: Steps, done: int, total: int) -> None:
    """Learning rates for the step after `done` of `total` ones: zero for groups that have not joined yet."""
    for group in optimizer.param_groups:
        start = group["start"]
        group["lr"] = group["base"] * DECAY[kind](done - start, total - start) if done >= start else 0.0
