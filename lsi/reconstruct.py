"""Block reconstruction: train a block's quantization parameters so that its output stays that of the full-precision block.

`Reconstruction` is begun from a block, stepped over batches, exported and imported at any step boundary (the result does not
depend on it), and read out as quantized weights. A non-finite loss or gradient is a status, not an exception: the parameters
keep their last finite values and no later step changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lsi.block import Hidden, replace_linears, run_block, trainable
from lsi.engine import Engine, Group, TorchEngine
from lsi.equivalence import Equivalence
from lsi.experts import expert_of
from lsi.grid import Grid, QuantizedWeight, clip_to_weights
from lsi.linear import DirectClipping, LearnedRounding, Parts, QuantizedLinear
from lsi.steps import DECAY, Bounds, Steps

Result = TypeVar("Result")
Status = Literal["ok", "non_finite"]
LossKind = Literal["mse", "relative"]
# A token of zeros has no relative error; this keeps its quotient finite.
SMALLEST_SQUARE = 1e-12


@dataclass(frozen=True)
class Method:
    """What is trained and with which steps.

    `rates`: learning rate of each part, by its name (clipping, increment, rounding, equivalence). `equivalence`: kinds of
    `lsi.pairs.KINDS`, none for no equivalent transformation, with shifts where biases take them up. `autocast`: dtype of
    the products, None for the block's own. fewest_tokens: an expert of a mixture that sees fewer in all steps is clipped
    without data.
    """

    grid: Grid
    parts: Parts
    rates: Mapping[str, float]
    total_steps: int
    steps: Steps = "adamw"
    loss: LossKind = "relative"
    first_token: float = 0.0
    autocast: torch.dtype | None = None
    equivalence: tuple[str, ...] = ()
    shifts: bool = False
    fewest_tokens: int = 0


def token_losses(
    output: Hidden, target: Hidden, kind: LossKind, first_token: float = 0.0
) -> Float[Tensor, "batch sequence"]:
    """The error of each token's hidden states, in float32, weighted.

    mse: mean squared error over the channels (LSI, OmniQuant). relative: that divided by the target's mean square. The
    norm at the next block's entrance divides every token by its own size, so a relative error is what that block sees;
    and a few tokens with massive activations (arXiv 2402.17762) do not outweigh all the others by orders of magnitude.

    `first_token`: what the first token's error counts beside the mean of all. It is the attention sink (arXiv 2309.17453):
    every later token attends to it, some block makes its activations massive, and where an error keeps that from happening
    all tokens suffer in all blocks after. One among hundreds, it would hardly be seen in the mean.
    """
    error = (output.float() - target.float()).square().mean(-1)
    if kind == "relative":
        error = error / target.float().square().mean(-1).clamp(min=SMALLEST_SQUARE)
    weight = torch.ones(error.shape[1], device=error.device)
    weight[0] += first_token * error.shape[1]
    return error * weight


def part_of(parameter: str) -> str:
    """Which part of the method a parameter belongs to: its name is linear.part.tensor, or let.kind.tensor."""
    return "equivalence" if parameter.startswith("let.") else parameter.split(".")[-2]


def grouped(block: nn.Module, rates: Mapping[str, float]) -> list[Group]:
    """Parameters with their learning rates, by these and by their bounds."""
    groups: dict[tuple[float, Bounds], list[str]] = {}
    for name, rate in rates.items():
        groups.setdefault((rate, bounds_of(block, name)), []).append(name)
    return [Group(tuple(names), rate, bounds) for (rate, bounds), names in groups.items()]


def bounds_of(block: nn.Module, parameter: str) -> Bounds:
    """What a parameter of a linear's part is put back into after every step."""
    if part_of(parameter) == "equivalence":
        return None
    part = block.get_submodule(parameter.rpartition(".")[0])
    return part.bounds if isinstance(part, DirectClipping | LearnedRounding) else None


def quantized_linear(block: nn.Module, name: str) -> QuantizedLinear:
    """A linear that has been replaced, by its name within the block."""
    linear = block.get_submodule(name)
    assert isinstance(linear, QuantizedLinear)
    return linear


class Reconstruction:
    """The trained state of one block. It takes the block over: an engine may put another in its place."""

    def __init__(self, block: nn.Module, names: list[str], method: Method, engine: Engine | None = None) -> None:
        self.method = method
        block = block.float()
        self.equivalence = None
        if method.equivalence:
            self.equivalence = Equivalence(
                block, method.equivalence, shifts=method.shifts, dtype=method.parts.scale_dtype
            )
        linears = replace_linears(block, names, method.grid, method.parts)
        self.experts = {name: expert for name in sorted(names) if (expert := expert_of(block, name))}
        parameters = dict(trainable(linears))
        if self.equivalence is not None:
            parameters |= {f"let.{name}": p for name, p in self.equivalence.named_parameters()}
        self.rates = {name: method.rates[part_of(name)] for name in parameters}
        groups = grouped(block, self.rates)
        self.attachment = (engine or TorchEngine()).attach(block, linears, parameters, method.steps, groups)
        self.block, self.parameters = self.attachment.block, self.attachment.parameters
        self.linears = {name: quantized_linear(self.block, name) for name in linears}
        # Tokens that an expert's linears saw: in all steps, and in the present one's part.
        self.tokens, self.seen = dict.fromkeys(self.experts, 0), dict.fromkeys(self.experts, 0)
        for name in self.experts:
            self.linears[name].register_forward_pre_hook(self._count(name))
        self.steps_done = 0
        self.status: Status = "ok"

    def _count(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self.seen[name] += arguments[0].numel() // arguments[0].shape[-1]

        return hook

    def untrained_experts(self) -> list[str]:
        """Experts that saw too few of the steps' tokens so far, by name."""
        least = self.method.fewest_tokens * self.steps_done
        few = (name for name, seen in self.tokens.items() if seen * self.method.total_steps < least)
        return sorted({self.experts[name] for name in few})

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.method.autocast is None:
            return nullcontext()
        device = next(iter(self.linears.values())).weight.device.type
        return torch.autocast(device, self.method.autocast)

    def _within(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on the block as the equivalent transformation leaves it."""
        return function() if self.equivalence is None else self.equivalence.within(self.block, function)

    def step(self, inputs: Hidden, targets: Hidden, arguments: Mapping[str, Any]) -> float:
        """One update. Returns the loss before it.

        A loss or a gradient that is not finite leaves the parameters alone and sets the status; later steps return NaN.
        """
        if not self.parameters or self.status != "ok":
            return math.nan
        part = self.attachment.part(len(inputs))
        share = self._share_of_loss(inputs[part], targets[part], arguments, len(inputs))
        factor = DECAY[self.method.steps](self.steps_done, self.method.total_steps)
        loss, finite = self.attachment.step(share, factor)
        self._add_tokens()
        if finite:
            self.steps_done += 1
        else:
            self.status = "non_finite"
        return loss

    def _share_of_loss(
        self, inputs: Hidden, targets: Hidden, arguments: Mapping[str, Any], samples: int
    ) -> Float[Tensor, ""]:
        """What some samples of a batch add to its mean loss."""
        if not len(inputs):
            return self.attachment.run(lambda: torch.zeros((), device=inputs.device, requires_grad=True))
        output = self.attachment.run(lambda: self._forward(inputs, arguments))
        losses = token_losses(output, targets, self.method.loss, self.method.first_token)
        return losses.mean() * (len(inputs) / samples)

    def _add_tokens(self) -> None:
        if self.experts:
            seen = self.attachment.total(list(self.seen.values()))
            self.tokens = {name: before + new for (name, before), new in zip(self.tokens.items(), seen, strict=True)}
            self.seen = dict.fromkeys(self.experts, 0)

    def _forward(self, inputs: Hidden, arguments: Mapping[str, Any]) -> Hidden:
        with self._autocast():
            return self._within(lambda: run_block(self.block, inputs.float(), arguments))

    def quantized(self) -> dict[str, QuantizedWeight]:
        """Codes, scales and zero points of the present parameters, by linear name."""
        few = set(self.untrained_experts())
        return self._within(lambda: {n: self._quantized(n, clip=self.experts.get(n) in few) for n in self.linears})

    def _quantized(self, name: str, *, clip: bool) -> QuantizedWeight:
        linear = self.linears[name]
        with self.attachment.whole(linear):
            return clip_to_weights(linear.weight, self.method.grid, linear.scale_dtype) if clip else linear.quantized()

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The block's other tensors that the equivalent transformation changes (norms, biases, routers), by name."""
        tensors = {} if self.equivalence is None else self.equivalence.transformed(self.block)
        return {name: t for name, t in tensors.items() if name.removesuffix(".weight") not in self.linears}

    def export_state(self) -> dict[str, Tensor]:
        """Parameters, and AdamW's moments, to go on from elsewhere. Views: copy them before the next step."""
        state = self.attachment.export_state()
        state["steps"] = torch.tensor([self.steps_done, self.status == "non_finite"], dtype=torch.int64)
        if self.tokens:
            state["tokens"] = torch.tensor(list(self.tokens.values()), dtype=torch.int64)
        return state

    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up an exported state: from here every step equals, bit for bit, what it would have been there."""
        steps, failed = (int(v) for v in state["steps"])
        self.steps_done = steps
        self.status = "non_finite" if failed else "ok"
        if self.tokens:
            self.tokens = dict(zip(self.tokens, state["tokens"].tolist(), strict=True))
        self.attachment.import_state(state, steps)
