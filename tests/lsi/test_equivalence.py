"""Equivalent transformations: exact for every family, trained, folded, and better than none where channels differ."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from material import Task, incremented
from tiny import CASES, HEAD_SIZE, HIDDEN, make_case
from tolerances import assert_close, assert_same
from torch import Tensor, nn

from lsi.block import linear_names, load_quantized, run_block
from lsi.equivalence import Equivalence, collect_ranges, load_tensors
from lsi.families import FAMILIES, family_of, find_family
from lsi.grid import Grid
from lsi.increment import Increment, Kind
from lsi.linear import Parts
from lsi.objective import token_losses
from lsi.pairs import KINDS, bias_name, find_pairs, tensor_of
from lsi.reconstruct import Method, Reconstruction, quantized_linear

TRAINED = ("norm", "value_output", "up_down")
METHOD = Method(
    Grid(2, 16, symmetric=False),
    Parts("learned", Increment("none"), False, torch.float32),
    rates={"clipping": 1e-2, "increment": 1e-3, "equivalence": 5e-3},
    total_steps=30,
)
DIAGONAL = replace(METHOD.parts, increment=Increment("diagonal"))
LET = replace(METHOD, equivalence=TRAINED)


def shiftable(name: str) -> bool:
    return CASES[name].model_type == "opt" or name == "llama-biased"


def random_equivalence(
    block: nn.Module, *, kinds: tuple[str, ...] = KINDS, shifts: bool = False, dtype: torch.dtype = torch.float32
) -> Equivalence:
    """All that the block allows, with scales between a tenth and ten."""
    equivalence = Equivalence(block, kinds, shifts=shifts, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    for parameter in equivalence.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return equivalence


def with_outliers(name: str) -> tuple[nn.Module, Task]:
    """A task in which two channels of the residual stream are thirty times the others, as in real models."""
    block, task = make_case(name, samples=4)
    inputs = task.inputs.clone()
    inputs[..., [3, 17]] *= 30
    return block, Task(inputs, run_block(block, inputs, task.arguments), task.arguments)


def names_of(block: nn.Module) -> list[str]:
    return linear_names(block, "block", [])


@torch.no_grad()
def fold(equivalence: Equivalence, block: nn.Module) -> None:
    """Write the transformed tensors into the block, and go back to the identity."""
    load_tensors(block, equivalence.transformed(block))
    for parameter in equivalence.parameters():
        parameter.zero_()


def smoothed(block: nn.Module, task: Task, *, shifts: bool = False, kinds: tuple[str, ...] = TRAINED) -> Equivalence:
    """The SmoothQuant start, not folded yet."""
    equivalence = Equivalence(block, kinds, shifts=shifts)
    equivalence.start(block, collect_ranges(block, equivalence.pairs, [(task.inputs, task.arguments)]))
    return equivalence


@pytest.mark.parametrize("name", CASES)
def test_folding_leaves_the_output_unchanged(name: str) -> None:
    """Random scales on every pair at once; the functional form and the folded block compute the same, bit for bit."""
    block, task = make_case(name)
    before = copy.deepcopy(block.state_dict())
    equivalence = random_equivalence(block, shifts=shiftable(name))
    sites = {site.tensor for pair in equivalence.pairs for site in pair.sites}

    output = equivalence.within(block, lambda: run_block(block, task.inputs, task.arguments))
    assert_close(output, task.targets)
    assert all(torch.equal(before[key], tensor) for key, tensor in block.state_dict().items())

    fold(equivalence, block)
    assert_same(run_block(block, task.inputs, task.arguments), output)
    assert not any(torch.equal(before[site], tensor_of(block, site)) for site in sites)
    assert not any(parameter.any() for parameter in equivalence.parameters())


@pytest.mark.parametrize("name", CASES)
def test_starts_at_the_identity(name: str) -> None:
    block, task = make_case(name)
    equivalence = Equivalence(block, KINDS, shifts=shiftable(name))
    for key, tensor in equivalence.transformed(block).items():
        assert_same(tensor, tensor_of(block, key))
    output = equivalence.within(block, lambda: run_block(block, task.inputs, task.arguments))
    assert_same(output, run_block(block, task.inputs, task.arguments))


@pytest.mark.parametrize("name", CASES)
def test_every_scale_and_shift_has_a_gradient(name: str) -> None:
    """With one side of each pair held fast: an equivalence as a whole has none."""
    block, task = make_case(name, samples=8)
    equivalence = random_equivalence(block, shifts=shiftable(name))
    for pair in equivalence.pairs:
        moving = pair.sites[0].tensor
        if moving == pair.sites[1].tensor:
            continue  # q and k fused in one linear
        free = {moving, bias_name(moving)}
        tensors = equivalence.transformed(block)
        held = {key: tensor if key in free else tensor.detach() for key, tensor in tensors.items()}
        run = torch.func.functional_call(block, held, (task.inputs,), dict(task.arguments))
        output = run[0] if isinstance(run, tuple) else run
        equivalence.zero_grad()
        token_losses(output, task.targets + 1, "mse").mean().backward()
        for part in (equivalence.log_scale, equivalence.shift):
            if pair.name in part:
                assert (part[pair.name].grad != 0).all(), pair.name


def test_a_rotation_is_seen_by_the_exactness_test() -> None:
    """The scale of two channels that a rotation mixes must be equal: were it not, the output would change."""
    block, task = make_case("llama-no-groups")
    scale = torch.ones(HIDDEN)
    scale[0] = 2
    block.self_attn.q_proj.weight.data *= scale.unsqueeze(1)
    block.self_attn.k_proj.weight.data /= scale.unsqueeze(1)
    output = run_block(block, task.inputs, task.arguments)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(output, task.targets)


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        # Two key heads of eight channels, paired by the rotation; a norm has one weight for all heads.
        ("llama", 2 * HEAD_SIZE // 2),
        ("llama-one-kv-head", HEAD_SIZE // 2),
        ("llama-no-groups", HIDDEN // 2),
        ("qwen3", HEAD_SIZE // 2),
        ("gemma3", HEAD_SIZE // 2),
        # Of eight channels four are rotated and four are not.
        ("phi3-partial", 2 * (2 + 4)),
        ("opt", HIDDEN),
    ],
)
def test_rotated_channels_and_grouped_heads_share_scales(name: str, scales: int) -> None:
    block, _ = make_case(name)
    pairs = {pair.name: pair for pair in find_pairs(block, family_of(block), KINDS, shifts=False)}
    assert pairs["query_key"].channels == scales
    heads = HIDDEN if "no-groups" in name or name == "opt" else HEAD_SIZE * (1 if "one" in name else 2)
    assert pairs["value_output"].channels == heads


def test_query_heads_of_a_group_share_the_output_scale() -> None:
    block, _ = make_case("llama")
    equivalence = random_equivalence(block)
    before = block.self_attn.o_proj.weight.clone()
    factor = (equivalence.transformed(block)["self_attn.o_proj.weight"] / before).view(HIDDEN, 2, 2, HEAD_SIZE)
    assert_close(factor[:, :, 0], factor[:, :, 1])
    assert not torch.allclose(factor[:, 0], factor[:, 1])


def test_norms_survive_the_rounding_to_their_dtype() -> None:
    """With the norms' dtype known, rounding them changes nothing; otherwise it costs three decimal places."""
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("llama", "gemma2-full"):
            block, task = make_case(name)
            norms = [key for key in block.state_dict() if "norm" in key]
            for key in norms:
                tensor_of(block, key).copy_(tensor_of(block, key).bfloat16())
            target = run_block(block, task.inputs, task.arguments)
            fold(random_equivalence(block, dtype=dtype), block)
            for key in norms:
                tensor_of(block, key).copy_(tensor_of(block, key).bfloat16())
            output = run_block(block, task.inputs, task.arguments)
            errors[dtype, name] = float((output - target).abs().max() / target.abs().max())
    for name in ("llama", "gemma2-full"):
        assert errors[torch.bfloat16, name] < 1e-5 < 1e-3 < errors[torch.float32, name]


@pytest.mark.parametrize("weight", [-0.5, -1.5])
def test_a_norm_next_to_minus_one_does_not_lose_its_channel(weight: float) -> None:
    """Where the weight divided by the scale would be rounded to -1, of which Gemma's norms make zero."""
    block, task = make_case("gemma2-full")
    norm = block.input_layernorm.weight
    norm.fill_(weight)
    target = run_block(block, task.inputs, task.arguments)
    equivalence = Equivalence(block, ("norm",), dtype=torch.bfloat16)
    equivalence.log_scale["attention_norm"].data.fill_(math.log(1000))
    fold(equivalence, block)
    assert torch.equal(norm, norm.bfloat16().float())
    assert bool((norm != -1).all())
    assert_close(run_block(block, task.inputs, task.arguments), target)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *itertools.product(["llama", "llama-biased", "phi3-partial", "mixtral-opened", "gemma3"], TRAINED),
        ("opt", "norm"),
        ("opt", "value_output"),
    ],
)
def test_smoothing_balances_inputs_and_weights(name: str, kind: str) -> None:
    """After it, every channel reaches as far in the input as in the weights (α = 0.5), and the output is the same."""
    shifts = name == "opt" or (name, kind) == ("llama-biased", "value_output")
    block, task = make_case(name)
    fold(smoothed(block, task, shifts=shifts, kinds=(kind,)), block)
    assert_close(run_block(block, task.inputs, task.arguments), task.targets)
    pairs = find_pairs(block, family_of(block), (kind,), shifts=shifts)
    for pair in pairs:
        low, high = collect_ranges(block, [pair], [(task.inputs, task.arguments)])[pair.name]
        reach = torch.zeros(pair.channels)
        for site in pair.consumers():
            columns = tensor_of(block, site.tensor).abs().flatten(0, -2).amax(0)
            reach = reach.scatter_reduce(0, site.index, columns, "amax")
        used = low <= high
        assert used.any()
        assert_close(torch.maximum(-low, high)[used], reach[used])
        if pair.shift:
            assert float((low + high).abs().max()) < 1e-4 * float(high.max())


def test_ranges_are_those_of_all_batches() -> None:
    block, task = make_case("llama")
    pairs = find_pairs(block, family_of(block), TRAINED, shifts=False)
    whole = collect_ranges(block, pairs, [(task.inputs, task.arguments)])
    parts = collect_ranges(block, pairs, [(task.inputs[i : i + 1], task.arguments) for i in range(len(task.inputs))])
    for name, (low, high) in whole.items():
        assert_close(parts[name][0], low)
        assert_close(parts[name][1], high)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_channels_without_signal_stay_as_they_are() -> None:
    block, task = make_case("llama")
    block.input_layernorm.weight.data[4] = 0
    block.mlp.down_proj.weight.data[:, 7] = 0
    equivalence = smoothed(block, task)
    assert equivalence.log_scale["attention_norm"][4] == 0
    assert equivalence.log_scale["up_down"][7] == 0
    assert all(torch.isfinite(parameter).all() for parameter in equivalence.parameters())


def test_an_expert_without_tokens_is_not_smoothed() -> None:
    block, task = make_case("mixtral-opened")
    inputs = task.inputs[:1, :1].contiguous()
    arguments = {"position_embeddings": tuple(p[:, :1] for p in task.arguments["position_embeddings"])}
    equivalence = Equivalence(block, TRAINED)
    ranges = collect_ranges(block, equivalence.pairs, [(inputs, {"attention_mask": None} | arguments)])
    equivalence.start(block, ranges)
    idle = [name for name, (low, high) in ranges.items() if bool((low > high).all())]
    assert len(idle) == 2, "one token goes to two of four experts"
    assert all(not equivalence.log_scale[name].any() for name in idle)


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2-full", "phi3-partial", "mixtral-opened"])
def test_training_it_lowers_the_loss_where_channels_differ(name: str) -> None:
    losses = []
    for method in (METHOD, LET):
        block, task = with_outliers(name)
        reconstruction = Reconstruction(block, names_of(block), method)
        losses.append([reconstruction.step(task.inputs, task.targets, task.arguments) for _ in range(30)])
    without, transformed = losses
    assert transformed[0] == without[0]
    assert transformed[-1] < 0.9 * without[-1]


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral-opened"])
def test_recomputing_changes_no_bit(name: str) -> None:
    """What is computed again in the backward pass must be of the transformed block, too."""
    states = []
    for again in (False, True):
        block, task = with_outliers(name)
        method = replace(LET, checkpoint=again, recompute=again)
        reconstruction = Reconstruction(block, names_of(block), method)
        for _ in range(2):
            reconstruction.step(task.inputs, task.targets, task.arguments)
        states.append(reconstruction.export_state())
    for key, tensor in states[0].items():
        assert_same(states[1][key], tensor)


def test_shifts_lower_the_loss_further() -> None:
    losses = {}
    for shifts in (False, True):
        block, task = with_outliers("opt")
        fold(smoothed(block, task, shifts=shifts), block)
        reconstruction = Reconstruction(block, names_of(block), replace(LET, shifts=shifts))
        losses[shifts] = [reconstruction.step(task.inputs, task.targets, task.arguments) for _ in range(30)][-1]
    assert losses[True] < losses[False]


def moved(name: str, kind: Kind) -> tuple[Reconstruction, Reconstruction, Task]:
    """A block in training, scales and increments at random places, and one without increments whose weights are the former's W'."""
    block, task = make_case(name)
    plain, names = copy.deepcopy(block), names_of(block)
    parts = replace(METHOD.parts, increment=Increment(kind, corner=3))
    reconstruction = Reconstruction(block, names, replace(LET, parts=parts))
    generator = torch.Generator().manual_seed(6)
    for n in names:
        increment = quantized_linear(reconstruction.block, n).increment
        for parameter in increment.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        weight = plain.get_submodule(n).weight
        weight.data = incremented(increment, weight).detach()
    other = Reconstruction(plain, names, LET)
    state = random_equivalence(plain, kinds=TRAINED).state_dict()
    for one in (reconstruction, other):
        assert one.equivalence is not None
        one.equivalence.load_state_dict(state)
    return reconstruction, other, task


@pytest.mark.parametrize("kind", ["diagonal", "corner", "band", "dense"])
@pytest.mark.parametrize("name", ["llama", "opt", "phi3"])
def test_what_is_transformed_is_the_incremented_weight(name: str, kind: Kind) -> None:
    """Weights, and the scales' gradients, are those of a block whose weights are W'."""
    weights, gradients = [], []
    first, second, task = moved(name, kind)
    for one in (first, second):
        let = one.equivalence
        assert let is not None

        def backward(one: Reconstruction = one) -> dict[str, Tensor]:
            output = run_block(one.block, task.inputs, task.arguments)
            token_losses(output, task.targets, "relative").mean().backward()
            return {n: linear.transformed()[0].detach() for n, linear in one.linears.items()}

        weights.append(let.within(one.block, backward))
        gradients.append({n: parameter.grad for n, parameter in let.log_scale.items()})
    for found, expected in (weights, gradients):
        for n, tensor in found.items():
            assert_close(tensor, expected[n])


@pytest.mark.parametrize("name", ["llama", "opt", "qwen2", "mixtral-opened"])
def test_codes_and_folded_tensors_are_the_trained_block(name: str) -> None:
    """A plain block with them computes what training saw: what a loader of the checkpoint gets."""
    block, task = with_outliers(name)
    plain = copy.deepcopy(block)
    names = [n for n in names_of(block) if not n.endswith("o_proj")]
    reconstruction = Reconstruction(block, names, replace(LET, parts=DIAGONAL, shifts=name == "opt"))
    for _ in range(3):
        reconstruction.step(task.inputs, task.targets, task.arguments)
    folded = reconstruction.folded()
    assert not {f"{n}.weight" for n in names} & set(folded)
    load_tensors(plain, folded)
    load_quantized(plain, reconstruction.quantized())
    loss = token_losses(run_block(plain, task.inputs, task.arguments), task.targets, "relative").mean()
    assert_close(loss, torch.tensor(reconstruction.step(task.inputs, task.targets, task.arguments)))


def test_folded_names_norms_biases_and_what_is_not_quantized() -> None:
    block, _ = make_case("qwen2")
    names = [n for n in names_of(block) if n != "mlp.gate_proj"]
    folded = Reconstruction(block, names, LET).folded()
    expected = {"input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.v_proj.bias"}
    assert set(folded) == expected | {"mlp.gate_proj.weight"}
    block, _ = make_case("mixtral-opened")
    assert "mlp.gate.weight" in Reconstruction(block, names_of(block), LET).folded()
    block, _ = make_case("llama")
    assert Reconstruction(block, names_of(block), METHOD).folded() == {}


@pytest.mark.parametrize("narrow", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_state_goes_on_elsewhere_bit_for_bit(name: str, narrow: torch.dtype | None) -> None:
    def begin() -> tuple[Reconstruction, Task]:
        block, task = with_outliers(name)
        fold(smoothed(block, task, shifts=name == "opt"), block)
        method = replace(
            LET,
            shifts=name == "opt",
            parts=replace(DIAGONAL, increment=Increment("diagonal", factors=narrow, products=narrow)),
        )
        return Reconstruction(block, names_of(block), method), task

    def steps(reconstruction: Reconstruction, task: Task, count: int) -> None:
        for _ in range(count):
            reconstruction.step(task.inputs, task.targets, task.arguments)

    (whole, task), (first, _), (second, _) = begin(), begin(), begin()
    steps(whole, task, 4)
    steps(first, task, 2)
    state: dict[str, Tensor] = {key: tensor.clone() for key, tensor in first.export_state().items()}
    assert any(key.startswith("value/let.log_scale.") for key in state)
    assert any(key.startswith("value/let.shift.") for key in state) == (name == "opt")
    second.import_state(state)
    steps(second, task, 2)
    for key, tensor in whole.folded().items():
        assert_same(second.folded()[key], tensor)
    for key, weight in whole.quantized().items():
        assert_same(second.quantized()[key].codes, weight.codes)


def test_learning_rates_are_apart() -> None:
    block, _ = make_case("llama")
    reconstruction = Reconstruction(block, names_of(block), replace(LET, rates={**METHOD.rates, "equivalence": 7e-3}))
    rates = {name: rate for name, rate in reconstruction.rates.items() if name.startswith("let.")}
    assert set(rates.values()) == {7e-3}
    assert set(rates) == {f"let.log_scale.{n}" for n in ("attention_norm", "mlp_norm", "value_output", "up_down")}


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_known_without_weights(name: str) -> None:
    """For checks before any work."""
    block, _ = make_case(name)
    pairs = find_pairs(block, family_of(block), KINDS, shifts=shiftable(name))
    empty = find_pairs(copy.deepcopy(block).to("meta"), family_of(block), KINDS, shifts=shiftable(name))
    assert [(p.name, p.channels, p.shift) for p in empty] == [(p.name, p.channels, p.shift) for p in pairs]


def test_every_declared_model_type_is_tested() -> None:
    declared = {name for family in FAMILIES for name in family.model_types}
    assert declared == {case.model_type for case in CASES.values()}


def test_a_family_without_declaration_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model type 'mamba' declares no equivalent transformation.*gemma2, .*qwen3_moe"
    ):
        find_family("mamba")
    block, _ = make_case("llama")
    block.self_attn.config = SimpleNamespace(model_type="bloom")
    with pytest.raises(ValueError, match="'bloom'"):
        Equivalence(block, TRAINED)
    with pytest.raises(ValueError, match="'Linear'"):
        Equivalence(nn.Linear(2, 2), TRAINED)


def test_what_a_block_does_not_have_is_refused() -> None:
    llama, _ = make_case("llama")
    with pytest.raises(ValueError, match="shifts need biases in norms and linears, which this llama block lacks"):
        Equivalence(llama, TRAINED, shifts=True)
    with pytest.raises(ValueError, match=r"unknown kind of equivalent transformation 'rotation'.*norm, value_output"):
        Equivalence(llama, ("norm", "rotation"))
    post_norm, _ = make_case("opt-post-norm")
    with pytest.raises(ValueError, match=r"of kind norm, up_down; it has value_output, query_key$"):
        Equivalence(post_norm, ("norm", "up_down"))
