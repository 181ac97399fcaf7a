"""Activations on the grid: against the formula, token by token, the gradient through the range, and attention's operands."""

from __future__ import annotations

import pytest
import torch
from material import NAMES, linear_of, make_layer, make_task, normal, numeric_gradient
from tolerances import assert_close, assert_same
from torch import Tensor
from torch.nn import functional

from lsi.activations import quantize_inputs, quantize_tokens, quantized_attention
from lsi.block import load_quantized, replace_linears, round_block, run_block
from lsi.grid import Grid
from lsi.increment import Increment
from lsi.linear import Parts

BITS = pytest.mark.parametrize("bits", [4, 6, 8])
GRIDS = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def with_outliers(*shape: int, seed: int = 0) -> Tensor:
    x = normal(*shape, seed=seed)
    x[..., 3] *= 20
    return x


def reference(token: Tensor, bits: int, symmetric: bool) -> Tensor:
    """One token, in words of one value each."""
    low, high = min(float(token.min()), 0.0), max(float(token.max()), 0.0)
    half, levels = 2 ** (bits - 1), 2**bits - 1
    scale = torch.tensor((2 * max(-low, high) if symmetric else high - low) / levels)
    zero = 0.0 if symmetric else float(torch.round(torch.tensor(-half - low / float(scale))).clamp(-half, half - 1))
    codes = torch.tensor([float(torch.round(v / scale + zero).clamp(-half, half - 1)) for v in token])
    return (codes - zero) * scale


@BITS
@GRIDS
def test_each_token_by_the_formula(bits: int, symmetric: bool) -> None:
    x = with_outliers(5, 12)
    expected = torch.stack([reference(token, bits, symmetric) for token in x])
    assert_close(quantize_tokens(x, Grid(bits, None, symmetric)), expected)


@BITS
@GRIDS
def test_a_token_does_not_depend_on_its_neighbours(bits: int, symmetric: bool) -> None:
    grid = Grid(bits, None, symmetric)
    x = with_outliers(3, 4, 24)
    together = quantize_tokens(x, grid)
    assert_same(together, quantize_tokens(x, grid))
    alone = torch.stack([torch.stack([quantize_tokens(token, grid) for token in sample]) for sample in x])
    assert_same(together, alone)
    assert_same(quantize_tokens(x[:, 1:3], grid), together[:, 1:3])


@BITS
@GRIDS
def test_no_value_moves_by_more_than_half_a_step(bits: int, symmetric: bool) -> None:
    x = with_outliers(50, 16)
    moved = (quantize_tokens(x, Grid(bits, None, symmetric)) - x).abs()
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    step = (2 * torch.maximum(-low, high) if symmetric else high - low) / (2**bits - 1)
    # The asymmetric grid moves by up to half a step itself, so that zero is on it.
    reach = 0.5 if symmetric else 1.0
    assert (moved <= reach * step.unsqueeze(-1) * (1 + 1e-4)).all()


@GRIDS
def test_zeros_and_narrow_dtypes(symmetric: bool) -> None:
    grid = Grid(8, None, symmetric)
    assert_same(quantize_tokens(torch.zeros(2, 4), grid), torch.zeros(2, 4))
    x = with_outliers(4, 16).to(torch.bfloat16)
    assert_same(quantize_tokens(x, grid), quantize_tokens(x.float(), grid).to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(quantize_tokens(x.float(), grid), quantize_tokens(x.float(), grid))


@GRIDS
def test_the_gradient_goes_straight_through_and_through_the_range(symmetric: bool) -> None:
    """With the roundings' offsets held fixed, y = x + offset · scale(x): that function's numeric gradient."""
    grid, x, weight = Grid(4, None, symmetric), normal(2, 9), normal(2, 9, seed=1).double()

    def scale_of(x: Tensor) -> Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return (2 * torch.maximum(-low, high) if symmetric else high - low) / grid.levels

    # Positive extremes of the symmetric grid are clamped, half a step in: there y = (2^(b−1) − 1) · scale.
    offset = ((quantize_tokens(x, grid) - x) / scale_of(x)).double()

    def surrogate(x: Tensor) -> Tensor:
        return ((x + offset * scale_of(x)) * weight).sum()

    leaf = x.clone().requires_grad_()
    (quantize_tokens(leaf, grid).double() * weight).sum().backward()
    assert leaf.grad is not None
    assert_close(leaf.grad.double(), numeric_gradient(surrogate, x.double()), torch.float32)


def test_the_named_linears_read_quantized_inputs() -> None:
    grid = Grid(4, None, symmetric=True)
    linear = linear_of(normal(6, 8), normal(6, seed=1))
    block = torch.nn.ModuleDict({"quantized": linear, "plain": linear_of(normal(6, 8))})
    x = with_outliers(2, 3, 8)
    quantize_inputs(block, ["quantized"], grid)
    assert_same(block["quantized"](x), functional.linear(quantize_tokens(x, grid), linear.weight, linear.bias))
    assert_same(block["plain"](x), functional.linear(x, block["plain"].weight))


@GRIDS
def test_a_block_in_training_computes_as_the_loaded_one(symmetric: bool) -> None:
    """Weights and activations by round-to-nearest in both, bit for bit."""
    task, weights, activations = make_task(bias=True), Grid(4, 32, False), Grid(4, None, symmetric)
    loaded, trained = make_layer(bias=True), make_layer(bias=True)
    load_quantized(loaded, round_block(loaded, NAMES, weights, torch.float32))
    replace_linears(trained, NAMES, weights, Parts("none", Increment("diagonal"), False, torch.float32))
    with torch.no_grad():
        weight_only = run_block(loaded, task.inputs, task.arguments)
    for block in (loaded, trained):
        quantize_inputs(block, NAMES, activations)
    output = run_block(trained, task.inputs, task.arguments)
    assert_same(output, run_block(loaded, task.inputs, task.arguments))
    assert not torch.equal(output, weight_only)


MASKS: dict[str, Tensor | None] = {
    "causal": None,
    "truth": torch.ones(7, 7, dtype=torch.bool).tril().triu(-2)[None, None],
    "added": torch.zeros(1, 1, 7, 7).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), torch.finfo().min),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", [1, 2, 4], ids=["one-kv-head", "grouped", "no-groups"])
@pytest.mark.parametrize("operands", [4, 8])
def test_attention_is_torchs_own_on_quantized_operands(mask: str, heads: int, operands: int) -> None:
    grid = Grid(operands, None, symmetric=False)
    query, key, value = (with_outliers(2, h, 7, 8, seed=s) for s, h in enumerate((4, heads, heads)))
    output = quantized_attention(query, key, value, MASKS[mask], grid, scaling=0.3)
    quantized = [quantize_tokens(operand, grid) for operand in (query, key, value)]
    how = {"attn_mask": MASKS[mask], "is_causal": mask == "causal", "scale": 0.3, "enable_gqa": True}
    assert_close(output, functional.scaled_dot_product_attention(*quantized, **how))


def test_attention_without_a_mask_and_with_soft_capping() -> None:
    grid = Grid(8, None, symmetric=True)
    query, key, value = (with_outliers(1, 2, 5, 8, seed=seed) for seed in range(3))
    q, k, v = (quantize_tokens(operand, grid) for operand in (query, key, value))
    free = quantized_attention(query, key, value, None, grid, scaling=0.5, causal=False)
    assert_close(free, functional.scaled_dot_product_attention(q, k, v, scale=0.5))
    capped = quantized_attention(query, key, value, None, grid, scaling=0.5, softcap=2.0, causal=False)
    assert_close(capped, (2 * torch.tanh(q @ k.mT * 0.5 / 2)).softmax(-1) @ v)


def test_softmax_stays_in_float32() -> None:
    """In bfloat16 the probabilities of a thousand equal tokens would sum to another number than 1."""
    ones = torch.ones(1, 1, 1000, 8, dtype=torch.bfloat16)
    output = quantized_attention(ones, ones, ones, None, Grid(8, None, True), scaling=1.0, causal=False)
    assert output.dtype == torch.bfloat16
    assert_close(output, quantize_tokens(ones, Grid(8, None, True)))
