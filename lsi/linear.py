"""A linear layer whose weight is quantized on the fly from trainable parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lsi.grid import Grid, QuantizedWeight, fake_quantize, grid_parameters, group_range, quantize
from lsi.increment import Increment, make_increment

Clipping = Literal["none", "learned", "direct"]
# A group never shrinks below this part of its range: at zero it would have no grid.
SMALLEST_BOUND = 0.05
# Half a step: the nearest grid point or the one beside it.
LARGEST_OFFSET = 0.5
# sigmoid(4) = 0.982: the bounds begin just inside the full range (OmniQuant, section 3.2).
CLIPPING_START = 4.0


class LearnedClipping(nn.Module):
    """LWC: bounds sigmoid(upper) · max and sigmoid(lower) · min for every group (OmniQuant, equation 2)."""

    def __init__(self, out_features: int, groups: int, device: torch.device) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.full((out_features, groups), CLIPPING_START, device=device))
        self.upper = nn.Parameter(torch.full((out_features, groups), CLIPPING_START, device=device))

    def forward(
        self, low: Float[Tensor, "out groups"], high: Float[Tensor, "out groups"]
    ) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        return low * self.lower.sigmoid(), high * self.upper.sigmoid()


class DirectClipping(nn.Module):
    """The bounds' factors themselves, in (0, 1], starting at the full range (SignRound, section 3.2). For signed steps."""

    bounds = (SMALLEST_BOUND, 1.0)  # what its parameters are put back into after a step

    def __init__(self, out_features: int, groups: int, device: torch.device) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.ones(out_features, groups, device=device))
        self.upper = nn.Parameter(torch.ones(out_features, groups, device=device))

    def forward(
        self, low: Float[Tensor, "out groups"], high: Float[Tensor, "out groups"]
    ) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        return low * self.lower, high * self.upper


class LearnedRounding(nn.Module):
    """An offset within half a step for every weight, added before rounding (SignRound, equation 3)."""

    bounds = (-LARGEST_OFFSET, LARGEST_OFFSET)  # what its parameters are put back into after a step

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out in"]:
        # W + scale · offset, and then W / scale + offset in the grid: the scale's gradient through the offset cancels.
        grouped = self.offset.view(*scale.shape, -1) * scale.unsqueeze(-1)
        return weight + grouped.view_as(weight)


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

    The weight is kept in float32. Parameters of these parts are trained; weight and bias are not.
    """

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None

    def __init__(self, linear: nn.Linear, grid: Grid, parts: Parts) -> None:
        super().__init__()
        self.grid = grid
        self.scale_dtype = parts.scale_dtype
        weight = linear.weight.detach().float()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float(), persistent=False)
        self.groups = grid.groups(weight.shape[1])
        bounds = CLIPPINGS.get(parts.clipping)
        self.clipping = bounds(weight.shape[0], self.groups, weight.device) if bounds else None
        low, high = group_range(self._grouped(weight))
        self.increment = make_increment(parts.increment, weight, grid_parameters(low, high, grid, parts.scale_dtype)[0])
        self.rounding = LearnedRounding(weight) if parts.rounding else None

    def _grouped(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out groups size"]:
        return weight.view(weight.shape[0], self.groups, -1)

    def transformed(self) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """W', its scale and its zero point, differentiable. Always in float32: the codes must not depend on autocast."""
        with torch.autocast(self.weight.device.type, enabled=False):
            weight = self.increment(self.weight)
            # The range follows W', but only the bounds' factors are trained through it: the path through two extreme
            # weights a group is noise beside them. An equivalent transformation is another matter: one scale moves all
            # of an outlying column, and so the step of every group that it is in. (The difference is zero.)
            followed = weight.detach()
            if self.weight.requires_grad:
                followed = followed + (self.weight - self.weight.detach())
            low, high = group_range(self._grouped(followed))
            if self.clipping is not None:
                low, high = self.clipping(low, high)
            scale, zero = grid_parameters(low, high, self.grid, self.scale_dtype)
            return (weight if self.rounding is None else self.rounding(weight, scale)), scale, zero

    def forward(self, x: Tensor) -> Tensor:
        weight, scale, zero = self.transformed()
        return functional.linear(x, fake_quantize(weight, scale, zero, self.grid), self.bias)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The codes that stand for the present parameters."""
        weight, scale, zero = self.transformed()
        return quantize(weight, scale, zero, self.grid, self.scale_dtype)
