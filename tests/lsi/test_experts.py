"""Mixtures of experts: opening the fused tensors changes nothing, and closing puts back what was trained."""

from __future__ import annotations

import pytest
import torch
from tiny import HIDDEN, LENGTH, MIXTURE, make_case
from tolerances import assert_close, assert_same
from torch import nn

from lsi.block import linear_names, run_block
from lsi.experts import close_experts, count_tokens, open_experts

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
def test_closing_is_the_inverse_of_opening(name: str) -> None:
    block, task = make_case(name)
    before = {key: tensor.clone() for key, tensor in block.state_dict().items()}
    open_experts(block)
    close_experts(block)
    assert list(block.state_dict()) == list(before)
    for key, tensor in block.state_dict().items():
        assert_same(tensor, before[key])
    assert_same(run_block(block, task.inputs, task.arguments), task.targets)


@pytest.mark.parametrize("name", MIXTURES)
def test_changed_experts_are_closed_as_they_are(name: str) -> None:
    block, task = make_case(name)
    open_experts(block)
    expert = block.get_submodule("mlp.experts.1")
    expert.up_proj.weight = nn.Parameter(expert.up_proj.weight * 2, requires_grad=False)
    expert.down_proj.weight.data = expert.down_proj.weight.data + 1
    opened = run_block(block, task.inputs, task.arguments)
    close_experts(block)
    assert_close(run_block(block, task.inputs, task.arguments), opened)
    assert not torch.allclose(opened, task.targets)


def test_opening_copies_no_weight() -> None:
    block, _ = make_case("mixtral")
    fused = block.mlp.experts.gate_up_proj
    open_experts(block)
    assert block.get_submodule("mlp.experts.0.gate_proj").weight.data_ptr() == fused.data_ptr()


@pytest.mark.parametrize("name", MIXTURES)
def test_tokens_are_counted_by_expert(name: str) -> None:
    block, task = make_case(name)
    open_experts(block)
    chosen: list[torch.Tensor] = []
    hook = block.mlp.gate.register_forward_hook(lambda module, arguments, output: chosen.append(output[2]))
    batches = [(task.inputs[i : i + 1], task.arguments) for i in range(len(task.inputs))]
    counts = count_tokens(block, batches)
    hook.remove()
    assert list(counts) == ["mlp.experts"]
    expected = [int((torch.cat(chosen) == number).sum()) for number in range(4)]
    assert counts["mlp.experts"].tolist() == expected
    assert sum(expected) == len(task.inputs) * LENGTH * MIXTURE["num_experts_per_tok"]
    assert not block.mlp.experts._forward_pre_hooks


def test_an_expert_without_tokens_takes_no_part() -> None:
    block, _ = make_case("mixtral")
    open_experts(block)
    hidden = torch.ones(1, HIDDEN)
    block.get_submodule("mlp.experts.3").down_proj.weight.data.fill_(torch.nan)
    output = block.mlp.experts(hidden, torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.5]]))
    assert torch.isfinite(output).all()


def test_another_layout_is_refused() -> None:
    block, _ = make_case("mixtral")
    block.mlp.experts.is_transposed = True
    with pytest.raises(
        ValueError, match=r"MixtralExperts keeps its experts in a layout.*skip them with mlp.experts\.\*"
    ):
        open_experts(block)


def test_a_block_without_a_mixture_has_nothing_to_open() -> None:
    block, _ = make_case("qwen3-moe-dense")
    assert open_experts(block) == []
