"""The increment: W' = W + U · M · Vh, with M trained and W exact at M = 0.

One family, told apart by which entries of M are free (LSI, arXiv 2406.16299, equations 3 and 4):

    none      no entry: W' = W
    diagonal  the singular values' increments I: W' = W + U · diag(I) · Vh
    dense     every entry. With U and Vh orthogonal that is any ΔW, so ΔW is trained itself and no factors are needed;
              it is counted in grid steps, which makes one learning rate fit every layer

Adding to W, instead of multiplying factors out, keeps W' = W at the start whatever the factorization's rounding error.
A new kind is a class here and an entry in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class NoIncrement(nn.Module):
    """W' = W."""

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return weight


class DiagonalIncrement(nn.Module):
    """Learnable singular value increment: one number a singular value."""

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        super().__init__()
        left, right = factorize(weight)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.increment = nn.Parameter(torch.zeros(left.shape[1], dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return weight + (self.left * self.increment) @ self.right


class DenseIncrement(nn.Module):
    """All of M free: ΔW itself, in steps of the group's initial grid."""

    step: Float[Tensor, "out groups 1"]

    def __init__(self, weight: Float[Tensor, "out in"], step: Float[Tensor, "out groups"]) -> None:
        super().__init__()
        self.register_buffer("step", step.unsqueeze(-1), persistent=False)
        self.increment = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        out, groups, _ = self.step.shape
        return weight + (self.increment.view(out, groups, -1) * self.step).view_as(weight)


def factorize(weight: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """U and Vh of the thin SVD, singular values in falling order, signs fixed.

    Each pair's sign is free; the largest entry of every column of U is made positive, so that equal weights give equal factors.
    """
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    peak = left.gather(0, left.abs().argmax(0, keepdim=True)).squeeze(0)
    sign = torch.where(peak < 0, -1.0, 1.0).to(weight.dtype)
    return left * sign, right * sign.unsqueeze(-1)


Maker = Callable[[Tensor, Tensor], nn.Module]
KINDS: dict[str, Maker] = {
    "none": lambda weight, step: NoIncrement(),
    "diagonal": lambda weight, step: DiagonalIncrement(weight),
    "dense": DenseIncrement,
}
# Steps per kind, found by measuring (benchmarks/results): absolute on singular values, in grid steps for dense.
DEFAULT_LEARNING_RATE = {"none": 1.0, "diagonal": 2e-2, "dense": 1e-2}


def make_increment(kind: str, weight: Float[Tensor, "out in"], step: Float[Tensor, "out groups"]) -> nn.Module:
    """The increment module of one linear; `step` is its initial grid's scale."""
    return KINDS[kind](weight, step)
