"""Activations on the integer grid: dynamic, one scale a token, rounded straight-through.

A token is a row of the same grid as a weight's (`lsi.grid`), with all of its channels in one group. Its range is taken from
the token itself (OmniQuant, arXiv 2308.13137, section 4.1), and gradients pass through it: a smaller outlier is a finer grid
for the whole token, which is what an equivalent transformation has to see. Sums are in float32 whatever the input's dtype,
as engines' kernels do them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lsi.grid import Grid, fake_quantize, grid_parameters, group_range


def quantize_tokens(x: Float[Tensor, "*batch channels"], grid: Grid) -> Float[Tensor, "*batch channels"]:
    """`x` on the grid, in its own dtype; every index of the leading dimensions is a token. The grid has no groups."""
    with torch.autocast(x.device.type, enabled=False):
        tokens = x.float().reshape(-1, x.shape[-1])
        low, high = group_range(tokens.unsqueeze(1), grid)
        scale, zero = grid_parameters(low, high, grid, torch.float32)
        return fake_quantize(tokens, scale, zero, grid).view(x.shape).to(x.dtype)


def quantize_inputs(block: nn.Module, names: Iterable[str], grid: Grid) -> None:
    """Let the named linears of a block, plain or in training, read their inputs on the grid. For good: take a copy."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return quantize_tokens(arguments[0], grid), *arguments[1:]

    for name in names:
        block.get_submodule(name).register_forward_pre_hook(hook)


def _scores(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Float[Tensor, "batch heads q k"]:
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _masked(scores: Float[Tensor, "batch heads q k"], mask: Tensor | None, *, causal: bool) -> Tensor:
    """Scores where no query looks at what it must not: a mask of truth values or of numbers to add, else the causal one."""
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril() if causal else None
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def quantized_attention(
    query: Float[Tensor, "batch heads q size"],
    key: Float[Tensor, "batch kv_heads k size"],
    value: Float[Tensor, "batch kv_heads k size"],
    mask: Tensor | None,
    grid: Grid,
    *,
    scaling: float,
    softcap: float | None = None,
    causal: bool = True,
) -> Float[Tensor, "batch heads q size"]:
    """softmax(q · kᵀ) · v with each head's q, k and v on the grid, token by token.

    The probabilities and their softmax stay in float32: the paper leaves these out, and so does OmniQuant, for their long
    tail. Query heads of a group share a key and value head.
    """
    query, key, value = (quantize_tokens(operand, grid) for operand in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (operand.repeat_interleave(group, dim=1) for operand in (key, value))
    scores = _masked(_scores(query, key, scaling, softcap), mask, causal=causal)
    return scores.softmax(-1).to(value.dtype) @ value
