"""The sizes that memory is reckoned from, out of a model's configuration: meta tensors, no weights and no shard's header."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lsi.block import get_linear, linear_names
from pipeline.config import RunConfig
from pipeline.skeleton import Skeleton
from pipeline.weights import block_tensors


@dataclass(frozen=True)
class BlockShape:
    """A block's sizes, those of the largest one. `linears`: (out, in) of those that are quantized; `rest`: its other numbers.

    attention, keys: widths of all query and of all key heads; intermediate: of the feed-forward part, as many times as a token
    passes one (`passes`: experts at work); gated: whether that has three linears. outer: numbers around the blocks, `largest_outer` of its largest tensor.
    blocks: how many there are.
    """

    linears: tuple[tuple[int, int], ...]
    rest: int
    hidden: int
    attention: int
    keys: int
    intermediate: int
    vocabulary: int
    outer: int
    largest_outer: int
    itemsize: int = 2
    gated: bool = True
    passes: int = 1
    blocks: int = 1

    @property
    def weights(self) -> int:
        return sum(out * width for out, width in self.linears)

    @property
    def largest(self) -> tuple[int, int]:
        return max(self.linears, key=lambda shape: shape[0] * shape[1])


def block_shape(skeleton: Skeleton, config: RunConfig, dtype: torch.dtype) -> BlockShape:
    """Of the largest block that is quantized."""
    sizes = [sum(t.numel() for t in block_tensors(skeleton, index).values()) for index in range(len(skeleton))]
    skip = config.scheme.skip
    named = [linear_names(block, skeleton.block_prefix(index), skip) for index, block in enumerate(skeleton.blocks)]
    index = max(range(len(sizes)), key=lambda place: (bool(named[place]), sizes[place]))
    names = named[index]
    linears = tuple(_shape(get_linear(skeleton.blocks[index], name).weight) for name in names)
    found, outer = skeleton.model.config, [t.numel() for t in block_tensors(skeleton, None).values()]
    hidden: int = found.hidden_size
    heads = getattr(found, "num_attention_heads", None) or 1
    head = getattr(found, "head_dim", None) or hidden // heads
    inner, experts = feed_forward(found)
    return BlockShape(
        linears=linears,
        rest=sizes[index] - sum(out * width for out, width in linears),
        hidden=hidden,
        attention=head * heads,
        keys=head * (getattr(found, "num_key_value_heads", None) or heads),
        intermediate=inner,
        vocabulary=found.vocab_size,
        outer=sum(outer),
        largest_outer=max(outer),
        itemsize=dtype.itemsize,
        gated=_is_gated(skeleton, index, inner),
        passes=experts,
        blocks=len(skeleton),
    )


def _shape(weight: torch.Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def feed_forward(config: Any) -> tuple[int, int]:
    """Inner width of the feed-forward part, or of one expert, and how many a token passes."""
    experts = getattr(config, "num_experts_per_tok", None)
    dense = ("intermediate_size", "ffn_dim", "n_inner")
    names = ("moe_intermediate_size", *dense) if experts else dense
    width = next((size for name in names if (size := getattr(config, name, None))), 4 * config.hidden_size)
    return int(width), int(experts or 1)


def _is_gated(skeleton: Skeleton, index: int, inner: int) -> bool:
    """Whether two linears of each feed-forward part widen: by the numbers of both kinds, fused ones counting for two."""
    shapes = [tuple(m.weight.shape) for m in skeleton.blocks[index].modules() if isinstance(m, torch.nn.Linear)]
    hidden = skeleton.model.config.hidden_size
    widening = sum(math.prod(shape) for shape in shapes if shape in ((inner, hidden), (2 * inner, hidden)))
    narrowing = sum(math.prod(shape) for shape in shapes if shape == (hidden, inner))
    return widening > narrowing or not narrowing
