"""The compressed-tensors formats: codes and scales to checkpoint tensors, and back.

`pack-quantized` holds weights alone, their bits packed into words. `int-quantized` holds one code a byte, and says that
inputs are quantized as they come, one symmetric range a token.

The only module that knows how that library lays out a quantized linear. Everything else speaks our convention:

- codes: uint8 [out, in], 0 … 2^b − 1
- scale: floating [out, groups], groups = 1 per channel
- zero point: uint8 [out, groups], 0 … 2^b − 1; None stands for the symmetric grid's constant 2^(b − 1), never stored
- W_hat = scale · (codes − zero point)

compressed-tensors counts from −2^(b − 1) instead (int8), which is the same grid moved by a constant: the move is done
here, the packing of bits into words by the library itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import compressed_tensors
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from torch import Tensor

from lsi.grid import Grid

MIN_BITS: Final = 1
MAX_BITS: Final = 8
WORD_BITS: Final = 32
# Where a transform is part of the stored weights, and nothing is left to do.
IN_WEIGHTS: Final = ("weight_input", "weight_output")
# Bits of weights and activations for which engines have kernels.
SERVED: Final = ((8, 8), (4, 8), (4, 4))

# The packer widens every value to int32 twice over, nine bytes a code: 2 GB for a whole 28672 × 8192 linear. Rows of a
# weight are packed independently, so they go through in pieces of some 40 MB, which is faster too.
CODES_AT_ONCE: Final = 1 << 22


def refusal(bits: int, activations: Grid | None, *, operands: bool) -> str | None:
    """Why a scheme has no checkpoint that an engine serves; None if it has one. operands: q, k and v are quantized too."""
    if activations is None:
        return None
    if (bits, activations.bits) not in SERVED:
        served = ", ".join(f"W{w}A{a}" for w, a in SERVED)
        return f"W{bits}A{activations.bits} is served by no engine (those served: {served})"
    if not activations.symmetric:
        return "asymmetric activations are served by no engine (scheme.activation_symmetric true is)"
    return "quantized q, k and v are served by no engine (scheme.quantize_qkv false is)" if operands else None


def unreadable(out_features: int, in_features: int, scheme: Grid) -> bool:
    """Whether compressed-tensors 0.20 saves but cannot load such a pack-quantized linear: zero points of 4 bits that fill no more than
    one word (8 outputs) in several groups (see `unpack_linear`)."""
    one_word = out_features * scheme.bits <= WORD_BITS
    return scheme.bits == 4 and not scheme.symmetric and one_word and scheme.groups(in_features) > 1


def format_of(activation_bits: int | None) -> CompressionFormat:
    """The form in which codes are stored."""
    return CompressionFormat.pack_quantized if activation_bits is None else CompressionFormat.int_quantized


def pack_linear(
    name: str, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, *, integers: bool = False
) -> dict[str, Tensor]:
    """The checkpoint tensors of one quantized linear, as compressed-tensors itself would save them.

    codes: uint8 [out, in]; scale: floating [out, groups], kept in its dtype; zero_point: uint8 [out, groups], or None
    for the symmetric grid.

    integers: the int-quantized form, `.weight` int8 [out, in], `.weight_scale`, and `.weight_zero_point` int8 [out, groups].

    Returns otherwise, under `name`: `.weight_packed` int32 [out, ⌈in·bits/32⌉], `.weight_scale` as given, `.weight_shape` int64
    [2], and for the asymmetric grid `.weight_zero_point` int32 [⌈out·bits/32⌉, groups].
    """
    _check_linear(name, codes, scale, zero_point, bits)
    if integers:
        whole = {f"{name}.weight": _to_signed(codes, bits), f"{name}.weight_scale": scale.detach().contiguous()}
        return whole if zero_point is None else whole | {f"{name}.weight_zero_point": _to_signed(zero_point, bits)}
    rows = _rows_at_once(codes.shape[1])
    tensors = {
        f"{name}.weight_packed": _by_rows(lambda part: pack_to_int32(_to_signed(part, bits), bits), codes, rows),
        f"{name}.weight_scale": scale.detach().contiguous(),
        f"{name}.weight_shape": torch.tensor(codes.shape),
    }
    if zero_point is not None:
        # Along the outputs, as the library does: a row has too few groups to fill a word.
        tensors[f"{name}.weight_zero_point"] = pack_to_int32(_to_signed(zero_point, bits), bits, packed_dim=0)
    return tensors


def unpack_linear(
    name: str, tensors: Mapping[str, Tensor], bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Exact inverse of `pack_linear`: (codes uint8 [out, in], scale [out, groups], zero point uint8 or None)."""
    _check_bits(bits)
    shape = torch.Size(_tensor(tensors, f"{name}.weight_shape").tolist())
    scale = _tensor(tensors, f"{name}.weight_scale")
    packed = _tensor(tensors, f"{name}.weight_packed")

    def unpack(part: Tensor) -> Tensor:
        return _to_unsigned(unpack_from_int32(part, bits, torch.Size((part.shape[0], shape[1]))), bits)

    codes = _by_rows(unpack, packed, _rows_at_once(shape[1]))
    if symmetric:
        return codes, scale, None
    packed_zero = _tensor(tensors, f"{name}.weight_zero_point")
    # By hand what packed_dim=0 does, with a true copy: at 4 bits the library's own transpose of a single row of words
    # (up to 8 outputs, several groups) passes for contiguous with a stride that is not 1, and its view as bytes raises.
    # compressed-tensors 0.20 therefore cannot load such a linear, though it can save it.
    across = packed_zero.t().clone(memory_format=torch.contiguous_format)
    zero = unpack_from_int32(across, bits, torch.Size((scale.shape[1], shape[0]))).t()
    return codes, scale, _to_unsigned(zero, bits).contiguous()


def packed_layout(
    name: str,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype,
    *,
    integers: bool = False,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor that `pack_linear` makes for such a linear, before there is data."""
    _check_bits(bits)
    groups = _group_count(name, in_features, group_size)
    if integers:
        whole: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            f"{name}.weight": (torch.int8, (out_features, in_features)),
            f"{name}.weight_scale": (scale_dtype, (out_features, groups)),
        }
        return whole if symmetric else whole | {f"{name}.weight_zero_point": (torch.int8, (out_features, groups))}
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{name}.weight_packed": (torch.int32, (out_features, _words(in_features, bits))),
        f"{name}.weight_scale": (scale_dtype, (out_features, groups)),
        f"{name}.weight_shape": (torch.int64, (2,)),
    }
    if not symmetric:
        layout[f"{name}.weight_zero_point"] = (torch.int32, (_words(out_features, bits), groups))
    return layout


def quantization_config(
    bits: int, group_size: int | None, symmetric: bool, ignore: Sequence[str], activation_bits: int | None = None
) -> dict[str, Any]:
    """What stands in config.json under "quantization_config": every Linear but those named in `ignore`."""
    config = QuantizationConfig(
        config_groups={"group_0": _scheme(bits, group_size, symmetric, activation_bits)},
        format=format_of(activation_bits).value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
    )
    document = {"version": compressed_tensors.__version__, **config.model_dump(mode="json")}
    if not symmetric and activation_bits is None:
        # Without this, transformers builds the packed modules on the meta device and asks the library's compressor for
        # their shapes. Its meta path (PackedQuantizationCompressor.compress) packs the weight's shape but leaves the
        # zero point as int8 [out, groups], so the stored int32 [⌈out·bits/32⌉, groups] does not fit and from_pretrained
        # raises, at every width and group size. With it, transformers unpacks while loading into plain linears and the
        # meta path is never taken. Symmetric linears store no zero point and load packed: no need to expand those.
        # vLLM picks the keys that it knows and passes this one by.
        document["dequantize"] = True
    return document


def _scheme(bits: int, group_size: int | None, symmetric: bool, activation_bits: int | None) -> QuantizationScheme:
    """The library's description of our grids; its compressor takes the same object."""
    _check_bits(bits)
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size is {group_size}; it must be positive, or None for one group per channel")
    strategy = QuantizationStrategy.CHANNEL if group_size is None else QuantizationStrategy.GROUP
    weights = QuantizationArgs(
        num_bits=bits, type=QuantizationType.INT, symmetric=symmetric, strategy=strategy, group_size=group_size
    )
    form = format_of(activation_bits)
    if activation_bits is None:
        return QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    # The library takes one range a token where inputs are [batch, token, channel]. Where a family flattens them before its
    # linears (OPT's fc1 and fc2), its emulation in transformers takes one for all tokens; engines' kernels do not.
    activations = QuantizationArgs(
        num_bits=activation_bits,
        type=QuantizationType.INT,
        symmetric=True,
        strategy=QuantizationStrategy.TOKEN,
        dynamic=True,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations, format=form)


def read_scheme(document: Any) -> Grid:
    """The grid that a "quantization_config" describes, of a checkpoint whose linears are all quantized alike.

    Raises ValueError, a clause that says what it is, for anything but one weight-only integer grid in pack-quantized form.
    """
    method = document.get("quant_method", "unknown") if isinstance(document, dict) else document
    if method != "compressed-tensors":
        raise ValueError(f"its weights are in the format of {method!r}")
    groups = [group for group in document.get("config_groups", {}).values() if isinstance(group, dict)]
    if not groups or any(not isinstance(group.get("weights"), dict) for group in groups):
        raise ValueError("its quantization_config describes no quantized weights")
    formats = {group.get("format") or document.get("format") for group in groups}
    if odd := sorted(str(name) for name in formats if name != CompressionFormat.pack_quantized.value):
        raise ValueError(f"its weights are in the form {', '.join(odd)}")
    transforms = (document.get("transform_config") or {}).get("config_groups", {}).values()
    if any(one.get("location") not in IN_WEIGHTS for group in transforms for one in group.get("apply", ())):
        raise ValueError("its activations go through transforms (transform_config)")
    if document.get("kv_cache_scheme") or any(
        g.get("input_activations") or g.get("output_activations") for g in groups
    ):
        raise ValueError("its activations are quantized, too")
    schemes = {_weight_scheme(group["weights"]) for group in groups}
    if len(schemes) > 1:
        raise ValueError(f"its linears are on {len(schemes)} different grids")
    return schemes.pop()


def _weight_scheme(weights: Mapping[str, Any]) -> Grid:
    # "weight" and "static" order what GPTQ looks at first; only these leave the groups as they are.
    if (order := weights.get("actorder")) not in (None, False, "weight", "static"):
        raise ValueError(f"its groups are in activation order (actorder {order!r})")
    kind, bits = weights.get("type", "int"), weights.get("num_bits")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if kind != "int" or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"its weights are {kind} of {bits} bits")
    if strategy not in ("group", "channel") or (strategy == "group" and (not isinstance(size, int) or size < 1)):
        raise ValueError(f"its scales are by {strategy}, of size {size}")
    return Grid(bits, size if strategy == "group" else None, bool(weights.get("symmetric", True)))


def loadable(document: dict[str, Any]) -> dict[str, Any]:
    """A "quantization_config" that transformers loads, from one that it may not (see `quantization_config`)."""
    return document if read_scheme(document).symmetric else document | {"dequantize": True}


def _group_count(name: str, in_features: int, group_size: int | None) -> int:
    """Groups in a row; the format has no place for a last group that is shorter."""
    if group_size is None:
        return 1
    if group_size < 1 or in_features % group_size:
        raise ValueError(f"{name}: group_size {group_size} does not divide the {in_features} inputs of this linear")
    return in_features // group_size


def _words(values: int, bits: int) -> int:
    return -(-values * bits // WORD_BITS)


def _rows_at_once(columns: int) -> int:
    return max(1, CODES_AT_ONCE // columns)


def _by_rows(function: Callable[[Tensor], Tensor], value: Tensor, rows: int) -> Tensor:
    """`function` on slices of `rows` rows, joined: the same as on the whole, for functions that treat rows apart."""
    return torch.cat([function(part) for part in value.split(rows)])


def _to_signed(value: Tensor, bits: int) -> Tensor:
    """uint8 0 … 2^b − 1 to int8 −2^(b − 1) … 2^(b − 1) − 1. Through int16: 2^7 itself is no int8."""
    return (value.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _to_unsigned(value: Tensor, bits: int) -> Tensor:
    return (value.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def _tensor(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"no tensor {key!r} among {sorted(tensors)}: not a pack-quantized linear of this grid")
    return tensors[key]


def _check_bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"pack-quantized holds {MIN_BITS} to {MAX_BITS} bits a weight, not {bits}")


def _check_linear(name: str, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> None:
    _check_bits(bits)
    _check_unsigned(f"{name}: codes", codes, bits)
    if not scale.is_floating_point():
        raise ValueError(f"{name}: scale is {scale.dtype}; a floating dtype is needed, the checkpoint's")
    if scale.ndim != 2 or scale.shape[0] != codes.shape[0] or scale.shape[1] < 1 or codes.shape[1] % scale.shape[1]:
        raise ValueError(
            f"{name}: scale {tuple(scale.shape)} does not fit codes {tuple(codes.shape)}: [out, groups] with equal "
            "groups is needed"
        )
    if zero_point is None:
        return
    _check_unsigned(f"{name}: zero point", zero_point, bits)
    if zero_point.shape != scale.shape:
        raise ValueError(f"{name}: zero point {tuple(zero_point.shape)} and scale {tuple(scale.shape)} must be alike")


def _check_unsigned(what: str, value: Tensor, bits: int) -> None:
    if value.dtype is not torch.uint8 or value.ndim != 2 or value.numel() == 0:
        raise ValueError(f"{what}: a filled uint8 matrix is needed, not {value.dtype} {tuple(value.shape)}")
    # The packer would add the overflow to the neighbouring values without a word.
    largest = int(value.max())
    if largest >= 1 << bits:
        raise ValueError(f"{what}: {largest} does not fit {bits} bits")
