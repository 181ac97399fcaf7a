"""Optimizers and their learning-rate schedules, as functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch

Steps = Literal["adamw", "signed"]


class SignedSteps(torch.optim.Optimizer):
    """p ← p − rate · sign(gradient) (SignRound, arXiv 2309.05516). No state: a step is as long as the schedule says."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


def cosine(step: int, total: int) -> float:
    """Learning rate factor, 1 at step 0, falling to 0 at `total`."""
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / max(total, 1)))


def linear(step: int, total: int) -> float:
    """The same along a straight line: so a signed parameter can move by half of rate × total in all."""
    return 1 - min(step, total) / max(total, 1)


def make_optimizer(kind: Steps, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW without weight decay (the papers'), or signed steps."""
    return torch.optim.AdamW(groups, weight_decay=0.0) if kind == "adamw" else SignedSteps(groups)


DECAY = {"adamw": cosine, "signed": linear}
