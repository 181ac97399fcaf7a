"""Perplexity on non-overlapping windows of a text's tokens, from its start."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from pipeline.errors import UserError


def take_windows(tokens: Int[Tensor, " tokens"], windows: int, length: int, name: str) -> Int[Tensor, "windows length"]:
    """The first windows × length tokens. Raises UserError if there are too few."""
    need = windows * length
    if len(tokens) < need:
        raise UserError(
            f"{name}: {windows} windows of {length} tokens need {need} tokens, the text has {len(tokens)}; "
            + (
                f"ask for at most {len(tokens) // length} windows or give more text"
                if len(tokens) >= length
                else "give more text"
            )
        )
    return tokens[:need].view(windows, length)


def negative_log_likelihood(
    logits: Float[Tensor, "batch length vocabulary"], tokens: Int[Tensor, "batch length"]
) -> float:
    """Sum over all predicted tokens (all but each window's first), in nats."""
    flat = logits[:, :-1].float().flatten(0, 1)
    return float(functional.cross_entropy(flat, tokens[:, 1:].flatten().long(), reduction="sum").double())


def perplexity(total: float, windows: int, length: int) -> float:
    """exp of the mean negative log likelihood; infinity where that overflows."""
    mean = total / (windows * (length - 1))
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def model_perplexity(
    model: torch.nn.Module, windows: Int[Tensor, "windows length"], progress: Callable[[int], None] = lambda done: None
) -> float:
    """Perplexity of a whole transformers model, one window at a time."""
    total = 0.0
    for index, window in enumerate(windows):
        batch = window.unsqueeze(0).long().to(next(model.parameters()).device)
        total += negative_log_likelihood(model(input_ids=batch, use_cache=False).logits, batch)
        progress(index + 1)
    return perplexity(total, *windows.shape)
