"""Blocks: which linears are meant, what replacing them changes, and writing W_hat back."""

from __future__ import annotations

import pytest
import torch
from material import NAMES, assert_same_weight, make_layer, make_task, normal
from tolerances import assert_same
from torch import Tensor, nn

from lsi.block import (
    is_skipped,
    linear_names,
    load_quantized,
    outputs_of,
    replace_linears,
    round_block,
    run_block,
    trainable,
)
from lsi.grid import Grid, round_to_nearest
from lsi.increment import Increment
from lsi.linear import Parts

GRID = Grid(4, 32, symmetric=False)
DOWN = "model.layers.3.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "pattern", "skipped"),
    [
        (DOWN, DOWN, True),
        (DOWN, "down_proj", True),
        (DOWN, "mlp.down_proj", True),
        (DOWN, "model.layers.3.*", True),
        (DOWN, "*.mlp.*", True),
        (DOWN, "model.layers.[0-2].*", False),
        (DOWN, "proj", False),
        (DOWN, "own_proj", False),
        (DOWN, "model.layers.3", False),
        (DOWN, "mlp", False),
        ("lm_head", "lm_head", True),
        ("my_lm_head", "lm_head", False),
    ],
)
def test_skip_patterns(name: str, pattern: str, skipped: bool) -> None:
    assert is_skipped(name, [pattern]) is skipped
    assert is_skipped(name, ["other", pattern]) is skipped


def test_nothing_is_skipped_without_patterns() -> None:
    assert not is_skipped(DOWN, [])


def test_linear_names_are_matched_by_their_names_in_the_model() -> None:
    layer = make_layer()
    assert sorted(linear_names(layer, "model.layers.0", [])) == sorted(NAMES)
    rest = linear_names(layer, "model.layers.0", ["o_proj", "model.layers.0.mlp.*"])
    assert sorted(rest) == [f"self_attn.{part}_proj" for part in "kqv"]
    assert linear_names(layer, "model.layers.1", ["model.layers.0.*"]) == linear_names(layer, "model.layers.1", [])


def test_gates_of_mixtures_are_no_linears_to_quantize() -> None:
    block = nn.Module()
    block.mlp = nn.Module()
    block.mlp.shared_expert_gate = nn.Linear(8, 1)
    block.mlp.router = nn.ModuleDict({"layer": nn.Linear(8, 4)})
    block.mlp.gate_proj = nn.Linear(8, 8)
    assert linear_names(block, "model.layers.0", []) == ["mlp.gate_proj"]


def test_replacing_freezes_everything_else() -> None:
    layer = make_layer()
    untouched = layer.mlp.down_proj
    names = [name for name in NAMES if name != "mlp.down_proj"]
    linears = replace_linears(layer, names, GRID, Parts("learned", Increment("dense"), False, torch.float32))
    assert list(linears) == names
    assert all(layer.get_submodule(name) is linear for name, linear in linears.items())
    assert layer.mlp.down_proj is untouched
    free = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    parts = ("clipping.lower", "clipping.upper", "increment.increment")
    assert free == {f"{name}.{part}" for name in names for part in parts}


def test_trainable_order_is_by_name_not_by_insertion() -> None:
    linears = replace_linears(make_layer(), NAMES, GRID, Parts("learned", Increment("diagonal"), False, torch.float32))
    forwards = [name for name, _ in trainable(linears)]
    backwards = [name for name, _ in trainable({name: linears[name] for name in reversed(NAMES)})]
    assert forwards == backwards
    parts = ("clipping.lower", "clipping.upper", "increment.diagonal")
    assert forwards == [f"{name}.{part}" for name in sorted(NAMES) for part in parts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_block_and_load_quantized(dtype: torch.dtype) -> None:
    layer, names = make_layer(bias=True, dtype=dtype), NAMES[:-1]
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weights = round_block(layer, names, GRID, torch.bfloat16)
    assert list(weights) == names
    for name in names:
        assert_same_weight(weights[name], round_to_nearest(before[f"{name}.weight"], GRID, torch.bfloat16))
    load_quantized(layer, weights)
    for key, tensor in layer.state_dict().items():
        name = key.removesuffix(".weight")
        assert_same(tensor, weights[name].dequantize().to(dtype) if name in names else before[key])


def test_replaced_block_computes_as_the_loaded_one() -> None:
    """Before any training and without clipping: round-to-nearest in both, bit for bit."""
    task = make_task(bias=True)
    loaded, replaced = make_layer(bias=True), make_layer(bias=True)
    load_quantized(loaded, round_block(loaded, NAMES, GRID, torch.float32))
    replace_linears(replaced, NAMES, GRID, Parts("none", Increment("diagonal"), False, torch.float32))
    output = run_block(replaced, task.inputs, task.arguments)
    assert_same(output, run_block(loaded, task.inputs, task.arguments))
    assert not torch.equal(output, task.targets)


class Doubling(nn.Module):
    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden: Tensor, factor: float) -> Tensor | tuple[Tensor, None]:
        return (hidden * factor, None) if self.as_tuple else hidden * factor


@pytest.mark.parametrize("as_tuple", [True, False])
def test_run_block_takes_the_hidden_states(as_tuple: bool) -> None:
    hidden = normal(2, 3, 4)
    assert_same(run_block(Doubling(as_tuple), hidden, {"factor": 2.0}), hidden * 2)


def test_outputs_on_a_cpu_do_not_depend_on_how_many_sequences_there_are_at_once() -> None:
    layer, task = make_layer(), make_task()
    assert_same(outputs_of(layer, task.inputs, task.arguments), run_block(layer, task.inputs, task.arguments))
    parts = [outputs_of(layer, some, task.arguments) for some in task.inputs.split(2)]
    assert torch.equal(outputs_of(layer, task.inputs, task.arguments), torch.cat(parts))
