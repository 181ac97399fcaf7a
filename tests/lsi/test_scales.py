"""Scales trained end to end: against references, and that only scales change."""

from __future__ import annotations

import pytest
import torch
from material import make_layer, make_task, normal
from tolerances import assert_close
from torch import nn

from lsi.block import load_quantized, round_block, run_block
from lsi.grid import Grid, QuantizedWeight, round_to_nearest
from lsi.scales import (
    ScaledLinear,
    adam_step,
    divergence,
    finite,
    head_pass,
    initial_state,
    replace_by_scaled,
    scaled,
)

GRID = Grid(2, 16, symmetric=False)


def quantized(dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    return round_to_nearest(normal(24, 32), GRID, dtype)


def test_it_computes_as_the_dequantized_weight_does() -> None:
    weight, x, bias = quantized(), normal(5, 32, seed=1), normal(24, seed=2)
    linear = ScaledLinear(weight, bias)
    assert_close(linear(x), nn.functional.linear(x, weight.dequantize(), bias))


def test_its_gradients_are_those_of_the_formula() -> None:
    weight, x, factor = quantized(), normal(3, 5, 32, seed=1), 1 + 0.1 * normal(24, 2, seed=2)
    linear = ScaledLinear(weight, None)
    linear.put(factor)
    entering = x.clone().requires_grad_()
    linear(entering).square().sum().backward()

    plain_x, plain = x.clone().requires_grad_(), factor.clone().requires_grad_()
    steps = weight.codes.view(24, 2, 16).float() - weight.zero_point.float().unsqueeze(-1)
    made = (steps * (plain * weight.scale).unsqueeze(-1)).view(24, 32)
    nn.functional.linear(plain_x, made).square().sum().backward()
    assert linear.factor.grad is not None
    assert plain.grad is not None
    assert_close(linear.factor.grad, plain.grad)
    assert plain_x.grad is not None
    assert_close(entering.grad, plain_x.grad)


def test_a_scale_that_its_dtype_cannot_hold_stays_as_it_was() -> None:
    weight = quantized(torch.float16)
    weight.scale[0, 0], weight.scale[1, 0] = 6e-8, 6e4
    factor = torch.ones(24, 2)
    factor[0, 0], factor[1, 0] = 0.5, 1.5
    stored = scaled(weight, factor)
    assert torch.equal(stored.scale, weight.scale)


def test_weights_are_made_again_where_that_is_asked_for() -> None:
    weight, x = quantized(), normal(5, 32, seed=1)
    kept, again = ScaledLinear(weight, None), ScaledLinear(weight, None, recompute=True)
    assert torch.equal(kept(x), again(x))
    assert kept.kept is not None
    assert again.kept is None


def test_a_factor_put_in_anew_counts_at_once() -> None:
    weight, x = quantized(), normal(5, 32, seed=1)
    linear = ScaledLinear(weight, None)
    before = linear(x)
    linear.put(torch.full_like(linear.factor, 1.5))
    assert_close(linear(x), 1.5 * before)


def test_what_is_trained_is_what_is_stored() -> None:
    weight, factor = quantized(torch.bfloat16), 1 + 0.1 * normal(24, 2, seed=2)
    linear = ScaledLinear(weight, None)
    linear.put(factor)
    stored = scaled(weight, factor)
    assert stored.scale.dtype == torch.bfloat16
    assert torch.equal(linear.present_scale(), stored.scale.float())
    assert torch.equal(stored.codes, weight.codes)
    assert torch.equal(stored.zero_point, weight.zero_point)


def test_a_block_computes_as_a_loader_does() -> None:
    layer, task = make_layer(), make_task()
    names = ["self_attn.q_proj", "mlp.down_proj"]
    weights = round_block(layer, names, GRID, torch.float32)
    loaded = make_layer()
    load_quantized(loaded, weights)
    linears = replace_by_scaled(layer, weights)
    assert sorted(linears) == sorted(names)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [f"{name}.factor" for name in names]
    assert_close(run_block(layer, task.inputs, task.arguments), run_block(loaded, task.inputs, task.arguments))


def reference_divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Of each token, by the library's own function."""
    log = ours.log_softmax(-1), theirs.log_softmax(-1)
    return nn.functional.kl_div(*log, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("tokens", [1, 14, 400])
def test_the_divergence_and_its_gradient_are_the_librarys(tokens: int) -> None:
    ours, theirs = normal(tokens, 1100).requires_grad_(), normal(tokens, 1100, seed=1)
    reference = reference_divergence(ours, theirs)
    reference.sum().backward()
    losses, gradient = divergence(ours.detach(), theirs)
    assert_close(losses, reference.detach())
    assert_close(gradient, ours.grad)


def test_equal_logits_have_no_divergence_and_no_gradient() -> None:
    logits = normal(14, 11)
    assert [float(part.abs().max()) for part in divergence(logits, logits)] == [0, 0]


def test_far_logits_have_a_finite_divergence() -> None:
    """Where probabilities underflow."""
    ours, theirs = torch.tensor([[0.0, 300.0]]), torch.tensor([[300.0, 0.0]])
    losses, gradient = divergence(ours, theirs)
    assert losses.tolist() == [300]
    assert gradient.tolist() == [[-1, 1]]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [5, 300, 512])
def test_the_head_in_pieces_gives_the_whole_ones_loss_and_gradient(batch: int, length: int) -> None:
    weight, hidden, target = normal(13, 6), normal(batch, length, 6, seed=1), normal(batch, length, 6, seed=2)

    def head(states: torch.Tensor) -> torch.Tensor:
        return states @ weight.t()

    total, gradient = head_pass(head, hidden, target, backward=True)
    whole = hidden.clone().requires_grad_()
    loss = reference_divergence(head(whole), head(target)).sum()
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    assert gradient is not None
    assert_close(gradient, whole.grad)
    assert head_pass(head, hidden, target, backward=False) == (pytest.approx(total), None)


def test_steps_from_stored_moments_are_those_of_one_optimizer() -> None:
    steps = [{"a": normal(4, 3, seed=seed)} for seed in range(5)]
    state = initial_state(steps[0])
    for done, gradients in enumerate(steps):
        state = {name: tensor.clone() for name, tensor in adam_step(state, gradients, 1e-2, done, 5).items()}
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for gradients in steps:
        parameter.grad = gradients["a"].clone()
        optimizer.step()
        schedule.step()
    assert_close(state["value/a"], parameter.detach())


def test_what_is_not_finite_is_noticed() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("inf")])
    assert finite({"a": good})
    assert not finite({"a": good, "b": bad})
