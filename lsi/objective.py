"""What the outputs of a block in training are held against.

The plain loss compares them with the full-precision block's outputs on the full-precision stream. Two more may be taken in:

    look-ahead         the outputs pass the next full-precision blocks before they are compared, with the full-precision
                       stream there (cross-layer learning, arXiv 2407.15508): an error counts by what later blocks make of it
    quantized stream   the block's own outputs are also compared with the full-precision block's on the same inputs, those of
                       the quantized stream (OmniQuant's additional loss): the errors of blocks before it are left to them
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lsi.block import Hidden, run_block

LossKind = Literal["mse", "relative", "next_token"]
Tokens = Int[Tensor, "batch sequence"]
# Hidden states, or logits.
Outputs = Float[Tensor, "batch sequence channels"]
# A token of zeros has no relative error; this keeps its quotient finite.
SMALLEST_SQUARE = 1e-12


def token_losses(
    output: Outputs, target: Outputs | Tokens, kind: LossKind, first_token: float = 0.0
) -> Float[Tensor, "batch losses"]:
    """The error of each token's hidden states, in float32, weighted.

    mse: mean squared error over the channels (LSI, OmniQuant). relative: that divided by the target's mean square. The
    norm at the next block's entrance divides every token by its own size, so a relative error is what that block sees;
    and a few tokens with massive activations (arXiv 2402.17762) do not outweigh all the others by orders of magnitude. It
    grows by its logarithm, log(1 + e): at 2 bits a block may turn a small token into a massive one, with a relative error of
    thousands, and all steps on its batch would serve that token alone.

    `first_token`: what the first token's error counts beside the mean of all. It is the attention sink (arXiv 2309.17453):
    every later token attends to it, some block makes its activations massive, and where an error keeps that from happening
    all tokens suffer in all blocks after. One among hundreds, it would hardly be seen in the mean.

    next_token: the outputs are logits (batch × sequence × vocabulary) and the targets the tokens themselves; the loss is the
    cross entropy of each token after the first, not weighted.
    """
    if kind == "next_token":
        logits, tokens = output[:, :-1].flatten(0, 1).float(), target[:, 1:].flatten().long()
        return functional.cross_entropy(logits, tokens, reduction="none").view(len(output), -1)
    error = (output.float() - target.float()).square().mean(-1)
    if kind == "relative":
        error = (error / target.float().square().mean(-1).clamp(min=SMALLEST_SQUARE)).log1p()
    weight = torch.ones(error.shape[1], device=error.device)
    weight[0] += first_token * error.shape[1]
    return error * weight


def products_in(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Products in `dtype`; None: in that of their factors."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def freeze(block: nn.Module, products: torch.dtype | None) -> nn.Module:
    """The block, changed in place, for gradients to pass through: weights of linears in the products' dtype (None:
    float32), all else in float32 like the hidden states of a training step."""
    for module in block.modules():
        # One by one, and none by way of float32: the whole block widened would be twice its size.
        wanted = products if products is not None and isinstance(module, nn.Linear) else torch.float32
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(wanted)
    return block.requires_grad_(False)


@dataclass(frozen=True)
class Call:
    """A block as `freeze` leaves it, and what it is called with besides the hidden states."""

    block: nn.Module
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Frozen:
    """The full-precision blocks that a loss runs: those after the trained one, in their order, and that one itself."""

    following: tuple[Call, ...] = ()
    itself: Call | None = None


@dataclass(frozen=True)
class Objective:
    """How losses are taken: `kind` and `first_token` as in `token_losses`, `quantized_stream` the weight of the loss on the
    quantized stream, `products` the dtype of the frozen blocks' products (None: float32)."""

    kind: LossKind
    first_token: float = 0.0
    quantized_stream: float = 0.0
    products: torch.dtype | None = None

    def losses(
        self, output: Outputs, inputs: Hidden, targets: Outputs | Tokens, frozen: Frozen
    ) -> Float[Tensor, "batch losses"]:
        """Of each token, in float32. `output`: the trained block's, on `inputs`; `targets`: the full-precision stream after
        the last of `frozen.following`. Raises ValueError without the block itself where its outputs are asked for."""
        reached = self._through(frozen.following, output)
        losses = token_losses(reached, targets, self.kind, self.first_token)
        if not self.quantized_stream:
            return losses
        if frozen.itself is None:
            raise ValueError("a loss on the quantized stream needs the full-precision block itself")
        with torch.no_grad():
            own = self._through((frozen.itself,), inputs)
        return losses + self.quantized_stream * token_losses(output, own, self.kind, self.first_token)

    def _through(self, calls: tuple[Call, ...], hidden: Hidden) -> Hidden:
        if not calls:
            return hidden
        hidden = hidden.float()
        with products_in(self.products, hidden.device):
            for call in calls:
                hidden = run_block(call.block, hidden, call.arguments)
        return hidden
