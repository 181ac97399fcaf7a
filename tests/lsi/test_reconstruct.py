"""Block reconstruction: it improves, it is deterministic across any interruption, and it fails as a status."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from material import HIDDEN, NAMES, Task, assert_same_weight, linear_of, make_layer, make_task, normal
from safetensors.torch import load_file, save_file
from tolerances import assert_close, assert_same
from torch import Tensor, nn

from lsi.block import load_quantized, round_block, run_block, sharing_copy
from lsi.engine import TorchAttachment
from lsi.grid import Grid
from lsi.increment import Increment, Kind
from lsi.linear import Clipping, Parts
from lsi.objective import token_losses
from lsi.reconstruct import Method, Reconstruction
from lsi.steps import Steps, cosine
from lsi.steps import linear as straight

METHOD = Method(
    grid=Grid(2, 32, symmetric=False),
    parts=Parts("learned", Increment("diagonal"), False, torch.float32),
    rates={"clipping": 1e-1, "increment": 5e-2, "rounding": 5e-2},
    total_steps=8,
)


def of(clipping: Clipping, kind: Kind, *, rounding: bool = False, steps: Steps = "adamw") -> Method:
    rates = METHOD.rates if steps == "adamw" else dict.fromkeys(METHOD.rates, 5e-2)
    parts = Parts(clipping, Increment(kind, corner=4), rounding, torch.float32)
    return replace(METHOD, parts=parts, steps=steps, rates=rates)


WAYS = {
    "clipping": of("learned", "none"),
    "diagonal": of("none", "diagonal"),
    "corner": of("none", "corner"),
    "band": of("none", "band"),
    "dense": of("none", "dense"),
    "clipping and diagonal": METHOD,
    "clipping and dense": of("learned", "dense"),
    "signed: clipping and rounding": of("direct", "none", rounding=True, steps="signed"),
    "signed: clipping, diagonal and rounding": of("direct", "diagonal", rounding=True, steps="signed"),
}
WAY = pytest.mark.parametrize("way", WAYS)


def begin(method: Method = METHOD, *, bias: bool = False) -> Reconstruction:
    return Reconstruction(make_layer(bias=bias), NAMES, method)


def step(reconstruction: Reconstruction, task: Task) -> float:
    return reconstruction.step(task.inputs, task.targets, task.arguments)


def steps(reconstruction: Reconstruction, numbers: range) -> list[float]:
    """Each step on data of its own."""
    return [step(reconstruction, make_task(seed=number)) for number in numbers]


def gradients_of(reconstruction: Reconstruction) -> dict[str, Tensor]:
    """What the optimizer gets at each step: nobody holds it afterwards."""
    seen: dict[str, Tensor] = {}

    def note(*_: object) -> None:
        seen.update({name: p.grad.clone() for name, p in reconstruction.parameters.items() if p.grad is not None})

    assert isinstance(reconstruction.attachment, TorchAttachment)
    reconstruction.attachment.optimizer.register_step_pre_hook(note)
    return seen


def snapshot(reconstruction: Reconstruction) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in reconstruction.export_state().items()}


def assert_same_state(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_same(actual[name], expected[name])


def assert_same_result(actual: Reconstruction, expected: Reconstruction) -> None:
    assert_same_state(actual.export_state(), expected.export_state())
    for name, quantized in expected.quantized().items():
        assert_same_weight(actual.quantized()[name], quantized)


# --- improves ---------------------------------------------------------------------------------------------------------


def loaded_loss(reconstruction: Reconstruction, task: Task) -> float:
    """The loss of a plain layer that was given the codes."""
    layer = make_layer()
    load_quantized(layer, reconstruction.quantized())
    with torch.no_grad():
        return (
            token_losses(run_block(layer, task.inputs, task.arguments), task.targets, reconstruction.method.loss)
            .mean()
            .item()
        )


@WAY
def test_training_improves_what_a_loader_computes(way: str) -> None:
    task = make_task(samples=4)
    reconstruction = begin(replace(WAYS[way], total_steps=15))
    before = loaded_loss(reconstruction, task)
    for _ in range(15):
        step(reconstruction, task)
    assert reconstruction.status == "ok"
    assert loaded_loss(reconstruction, task) < 0.95 * before


@WAY
def test_the_loss_returned_is_that_of_the_codes_before_the_step(way: str) -> None:
    task, reconstruction = make_task(), begin(WAYS[way])
    for _ in range(2):
        expected = loaded_loss(reconstruction, task)
        assert step(reconstruction, task) == expected


# --- equals a reference -----------------------------------------------------------------------------------------------


def test_losses_are_means_over_channels_in_float32() -> None:
    output = torch.tensor([[[1.0, 2.0], [300.0, 400.0]]]).bfloat16()
    target = torch.tensor([[[0.0, 4.0], [0.0, 400.0]]])
    plain = token_losses(output, target, "mse")
    assert plain.dtype == torch.float32
    assert plain.tolist() == [[2.5, 45000.0]]
    expected = torch.tensor([[2.5 / 8, 45000.0 / 80000]]).log1p()
    assert torch.equal(token_losses(output, target, "relative"), expected)


def test_a_token_that_became_massive_does_not_outweigh_the_others() -> None:
    """A relative error of 10,000 pulls at its own outputs no more than one of 1 does at its."""
    output = torch.tensor([[[101.0] * 4, [2.0] * 4]], requires_grad=True)
    loss = token_losses(output, torch.ones(1, 2, 4), "relative").sum()
    (gradient,) = torch.autograd.grad(loss, output)
    assert loss < 10
    assert gradient[0, 0].abs().max() < gradient[0, 1].abs().max()


def test_the_relative_loss_does_not_depend_on_a_tokens_size() -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(1, 3, 8, generator=generator) for _ in range(2))
    sizes = torch.tensor([1.0, 1024.0, 2.0**-10])[None, :, None]
    expected = token_losses(output, target, "relative")
    assert torch.equal(token_losses(output * sizes, target * sizes, "relative"), expected)


def test_the_first_tokens_error_counts_beside_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    plain = token_losses(output, target, "relative")
    weighted = token_losses(output, target, "relative", first_token=0.2)
    assert_close(weighted.mean(), plain.mean() + 0.2 * plain[:, 0].mean())


def test_a_token_of_zeros_has_a_finite_relative_loss() -> None:
    assert torch.isfinite(token_losses(torch.ones(1, 1, 4), torch.zeros(1, 1, 4), "relative")).all()


def test_cosine_falls_from_one_to_zero() -> None:
    assert [cosine(number, 4) for number in (0, 2, 4, 5)] == pytest.approx([1, 0.5, 0, 0])
    assert cosine(1, 3) == pytest.approx(0.75)
    assert cosine(0, 0) == 1


@pytest.mark.parametrize("way", ["clipping and diagonal", "clipping and dense"])
def test_steps_are_adam_without_decay_under_the_cosine(way: str) -> None:
    """The update written out, in float64, from the gradients that each step leaves."""
    method = WAYS[way]
    reconstruction = begin(method)
    gradients = gradients_of(reconstruction)
    values = {name: parameter.detach().double() for name, parameter in reconstruction.parameters.items()}
    start = dict(values)
    first = {name: torch.zeros_like(value) for name, value in values.items()}
    second = {name: torch.zeros_like(value) for name, value in values.items()}
    for number in range(3):
        steps(reconstruction, range(number, number + 1))
        for name in reconstruction.parameters:
            gradient = gradients[name].double()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            rate = method.rates["clipping" if ".clipping." in name else "increment"]
            rate *= 0.5 * (1 + math.cos(math.pi * number / method.total_steps))
            corrected = (second[name] / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8
            values[name] = values[name] - rate * first[name] / (1 - 0.9 ** (number + 1)) / corrected
    for name, parameter in reconstruction.parameters.items():
        assert (values[name] != start[name]).any()
        assert_close(parameter, values[name], torch.float32)


def test_signed_steps_go_against_the_sign_along_a_straight_line() -> None:
    method = WAYS["signed: clipping and rounding"]
    reconstruction = begin(method)
    gradients = gradients_of(reconstruction)
    values = {name: parameter.detach().clone() for name, parameter in reconstruction.parameters.items()}
    for number in range(3):
        steps(reconstruction, range(number, number + 1))
        for name in reconstruction.parameters:
            values[name] -= 5e-2 * (1 - number / method.total_steps) * gradients[name].sign()
            if ".clipping." in name:
                values[name].clamp_(0.05, 1)
    for name, parameter in reconstruction.parameters.items():
        assert_close(parameter, values[name])
    assert not any(name.startswith(("first", "second")) for name in reconstruction.export_state())


def test_a_bound_is_never_left() -> None:
    method = replace(WAYS["signed: clipping and rounding"], rates={"clipping": 2.0, "rounding": 2.0})
    reconstruction = begin(method)
    steps(reconstruction, range(3))
    for name, parameter in reconstruction.parameters.items():
        low, high = (0.05, 1.0) if ".clipping." in name else (-0.5, 0.5)
        assert parameter.min() >= low
        assert parameter.max() <= high


def test_straight_line_falls_from_one_to_zero() -> None:
    assert [straight(number, 4) for number in (0, 1, 4, 5)] == [1, 0.75, 0, 0]
    assert straight(0, 0) == 1


def test_training_changes_nothing_but_its_parameters() -> None:
    layer = make_layer(bias=True)
    expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    reconstruction = Reconstruction(layer, NAMES, METHOD)
    steps(reconstruction, range(3))
    for name, linear in reconstruction.linears.items():
        assert_same(linear.weight, expected.pop(f"{name}.weight"))
        if f"{name}.bias" in expected:
            assert linear.bias is not None
            assert_same(linear.bias, expected.pop(f"{name}.bias"))
    assert sorted(expected) == ["input_layernorm.weight", "post_attention_layernorm.weight"]
    for name, tensor in expected.items():
        assert_same(layer.state_dict()[name], tensor)


def test_gradients_do_not_outlive_the_step() -> None:
    reconstruction = begin()
    steps(reconstruction, range(2))
    assert all(parameter.grad is None for parameter in reconstruction.parameters.values())


@WAY
def test_recomputing_changes_no_bit(way: str) -> None:
    kept, recomputed = (begin(replace(WAYS[way], recompute=choice)) for choice in (False, True))
    assert steps(recomputed, range(3)) == steps(kept, range(3))
    assert_same_result(recomputed, kept)


def test_no_step_after_the_last_one() -> None:
    reconstruction = begin(replace(METHOD, total_steps=2))
    steps(reconstruction, range(2))
    before = snapshot(reconstruction)
    steps(reconstruction, range(2, 3))
    for name in reconstruction.parameters:
        assert_same(reconstruction.export_state()[f"value/{name}"], before[f"value/{name}"])


def test_with_nothing_to_train_it_is_round_to_nearest() -> None:
    reconstruction = begin(of("none", "none"))
    assert math.isnan(steps(reconstruction, range(1))[0])
    assert reconstruction.status == "ok"
    assert set(reconstruction.export_state()) == {"steps"}
    expected = round_block(make_layer(), NAMES, METHOD.grid, METHOD.parts.scale_dtype)
    for name, quantized in reconstruction.quantized().items():
        assert_same_weight(quantized, expected[name])


def test_some_linears_may_be_left_alone() -> None:
    names = NAMES[:2]
    reconstruction = Reconstruction(make_layer(), names, METHOD)
    steps(reconstruction, range(1))
    assert list(reconstruction.quantized()) == names


# --- deterministic ----------------------------------------------------------------------------------------------------


@WAY
def test_two_runs_are_the_same(way: str) -> None:
    first, again = begin(WAYS[way]), begin(WAYS[way])
    assert steps(first, range(3)) == steps(again, range(3))
    assert_same_result(again, first)


@WAY
def test_interrupted_anywhere_is_the_same(way: str, tmp_path: Path) -> None:
    whole = begin(WAYS[way])
    losses = steps(whole, range(6))
    for stop in (0, 1, 3):
        part = begin(WAYS[way])
        assert steps(part, range(stop)) == losses[:stop]
        save_file(part.export_state(), tmp_path / "state.safetensors")
        fresh = begin(WAYS[way])
        fresh.import_state(load_file(tmp_path / "state.safetensors"))
        assert steps(fresh, range(stop, 6)) == losses[stop:]
        assert_same_result(fresh, whole)


def test_an_import_leaves_nothing_of_what_was_there() -> None:
    whole, used = begin(), begin()
    untouched = snapshot(whole)
    losses = steps(whole, range(2))
    steps(used, range(5, 7))
    used.import_state(untouched)
    assert steps(used, range(2)) == losses
    assert_same_result(used, whole)


class Branches(nn.Module):
    """Not every linear is reached by every batch, as with experts."""

    def __init__(self) -> None:
        super().__init__()
        self.one = linear_of(normal(HIDDEN, HIDDEN))
        self.other = linear_of(normal(HIDDEN, HIDDEN, seed=1))

    def forward(self, hidden: Tensor, reached: str) -> Tensor:
        return hidden + self.get_submodule(reached)(hidden)


def test_linears_that_a_batch_does_not_reach() -> None:
    whole, part, fresh = (Reconstruction(Branches(), ["one", "other"], METHOD) for _ in range(3))
    task = make_task()
    for reached in ("one", "one", "other"):
        whole.step(task.inputs, task.targets, {"reached": reached})
    part.step(task.inputs, task.targets, {"reached": "one"})
    fresh.import_state(part.export_state())
    for reached in ("one", "other"):
        fresh.step(task.inputs, task.targets, {"reached": reached})
    assert_same_result(fresh, whole)


def test_an_imported_state_is_exported_again() -> None:
    part = begin()
    steps(part, range(3))
    fresh = begin()
    fresh.import_state(part.export_state())
    assert_same_state(fresh.export_state(), part.export_state())
    assert fresh.steps_done == 3


def test_going_on_from_an_import_leaves_the_state_it_came_from_alone() -> None:
    part = begin()
    steps(part, range(2))
    state = snapshot(part)
    fresh = begin()
    fresh.import_state(part.export_state())
    steps(fresh, range(2, 4))
    assert_same_state(part.export_state(), state)


def test_state_holds_both_moments_of_every_parameter() -> None:
    reconstruction = begin()
    assert set(reconstruction.export_state()) == {"steps"} | {f"value/{name}" for name in reconstruction.parameters}
    steps(reconstruction, range(1))
    parts = ("value", "first", "second")
    assert set(reconstruction.export_state()) == {"steps"} | {
        f"{part}/{name}" for part in parts for name in reconstruction.parameters
    }


def test_autocast_is_deterministic_and_near_the_plain_products() -> None:
    method = replace(METHOD, autocast=torch.bfloat16)
    first, again = begin(method), begin(method)
    losses = steps(first, range(2))
    assert losses == steps(again, range(2))
    assert_same_result(again, first)
    plain = steps(begin(), range(2))
    assert losses != plain
    assert_close(torch.tensor(losses), torch.tensor(plain), torch.bfloat16)


def test_a_half_precision_block_is_trained_in_float32() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    reference = Reconstruction(copy.deepcopy(layer).float(), NAMES, METHOD)
    reconstruction = Reconstruction(layer, NAMES, METHOD)
    assert {parameter.dtype for parameter in reconstruction.block.parameters()} == {torch.float32}
    assert {linear.weight.dtype for linear in reconstruction.linears.values()} == {torch.bfloat16}
    assert steps(reconstruction, range(2)) == steps(reference, range(2))
    assert_same_result(reconstruction, reference)


# --- failure as a status ----------------------------------------------------------------------------------------------


def spoil(task: Task, part: str, value: float) -> Task:
    tensor = getattr(task, part).clone()
    tensor[0, 0, 0] = value
    return replace(task, **{part: tensor})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["inputs", "targets"])
@pytest.mark.parametrize("good_steps", [0, 2])
def test_non_finite_data_is_a_status_that_freezes_the_state(good_steps: int, part: str, value: float) -> None:
    reconstruction = begin()
    steps(reconstruction, range(good_steps))
    before, codes = snapshot(reconstruction), reconstruction.quantized()
    assert not math.isfinite(step(reconstruction, spoil(make_task(), part, value)))
    assert reconstruction.status == "non_finite"
    assert reconstruction.steps_done == good_steps
    for _ in range(2):
        assert not math.isfinite(step(reconstruction, make_task()))
    after = snapshot(reconstruction)
    assert before.pop("steps").tolist() == [good_steps, 0]
    assert after.pop("steps").tolist() == [good_steps, 1]
    assert_same_state(after, before)
    for name, quantized in reconstruction.quantized().items():
        assert_same_weight(quantized, codes[name])


def test_a_non_finite_gradient_of_a_finite_loss_is_one_too() -> None:
    reconstruction = begin()
    steps(reconstruction, range(1))
    before = snapshot(reconstruction)
    name = min(reconstruction.parameters)
    handle = reconstruction.parameters[name].register_hook(lambda gradient: gradient * math.inf)
    assert math.isfinite(step(reconstruction, make_task()))
    handle.remove()
    assert reconstruction.status == "non_finite"
    assert math.isnan(step(reconstruction, make_task()))
    after = snapshot(reconstruction)
    assert after.pop("steps").tolist() == [1, 1]
    before.pop("steps")
    assert_same_state(after, before)


def test_the_status_is_carried_by_the_state() -> None:
    reconstruction = begin()
    steps(reconstruction, range(1))
    step(reconstruction, spoil(make_task(), "inputs", math.nan))
    fresh = begin()
    fresh.import_state(reconstruction.export_state())
    assert fresh.status == "non_finite"
    assert math.isnan(step(fresh, make_task()))
    assert_same_result(fresh, reconstruction)


def test_a_good_state_clears_the_status() -> None:
    good, bad = begin(), begin()
    steps(good, range(1))
    step(bad, spoil(make_task(), "targets", math.nan))
    bad.import_state(good.export_state())
    assert bad.status == "ok"
    assert steps(bad, range(1, 3)) == steps(good, range(1, 3))
    assert_same_result(bad, good)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_micro_batches_add_up_to_the_batch() -> None:
    """Of three sequences, two and one."""
    task = make_task(samples=3)
    whole, parts = begin(), begin(replace(METHOD, micro_batch=2))
    taken = [gradients_of(reconstruction) for reconstruction in (whole, parts)]
    assert step(parts, task) == pytest.approx(step(whole, task), rel=1e-5)
    for name, gradient in taken[0].items():
        assert_close(taken[1][name], gradient)


def test_a_micro_batch_of_the_batch_is_the_batch() -> None:
    task = make_task(samples=3)
    whole, same = begin(), begin(replace(METHOD, micro_batch=3))
    assert step(same, task) == step(whole, task)
    assert_same_result(same, whole)


@WAY
def test_checkpointing_changes_no_bit(way: str) -> None:
    kept, checkpointed = begin(WAYS[way]), begin(replace(WAYS[way], checkpoint=True))
    assert steps(checkpointed, range(3)) == steps(kept, range(3))
    assert_same_result(checkpointed, kept)


class Largest:
    """The largest number of numbers that autograd keeps from the forward pass, beside tensors that are there anyway."""

    def __init__(self, block: nn.Module) -> None:
        self.there = {t.data_ptr() for t in (*block.parameters(), *block.buffers())}
        self.kept = 0

    def pack(self, tensor: Tensor) -> Tensor:
        self.kept += 0 if tensor.data_ptr() in self.there else tensor.numel()
        return tensor


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    task, kept = make_task(samples=4, length=32), []
    for checkpointing in (False, True):
        reconstruction = begin(replace(METHOD, checkpoint=checkpointing))
        largest = Largest(reconstruction.block)
        with torch.autograd.graph.saved_tensors_hooks(largest.pack, lambda tensor: tensor):
            output = run_block(reconstruction.block, task.inputs, task.arguments)
        kept.append(largest.kept)
        output.sum().backward()
    assert kept[1] < kept[0] / 2


def test_training_on_a_shared_block_leaves_it_alone() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    reconstruction = Reconstruction(sharing_copy(layer), NAMES, METHOD)
    steps(reconstruction, range(2))
    shared = sharing_copy(layer)
    load_quantized(shared, reconstruction.quantized())
    for name, linear in reconstruction.linears.items():
        assert linear.weight.data_ptr() == layer.get_submodule(name).weight.data_ptr()
    for name, tensor in layer.state_dict().items():
        assert_same(tensor, before[name])
    assert not torch.equal(shared.mlp.up_proj.weight, layer.mlp.up_proj.weight)
