"""The scales of a whole quantized model, trained together while its codes and zero points stay.

A block that is trained by itself is held against hidden states, and does not know what the model makes of an error. The scales
are few, one number in a group, and how they are best is a question to all blocks at once (EfficientQAT, arXiv 2407.11062,
section 3.3): so they are trained last, towards the full-precision model's distribution over the next token.

Every scale is trained as a factor of itself, so that one learning rate serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from lsi.block import widen_rest
from lsi.factors import MANY
from lsi.grid import QuantizedWeight, row_pieces, straight_through
from lsi.steps import cosine

Logits = Float[Tensor, "tokens vocabulary"]
# So many tokens have their logits in memory at once.
TOKENS_AT_ONCE = 256


class _Product(torch.autograd.Function):
    """x · W_hatᵀ + b with W_hat = scale · (codes − zero), and the gradients of x and of the scale. Keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, linear: ScaledLinear, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.linear, ctx.dtype = linear, dtype
        bias = None if linear.bias is None else linear.bias.to(dtype)
        return functional.linear(x.to(dtype), linear.weight_of(scale, dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        gradient, linear = gradients[0], ctx.linear
        by_input = (gradient @ linear.weight_of(scale, ctx.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        by_weight = gradient.flatten(0, -2).t() @ x.to(ctx.dtype).flatten(0, -2)
        return by_input, linear.by_scale(by_weight), None, None


class ScaledLinear(nn.Module):
    """y = x · W_hatᵀ + b with W_hat = factor · scale · (codes − zero point); `factor`, a number a group, is what is trained.

    The scale is rounded to the dtype it is stored in, straight-through: what is trained is what is loaded.

    W_hat is made in every pass from the codes, which take a byte a weight, or kept until the factor is put in anew.
    `recompute`: never keep it; None: that of linears of `MANY` weights and more.
    """

    codes: UInt8[Tensor, "out groups size"]
    zero_point: UInt8[Tensor, "out groups"]
    scale: Float[Tensor, "out groups"]
    bias: Float[Tensor, " out"] | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, *, recompute: bool | None = None) -> None:
        super().__init__()
        self.recompute = weight.codes.numel() >= MANY if recompute is None else recompute
        self.register_buffer("codes", weight.codes.view(*weight.scale.shape, -1), persistent=False)
        self.register_buffer("zero_point", weight.zero_point, persistent=False)
        self.register_buffer("scale", weight.scale, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().float(), persistent=False)
        self.factor = nn.Parameter(torch.ones(weight.scale.shape, device=weight.scale.device))
        self.kept: Tensor | None = None

    def put(self, factor: Float[Tensor, "out groups"]) -> None:
        """Compute with this factor from now on."""
        self.factor.data = factor.to(self.factor.device)
        self.kept = None

    def present_scale(self) -> Float[Tensor, "out groups"]:
        """In float32, rounded to the dtype that it is stored in; as it was where that would be zero or infinite."""
        scale = self.scale.float() * self.factor
        rounded = scale.detach().to(self.scale.dtype)
        possible = (rounded != 0) & rounded.isfinite()
        return straight_through(scale, torch.where(possible, rounded, self.scale).float())

    @torch.no_grad()
    def weight_of(self, scale: Float[Tensor, "out groups"], dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """W_hat, rounded to `dtype`."""
        if self.kept is not None and self.kept.dtype == dtype:
            return self.kept
        weight = QuantizedWeight(self.codes.flatten(1), scale, self.zero_point).dequantize(dtype)
        self.kept = None if self.recompute else weight
        return weight

    def by_scale(self, by_weight: Float[Tensor, "out in"]) -> Float[Tensor, "out groups"]:
        """The scale's gradient from that of W_hat, in float32."""
        result = torch.empty(self.scale.shape, device=by_weight.device)
        grouped = by_weight.view(self.codes.shape)
        for rows in row_pieces(grouped):
            steps = self.codes[rows].float().sub_(self.zero_point[rows].float().unsqueeze(-1))
            result[rows] = steps.mul_(grouped[rows]).sum(-1)
        return result

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        product: Tensor = _Product.apply(x, self.present_scale(), self, dtype)
        return product


def scaled(weight: QuantizedWeight, factor: Float[Tensor, "out groups"]) -> QuantizedWeight:
    """The quantized weight with its scales multiplied, as `ScaledLinear` computes with it."""
    linear = ScaledLinear(weight, None)
    linear.put(factor)
    return QuantizedWeight(weight.codes, linear.present_scale().detach().to(weight.scale.dtype), weight.zero_point)


def replace_by_scaled(
    block: nn.Module, weights: Mapping[str, QuantizedWeight], *, recompute: bool | None = None
) -> dict[str, ScaledLinear]:
    """Put scaled linears in the place of a block's quantized ones, all else frozen and in float32. Returns them by name."""
    block.requires_grad_(False)
    linears = {}
    for name, weight in weights.items():
        bias = block.get_submodule(name).bias
        linears[name] = ScaledLinear(weight, bias if isinstance(bias, Tensor) else None, recompute=recompute)
        block.set_submodule(name, linears[name])
    widen_rest(block, linears.values())
    return linears


def divergence(logits: Logits, target: Logits) -> tuple[Float[Tensor, " tokens"], Logits]:
    """Kullback-Leibler divergence of each token's distribution from the target's, in float32, and its sum's gradient for the
    logits, softmax(logits) − softmax(target).

    Some rows after another: a vocabulary's float32 tensors, of all tokens at once, would take longer than the products.
    """
    losses, gradient = torch.empty(len(logits), device=logits.device), torch.empty_like(logits)
    for rows in row_pieces(logits):
        own, wanted = logits[rows].float(), target[rows].float()
        probabilities = wanted.softmax(-1)  # not exp of log_softmax: where it underflows, exp is ten times as slow
        losses[rows] = wanted.log_softmax(-1).sub_(own.log_softmax(-1)).mul_(probabilities).sum(-1)
        gradient[rows] = own.softmax(-1).sub_(probabilities)
    return losses, gradient


def head_pass(
    head: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor, *, backward: bool
) -> tuple[float, Tensor | None]:
    """The divergence's sum over the tokens of hidden states that leave the last block, from the full-precision ones `target`.

    Returns it, and the gradient of the hidden states if `backward`. Logits are made of some tokens at a time, and of a whole
    tensor: for a part of the second dimension of three, torch multiplies batch by batch, with a copy of the head's weight.
    """
    total = 0.0
    entering = hidden.detach().flatten(0, 1).requires_grad_(backward)
    pieces = zip(entering.split(TOKENS_AT_ONCE), target.flatten(0, 1).split(TOKENS_AT_ONCE), strict=True)
    for piece, wanted in pieces:
        with torch.no_grad():
            goal = head(wanted.unsqueeze(0)).squeeze(0)
        with torch.set_grad_enabled(backward):
            logits = head(piece.unsqueeze(0)).squeeze(0)
        losses, gradient = divergence(logits.detach(), goal)
        if backward:
            logits.backward(gradient)
        total += float(losses.sum())
    return total, None if entering.grad is None else entering.grad.view_as(hidden)


# A factor stays within: what needs more is not to be had by scales.
BOUNDS = (0.5, 2.0)


def initial_state(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Before any step: value/NAME, factors of one."""
    return {f"value/{name}": torch.ones_like(gradient) for name, gradient in gradients.items()}


def adam_step(
    state: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rate: float, done: int, total: int
) -> dict[str, Tensor]:
    """AdamW without weight decay on some factors, from what is stored of them: the state after the step that follows
    `done` of `total` ones, value/NAME, first/NAME, second/NAME. It takes `state` over: its tensors are written to."""
    if not gradients:
        return {}
    values = {name: nn.Parameter(state[f"value/{name}"]) for name in gradients}
    optimizer = torch.optim.AdamW(values.values(), lr=rate * cosine(done, total), weight_decay=0.0)
    for name, value in values.items():
        value.grad = gradients[name]
        if done:
            optimizer.state[value] = {
                "step": torch.tensor(float(done)),
                "exp_avg": state[f"first/{name}"],
                "exp_avg_sq": state[f"second/{name}"],
            }
    optimizer.step()
    after: dict[str, Tensor] = {}
    for name, value in values.items():
        moments = optimizer.state[value]
        after |= {f"value/{name}": value.detach().clamp_(*BOUNDS), f"first/{name}": moments["exp_avg"]}
        after[f"second/{name}"] = moments["exp_avg_sq"]
    return after


def finite(gradients: Mapping[str, Tensor]) -> bool:
    """Whether all of them are numbers."""
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
