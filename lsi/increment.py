"""The increment: W' = W + U · M · Vh, with M trained and W exact at M = 0.

One family, told apart by which entries of M are free:

    none      no entry: W' = W
    diagonal  the singular values' increments I (LSI, arXiv 2406.16299, equations 3 and 4)
    corner    the diagonal, and a dense k × k block K in the top-left corner, for groups (LSI, section 3.3)
    band      the entries within `band` of the diagonal (SDE, arXiv 2407.15508); a band of 0 is the diagonal
    dense     every entry. With U and Vh orthogonal that is any ΔW, so ΔW is trained itself and no factors are needed

`rank` keeps the leading singular values only; a dense M is then rank × rank between the leading factors.

Adding to W, instead of multiplying factors out, keeps W' = W at the start whatever the factorization's rounding error.

Under an equivalent transformation (`lsi.equivalence`) what is transformed is W', the increment with it: U and Vh stay the factors of
W. (A shift's share of the bias is W's alone.)

All entries are counted in grid steps: an M whose every entry is ±1 changes the weights by one mean grid step of W's, root mean
square. So one learning rate fits every kind, every shape and every width of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lsi.factors import Factorizer, factor_dtype, factors_of
from lsi.grid import widened

Kind = Literal["none", "diagonal", "corner", "band", "dense"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Increment:
    """Which entries of M are free. `corner` is k, `band` the number of diagonals on each side of the main one.

    `factors`: the dtype that U and Vh are kept in; None: by the weight's size. `products`: a dtype that the hardware multiplies
    natively; U of that dtype is multiplied with M · Vh in it, and others in float32.
    """

    kind: Kind = "diagonal"
    rank: int | None = None
    corner: int = 100
    band: int = 1
    factors: torch.dtype | None = None
    products: torch.dtype | None = None

    @property
    def smallest_rank(self) -> int:
        """The least rank that a weight must have for this increment: what `rank`, the corner or the band ask for."""
        return 1 if self.kind == "none" else max(self.rank or 1, self.reach)

    @property
    def reach(self) -> int:
        """The singular vectors that the corner or the band takes at least."""
        return {"corner": self.corner, "band": self.band + 1}.get(self.kind, 1)

    def entries(self, out_features: int, in_features: int) -> int:
        """How many numbers are trained in one linear."""
        rank = self.rank or min(out_features, in_features)
        return {
            "none": 0,
            "diagonal": rank,
            "corner": rank + self.corner**2,
            "band": rank * (2 * self.band + 1),
            "dense": out_features * in_features if self.rank is None else rank**2,
        }[self.kind]


class NoIncrement(nn.Module):
    """W' = W."""

    def forward(self) -> None:
        """There is none."""


class FactoredIncrement(nn.Module):
    """M between the leading factors of W: any sum of a diagonal, a corner and a band of diagonals."""

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        step: float,
        increment: Increment,
        factorizer: Factorizer = factors_of,
    ) -> None:
        super().__init__()
        if increment.smallest_rank > min(weight.shape):
            raise ValueError(f"an increment of rank {increment.smallest_rank} for a weight of {tuple(weight.shape)}")
        left, right = factorizer(weight, increment.rank, factor_dtype(weight, increment.factors))
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        rank, self.scale = left.shape[1], step * math.sqrt(weight.numel())
        self.products = left.dtype if left.dtype == increment.products else widened(left[:0]).dtype
        self.diagonal, self.corner, self.band = None, None, None
        if increment.kind in ("diagonal", "corner"):
            self.diagonal = nn.Parameter(weight.new_zeros(rank))
        if increment.kind == "corner":
            self.corner = nn.Parameter(weight.new_zeros(increment.corner, increment.corner))
        if increment.kind == "band":
            self.band = nn.Parameter(weight.new_zeros(2 * increment.band + 1, rank))
        if increment.kind == "dense":
            self.corner = nn.Parameter(weight.new_zeros(rank, rank))

    def _unit(self, entries: Tensor) -> Tensor:
        """Entries in steps → entries of M: n of them at 1 have the Frobenius norm of one step in every weight."""
        return entries * (self.scale / math.sqrt(entries.numel()))

    def middle_times_right(self) -> Float[Tensor, "rank in"]:
        """M · Vh, in float32 at least."""
        right = widened(self.right)
        product = torch.zeros_like(right)
        if self.diagonal is not None:
            product = product + self._unit(self.diagonal).unsqueeze(-1) * right
        if self.corner is not None:
            size = len(self.corner)
            rows = self._unit(self.corner) @ right[:size]
            product = product + nn.functional.pad(rows, (0, 0, 0, len(right) - size))
        if self.band is not None:
            half = len(self.band) // 2
            for offset, entries in zip(range(-half, half + 1), self._unit(self.band), strict=True):
                product = product + entries.unsqueeze(-1) * shifted(right, offset)
        return product

    def forward(self) -> Float[Tensor, "out in"]:
        """U · M · Vh, in float32 at least."""
        right = self.middle_times_right()
        return (self.left.to(self.products) @ right.to(self.products)).to(right.dtype)


class DenseIncrement(nn.Module):
    """All of M free: ΔW itself, in steps of the group's initial grid."""

    step: Float[Tensor, "out groups 1"]

    def __init__(self, weight: Float[Tensor, "out in"], step: Float[Tensor, "out groups"]) -> None:
        super().__init__()
        self.register_buffer("step", step.unsqueeze(-1), persistent=False)
        self.increment = nn.Parameter(torch.zeros_like(weight))

    def forward(self) -> Float[Tensor, "out in"]:
        """ΔW, in float32 at least."""
        out, groups, _ = self.step.shape
        return (self.increment.view(out, groups, -1) * self.step).view_as(self.increment)


def shifted(rows: Float[Tensor, "rank in"], offset: int) -> Float[Tensor, "rank in"]:
    """Row i is row i + offset of the argument, zero where there is none."""
    if abs(offset) >= len(rows):
        return torch.zeros_like(rows)
    moved = rows[max(offset, 0) : len(rows) + min(offset, 0)]
    return nn.functional.pad(moved, (0, 0, max(-offset, 0), max(offset, 0)))


IncrementModule = NoIncrement | FactoredIncrement | DenseIncrement

# In grid steps, for every kind; found by measuring (benchmarks/results).
DEFAULT_LEARNING_RATE = 1e-2


def make_increment(
    increment: Increment,
    weight: Float[Tensor, "out in"],
    step: Float[Tensor, "out groups"],
    factorizer: Factorizer = factors_of,
) -> IncrementModule:
    """The increment module of one linear; `step` is its initial grid's scale, `factorizer` gives U and Vh if they are needed.

    Raises ValueError for too high a rank.
    """
    if increment.kind == "none":
        return NoIncrement()
    if increment.kind == "dense" and increment.rank is None:
        return DenseIncrement(weight, step)
    return FactoredIncrement(weight, step.mean().item(), increment, factorizer)
