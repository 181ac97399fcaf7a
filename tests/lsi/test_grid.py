"""The grid: against the library that defines the stored format, its gradients, and what any uniform grid must hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization import quantize as library_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from material import assert_same_weight, hard_weights, normal, numeric_gradient
from tolerances import RELATIVE, assert_close, assert_same
from torch import Tensor

from lsi.grid import (
    Grid,
    QuantizedWeight,
    clip_to_weights,
    fake_quantize,
    grid_parameters,
    group_range,
    quantize,
    round_to_nearest,
    straight_through,
)

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
GROUPS = pytest.mark.parametrize("group_size", [3, None], ids=["group", "channel"])
SCALE_DTYPES = pytest.mark.parametrize(
    "scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def library_round_to_nearest(weight: Tensor, grid: Grid, scale_dtype: torch.dtype) -> QuantizedWeight:
    """compressed-tensors' own grid, its signed codes moved to count from zero."""
    args = QuantizationArgs(
        num_bits=grid.bits,
        symmetric=grid.symmetric,
        strategy="channel" if grid.group_size is None else "group",
        group_size=grid.group_size,
        scale_dtype=scale_dtype,
    )
    groups = weight.unflatten(1, (-1, grid.group_size or weight.shape[1]))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = library_quantize(weight, scale, zero, args, dtype=torch.int8)
    codes, zero = (tensor.to(torch.int32) + grid.middle for tensor in (codes, zero))
    return QuantizedWeight(codes.to(torch.uint8), scale.to(scale_dtype), zero.to(torch.uint8))


@SCALE_DTYPES
@SYMMETRIC
@GROUPS
@BITS
def test_round_to_nearest_equals_the_library(
    bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    grid, weight = Grid(bits, group_size, symmetric), hard_weights()
    ours = round_to_nearest(weight, grid, scale_dtype)
    assert_same_weight(ours, library_round_to_nearest(weight, grid, scale_dtype))
    assert ours.codes.max() == grid.levels
    assert ours.codes.min() == 0


@BITS
def test_weights_below_the_smallest_scale_are_zero(bits: int) -> None:
    """Their range divided by the levels is 0. The library has another zero point for the negative row, same W_hat."""
    weight = torch.tensor([[1.0], [-1.0]]).expand(2, 6) * 2.0**-149
    grid = Grid(bits, 3, symmetric=False)
    theirs = library_round_to_nearest(weight, grid, torch.float32).dequantize()
    assert round_to_nearest(weight, grid, torch.float32).dequantize().abs().max() == theirs.abs().max() == 0


@SYMMETRIC
def test_half_precision_weights_are_rounded_as_their_float32_values(symmetric: bool) -> None:
    grid, weight = Grid(3, 3, symmetric), hard_weights().bfloat16()
    assert_same_weight(
        round_to_nearest(weight, grid, torch.bfloat16), round_to_nearest(weight.float(), grid, torch.bfloat16)
    )


@SYMMETRIC
def test_round_to_nearest_twice_is_the_same(symmetric: bool) -> None:
    grid, weight = Grid(3, 3, symmetric), hard_weights()
    first = round_to_nearest(weight, grid, torch.float32)
    assert_same_weight(round_to_nearest(weight.clone(), grid, torch.float32), first)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_without_data_leaves_no_group_farther_than_round_to_nearest(bits: int, symmetric: bool) -> None:
    weight, grid = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)), Grid(bits, 16, symmetric)
    weight[0, :16] = 0
    errors = []
    for quantized in (clip_to_weights(weight, grid, torch.bfloat16), round_to_nearest(weight, grid, torch.bfloat16)):
        errors.append((quantized.dequantize() - weight).square().view(24, 4, 16).sum(-1))
    assert bool((errors[0] <= errors[1]).all())
    assert errors[0].sum() < 0.98 * errors[1].sum()


def test_group_sizes() -> None:
    assert Grid(4, 32, symmetric=True).groups(96) == 3
    assert Grid(4, None, symmetric=True).groups(96) == 1
    with pytest.raises(ValueError, match="32 does not divide 100"):
        Grid(4, 32, symmetric=True).groups(100)
    with pytest.raises(ValueError, match="4 does not divide 15"):
        round_to_nearest(hard_weights(), Grid(4, 4, symmetric=False), torch.float32)


def test_groups_are_neighbours_in_a_row() -> None:
    weight = torch.tensor([[0.0, 3.0, 0.0, 30.0], [0.0, 6.0, 0.0, 60.0]])
    scale = round_to_nearest(weight, Grid(2, 2, symmetric=False), torch.float32).scale
    assert scale.tolist() == [[1.0, 10.0], [2.0, 20.0]]


def test_the_worked_example_of_the_docstring() -> None:
    """low −1, high 2, two bits: scale 1, zero point 1."""
    weight = torch.tensor([[-1.0, -0.4, 0.0, 0.6, 2.0]])
    result = round_to_nearest(weight, Grid(2, None, symmetric=False), torch.float32)
    assert result.scale.tolist() == [[1.0]]
    assert result.zero_point.tolist() == [[1]]
    assert result.codes.tolist() == [[0, 1, 1, 2, 3]]
    assert result.dequantize().tolist() == [[-1.0, 0.0, 0.0, 1.0, 2.0]]


def test_a_symmetric_range_that_reaches_further_up_is_turned_round() -> None:
    """Two bits have the levels −2, −1, 0, 1: times a negative scale 2, 1, 0, −1."""
    grid, weight = Grid(2, None, symmetric=True), torch.tensor([[-0.5, 0.2, 1.0]])
    scale, zero = grid_parameters(torch.tensor([[0.0]]), torch.tensor([[0.75]]), grid, torch.float32)
    assert (scale.tolist(), zero.tolist()) == ([[-0.5]], [[2.0]])
    stored = quantize(weight, scale, zero, grid, torch.float32)
    assert stored.dequantize().tolist() == fake_quantize(weight, scale, zero, grid).tolist() == [[-0.5, 0.0, 1.0]]
    up, down = clip_to_weights(weight, grid, torch.float32), clip_to_weights(-weight, grid, torch.float32)
    assert up.scale.tolist() == (-down.scale).tolist()
    assert up.scale < 0
    assert up.codes.tolist() == down.codes.tolist()


@SYMMETRIC
def test_all_zero_groups_stay_zero_and_differentiable(symmetric: bool) -> None:
    weight = torch.zeros(2, 6, requires_grad=True)
    grid = Grid(4, 3, symmetric)
    low, high = group_range(weight.view(2, 2, 3), grid)
    w_hat = fake_quantize(weight, *grid_parameters(low, high, grid, torch.bfloat16), grid)
    assert w_hat.abs().max() == 0
    w_hat.sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


# --- fake quantization and its gradients ------------------------------------------------------------------------------


def any_parameters(grid: Grid, scale_dtype: torch.dtype, seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with a grid that was not made from its range: some of it lies outside."""
    weight = normal(16, 24, seed=seed)
    groups = grid.groups(24)
    scale = (normal(16, groups, seed=seed + 1).abs() + 0.5) * 2 / grid.levels
    zero = (torch.rand(16, groups, generator=torch.Generator().manual_seed(seed)) * grid.levels).round()
    return weight, scale.to(scale_dtype).float(), zero


@SCALE_DTYPES
@SYMMETRIC
@GROUPS
@BITS
def test_fake_quantize_is_what_the_codes_stand_for(
    bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    grid = Grid(bits, group_size, symmetric)
    weight, scale, zero = any_parameters(grid, scale_dtype)
    stored = quantize(weight, scale, zero, grid, scale_dtype)
    assert_same(fake_quantize(weight, scale, zero, grid) + 0.0, stored.dequantize() + 0.0)
    assert_same(stored.scale.float(), scale)
    assert_same(stored.zero_point.float(), zero)


@SYMMETRIC
@BITS
def test_fake_quantize_of_a_range_is_round_to_nearest(bits: int, symmetric: bool) -> None:
    """With the differentiable scale and zero point, whose straight-through sums must round to the very grid point."""
    grid, weight = Grid(bits, 3, symmetric), hard_weights()
    low, high = group_range(weight.view(weight.shape[0], -1, 3), grid)
    scale, zero = grid_parameters(low, high, grid, torch.bfloat16)
    expected = round_to_nearest(weight, grid, torch.bfloat16)
    assert_same(scale, expected.scale.float())
    assert_same(zero, expected.zero_point.float())
    assert_same(fake_quantize(weight, scale, zero, grid) + 0.0, expected.dequantize() + 0.0)


def test_straight_through_has_one_value_and_the_others_gradient() -> None:
    value = torch.tensor([0.3, 1.7, -2.5], requires_grad=True)
    result = straight_through(value, value.round())
    assert result.tolist() == [0.0, 2.0, -2.0]
    (gradient,) = torch.autograd.grad((result * torch.tensor([1.0, 2.0, 3.0])).sum(), value)
    assert gradient.tolist() == [1.0, 2.0, 3.0]


class Case:
    """fake_quantize in float64 at a point away from the ends of the range, and its smooth part around that point.

    The smooth part is the same expression with rounding replaced by adding the distance to the rounded value, a constant.
    """

    def __init__(self) -> None:
        self.grid = Grid(3, 4, symmetric=False)
        self.weight = normal(3, 8, seed=11, dtype=torch.float64)
        self.scale = normal(3, 2, seed=12, dtype=torch.float64).abs() * 0.1 + 0.2
        self.zero = torch.tensor([[3.0, 1.0], [5.0, 7.0], [0.0, 4.0]], dtype=torch.float64)
        self.out = normal(3, 8, seed=13, dtype=torch.float64)
        position = self.position(self.weight, self.scale, self.zero)
        # What rounds to a code of the grid is inside, half a step beyond its last codes too.
        self.inside = (position > -0.5) & (position < self.grid.levels + 0.5)
        edge = torch.minimum((position + 0.5).abs(), (position - self.grid.levels - 0.5).abs())
        assert edge.min() > 1e-3
        assert 0.3 < self.inside.double().mean() < 0.9
        self.residual = position.round().clamp(0, self.grid.levels) - self.clamped(position)

    def clamped(self, position: Tensor) -> Tensor:
        return position.clamp(-0.5, self.grid.levels + 0.5)

    def position(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return weight.view(3, 2, 4) / scale[..., None] + zero[..., None]

    def smooth(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        steps = self.clamped(self.position(weight, scale, zero)) + self.residual
        return ((scale[..., None] * (steps - zero[..., None])).view(3, 8) * self.out).sum()

    def gradients(self) -> tuple[Tensor, ...]:
        tensors = [tensor.clone().requires_grad_() for tensor in (self.weight, self.scale, self.zero)]
        w_hat = fake_quantize(tensors[0], tensors[1], tensors[2], self.grid)
        return torch.autograd.grad((w_hat * self.out).sum(), tensors)


def test_weight_gradient_is_one_inside_the_range_and_nothing_outside() -> None:
    case = Case()
    gradient = case.gradients()[0]
    assert_close(gradient, case.out * case.inside.view(3, 8))
    assert_close(gradient, numeric_gradient(lambda weight: case.smooth(weight, case.scale, case.zero), case.weight))


def test_scale_gradient_is_that_of_the_smooth_part() -> None:
    case = Case()
    numeric = numeric_gradient(lambda scale: case.smooth(case.weight, scale, case.zero), case.scale)
    assert_close(case.gradients()[1], numeric)


def test_zero_point_gradient_is_that_of_the_smooth_part() -> None:
    case = Case()
    gradient = case.gradients()[2]
    assert_close(gradient, numeric_gradient(lambda zero: case.smooth(case.weight, case.scale, zero), case.zero))
    outside = (case.out.view(3, 2, 4) * ~case.inside).sum(-1)
    assert_close(gradient, -case.scale * outside)


def test_an_offset_is_added_in_steps_and_its_gradient_is_the_weights_times_the_scale() -> None:
    """round(W / scale + offset) is what round((W + scale · offset) / scale) would be, with the same gradients."""
    case = Case()
    offset = normal(3, 8, seed=14, dtype=torch.float64).clamp(-0.5, 0.5).requires_grad_()
    parts = [tensor.clone().requires_grad_() for tensor in (case.weight, case.scale, case.zero)]
    together = fake_quantize(*parts, case.grid, offset)
    moved = parts[0] + (parts[1].unsqueeze(-1) * offset.view(3, 2, 4)).view(3, 8)
    apart = fake_quantize(moved, *parts[1:], case.grid)
    assert_close(together, apart)
    for fused, plain in zip(
        torch.autograd.grad((together * case.out).sum(), [*parts, offset]),
        torch.autograd.grad((apart * case.out).sum(), [*parts, offset]),
        strict=True,
    ):
        assert_close(fused, plain)


def test_w_hat_in_another_dtype_is_rounded_once_and_its_gradient_widened() -> None:
    weight, grid = normal(4, 16).requires_grad_(), Grid(3, 8, symmetric=False)
    scale, zero = grid_parameters(*group_range(weight.detach().view(4, 2, 8), grid), grid, torch.float32)
    wide, narrow = (fake_quantize(weight, scale, zero, grid, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert_same(narrow, wide.bfloat16())
    out = normal(4, 16, seed=3).bfloat16()
    assert_same(torch.autograd.grad(narrow, weight, out)[0], torch.autograd.grad(wide, weight, out.float())[0])


@pytest.mark.parametrize("side", ["low", "high"])
@SYMMETRIC
def test_range_gradient_passes_both_roundings(symmetric: bool, side: str) -> None:
    """Of scale and zero point in the bounds: both are rounded, and both roundings are straight-through."""
    grid = Grid(4, 4, symmetric)
    bounds = {
        "low": torch.tensor([[-1.0, -0.3], [-0.7, -2.0]], dtype=torch.float64),
        "high": torch.tensor([[0.4, 1.1], [1.9, 0.6]], dtype=torch.float64),
    }
    to_scale, to_zero = (normal(2, 2, seed=seed, dtype=torch.float64) for seed in (1, 2))

    def smooth(bound: Tensor) -> Tensor:
        low, high = {**bounds, side: bound}["low"], {**bounds, side: bound}["high"]
        if symmetric:
            size = 2 * torch.maximum(-low, high) / 15
            return (torch.where(high > -low, -size, size) * to_scale).sum()
        scale = (high - low) / 15
        return (scale * to_scale + -low / scale * to_zero).sum()

    bound = bounds[side].clone().requires_grad_()
    moved = {**bounds, side: bound}
    scale, zero = grid_parameters(moved["low"], moved["high"], grid, torch.bfloat16)
    assert_same(scale.detach(), scale.detach().bfloat16().double())
    assert_same(zero.detach(), zero.detach().round())
    (gradient,) = torch.autograd.grad((scale * to_scale + zero * to_zero).sum(), bound)
    assert_close(gradient, numeric_gradient(smooth, bounds[side]))


# --- properties -------------------------------------------------------------------------------------------------------


@st.composite
def weights_and_grids(draw: st.DrawFn) -> tuple[Tensor, Grid, torch.dtype]:
    """Any small matrix with at least one zero in each group, any grid."""
    rows, groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(2, 5))
    magnitude = 10.0 ** draw(st.integers(-20, 20))
    values = st.floats(-1, 1, width=32)
    flat = draw(st.lists(values, min_size=rows * groups * size, max_size=rows * groups * size))
    weight = torch.tensor(flat).view(rows, groups, size) * magnitude
    weight[..., draw(st.integers(0, size - 1))] = 0
    grid = Grid(draw(st.integers(1, 8)), size if groups > 1 else None, draw(st.booleans()))
    return weight.view(rows, groups * size), grid, draw(st.sampled_from([torch.float32, torch.bfloat16]))


PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
Drawn = tuple[Tensor, Grid, torch.dtype]


@PROPERTY
@given(weights_and_grids())
def test_codes_are_in_range(drawn: Drawn) -> None:
    weight, grid, scale_dtype = drawn
    result = round_to_nearest(weight, grid, scale_dtype)
    assert result.codes.max() <= grid.levels
    assert result.zero_point.max() <= grid.levels
    assert (result.scale > 0).all()
    assert result.scale.dtype == scale_dtype


@PROPERTY
@given(weights_and_grids())
def test_zero_is_on_the_grid(drawn: Drawn) -> None:
    weight, grid, scale_dtype = drawn
    w_hat = round_to_nearest(weight, grid, scale_dtype).dequantize()
    assert (weight == 0).any()
    assert (w_hat[weight == 0] == 0).all()


@PROPERTY
@given(weights_and_grids())
def test_values_on_the_grid_keep_their_codes(drawn: Drawn) -> None:
    weight, grid, scale_dtype = drawn
    once = round_to_nearest(weight, grid, scale_dtype)
    again = quantize(once.dequantize(), once.scale.float(), once.zero_point.float(), grid, scale_dtype)
    assert_same_weight(again, once)


@PROPERTY
@given(weights_and_grids())
def test_error_is_half_a_step_at_most_inside_the_range(drawn: Drawn) -> None:
    weight, grid, scale_dtype = drawn
    result = round_to_nearest(weight, grid, scale_dtype)
    scale, zero = result.scale.double()[..., None], result.zero_point.double()[..., None]
    grouped = weight.double().view(*result.scale.shape, -1)
    error = (result.dequantize().double().view_as(grouped) - grouped).abs()
    lowest, highest = -zero * scale, (grid.levels - zero) * scale
    outside = torch.maximum(lowest - grouped, grouped - highest).clamp(min=0)
    # The position of a weight, up to `levels` steps, is computed in float32.
    slack = scale * grid.levels * RELATIVE[torch.float32]
    assert (error <= torch.maximum(0.5 * scale, outside) + slack).all()


@PROPERTY
@given(weights_and_grids())
def test_order_is_kept(drawn: Drawn) -> None:
    weight, grid, scale_dtype = drawn
    size = grid.group_size or weight.shape[1]
    ordered = weight.view(weight.shape[0], -1, size).sort(-1).values.view_as(weight)
    codes = round_to_nearest(ordered, grid, scale_dtype).codes.view(weight.shape[0], -1, size).int()
    assert (codes.diff(dim=-1) >= 0).all()


@PROPERTY
@given(weights_and_grids(), st.integers(-10, 10))
def test_a_power_of_two_only_moves_the_scale(drawn: Drawn, exponent: int) -> None:
    weight, grid, scale_dtype = drawn
    weight = torch.where(weight.abs() < 1e-30, 0, weight)
    plain, moved = (round_to_nearest(w, grid, scale_dtype) for w in (weight, weight * 2.0**exponent))
    assert_same(moved.codes, plain.codes)
    assert_same(moved.zero_point, plain.zero_point)
    empty = plain.dequantize().view(*plain.scale.shape, -1).abs().amax(-1) == 0
    expected = plain.scale * 2.0**exponent
    assert_same(torch.where(empty, 0, moved.scale), torch.where(empty, 0, expected))


def test_grids_are_values() -> None:
    """They are part of a content address: equal settings are one grid."""
    grid = Grid(4, 32, symmetric=True)
    assert replace(grid, bits=3) == Grid(3, 32, symmetric=True)
    assert len({grid, Grid(4, 32, symmetric=True)}) == 1
    assert (grid.levels, grid.middle) == (15, 8)
