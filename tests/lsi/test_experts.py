"""Mixtures of experts: opening the fused tensors changes nothing, and closing puts back what was trained."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny import HIDDEN, LENGTH, MIXTURE, make_case
from tolerances import assert_close, assert_same

from lsi.block import linear_names, run_block
from lsi.experts import open_experts
from lsi.grid import Grid, clip_to_weights
from lsi.increment import Increment
from lsi.linear import Parts
from lsi.reconstruct import Method, Reconstruction

MIXTURES = ["mixtral", "qwen3-moe"]


@pytest.mark.parametrize("name", MIXTURES)
def test_opened_experts_compute_the_same(name: str) -> None:
    block, task = make_case(name)
    attention = linear_names(block, "block", [])
    assert open_experts(block) == ["mlp.experts"]
    assert_close(run_block(block, task.inputs, task.arguments), task.targets)
    parts = [f"mlp.experts.{i}.{part}_proj" for i in range(4) for part in ("gate", "up", "down")]
    assert linear_names(block, "block", []) == attention + parts
    assert open_experts(block) == []


@pytest.mark.parametrize("name", MIXTURES)
def test_opened_weights_are_the_fused_tensors(name: str) -> None:
    block, _ = make_case(name)
    fused = block.get_submodule("mlp.experts")
    open_experts(block)
    experts = [block.get_submodule(f"mlp.experts.{number}") for number in range(len(fused.down_proj))]
    assert_same(torch.stack([expert.down_proj.weight for expert in experts]), fused.down_proj)
    gates, ups = ([getattr(expert, part).weight for expert in experts] for part in ("gate_proj", "up_proj"))
    assert_same(torch.cat([torch.stack(gates), torch.stack(ups)], dim=1), fused.gate_up_proj)


def test_opening_copies_no_weight() -> None:
    block, _ = make_case("mixtral")
    fused = block.mlp.experts.gate_up_proj
    open_experts(block)
    assert block.get_submodule("mlp.experts.0.gate_proj").weight.data_ptr() == fused.data_ptr()


def opened_method(fewest: int) -> Method:
    parts = Parts("learned", Increment("dense"), False, torch.float32)
    rates = {"clipping": 1e-1, "increment": 1e-2}
    return Method(Grid(3, 8, symmetric=True), parts, rates, total_steps=4, fewest_tokens=fewest)


@pytest.mark.parametrize("name", MIXTURES)
def test_recomputing_counts_no_token_twice_and_changes_no_bit(name: str) -> None:
    states = []
    for again in (False, True):
        block, task = make_case(name)
        open_experts(block)
        method = replace(opened_method(0), checkpoint=again, recompute=again)
        reconstruction = Reconstruction(block, linear_names(block, "block", []), method)
        reconstruction.step(task.inputs, task.targets, task.arguments)
        states.append(reconstruction.export_state())
    assert states[0]["tokens"].sum() > 0
    for key, tensor in states[0].items():
        assert_same(states[1][key], tensor)


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_with_few_tokens_is_clipped_without_data(name: str) -> None:
    block, task = make_case(name)
    open_experts(block)
    chosen: list[torch.Tensor] = []
    block.mlp.gate.register_forward_hook(lambda module, arguments, output: chosen.append(output[2]))
    plain, other, names = copy.deepcopy(block), copy.deepcopy(block), linear_names(block, "block", [])
    Reconstruction(other, names, opened_method(0)).step(task.inputs, task.targets, task.arguments)
    counts = [int((chosen[0] == number).sum()) for number in range(4)]
    assert sum(counts) == len(task.inputs) * LENGTH * MIXTURE["num_experts_per_tok"]
    # The threshold of four steps lies just above what the idlest expert sees in the first.
    reconstruction = Reconstruction(block, names, opened_method(4 * min(counts) + 1))
    assert reconstruction.untrained_experts() == []
    reconstruction.step(task.inputs, task.targets, task.arguments)
    few = [f"mlp.experts.{number}" for number in range(4) if counts[number] == min(counts)]
    assert reconstruction.untrained_experts() == few
    resumed = Reconstruction(plain, names, reconstruction.method)
    resumed.import_state({key: tensor.clone() for key, tensor in reconstruction.export_state().items()})
    for linear, weight in resumed.quantized().items():
        assert_same(weight.codes, reconstruction.quantized()[linear].codes)
        expected = clip_to_weights(resumed.linears[linear].weight, Grid(3, 8, symmetric=True), torch.float32)
        idle = linear.rpartition(".")[0] in few
        assert (torch.equal(weight.codes, expected.codes) and torch.equal(weight.scale, expected.scale)) is idle


def test_an_expert_without_tokens_takes_no_part() -> None:
    block, _ = make_case("mixtral")
    open_experts(block)
    hidden = torch.ones(1, HIDDEN)
    block.get_submodule("mlp.experts.3").down_proj.weight.data.fill_(torch.nan)
    output = block.mlp.experts(hidden, torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.5]]))
    assert torch.isfinite(output).all()


def test_another_layout_stays_fused() -> None:
    block, _ = make_case("mixtral")
    fused = block.mlp.experts
    fused.is_transposed = True
    assert open_experts(block) == []
    assert block.mlp.experts is fused


def test_a_block_without_a_mixture_has_nothing_to_open() -> None:
    block, _ = make_case("qwen3-moe-dense")
    assert open_experts(block) == []
