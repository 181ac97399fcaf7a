"""The quantized linear: round-to-nearest at the start, its parts' gradients, and codes that do not depend on autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from material import assert_same_weight, hard_weights, incremented, linear_of, normal, numeric_gradient
from tolerances import assert_close, assert_same
from torch import Tensor, nn
from torch.nn import functional

from lsi.factors import MANY
from lsi.grid import Grid, round_to_nearest
from lsi.increment import KINDS, Increment, Kind
from lsi.linear import Clipping, Parts, QuantizedLinear

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
GROUPS = pytest.mark.parametrize("group_size", [3, None], ids=["group", "channel"])
KIND = pytest.mark.parametrize("kind", sorted(KINDS))


def make(
    weight: Tensor,
    grid: Grid,
    *,
    clipping: bool | Clipping = False,
    increment: Kind = "none",  # with small parameters for small matrices
    scale_dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
    rounding: bool = False,
) -> QuantizedLinear:
    bounds: Clipping = clipping if isinstance(clipping, str) else ("learned" if clipping else "none")
    parts = Parts(bounds, Increment(increment, corner=3, band=1), rounding, scale_dtype)
    return QuantizedLinear(linear_of(weight, bias), grid, parts)


def move(linear: QuantizedLinear, size: float = 0.3) -> QuantizedLinear:
    """Away from the start, each parameter to its own random place."""
    for seed, parameter in enumerate(linear.parameters()):
        parameter.data += size * normal(*parameter.shape, seed=50 + seed).to(parameter.dtype)
    return linear


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@KIND
@SYMMETRIC
@GROUPS
@BITS
def test_begins_at_round_to_nearest(
    bits: int, group_size: int | None, symmetric: bool, kind: str, scale_dtype: torch.dtype
) -> None:
    grid = Grid(bits, group_size, symmetric)
    weight = hard_weights()[-120:]
    linear = make(weight, grid, increment=kind, scale_dtype=scale_dtype)
    assert_same_weight(linear.quantized(), round_to_nearest(weight, grid, scale_dtype))


@KIND
@SYMMETRIC
def test_stays_round_to_nearest_of_the_moved_weight(symmetric: bool, kind: str) -> None:
    """The range follows W'."""
    grid = Grid(3, 4, symmetric)
    linear = move(make(normal(6, 8), grid, increment=kind))
    moved = incremented(linear.increment, linear.weight).detach()
    assert (kind == "none") == torch.equal(moved, linear.weight)
    assert_same_weight(linear.quantized(), round_to_nearest(moved, grid, torch.float32))


@pytest.mark.parametrize("bias", [None, normal(6, seed=3)], ids=["plain", "bias"])
@pytest.mark.parametrize("clipping", [True, False], ids=["clipping", "range"])
@KIND
@SYMMETRIC
@BITS
def test_forward_computes_with_what_is_stored(
    bits: int, symmetric: bool, kind: str, clipping: bool, bias: Tensor | None
) -> None:
    grid = Grid(bits, 4, symmetric)
    linear = move(make(normal(6, 8), grid, clipping=clipping, increment=kind, scale_dtype=torch.bfloat16, bias=bias))
    x = normal(2, 5, 8, seed=9)
    assert_same(linear(x), functional.linear(x, linear.quantized().dequantize(), bias))


def test_only_clipping_and_increment_are_trained() -> None:
    grid = Grid(3, 4, symmetric=False)
    linear = make(normal(6, 8), grid, clipping=True, increment="diagonal", bias=normal(6))
    assert {name for name, _ in linear.named_parameters()} == {
        "clipping.lower",
        "clipping.upper",
        "increment.diagonal",
    }
    linear(normal(2, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in linear.parameters())
    assert linear.weight.grad is None
    assert linear.bias is not None
    assert linear.bias.grad is None


def test_half_precision_weights_are_computed_with_in_float32() -> None:
    weight, bias = normal(6, 8).bfloat16(), normal(6, seed=1).bfloat16()
    linear = make(weight, Grid(3, 4, symmetric=False), increment="diagonal", bias=bias)
    assert_same(linear.weight, weight)
    assert_same(incremented(linear.increment, linear.weight.float()), weight.float())
    assert linear.bias is not None
    assert_same(linear.bias, bias.float())
    assert {parameter.dtype for parameter in linear.parameters()} == {torch.float32}


def test_group_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="3 does not divide 8"):
        make(normal(6, 8), Grid(3, 3, symmetric=False))


# --- clipping ---------------------------------------------------------------------------------------------------------


def clip(linear: QuantizedLinear, lower: float, upper: float) -> QuantizedLinear:
    assert linear.clipping is not None
    linear.clipping.lower.data.fill_(lower)
    linear.clipping.upper.data.fill_(upper)
    return linear


@SYMMETRIC
@BITS
def test_clipping_begins_just_inside_the_range(bits: int, symmetric: bool) -> None:
    weight, grid = normal(6, 8), Grid(bits, 4, symmetric)
    plain = round_to_nearest(weight, grid, torch.float32)
    clipped = make(weight, grid, clipping=True).quantized()
    assert_close(clipped.scale, plain.scale * torch.tensor(4.0).sigmoid())
    assert (plain.zero_point.int() - clipped.zero_point.int()).abs().max() == 0


@SYMMETRIC
@BITS
def test_open_clipping_is_round_to_nearest(bits: int, symmetric: bool) -> None:
    """sigmoid(100) is 1 in float32."""
    weight, grid = hard_weights()[-120:], Grid(bits, 3, symmetric)
    linear = clip(make(weight, grid, clipping=True), 100, 100)
    assert_same_weight(linear.quantized(), round_to_nearest(weight, grid, torch.float32))


def test_each_bound_has_its_own_number() -> None:
    """sigmoid(0) = 1/2 halves the bound it belongs to."""
    weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    linear = make(weight, Grid(2, None, symmetric=False), clipping=True)
    lower, upper = clip(linear, 0, 100).quantized(), clip(linear, 100, 0).quantized()
    assert lower.scale.item() == pytest.approx((2.0 + 0.5) / 3)
    assert upper.scale.item() == pytest.approx((1.0 + 1.0) / 3)


def test_symmetric_clipping_is_the_wider_bound() -> None:
    """Both are parts of the further end; where the upper one is the wider, the scale is negative."""
    weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    linear = make(weight, Grid(2, None, symmetric=True), clipping=True)
    assert clip(linear, 0, 0).quantized().scale.item() == pytest.approx(2 * 1.0 / 3)
    assert clip(linear, 0, 100).quantized().scale.item() == pytest.approx(-2 * 2.0 / 3)
    linear = clip(linear, 1, -3)
    assert linear.quantized().scale.item() == pytest.approx(2 * 2.0 * torch.tensor(1.0).sigmoid().item() / 3)
    assert linear.quantized().zero_point.item() == 2
    linear(torch.eye(4)).square().sum().backward()
    assert linear.clipping is not None
    assert linear.clipping.upper.grad is not None
    assert linear.clipping.lower.grad is not None
    assert linear.clipping.upper.grad.item() == 0
    assert linear.clipping.lower.grad.item() != 0


# --- gradients --------------------------------------------------------------------------------------------------------


class Case:
    """A moved linear in float64, and the smooth part of Σ out · W_hat around it.

    Written out from the formulas: rounding (of scale, zero point, codes) adds a constant, and the range is a constant.
    """

    def __init__(self, kind: str, symmetric: bool) -> None:
        self.grid = Grid(3, 4, symmetric)
        self.linear = make(
            normal(4, 8, seed=21), self.grid, clipping=True, increment=kind, scale_dtype=torch.bfloat16
        ).double()
        move(clip(self.linear, 1, 1))
        self.values = {name: parameter.detach().clone() for name, parameter in self.linear.named_parameters()}
        self.out = normal(4, 8, seed=22, dtype=torch.float64)
        grouped = self.moved(self.values).view(4, 2, 4)
        self.low, self.high = grouped.amin(-1), grouped.amax(-1)
        assert (self.low < 0).all()
        assert (self.high > 0).all()
        if symmetric:
            self.high = torch.maximum(-self.low, self.high)
            self.low = -self.high
        self.residual = {"scale": torch.zeros(()), "zero": torch.zeros(()), "steps": torch.zeros(())}
        # Each rounding takes in what the ones before it have rounded.
        for part in self.residual:
            value = self.parts(self.values)[part]
            rounded = value.bfloat16().double() if part == "scale" else value.round().clamp(0, 7)
            self.residual[part] = rounded - value
        steps = self.parts(self.values)["position"]
        # What rounds to a code of the grid is inside, half a step beyond its last codes too.
        self.inside = (steps > -0.5) & (steps < 7.5)
        assert torch.minimum((steps + 0.5).abs(), (steps - 7.5).abs()).min() > 1e-3
        assert not self.inside.all()

    def moved(self, values: dict[str, Tensor]) -> Tensor:
        module: Any = self.linear.increment
        weight = self.linear.weight
        if hasattr(module, "left"):
            return weight + module.left @ torch.diag(module._unit(values["increment.diagonal"])) @ module.right
        if hasattr(module, "step"):
            return weight + values["increment.increment"] * module.step.squeeze(-1).repeat_interleave(4, dim=1)
        return weight

    def parts(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        low = self.low * values["clipping.lower"].sigmoid()
        high = self.high * values["clipping.upper"].sigmoid()
        span = (2 * torch.where(high > -low, -high, -low) if self.grid.symmetric else high - low) / 7
        scale = span + self.residual["scale"]
        zero = torch.full_like(span, 4) if self.grid.symmetric else -low / span + self.residual["zero"]
        position = self.moved(values).view(4, 2, 4) / scale[..., None] + zero[..., None]
        return {
            "scale": scale,
            "zero": zero,
            "position": position,
            "steps": position.clamp(-0.5, 7.5) + self.residual["steps"],
        }

    def smooth(self, values: dict[str, Tensor]) -> Tensor:
        parts = self.parts(values)
        w_hat = parts["scale"][..., None] * (parts["steps"] - parts["zero"][..., None])
        return (w_hat.view(4, 8) * self.out).sum()

    def gradient(self, name: str) -> Tensor:
        self.linear.zero_grad()
        # W_hatᵀ, by way of the forward pass.
        (self.linear(torch.eye(8, dtype=torch.float64)).T * self.out).sum().backward()
        gradient = self.linear.get_parameter(name).grad
        assert gradient is not None
        return gradient


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, f"clipping.{side}") for kind in ("diagonal", "dense") for side in ("lower", "upper")),
        ("diagonal", "increment.diagonal"),
        ("dense", "increment.increment"),
    ],
)
@SYMMETRIC
def test_gradient_is_that_of_the_smooth_part(symmetric: bool, kind: str, name: str) -> None:
    case = Case(kind, symmetric)
    numeric = numeric_gradient(lambda value: case.smooth({**case.values, name: value}), case.values[name])
    assert numeric.abs().max() > 0
    assert_close(case.gradient(name), numeric)


@SYMMETRIC
def test_diagonal_gradient_is_that_of_the_unclipped_weights(symmetric: bool) -> None:
    """u_jᵀ G v_j, with G the gradient at W': zero where W' is clipped."""
    case = Case("diagonal", symmetric)
    left, right = (case.linear.increment.get_buffer(name) for name in ("left", "right"))
    at_weight = case.out * case.inside.view(4, 8)
    unit = case.linear.increment._unit(torch.ones(4, dtype=torch.float64))
    assert_close(case.gradient("increment.diagonal"), unit * torch.diagonal(left.T @ at_weight @ right.T))


# --- autocast ---------------------------------------------------------------------------------------------------------


@KIND
@SYMMETRIC
def test_codes_do_not_depend_on_autocast(symmetric: bool, kind: str) -> None:
    linear = move(make(normal(24, 32), Grid(8, 16, symmetric), clipping=True, increment=kind))
    plain = linear.quantized()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_weight(linear.quantized(), plain)


def test_products_follow_autocast_and_its_weights_are_the_stored_ones() -> None:
    linear = move(make(normal(24, 32), Grid(4, 16, symmetric=False), clipping=True, increment="diagonal"))
    x = normal(5, 32, seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(x)
        expected = functional.linear(x, linear.quantized().dequantize())
    assert output.dtype == torch.bfloat16
    assert_same(output, expected)
    assert_close(output.float(), linear(x), torch.bfloat16)


# --- learned rounding and direct bounds -------------------------------------------------------------------------------


def test_an_offset_moves_the_code_by_at_most_one() -> None:
    """round(W / scale + offset): half a step up or down reaches the grid point on the weight's other side, no further."""
    weight, grid = normal(6, 8), Grid(4, 4, symmetric=False)
    linear = make(weight, grid, rounding=True)
    nearest = round_to_nearest(weight, grid, torch.float32)
    assert linear.rounding is not None
    linear.rounding.offset.data = normal(6, 8, seed=9).clamp(-0.5, 0.5)
    result = linear.quantized()
    grouped = weight.view(6, 2, 4) / result.scale[..., None] + linear.rounding.offset.view(6, 2, 4)
    expected = (grouped.round() + result.zero_point[..., None]).clamp(0, 15)
    assert_same(result.codes.float(), expected.view(6, 8).detach())
    change = result.codes.int() - nearest.codes.int()
    assert change.abs().max() == 1


def test_an_offsets_gradient_is_the_scale_times_the_weights() -> None:
    linear = make(normal(6, 8), Grid(3, 4, symmetric=False), rounding=True)
    out = normal(8, 6)
    (linear(torch.eye(8)) * out).sum().backward()
    scale = linear.quantized().scale.repeat_interleave(4, dim=1)
    assert linear.rounding is not None
    assert_close(linear.rounding.offset.grad, scale * out.T)


@SYMMETRIC
def test_direct_bounds_are_the_range_times_their_factors(symmetric: bool) -> None:
    weight, grid = normal(6, 8), Grid(3, 4, symmetric)
    linear = make(weight, grid, clipping="direct")
    assert_same_weight(linear.quantized(), round_to_nearest(weight, grid, torch.float32))
    clip(linear, 0.5, 0.5)
    halved = linear.quantized().scale
    assert_close(halved, round_to_nearest(weight, grid, torch.float32).scale / 2)


# --- memory -----------------------------------------------------------------------------------------------------------


class Plain(QuantizedLinear):
    """The forward pass with all that lies between kept, and the plain form of rounding straight-through."""

    def forward(self, x: Tensor) -> Tensor:
        weight, scale, zero = self.transformed()
        grouped, scale, zero = weight.view(*scale.shape, -1), scale[..., None], zero[..., None] - self.grid.middle
        steps = grouped / scale + zero
        rounded = steps + (steps.round() - steps).detach()
        codes = rounded.clamp(-self.grid.middle, self.grid.middle - 1)
        return functional.linear(x, (scale * (codes - zero)).view_as(weight), self.bias)


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("autocast", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["diagonal", "corner", "band", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["stored fp32", "stored bf16"])
def test_equals_the_plain_linear(kind: Kind, dtype: torch.dtype, autocast: bool, recompute: bool) -> None:
    """Outputs to the last bit, gradients up to the order of their sums; several pieces of rows, and a rest."""
    weight, x, out = normal(700, 256).to(dtype), normal(3, 5, 256, seed=1), normal(3, 5, 700, seed=2)
    parts = Parts("learned", Increment(kind, corner=3), False, torch.bfloat16)
    results = []
    for made in (Plain, QuantizedLinear):
        linear = move(made(linear_of(weight), Grid(3, 32, symmetric=False), parts, recompute=recompute))
        entrance = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = linear(entrance)
        output.backward(out.to(output.dtype))
        results.append((output, entrance.grad, *(p.grad for p in linear.parameters())))
    plain, ours = results
    assert_same(ours[0], plain[0])
    for gradient, expected in zip(ours[1:], plain[1:], strict=True):
        assert_close(gradient, expected)


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_recomputing_changes_no_bit(kind: Kind) -> None:
    results = []
    for recompute in (True, False):
        parts = Parts("learned", Increment(kind), True, torch.bfloat16)
        linear = QuantizedLinear(linear_of(normal(700, 256)), Grid(3, 32, symmetric=False), parts, recompute=recompute)
        output = move(linear)(normal(5, 256, seed=1))
        output.square().sum().backward()
        results.append([output, *(p.grad for p in linear.parameters())])
    for ours, kept in zip(*results, strict=True):
        assert_same(ours, kept)


class Saved:
    """The largest number of bytes that autograd holds at once, in tensors of `numel` numbers."""

    def __init__(self, numel: int) -> None:
        self.numel, self.held, self.most = numel, 0, 0

    def pack(self, tensor: Tensor) -> Tensor:
        self.held += tensor.numel() == self.numel
        self.most = max(self.most, self.held)
        return tensor


def test_nothing_of_a_weights_size_is_kept_between_the_passes() -> None:
    weight = normal(64, 96)
    for recompute, kept in ((True, False), (False, True)):
        parts = Parts("learned", Increment("diagonal"), False, torch.float32)
        linear = QuantizedLinear(linear_of(weight), Grid(3, 32, symmetric=False), parts, recompute=recompute)
        saved = Saved(weight.numel())
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            output = linear(normal(5, 96, seed=1))
        assert (saved.most > 0) == kept
        output.sum().backward()


def test_the_weight_is_shared_and_left_alone() -> None:
    stored = linear_of(normal(6, 8).bfloat16())
    before = stored.weight.detach().clone()
    linear = QuantizedLinear(
        stored, Grid(3, 4, symmetric=False), Parts("learned", Increment("diagonal"), False, torch.float32)
    )
    linear(normal(2, 8)).sum().backward()
    assert linear.weight.data_ptr() == stored.weight.data_ptr()
    assert_same(stored.weight.detach(), before)


def test_large_linears_are_recomputed_unless_told_otherwise() -> None:
    parts = Parts("none", Increment("none"), False, torch.float32)
    grid = Grid(4, None, symmetric=True)
    with torch.device("meta"):
        sizes = [nn.Linear(MANY // 8, 8), nn.Linear(MANY // 8 - 1, 8)]
    assert [QuantizedLinear(linear, grid, parts).recompute for linear in sizes] == [True, False]
    assert not QuantizedLinear(sizes[0], grid, parts, recompute=False).recompute
