"""A linear layer whose weight is quantized on the fly from trainable parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lsi.factors import MANY, Factorizer, factors_of
from lsi.grid import (
    Grid,
    QuantizedWeight,
    fake_quantize,
    grid_parameters,
    group_range,
    nearest_range,
    quantize,
    range_of,
    widened,
)
from lsi.increment import Increment, make_increment

Clipping = Literal["none", "learned", "direct"]
Side = Literal["rows", "columns"]
SIDES: tuple[Side, Side] = ("rows", "columns")
# A group never shrinks below this part of its range: at zero it would have no grid.
SMALLEST_BOUND = 0.05
LARGEST_FROM_GRID = 2.0
# Half a step: the nearest grid point or the one beside it. From a grid point itself it takes a whole one.
LARGEST_OFFSET, LARGEST_FROM_CODES = 0.5, 1.0
# sigmoid(4) = 0.982: the bounds begin just inside the full range (OmniQuant, section 3.2).
CLIPPING_START = 4.0


class LearnedClipping(nn.Module):
    """LWC: bounds sigmoid(upper) · max and sigmoid(lower) · min for every group (OmniQuant, equation 2).

    `largest`: of a range that is a grid's, which may grow, these sigmoids count so many times.
    """

    largest = 1.0

    def __init__(self, out_features: int, groups: int, device: torch.device) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.full((out_features, groups), CLIPPING_START, device=device))
        self.upper = nn.Parameter(torch.full((out_features, groups), CLIPPING_START, device=device))

    def forward(
        self, low: Float[Tensor, "out groups"], high: Float[Tensor, "out groups"]
    ) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        return low * (self.largest * self.lower.sigmoid()), high * (self.largest * self.upper.sigmoid())

    @torch.no_grad()
    def begin(self, lower: Float[Tensor, "out groups"], upper: Float[Tensor, "out groups"]) -> None:
        """At bounds that are these parts of the range, or at the start's where that is more."""
        for bound, part in ((self.lower, lower), (self.upper, upper)):
            bound.copy_(torch.special.logit(part.clamp(min=SMALLEST_BOUND)).clamp(max=CLIPPING_START))

    @torch.no_grad()
    def begin_at_grid(self) -> None:
        """At the whole range, from where it may grow as well: sigmoid(0) is one half."""
        self.largest = LARGEST_FROM_GRID
        for bound in (self.lower, self.upper):
            bound.zero_()


class DirectClipping(nn.Module):
    """The bounds' factors themselves, in (0, 1], starting at the full range (SignRound, section 3.2). For signed steps.

    `largest`: a range that is a grid's, and not the weights' own, may grow.
    """

    largest = 1.0

    def __init__(self, out_features: int, groups: int, device: torch.device) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.ones(out_features, groups, device=device))
        self.upper = nn.Parameter(torch.ones(out_features, groups, device=device))

    def forward(
        self, low: Float[Tensor, "out groups"], high: Float[Tensor, "out groups"]
    ) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        return low * self.lower, high * self.upper

    @torch.no_grad()
    def begin(self, lower: Float[Tensor, "out groups"], upper: Float[Tensor, "out groups"]) -> None:
        """At bounds that are these parts of the range."""
        for bound, part in ((self.lower, lower), (self.upper, upper)):
            bound.copy_(part.clamp(min=SMALLEST_BOUND))

    def begin_at_grid(self) -> None:
        """At the whole range, from where it may grow as well."""
        self.largest = LARGEST_FROM_GRID

    @property
    def bounds(self) -> tuple[float, float]:
        """What its parameters are put back into after a step."""
        return SMALLEST_BOUND, self.largest


class LearnedRounding(nn.Module):
    """An offset within half a step for every weight, added before rounding (SignRound, equation 3)."""

    def __init__(self, weight: Float[Tensor, "out in"], largest: float = LARGEST_OFFSET) -> None:
        super().__init__()
        self.largest = largest
        self.offset = nn.Parameter(torch.zeros_like(weight))

    @property
    def bounds(self) -> tuple[float, float]:
        """What its parameters are put back into after a step."""
        return -self.largest, self.largest


CLIPPINGS: dict[Clipping, type[LearnedClipping] | type[DirectClipping]] = {
    "learned": LearnedClipping,
    "direct": DirectClipping,
}


@dataclass(frozen=True)
class Parts:
    """What is trained in a linear. `scale_dtype`: the dtype its scales are stored in."""

    clipping: Clipping
    increment: Increment
    rounding: bool
    scale_dtype: torch.dtype


class QuantizedLinear(nn.Module):
    """y = x · W_hatᵀ + b with W_hat from the increment, the clipping, the rounding and the grid.

    The weight is the linear's own, not copied, in its dtype; all that is computed from it is in float32 at least.
    Parameters of these parts are trained; weight and bias are not.

    `recompute`: what lies between the parameters and W_hat is made again in the backward pass, so that between the passes
    no tensor of the weight's size is kept. It changes no bit of the result, and costs a quarter of a step's time at 135M
    parameters; None: for linears of `MANY` weights and more.

    `start`: the weight is quantized already. Training begins at its codes, and the range is its grid's, whatever W' does.
    """

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None
    # What an equivalent transformation multiplies the weight's rows and columns by; None in a block without one.
    rows: Float[Tensor, " out"] | None
    columns: Float[Tensor, " in"] | None

    def __init__(
        self,
        linear: nn.Linear,
        grid: Grid,
        parts: Parts,
        start: QuantizedWeight | None = None,
        *,
        recompute: bool | None = None,
        factorizer: Factorizer = factors_of,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.start = start
        # Whether it computes with the weight as it is.
        self.plain = False
        # Where the processes of a group share its rows (`lsi.rows`): makes all of W_hat of this one's.
        self.gather: Callable[[Tensor], Tensor] | None = None
        self.recompute = linear.weight.numel() >= MANY if recompute is None else recompute
        self.scale_dtype = start.scale.dtype if start else parts.scale_dtype
        self.register_buffer("weight", start.dequantize() if start else linear.weight.detach(), persistent=False)
        weight = widened(self.weight)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float(), persistent=False)
        for side in SIDES:
            self.register_buffer(side, None, persistent=False)
        self.groups = grid.groups(weight.shape[1])
        bounds = CLIPPINGS.get(parts.clipping)
        self.clipping = bounds(weight.shape[0], self.groups, weight.device) if bounds else None
        if start and self.clipping is not None:
            self.clipping.begin_at_grid()
        elif grid.symmetric and self.clipping is not None:
            # The wider bound decides, and says the scale's sign: two that are equal would leave that to rounding.
            whole = torch.ones_like(self.clipping.lower)
            self.clipping.begin(whole, torch.zeros_like(whole))
        step = grid_parameters(*self._range(weight), grid, self.scale_dtype)[0].abs()
        self.increment = make_increment(parts.increment, weight, step, factorizer)
        self.rounding = (
            LearnedRounding(weight, LARGEST_FROM_CODES if start else LARGEST_OFFSET) if parts.rounding else None
        )

    def expect_scaling(self, side: Side) -> None:
        """Make room for what an equivalent transformation multiplies rows or columns by: the increment is multiplied with them."""
        size = self.weight.shape[SIDES.index(side)]
        setattr(self, side, torch.ones(size, device=self.weight.device))

    def _scaled(self, change: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The increment as the weight is transformed. (By the factors of its product, their gradients would be products, too.)"""
        change = change if self.rows is None else change * self.rows.unsqueeze(-1)
        return change if self.columns is None else change * self.columns

    def _grouped(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out groups size"]:
        return weight.view(weight.shape[0], self.groups, -1)

    def _range(
        self, weight: Float[Tensor, "out in"]
    ) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        if self.start is None:
            return group_range(self._grouped(weight), self.grid)
        return range_of(self.start.scale.float(), self.start.zero_point.float(), self.grid)

    def transformed(self) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """W', its scale and its zero point, differentiable. Always in float32: the codes must not depend on autocast."""
        with torch.autocast(self.weight.device.type, enabled=False):
            original = widened(self.weight)
            change = self.increment()
            weight = original if change is None else original + self._scaled(change)
            # The range follows W', but only the bounds' factors are trained through it: the path through two extreme
            # weights a group is noise beside them. An equivalent transformation is another matter: one scale moves all
            # of an outlying column, and so the step of every group that it is in.
            followed = weight.detach()
            if original.requires_grad:
                followed = original if change is None else original + self._scaled(change.detach())
            low, high = self._range(followed)
            if self.clipping is not None:
                low, high = self.clipping(low, high)
            return weight, *grid_parameters(low, high, self.grid, self.scale_dtype)

    @property
    def _offset(self) -> Tensor | None:
        return None if self.rounding is None else self.rounding.offset

    @torch.no_grad()
    def begin_clipping(self, importance: Float[Tensor, " in"] | None) -> None:
        """Begin with the bounds that leave the weights nearest, an input channel's error counting as much as `importance`
        says. Where that is None or zero everywhere (an expert that no token reached) all channels count the same."""
        if self.clipping is not None and self.start is None:
            counted = importance if importance is not None and importance.any() else None
            self.clipping.begin(*nearest_range(self.weight, self.grid, self.scale_dtype, counted))

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return functional.linear(x, widened(self._all_rows(self.weight)), self.bias)
        if self.recompute and torch.is_grad_enabled():
            # Nothing in it is random. (Where the weight is replaced from outside, it must be until after the backward pass.)
            result: Tensor = checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=False)
            return result
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        kind = self.weight.device.type
        # Autocast would round W_hat to its dtype in a further pass over it, and widen its gradient in another.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        own = fake_quantize(*self.transformed(), self.grid, self._offset, dtype)
        return functional.linear(x, self._all_rows(own), self.bias)

    def _all_rows(self, own: Float[Tensor, "rows in"]) -> Float[Tensor, "out in"]:
        return own if self.gather is None else self.gather(own)

    @torch.no_grad()
    def present_grid(self) -> tuple[Float[Tensor, "out groups"], UInt8[Tensor, "out groups"]]:
        """Scale and zero point of the present parameters, as they are stored."""
        _, scale, zero = self.transformed()
        return scale.to(self.scale_dtype), zero.to(torch.uint8)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The codes that stand for the present parameters."""
        return quantize(*self.transformed(), self.grid, self.scale_dtype, self._offset)
