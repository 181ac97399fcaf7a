"""Activations on an integer grid: dynamic, one scale (and zero point) a token, as engines compute them.

The grid is the weights' own (`lsi.grid`) with a token in the place of an output channel: symmetric as served (W8A8, W4A8,
W4A4), asymmetric as in OmniQuant's and LSI's tables. The range is the token's own at every call, so nothing is stored. Its
gradient reaches the two extreme channels, which is what the equivalent transformation trains on: it makes them smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lsi.grid import Grid, fake_quantize, grid_parameters, group_range


@dataclass(frozen=True)
class Activations:
    """`operands`: the two operands of q·kᵀ and of p·v are quantized too (OmniQuant, section 4.1); fake-quant only."""

    bits: int
    symmetric: bool
    operands: bool = False

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, None, self.symmetric)


def quantize_tokens(x: Float[Tensor, "*batch channels"], activations: Activations) -> Float[Tensor, "*batch channels"]:
    """The values that the tokens' codes stand for, in x's dtype, which is also the scale's. Differentiable."""
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        low, high = group_range(flat.float().unsqueeze(1))
        scale, zero = grid_parameters(low, high, activations.grid, x.dtype)
        return fake_quantize(flat.float(), scale, zero, activations.grid).to(x.dtype).view_as(x)


def _quantize_input(activations: Activations) -> Any:
    return lambda module, arguments: (quantize_tokens(arguments[0], activations), *arguments[1:])


@contextmanager
def quantized_inputs(block: nn.Module, names: Iterable[str], activations: Activations | None) -> Iterator[None]:
    """Within it, the named modules of a block get quantized inputs. None: nothing is changed."""
    handles = []
    if activations is not None:
        hook = _quantize_input(activations)
        handles = [block.get_submodule(name).register_forward_pre_hook(hook) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_with_quantized_operands(
    activations: Activations,
    query: Float[Tensor, "batch heads sequence head"],
    key: Float[Tensor, "batch heads sequence head"],
    value: Float[Tensor, "batch heads sequence head"],
    mask: Tensor | None,
    scaling: float,
) -> Float[Tensor, "batch sequence heads head"]:
    """softmax(q·kᵀ) · v with q, k and v (per token and head) quantized, and the softmax itself in float32.

    Probabilities stay as they are: they lie in [0, 1] and a token's grid would waste half its codes on them.
    """
    query, key, value = (quantize_tokens(x, activations) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask[..., : key.shape[-2]]
    probabilities = scores.float().softmax(-1).to(query.dtype)
    return (probabilities @ value).transpose(1, 2).contiguous()
