"""Losses further on and on the quantized stream: equal to references written out, through blocks that stay as they are."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from material import NAMES, Task, make_layer, make_task, normal
from tolerances import assert_close, assert_same
from torch import Tensor, nn

from lsi.block import load_quantized, run_block
from lsi.grid import Grid
from lsi.increment import Increment
from lsi.linear import Parts
from lsi.objective import Call, Frozen, Objective, freeze
from lsi.reconstruct import Method, Reconstruction

METHOD = Method(
    grid=Grid(2, 32, symmetric=False),
    parts=Parts("learned", Increment("diagonal"), False, torch.float32),
    rates={"clipping": 1e-1, "increment": 5e-2},
    total_steps=15,
)


def other_layer(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A block that is not the trained one."""
    layer = make_layer()
    for number, parameter in enumerate(layer.parameters()):
        parameter.data += normal(*parameter.shape, seed=1000 * seed + number) * 0.05
    return layer.to(dtype)


def ahead(task: Task, count: int) -> tuple[Frozen, Task]:
    """The frozen blocks after the trained one, and the task with the full-precision stream after the last of them."""
    blocks = [other_layer(seed) for seed in range(1, count + 1)]
    targets = task.targets
    with torch.no_grad():
        for block in blocks:
            targets = run_block(block, targets, task.arguments)
    calls = tuple(Call(freeze(block, None), task.arguments) for block in blocks)
    return Frozen(calls), replace(task, targets=targets)


def itself(task: Task) -> Frozen:
    return Frozen((), Call(freeze(make_layer(), None), task.arguments))


def relative(output: Tensor, target: Tensor) -> Tensor:
    """The relative loss written out in float64."""
    error = (output.double() - target.double()).square().mean(-1)
    return (error / target.double().square().mean(-1)).log1p()


def rounded(reconstruction: Reconstruction, task: Task) -> Tensor:
    """What a plain layer that was given the codes makes of the inputs."""
    layer = make_layer()
    load_quantized(layer, reconstruction.quantized())
    with torch.no_grad():
        return run_block(layer, task.inputs, task.arguments)


def step(reconstruction: Reconstruction, task: Task, frozen: Frozen) -> float:
    return reconstruction.step(task.inputs, task.targets, task.arguments, frozen)


@pytest.mark.parametrize("count", [1, 2])
def test_the_loss_further_on_is_that_of_the_outputs_through_the_next_blocks(count: int) -> None:
    frozen, task = ahead(make_task(), count)
    reconstruction = Reconstruction(make_layer(), NAMES, METHOD)
    reached = rounded(reconstruction, task)
    for seed in range(1, count + 1):
        with torch.no_grad():
            reached = run_block(other_layer(seed), reached, task.arguments)
    expected = relative(reached, task.targets).mean()
    assert_close(torch.tensor(step(reconstruction, task, frozen)).double(), expected, torch.float32)


def test_gradients_further_on_are_those_of_the_whole_chain() -> None:
    """Against one module that holds both blocks, of which only the first one's weights are trained: its engine sums the second
    one's gradients in another order."""
    frozen, task = ahead(make_task(), 1)
    names = [f"0.{name}" for name in NAMES]

    class Chain(nn.Sequential):
        def forward(self, hidden: Tensor, **arguments: object) -> Tensor:
            for block in self:
                hidden = block(hidden, **arguments)
            return hidden

    chain = Reconstruction(Chain(make_layer(), other_layer(1)), names, METHOD)
    chain.step(task.inputs, task.targets, task.arguments)
    reconstruction = Reconstruction(make_layer(), NAMES, METHOD)
    step(reconstruction, task, frozen)
    for name, parameter in reconstruction.parameters.items():
        assert_close(parameter, chain.parameters[f"0.{name}"])


def test_the_blocks_that_a_loss_passes_stay_as_they_are() -> None:
    frozen, task = ahead(make_task(), 2)
    frozen = replace(frozen, itself=itself(task).itself)
    calls = [*frozen.following, *([frozen.itself] if frozen.itself else [])]
    before = [copy.deepcopy(call.block.state_dict()) for call in calls]
    reconstruction = Reconstruction(make_layer(), NAMES, replace(METHOD, quantized_stream=0.5))
    for _ in range(2):
        step(reconstruction, task, frozen)
    assert len(calls) == 3
    for call, state in zip(calls, before, strict=True):
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in call.block.parameters())
        for name, tensor in call.block.state_dict().items():
            assert_same(tensor, state[name])


def test_training_further_on_improves_what_the_next_block_makes_of_it() -> None:
    frozen, task = ahead(make_task(samples=4), 1)
    reconstruction = Reconstruction(make_layer(), NAMES, METHOD)
    losses = [step(reconstruction, task, frozen) for _ in range(15)]
    assert losses[-1] < 0.95 * losses[0]


def test_with_nothing_further_the_objective_is_the_plain_loss() -> None:
    task = make_task()
    with_none, plain = (Reconstruction(make_layer(), NAMES, METHOD) for _ in range(2))
    for _ in range(3):
        assert step(with_none, task, itself(task)) == plain.step(task.inputs, task.targets, task.arguments)
    for name, parameter in plain.parameters.items():
        assert_same(with_none.parameters[name], parameter)


def test_the_loss_on_the_quantized_stream_is_added_with_its_weight() -> None:
    clean, shifted = make_task(), make_task(seed=1)
    task = replace(
        clean, inputs=clean.inputs + 0.1 * shifted.inputs
    )  # a stream that carries errors, targets that do not
    reconstruction = Reconstruction(make_layer(), NAMES, replace(METHOD, quantized_stream=0.5))
    output = rounded(reconstruction, task)
    with torch.no_grad():
        own = run_block(make_layer(), task.inputs, task.arguments)
    expected = (relative(output, task.targets) + 0.5 * relative(output, own)).mean()
    assert_close(torch.tensor(step(reconstruction, task, itself(task))).double(), expected, torch.float32)


def test_the_loss_on_the_quantized_stream_is_taken_at_the_blocks_own_end() -> None:
    frozen, task = ahead(make_task(), 1)
    frozen = replace(frozen, itself=itself(task).itself)
    output = task.inputs + 1
    plain = Objective("relative").losses(output, task.inputs, task.targets, frozen)
    both = Objective("relative", 0.0, 2.0).losses(output, task.inputs, task.targets, frozen)
    own = relative(output, make_task().targets)
    assert_close((both - plain).double(), 2 * own, torch.float32)


def test_the_quantized_stream_without_its_block_is_refused() -> None:
    task = make_task()
    reconstruction = Reconstruction(make_layer(), NAMES, replace(METHOD, quantized_stream=0.5))
    with pytest.raises(ValueError, match="needs the full-precision block"):
        step(reconstruction, task, Frozen())


@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_a_frozen_block_has_linears_in_the_products_dtype_and_the_rest_in_float32(products: torch.dtype | None) -> None:
    block = freeze(make_layer(dtype=torch.bfloat16), products)
    for name, parameter in block.named_parameters():
        assert parameter.dtype == (torch.float32 if products is None or "norm" in name else products)


def test_bfloat16_products_are_deterministic_and_near_the_plain_ones() -> None:
    method = replace(METHOD, autocast=torch.bfloat16, quantized_stream=0.5)
    frozen, task = ahead(make_task(), 2)
    plain = replace(frozen, itself=itself(task).itself)
    calls = [Call(freeze(other_layer(seed), torch.bfloat16), task.arguments) for seed in (1, 2)]
    narrow = Frozen(tuple(calls), Call(freeze(make_layer(), torch.bfloat16), task.arguments))
    found = [step(Reconstruction(make_layer(), NAMES, method), task, narrow) for _ in range(2)]
    assert found[0] == found[1]
    expected = step(Reconstruction(make_layer(), NAMES, replace(method, autocast=None)), task, plain)
    assert_close(torch.tensor(found[0]), torch.tensor(expected), torch.bfloat16)


def test_a_number_that_is_not_finite_further_on_is_a_status() -> None:
    frozen, task = ahead(make_task(), 1)
    frozen.following[0].block.get_submodule("mlp.down_proj").weight.data[0, 0] = math.nan
    reconstruction = Reconstruction(make_layer(), NAMES, METHOD)
    assert not math.isfinite(step(reconstruction, task, frozen))
    assert reconstruction.status == "non_finite"
