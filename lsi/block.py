"""A transformer block with its linears replaced: the family's own module runs the forward pass, nothing is re-written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lsi.grid import Grid, QuantizedWeight, round_to_nearest
from lsi.linear import Parts, QuantizedLinear

Hidden = Float[Tensor, "batch sequence hidden"]


def is_skipped(name: str, skip: list[str]) -> bool:
    """Whether a linear's full name matches a pattern: the name, its last parts, or an fnmatch pattern."""
    return any(name == pattern or name.endswith("." + pattern) or fnmatch(name, pattern) for pattern in skip)


def linear_names(block: nn.Module, prefix: str, skip: list[str]) -> list[str]:
    """Names within the block of the linears that are quantized; `prefix` is the block's name in the model."""
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in names if not is_skipped(f"{prefix}.{name}", skip)]


def get_linear(block: nn.Module, name: str) -> nn.Linear:
    """A linear of a block by its name within it."""
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def replace_linears(
    block: nn.Module, names: list[str], grid: Grid, parts: Parts, starts: Mapping[str, QuantizedWeight] | None = None
) -> dict[str, QuantizedLinear]:
    """Put trainable quantized linears in the place of the named ones, freeze the rest, and return them by name.

    `starts`: what they are quantized to already, by name.
    """
    block.requires_grad_(False)
    replaced = {}
    for name in names:
        replaced[name] = QuantizedLinear(get_linear(block, name), grid, parts, (starts or {}).get(name))
        block.set_submodule(name, replaced[name])
    return replaced


def run_block(
    block: nn.Module, hidden: Hidden, arguments: Mapping[str, Any]
) -> Float[Tensor, "batch sequence channels"]:
    """The block's hidden states, or logits where the head is in it; some families return a tuple with them first."""
    output = block(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def trainable(linears: Mapping[str, QuantizedLinear]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every trained parameter as (linear name.part, tensor), in a fixed order."""
    for name in sorted(linears):
        for part, parameter in linears[name].named_parameters():
            yield f"{name}.{part}", parameter


@torch.no_grad()
def load_quantized(block: nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    """Write W_hat into a plain block's linears, rounded to their dtype: what a loader of the checkpoint computes with."""
    for name, quantized in weights.items():
        get_linear(block, name).weight.copy_(quantized.dequantize())


@torch.no_grad()
def round_block(block: nn.Module, names: list[str], grid: Grid, scale_dtype: torch.dtype) -> dict[str, QuantizedWeight]:
    """Round-to-nearest of every named linear."""
    return {name: round_to_nearest(get_linear(block, name).weight, grid, scale_dtype) for name in names}
