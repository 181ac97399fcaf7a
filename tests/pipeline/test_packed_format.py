"""The packed format against the library that defines it: bit for bit, through its packer, its loader and its grid."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor, compress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    quantize,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lsi.grid import Grid
from pipeline import packed_format
from pipeline.packed_format import pack_linear, packed_layout, quantization_config, unpack_linear, unreadable

BITS = [2, 3, 4, 6, 8]
GRIDS = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
CHECKPOINT_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
# (out, in, group size). Groups of 32 always end on a word; the odd ones and the odd channel counts do not.
SHAPES = [(64, 128, 32), (64, 128, 64), (64, 128, None), (7, 96, 32), (13, 37, None), (33, 35, 5), (1, 1, None)]


@dataclass(frozen=True)
class Quantized:
    """One random linear in our convention."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int

    @property
    def zero(self) -> Tensor:
        """The zero point as int32 [out, groups], the symmetric grid's constant too."""
        constant = torch.full(self.scale.shape, 1 << (self.bits - 1), dtype=torch.int32)
        return constant if self.zero_point is None else self.zero_point.to(torch.int32)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W_hat, exact in float64 (8 bits of code times 24 of scale) and then rounded once."""
        groups = self.codes.to(torch.int32).unflatten(1, (self.scale.shape[1], -1))
        return (self.scale.double()[..., None] * (groups - self.zero[..., None])).flatten(1).to(dtype)


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_linear(
    out: int, inputs: int, bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype, seed: int = 0
) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size is None else inputs // group_size
    codes = torch.randint(0, 1 << bits, (out, inputs), dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 1 << bits, (out, groups), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(out, groups, generator=generator) * 0.02 + 0.001).to(dtype)
    if symmetric:  # its grids may be turned round
        turned = torch.rand(out, groups, generator=generator) < 0.5
        return Quantized(codes, torch.where(turned, -scale, scale), None, bits)
    return Quantized(codes, scale, zero, bits)


def pack(name: str, linear: Quantized) -> dict[str, Tensor]:
    return pack_linear(name, linear.codes, linear.scale, linear.zero_point, linear.bits)


def library_args(bits: int, group_size: int | None, symmetric: bool, **more: Any) -> QuantizationArgs:
    strategy = "channel" if group_size is None else "group"
    return QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group_size, **more)


TOKENS = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)


def assert_same(left: Tensor | None, right: Tensor | None) -> None:
    if left is None or right is None:
        assert left is right
        return
    assert left.dtype == right.dtype
    assert torch.equal(left, right)


# --- packing ---------------------------------------------------------------------------------------------------------


@CHECKPOINT_DTYPES
@GRIDS
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_and_layout(
    shape: tuple[int, int, int | None], bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    out, inputs, group_size = shape
    linear = random_linear(out, inputs, bits, group_size, symmetric, dtype)
    tensors = pack("a.b", linear)
    codes, scale, zero_point = unpack_linear("a.b", tensors, bits, symmetric)
    assert_same(codes, linear.codes)
    assert_same(scale, linear.scale)
    assert_same(zero_point, linear.zero_point)
    layout = packed_layout("a.b", out, inputs, bits, group_size, symmetric, dtype)
    assert layout == {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("bits", BITS)
def test_pieces_of_rows_pack_like_the_whole(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = random_linear(13, 37, bits, None, False, torch.float32)
    whole = pack("x", linear)
    monkeypatch.setattr(packed_format, "CODES_AT_ONCE", 5 * 37)
    pieces = pack("x", linear)
    for key in whole:
        assert_same(pieces[key], whole[key])
    assert_same(unpack_linear("x", whole, bits, False)[0], linear.codes)


@CHECKPOINT_DTYPES
@GRIDS
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_library_compressor(
    shape: tuple[int, int, int | None], bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    out, inputs, group_size = shape
    linear = random_linear(out, inputs, bits, group_size, symmetric, dtype)
    model = nn.Sequential(nn.Linear(inputs, out, bias=False))
    scheme = QuantizationScheme(
        targets=["Linear"], weights=library_args(bits, group_size, symmetric), format="pack-quantized"
    )
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}), show_progress=False)
    module = model[0]
    # The weight in float32 whatever the scale's dtype: in bf16 eight bits of code would not survive w / scale.
    module.weight.data = linear.weight(torch.float32)
    module.weight_scale.data = linear.scale
    module.weight_zero_point.data = (linear.zero - (1 << (bits - 1))).to(torch.int8)
    compress_module(module)
    ours, theirs = pack("0", linear), model.state_dict()
    assert set(ours) == set(theirs)
    for key in theirs:
        assert_same(ours[key], theirs[key])


@CHECKPOINT_DTYPES
@GRIDS
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_equal_the_library_compressor(
    shape: tuple[int, int, int | None], bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    """A code a byte, where activations are quantized too; and the layout, before there is data."""
    out, inputs, group_size = shape
    linear = random_linear(out, inputs, bits, group_size, symmetric, dtype)
    ours = pack_linear("x", linear.codes, linear.scale, linear.zero_point, bits, integers=True)
    state = {"weight": linear.weight(torch.float32), "weight_scale": linear.scale.float()}
    state["weight_zero_point"] = (linear.zero - (1 << (bits - 1))).to(torch.int8)
    args = library_args(bits, group_size, symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=TOKENS, format="int-quantized")
    theirs = IntQuantizationCompressor.compress(state, scheme)
    assert set(ours) == {f"x.{key}" for key in theirs}
    assert_same(ours["x.weight"], theirs["weight"])
    if not symmetric:
        assert_same(ours["x.weight_zero_point"], theirs["weight_zero_point"])
    layout = packed_layout("x", out, inputs, bits, group_size, symmetric, dtype, integers=True)
    assert layout == {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in ours.items()}


def test_library_cannot_unpack_up_to_eight_outputs_at_four_bits_asymmetric() -> None:
    """Ours can. The day the library can too, the copy in `unpack_linear` and its comment can go."""
    for out, fails in [(8, True), (9, False)]:
        assert unreadable(out, 96, Grid(4, 32, False)) == fails
        linear = random_linear(out, 96, 4, 32, False, torch.float32)
        state = {key.removeprefix("x."): tensor for key, tensor in pack("x", linear).items()}
        scheme = QuantizationScheme(targets=["Linear"], weights=library_args(4, 32, False))
        if fails:
            with pytest.raises(RuntimeError, match="stride"):
                PackedQuantizationCompressor.decompress(state, scheme)
        else:
            weight = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
            assert_same(weight, linear.weight(torch.float32))
        assert_same(unpack_linear("x", pack("x", linear), 4, False)[2], linear.zero_point)
    # Other widths, one group, and grids without zero points are read.
    for readable in (Grid(3, 32, False), Grid(4, 96, False), Grid(4, None, False), Grid(4, 32, True)):
        assert not unreadable(8, 96, readable)


def test_what_does_not_fit_is_refused() -> None:
    good = random_linear(4, 8, 3, None, False, torch.float32)
    with pytest.raises(ValueError, match="9 does not fit 3 bits"):
        pack_linear("x", torch.full((4, 8), 9, dtype=torch.uint8), good.scale, None, 3)
    with pytest.raises(ValueError, match="uint8 matrix"):
        pack_linear("x", good.codes.to(torch.int8), good.scale, None, 3)
    with pytest.raises(ValueError, match="not 9"):
        pack_linear("x", good.codes, good.scale, None, 9)
    with pytest.raises(ValueError, match="equal groups"):
        pack_linear("x", good.codes, torch.ones(4, 3), None, 3)
    with pytest.raises(ValueError, match="must be alike"):
        pack_linear("x", good.codes, torch.ones(4, 2), good.zero_point, 3)
    with pytest.raises(ValueError, match="floating"):
        pack_linear("x", good.codes, good.zero, None, 3)
    with pytest.raises(ValueError, match="does not divide"):
        packed_layout("x", 4, 100, 3, 32, True, torch.float32)
    with pytest.raises(ValueError, match="weight_zero_point"):
        unpack_linear("x", pack_linear("x", good.codes, good.scale, None, 3), 3, symmetric=False)


# --- configuration ---------------------------------------------------------------------------------------------------


@GRIDS
@pytest.mark.parametrize("group_size", [32, None])
def test_config_is_json_that_the_library_reads_back(group_size: int | None, symmetric: bool) -> None:
    document = json.loads(json.dumps(quantization_config(3, group_size, symmetric, ("lm_head",))))
    assert document["quant_method"] == "compressed-tensors"
    assert document["format"] == "pack-quantized"
    assert document.get("dequantize", False) is not symmetric
    config = QuantizationConfig.model_validate(document)
    assert config.ignore == ["lm_head"]
    (scheme,) = config.config_groups.values()
    assert isinstance(scheme, QuantizationScheme)
    assert scheme.targets == ["Linear"]
    assert scheme.weights == library_args(3, group_size, symmetric)


@GRIDS
@pytest.mark.parametrize("group_size", [32, None])
def test_config_with_activations(group_size: int | None, symmetric: bool) -> None:
    document = json.loads(json.dumps(quantization_config(4, group_size, symmetric, ("lm_head",), 8)))
    assert document["format"] == "int-quantized"
    # Dequantized into plain linears, it would run with activations as they are.
    assert "dequantize" not in document
    (scheme,) = QuantizationConfig.model_validate(document).config_groups.values()
    assert isinstance(scheme, QuantizationScheme)
    assert scheme.weights == library_args(4, group_size, symmetric)
    assert scheme.input_activations == TOKENS


def test_what_no_engine_serves() -> None:
    symmetric, asymmetric = Grid(8, None, symmetric=True), Grid(8, None, symmetric=False)
    assert all(packed_format.refusal(bits, None, operands=False) is None for bits in BITS)
    assert all(packed_format.refusal(w, Grid(a, None, True), operands=False) is None for w, a in packed_format.SERVED)
    assert "W6A8" in (packed_format.refusal(6, symmetric, operands=False) or "")
    assert "asymmetric" in (packed_format.refusal(8, asymmetric, operands=False) or "")
    assert "q, k and v" in (packed_format.refusal(8, symmetric, operands=True) or "")


# --- loading ---------------------------------------------------------------------------------------------------------


def small_llama(tied: bool, intermediate: int = 128) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def write_packed(
    folder: Path, model: LlamaForCausalLM, bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype
) -> dict[str, Quantized]:
    """The model with random codes in all its linears but the head; plain files, as the merge stage writes them."""
    state = dict(nn.Module.to(model, dtype).state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    linears = {}
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            out, inputs = module.weight.shape
            linears[name] = random_linear(out, inputs, bits, group_size, symmetric, dtype, seed)
            del state[f"{name}.weight"]
            state |= pack(name, linears[name])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": quantization_config(bits, group_size, symmetric, ["lm_head"]),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return linears


def check_loaded(folder: Path, linears: dict[str, Quantized], dtype: torch.dtype) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    # The first forward pass unpacks a symmetric model; an asymmetric one arrives unpacked.
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    for name, linear in linears.items():
        assert_same(model.get_submodule(name).weight.detach(), linear.weight(dtype))


@CHECKPOINT_DTYPES
@GRIDS
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_from_pretrained_gives_w_hat(
    tmp_path: Path, tied: bool, group_size: int | None, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    # Per channel, rows of 100: they end within a word at 3 bits, and the loader must take the width from weight_shape.
    model = small_llama(tied, intermediate=100 if group_size is None else 128)
    linears = write_packed(tmp_path, model, bits, group_size, symmetric, dtype)
    check_loaded(tmp_path, linears, dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, linear in linears.items():
        codes, scale, zero_point = unpack_linear(name, tensors, bits, symmetric)
        assert_same(codes, linear.codes)
        assert_same(scale, linear.scale)
        assert_same(zero_point, linear.zero_point)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, None])
def test_asymmetric_needs_dequantize(tmp_path: Path, group_size: int | None, bits: int) -> None:
    """The day this loads, the key and its comment in `quantization_config` can go."""
    write_packed(tmp_path, small_llama(True), bits, group_size, False, torch.bfloat16)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["dequantize"]
    path.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --- the library's round-to-nearest, restated in our convention -------------------------------------------------------
#
# The formulas below are what lsi/grid.py must compute to agree with the library on every bit: the zero point is added
# before the one rounding, in the signed convention. Adding it unsigned (or after rounding) moves ties and changes
# what the floating sum rounds to.


def grouped(weight: Tensor, group_size: int | None) -> Tensor:
    return weight.unflatten(-1, (-1, group_size or weight.shape[-1]))


def library_grid(
    weight: Tensor, bits: int, group_size: int | None, symmetric: bool, **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, zero, codes) from calculate_qparams and quantize; zero and codes int32, moved to count from 0."""
    args = library_args(bits, group_size, symmetric, **more)
    groups = grouped(weight, group_size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = quantize(weight, scale, zero, args, dtype=torch.int8)
    half = 1 << (bits - 1)
    return scale, zero.to(torch.int32) + half, codes.to(torch.int32) + half


def exact_scale(groups: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Before the guard against zero."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    steps = (1 << bits) - 1
    return torch.maximum(-low, high) / (steps / 2) if symmetric else (high - low) / steps


def exact_zero(groups: Tensor, scale: Tensor, bits: int, symmetric: bool) -> Tensor:
    """From the scale before the guard. 0/0 (an all-zero group) is NaN, which the library casts to a signed 0."""
    half = 1 << (bits - 1)
    if symmetric:
        return torch.full_like(scale, half).to(torch.int32)
    signed = (-half - groups.amin(-1).clamp(max=0) / scale).clamp(-half, half - 1).round()
    return signed.nan_to_num(nan=0).to(torch.int32) + half


def exact_codes(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    signed = groups / scale[..., None] + (zero - half).to(groups.dtype)[..., None]
    return signed.clamp(-half, half - 1).round().to(torch.int32).flatten(-2) + half


def guarded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(scale == 0, torch.finfo(dtype).eps, scale)


def tied_weights() -> Tensor:
    """All triples of multiples of 1/4 in −3 … 3, as [3125, 15]: many quotients end on a half."""
    values = [quarter / 4 for quarter in range(-12, 13)]
    return torch.tensor(list(itertools.product(values, repeat=3))).reshape(-1, 15)


def hard_weights(dtype: torch.dtype) -> Tensor:
    """The triples, random rows, and rows of one sign, of zeros and of the smallest numbers, whose scale underflows."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.cat([tied_weights(), torch.randn(2048, 15, generator=generator) * 0.02]).to(dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    rows = [torch.zeros(15), torch.ones(15), -torch.ones(15)]
    tiny = [torch.full((15,), sign * smallest, dtype=dtype) for sign in (1, -1)]
    return torch.cat([weight, torch.stack(rows).to(dtype), torch.stack(tiny)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@GRIDS
@pytest.mark.parametrize("bits", [1, *BITS])
@pytest.mark.parametrize("group_size", [3, None])
def test_library_grid_bit_for_bit(group_size: int | None, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = hard_weights(dtype)
    scale, zero, codes = library_grid(weight, bits, group_size, symmetric)
    groups = grouped(weight, group_size)
    raw = exact_scale(groups, bits, symmetric)
    assert_same(scale, guarded(raw, dtype))
    assert_same(zero, exact_zero(groups, raw, bits, symmetric))
    assert_same(codes, exact_codes(groups, scale, zero, bits))


@GRIDS
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [3, None])
def test_textbook_formula_differs_at_ties_only(group_size: int | None, bits: int, symmetric: bool) -> None:
    """clamp(round(w/s) + z) and clamp(round(−min/s)) against the library, in float32."""
    weight = hard_weights(torch.float32)
    scale, zero, codes = library_grid(weight, bits, group_size, symmetric)
    groups = grouped(weight, group_size)
    steps = (1 << bits) - 1
    quotient = groups / scale[..., None]
    textbook = (quotient.round() + zero[..., None]).clamp(0, steps).flatten(-2).to(torch.int32)
    if symmetric:
        # The signed zero point is 0: nothing is added before the rounding.
        assert_same(codes, textbook)
        return
    # How far the sum's own rounding can carry a quotient: half a unit in the last place of a number below 2^b.
    reach = 2.0**bits * torch.finfo(torch.float32).eps
    different = codes != textbook
    distance = (quotient - quotient.floor() - 0.5).abs().flatten(-2)
    assert different.any()
    assert (codes - textbook).abs().max() == 1
    assert distance[different].max() <= reach
    raw = exact_scale(groups, bits, symmetric)
    position = torch.where(raw == 0, 0.0, -groups.amin(-1).clamp(max=0) / raw)
    zero_off = (zero != position.round().clamp(0, steps).to(torch.int32)) & (raw != 0)
    assert ((position - position.floor() - 0.5).abs()[zero_off] <= reach).all()


@GRIDS
@pytest.mark.parametrize("bits", BITS)
def test_scale_dtype_rounds_the_scale_after_the_zero_point(bits: int, symmetric: bool) -> None:
    """QuantizationArgs(scale_dtype=bf16) on float32 weights: how the library itself meets a bf16 checkpoint."""
    weight = hard_weights(torch.float32)
    scale, zero, codes = library_grid(weight, bits, 3, symmetric, scale_dtype=torch.bfloat16)
    groups = grouped(weight, 3)
    raw = exact_scale(groups, bits, symmetric)
    assert_same(scale, guarded(raw.to(torch.bfloat16).float(), torch.bfloat16))
    assert_same(zero, exact_zero(groups, raw, bits, symmetric))
    assert_same(codes, exact_codes(groups, scale, zero, bits))
