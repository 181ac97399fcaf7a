"""The uniform integer grid: scale and zero point from a range, rounding with straight-through gradients, codes.

    scale = (high − low) / (2^b − 1)      zero = clamp(round(−low / scale), 0, 2^b − 1)
    codes = clamp(round(W / scale + zero), 0, 2^b − 1)      W_hat = scale · (codes − zero)

(OmniQuant, arXiv 2308.13137, section 3.2.) The symmetric grid has its zero in the middle, zero = 2^(b−1), and
scale = 2 · max(−low, high) / (2^b − 1). It has one level more below zero than above. Where the range reaches further up than down its
scale is negative, which turns it round: the level more is on the side that needs it.

Without learned clipping this is round-to-nearest, and equal bit for bit to what compressed-tensors computes: its symmetric ranges reach
as far up as down, and sums and ties are taken in the signed range −2^(b−1) … 2^(b−1) − 1 as there, because rounding is to even and an
odd offset would break ties the other way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

# Factors that are tried on a group's range. At 2 bits a heavy-tailed group ends at about a half.
SHRINKING = tuple(1 - 0.05 * step for step in range(13))
# Then of one end alone.
NARROWING = (0.8, 0.6)


@dataclass(frozen=True)
class Grid:
    """`group_size` input channels share a scale and a zero point; None: all of an output channel's. positive: symmetric scales are."""

    bits: int
    group_size: int | None
    symmetric: bool
    positive: bool = False

    @property
    def levels(self) -> int:
        """The largest code, 2^bits − 1."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The symmetric grid's zero point."""
        return 2 ** (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """How many groups a row has. Raises ValueError if they do not fill it."""
        size = self.group_size or in_features
        if in_features % size:
            raise ValueError(f"group size {size} does not divide {in_features} input channels")
        return in_features // size


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid. `zero_point` is there for the symmetric grid too (constant)."""

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero_point: UInt8[Tensor, "out groups"]

    def to(self, device: str) -> QuantizedWeight:
        """The same on another device."""
        return QuantizedWeight(self.codes.to(device), self.scale.to(device), self.zero_point.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """scale · (codes − zero point), in float32, rounded to `dtype`."""
        out, groups = self.scale.shape
        codes, size, zero = self.codes.view(out, groups, -1), self.scale.float(), self.zero_point.float()
        result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for rows in row_pieces(codes):
            steps = codes[rows].float().sub_(zero[rows].unsqueeze(-1))
            result[rows] = steps.mul_(size[rows].unsqueeze(-1))
        return result.view(out, -1)


def widened(weight: Tensor) -> Tensor:
    """In float32 at least; exact, and the tensor itself if it is that already."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def range_of(
    scale: Float[Tensor, "out groups"], zero: Float[Tensor, "out groups"], grid: Grid
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """The range that a scale and a zero point stand for: `grid_parameters` gives them back, but for the last bit of float32."""
    if grid.symmetric:
        end = -scale * grid.levels / 2
        return end.clamp(max=0), end.clamp(min=0)
    return -scale * zero, scale * (grid.levels - zero)


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` in the forward pass, the gradient of `value` in the backward pass."""
    return value + (rounded - value).detach()


def group_range(
    grouped: Float[Tensor, "out groups size"], grid: Grid
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Lowest and highest value of each group, widened to hold zero so that zero is on the grid; the symmetric grid's is the further
    one on both sides."""
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        return -high, high
    return low, high


def grid_parameters(
    low: Float[Tensor, "out groups"], high: Float[Tensor, "out groups"], grid: Grid, scale_dtype: torch.dtype
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Scale and zero point (both float32, differentiable) of the range low ≤ 0 ≤ high.

    The scale is rounded to `scale_dtype`, the dtype it is stored in, so that what is trained is what is loaded; the zero
    point comes from the unrounded one. A symmetric scale is negative where high > −low.
    """
    span = (2 * torch.maximum(-low, high) if grid.symmetric else high - low) / grid.levels
    # A float16 scale has a largest value; clipping the group there is what the library does, infinity would be NaN later.
    span = span.clamp(max=torch.finfo(scale_dtype).max)
    # A group of zeros has no range: any scale serves, as long as dividing by it is harmless.
    empty = span == 0
    scale = straight_through(span, span.to(scale_dtype).to(span.dtype))
    scale = torch.where(scale == 0, torch.finfo(scale_dtype).eps, scale)
    if grid.symmetric:
        return torch.where(high > -low, -scale, scale), torch.full_like(scale, grid.middle)
    signed = -grid.middle - low / torch.where(empty, 1.0, span)
    signed = torch.where(empty, 0.0, signed).clamp(-grid.middle, grid.middle - 1)
    return scale, straight_through(signed, signed.round()) + grid.middle


# Elementwise passes go over the rows in pieces: what they need between input and output stays in a processor's cache, and
# beside it no second tensor of the weight's size is made. On a GPU a piece is larger, so that launches do not count.
PIECE = {"cpu": 1 << 17}
LARGE_PIECE = 1 << 24


def piece_on(device: str) -> int:
    """How many numbers a piece has on this type of device."""
    return PIECE.get(device, LARGE_PIECE)


def row_pieces(weight: Tensor) -> Iterator[slice]:
    """Slices over the first dimension, of about `piece_on` numbers each."""
    rows = max(1, piece_on(weight.device.type) * len(weight) // max(1, weight.numel()))
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


def _rounded(ratio: Tensor, zero: Tensor, offset: Tensor | None) -> Tensor:
    steps = ratio + zero
    return (steps if offset is None else steps.add_(offset)).round_()


class _FakeQuantize(torch.autograd.Function):
    """scale · (clamp(round(W / scale + z + v)) − z), on the signed range, with straight-through gradients written out.

    The plain form builds a dozen tensors of the weight's size, this one only its results. The gradients are those of
    rounding straight-through and of the clamp after it. With m = 1 where nothing was clamped, and n = codes − z:

        ∂/∂W = m      ∂/∂scale = n − m · W / scale      ∂/∂z = (m − 1) · scale      ∂/∂v = m · scale
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor,
        offset: Tensor | None,
        middle: int,
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero, offset)
        ctx.middle = middle
        result = torch.empty_like(weight, dtype=dtype)
        for rows in row_pieces(weight):
            moved = None if offset is None else offset[rows]
            codes = _rounded(weight[rows] / scale[rows], zero[rows], moved).clamp_(-middle, middle - 1)
            torch.mul(codes.sub_(zero[rows]), scale[rows], out=result[rows])
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero, offset = ctx.saved_tensors
        sources = (weight, scale, zero, offset)
        needed = ctx.needs_input_grad
        by_weight, by_scale, by_zero, by_offset = (
            torch.empty_like(source) if wanted else None for source, wanted in zip(sources, needed, strict=False)
        )
        for rows in row_pieces(weight):
            gradient, size, zeros = gradients[0][rows].to(weight.dtype), scale[rows], zero[rows]
            ratio = weight[rows] / size
            steps = _rounded(ratio, zeros, None if offset is None else offset[rows])
            codes = steps.clamp(-ctx.middle, ctx.middle - 1)
            passed = steps.eq_(codes).mul_(gradient)
            if by_weight is not None:
                by_weight[rows] = passed
            if by_offset is not None:
                torch.mul(passed, size, out=by_offset[rows])
            if by_zero is not None:
                by_zero[rows] = (passed.sum(-1, keepdim=True) - gradient.sum(-1, keepdim=True)) * size
            if by_scale is not None:
                stretched = codes.sub_(zeros).mul_(gradient).sum(-1, keepdim=True)
                by_scale[rows] = stretched - ratio.mul_(passed).sum(-1, keepdim=True)
        return by_weight, by_scale, by_zero, by_offset, None, None


def fake_quantize(
    weight: Float[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"],
    grid: Grid,
    offset: Float[Tensor, "out in"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "out in"]:
    """W_hat, differentiable in the weight, the scale, the zero point and the offset (rounding straight-through).

    `offset`: added before rounding, in steps (SignRound, equation 3). `dtype`: what W_hat is rounded to; None: the weight's.
    """
    grouped = weight.view(*scale.shape, -1)
    signed = (zero - grid.middle).unsqueeze(-1)
    moved = None if offset is None else offset.view_as(grouped)
    return _FakeQuantize.apply(grouped, scale.unsqueeze(-1), signed, moved, grid.middle, dtype).view_as(weight)


@torch.no_grad()
def quantize(
    weight: Float[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"],
    grid: Grid,
    scale_dtype: torch.dtype,
    offset: Float[Tensor, "out in"] | None = None,
) -> QuantizedWeight:
    """The codes that `fake_quantize` stands for."""
    grouped, size, zeros = weight.view(*scale.shape, -1), scale.unsqueeze(-1), (zero - grid.middle).unsqueeze(-1)
    moved = None if offset is None else offset.view_as(grouped)
    codes = torch.empty(grouped.shape, dtype=torch.uint8, device=weight.device)
    for rows in row_pieces(grouped):
        signed = _rounded(grouped[rows] / size[rows], zeros[rows], None if moved is None else moved[rows])
        codes[rows] = signed.clamp_(-grid.middle, grid.middle - 1).add_(grid.middle)
    return QuantizedWeight(codes.view_as(weight), scale.to(scale_dtype), zero.to(torch.uint8))


def shrunken(grid: Grid) -> list[tuple[float, float]]:
    """What is tried of a group's range, parts of its low and of its high end: of a symmetric one, one end after the other, or the low one
    alone for a positive scale."""
    if grid.symmetric:
        return [(part, 0.0) for part in SHRINKING] + [(0.0, part) for part in SHRINKING if not grid.positive]
    return [(part, part) for part in SHRINKING]


def narrowed(grid: Grid) -> list[tuple[float, float]]:
    """What is tried further, parts of the ends that are best so far: one end of an asymmetric range alone."""
    return [] if grid.symmetric else [(part, 1.0) for part in NARROWING] + [(1.0, part) for part in NARROWING]


@torch.no_grad()
def nearest_range(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    scale_dtype: torch.dtype,
    importance: Float[Tensor, " in"] | None = None,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """The parts of its low and of its high end, the best of `shrunken` and then of what is `narrowed`, that leave each group nearest to
    its weights; `importance` says what an input channel's squared error counts, all the same without."""
    size = len(weight), grid.groups(weight.shape[1])
    lower, upper = (torch.empty(size, device=weight.device) for _ in range(2))
    for rows in row_pieces(weight):
        lower[rows], upper[rows] = _nearest_range(weight[rows].float(), grid, scale_dtype, importance)
    return lower, upper


def _nearest_range(
    weight: Tensor, grid: Grid, scale_dtype: torch.dtype, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    grouped = weight.view(weight.shape[0], grid.groups(weight.shape[1]), -1)
    low, high = group_range(grouped, grid)
    whole = torch.ones_like(low)

    def error(lower: Tensor, upper: Tensor) -> Tensor:
        parameters = grid_parameters(low * lower, high * upper, grid, scale_dtype)
        squares = (fake_quantize(weight, *parameters, grid) - weight).square_()
        if importance is not None:
            squares *= importance
        return squares.view_as(grouped).sum(-1)

    best, least = (whole, whole), torch.full_like(low, torch.inf)
    for tried in (shrunken(grid), narrowed(grid)):
        lower, upper = best
        for parts in tried:
            present = lower * parts[0], upper * parts[1]
            total = error(*present)
            best = torch.where(total < least, present[0], best[0]), torch.where(total < least, present[1], best[1])
            least = torch.minimum(least, total)
    return best


@torch.no_grad()
def clip_to_weights(weight: Float[Tensor, "out in"], grid: Grid, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Clipping without data: each group's range shrunk as leaves its weights nearest."""
    weight = weight.float()
    low, high = group_range(weight.view(weight.shape[0], grid.groups(weight.shape[1]), -1), grid)
    lower, upper = nearest_range(weight, grid, scale_dtype)
    return quantize(weight, *grid_parameters(low * lower, high * upper, grid, scale_dtype), grid, scale_dtype)


@torch.no_grad()
def round_to_nearest(weight: Float[Tensor, "out in"], grid: Grid, scale_dtype: torch.dtype) -> QuantizedWeight:
    """The data-free baseline: each group's own range, nearest grid point."""
    weight = weight.float()
    low, high = group_range(weight.view(weight.shape[0], grid.groups(weight.shape[1]), -1), grid)
    scale, zero = grid_parameters(low, high, grid, scale_dtype)
    return quantize(weight, scale, zero, grid, scale_dtype)
