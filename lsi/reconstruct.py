"""Block reconstruction: train a block's quantization parameters so that its output stays that of the full-precision block.

`Reconstruction` is begun from a block, stepped over batches, exported and imported at any step boundary (the result does not
depend on it), and read out as quantized weights. A non-finite loss or gradient is a status, not an exception: the parameters
keep their last finite values and no later step changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lsi.block import Hidden, checkpoint_parts, replace_linears, run_block, trainable, widen_rest
from lsi.equivalence import Equivalence
from lsi.experts import expert_of
from lsi.factors import Factorizer, factors_of
from lsi.grid import Grid, QuantizedWeight, clip_to_weights
from lsi.linear import DirectClipping, LearnedRounding, Parts
from lsi.objective import Frozen, LossKind, Objective, Tokens, products_in
from lsi.start import Batches, collect_moments
from lsi.steps import DECAY, Steps, make_optimizer

Result = TypeVar("Result")
Status = Literal["ok", "non_finite"]
# Parts that only find their place on a grid that has settled: they join after `Method.warm_steps`.
JOINING = ("increment", "rounding")
NOTHING_FROZEN = Frozen()


@dataclass(frozen=True)
class Method:
    """What is trained and with which steps.

    `rates`: learning rate of each part, by its name (clipping, increment, rounding, equivalence). `equivalence`: kinds of
    `lsi.pairs.KINDS`, none for no equivalent transformation, with shifts where biases take them up. `autocast`: dtype of
    the products, None for the block's own. fewest_tokens: an expert of a mixture that sees fewer in all steps is clipped
    without data. quantized_stream: weight of the loss on the quantized stream.

    warm_steps: so many steps train clipping and equivalence alone; then increment and rounding join (LSI starts from
    OmniQuant's trained values). Every part has one decay, from its own first step to the last of all: those that join begin at
    their full rate, and what is settling already is not shaken again by a second start. Clipping or equivalence must be trained.

    recompute: keep no weight-sized tensor between the passes, at the same result; None: of large linears. checkpoint: run attention and feed-forward
    part again in the backward pass, at the same result. micro_batch: sequences at once within a step; None: all.
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
    quantized_stream: float = 0.0
    warm_steps: int = 0
    recompute: bool | None = None
    checkpoint: bool = False
    micro_batch: int | None = None

    @property
    def objective(self) -> Objective:
        """How losses are taken, in training and wherever states are compared."""
        return Objective(self.loss, self.first_token, self.quantized_stream, self.autocast)


def part_of(parameter: str) -> str:
    """Which part of the method a parameter belongs to: its name is linear.part.tensor, or let.kind.tensor."""
    return "equivalence" if parameter.startswith("let.") else parameter.split(".")[-2]


class Reconstruction:
    """The trained state of one block. The block's modules are changed, its tensors are not: they may be shared.

    `starts`: what its linears are quantized to already, where training begins there.
    """

    def __init__(
        self,
        block: nn.Module,
        names: list[str],
        method: Method,
        starts: Mapping[str, QuantizedWeight] | None = None,
        factorizer: Factorizer = factors_of,
    ) -> None:
        self.method = method
        self.block = block
        self.equivalence = None
        if method.equivalence:
            self.equivalence = Equivalence(
                self.block, method.equivalence, shifts=method.shifts, dtype=method.parts.scale_dtype
            )
        self.linears = replace_linears(
            self.block,
            names,
            method.grid,
            method.parts,
            starts,
            recompute=method.recompute,
            factorizer=factorizer,
        )
        widen_rest(self.block)
        if method.checkpoint:
            checkpoint_parts(self.block)
        self.counting = False
        self.experts = {name: expert for name in sorted(names) if (expert := expert_of(self.block, name))}
        self.tokens = dict.fromkeys(self.experts, 0)
        for name in self.experts:
            self.linears[name].register_forward_pre_hook(self._count(name))
        self.parameters = dict(trainable(self.linears))
        if self.equivalence is not None:
            self.parameters |= {f"let.{name}": p for name, p in self.equivalence.named_parameters()}
        self.rates = {name: method.rates[part_of(name)] for name in self.parameters}
        self.starts = {name: method.warm_steps if part_of(name) in JOINING else 0 for name in self.parameters}
        self.optimizer = self._make_optimizer()
        self.steps_done = 0
        self.status: Status = "ok"

    def _count(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if self.counting:  # not where the backward pass runs it again
                self.tokens[name] += arguments[0].numel() // arguments[0].shape[-1]

        return hook

    def untrained_experts(self) -> list[str]:
        """Experts that saw too few of the steps' tokens so far, by name."""
        least = self.method.fewest_tokens * self.steps_done
        few = (name for name, seen in self.tokens.items() if seen * self.method.total_steps < least)
        return sorted({self.experts[name] for name in few})

    def _make_optimizer(self) -> torch.optim.Optimizer | None:
        if not self.parameters:
            return None
        kinds = {name: (self.starts[name], self.rates[name]) for name in self.parameters}
        groups = [
            {"params": [p for n, p in self.parameters.items() if kinds[n] == kind], "start": kind[0], "base": kind[1]}
            for kind in sorted(set(kinds.values()))
        ]
        return make_optimizer(self.method.steps, groups)

    def _within(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on the block as the equivalent transformation leaves it."""
        return function() if self.equivalence is None else self.equivalence.within(self.block, function)

    @property
    def fresh(self) -> bool:
        """Whether the linears' weights are not on a grid already."""
        return all(linear.start is None for linear in self.linears.values())

    def begin_clipping(self, batches: Batches) -> None:
        """Let the clipping begin where it changes the linears' outputs least on batches of (inputs, further arguments)."""

        def begin() -> None:
            moments = collect_moments(self.block, self.linears, batches, self.method.autocast)
            for name, linear in self.linears.items():
                linear.begin_clipping(moments[name])

        self._within(begin)

    def step(
        self, inputs: Hidden, targets: Hidden | Tokens, arguments: Mapping[str, Any], frozen: Frozen = NOTHING_FROZEN
    ) -> float:
        """One update. Returns the loss before it. `targets`: the full-precision stream after the last of `frozen.following`.

        A loss or a gradient that is not finite leaves the parameters alone and sets the status; later steps return NaN.
        """
        if self.optimizer is None or self.status != "ok":
            return math.nan
        self._begin_step(self.optimizer)
        loss = self._batch(inputs, targets, arguments, frozen)
        for parameter in self.parameters.values():
            # A linear that the batch does not reach (an expert) takes part with zeros: one step count serves all.
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        if self._finite(loss):
            self.optimizer.step()
            self._project()
            self.steps_done += 1
        else:
            self.status = "non_finite"
        # They are as large as what is trained, and nobody reads them after the step.
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Learning rates of this step; what has not joined yet gets no gradient, and so stays as it is."""
        for group in optimizer.param_groups:
            done, steps = self.steps_done - group["start"], self.method.total_steps - group["start"]
            group["lr"] = group["base"] * DECAY[self.method.steps](done, steps)
            for parameter in group["params"]:
                parameter.requires_grad_(done >= 0)
        optimizer.zero_grad(set_to_none=True)

    def _batch(self, inputs: Hidden, targets: Hidden | Tokens, arguments: Mapping[str, Any], frozen: Frozen) -> Tensor:
        """Give the parameters a batch's gradients, micro-batch by micro-batch. Returns its loss."""
        size = self.method.micro_batch or len(inputs)
        losses = []
        for pair in zip(inputs.split(size), targets.split(size), strict=True):
            # The backward pass is within, too: it computes parts of the forward pass again.
            losses.append(self._within(partial(self._backward, *pair, arguments, frozen, len(inputs))))
        return torch.stack(losses).sum()

    def _backward(
        self, inputs: Hidden, targets: Hidden | Tokens, arguments: Mapping[str, Any], frozen: Frozen, batch: int
    ) -> Tensor:
        """Add the gradients of some of a batch's sequences to the parameters'. Returns their part of the batch's loss."""
        self.counting = True
        inputs = inputs.float()
        with products_in(self.method.autocast, inputs.device):
            output = run_block(self.block, inputs, arguments)
        self.counting = False
        loss = self.method.objective.losses(output, inputs, targets, frozen).mean()
        loss = loss * (len(inputs) / batch)
        loss.backward()
        return loss.detach()

    def _project(self) -> None:
        for linear in self.linears.values():
            for part in (linear.clipping, linear.rounding):
                if isinstance(part, DirectClipping | LearnedRounding):
                    part.project()

    def _finite(self, loss: Tensor) -> bool:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        total = torch.stack([loss.detach(), *[g.square().sum() for g in gradients]])
        return bool(torch.isfinite(total).all())

    def quantized(self) -> dict[str, QuantizedWeight]:
        """Codes, scales and zero points of the present parameters, by linear name."""
        few = set(self.untrained_experts())
        return self._within(lambda: {n: self._quantized(n, clip=self.experts.get(n) in few) for n in self.linears})

    def grids(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Scales and zero points of the present parameters, by linear name."""
        return self._within(lambda: {name: linear.present_grid() for name, linear in self.linears.items()})

    def _quantized(self, name: str, *, clip: bool) -> QuantizedWeight:
        linear = self.linears[name]
        return clip_to_weights(linear.weight, self.method.grid, linear.scale_dtype) if clip else linear.quantized()

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The block's other tensors that the equivalent transformation changes (norms, biases, routers), by name."""
        tensors = {} if self.equivalence is None else self.equivalence.transformed(self.block)
        return {name: t for name, t in tensors.items() if name.removesuffix(".weight") not in self.linears}

    def export_state(self) -> dict[str, Tensor]:
        """Parameters, and AdamW's moments, to go on from elsewhere. Views: copy them before the next step."""
        state = {f"value/{name}": p.detach() for name, p in self.parameters.items()}
        state["steps"] = torch.tensor([self.steps_done, self.status == "non_finite"], dtype=torch.int64)
        if self.tokens:
            state["tokens"] = torch.tensor(list(self.tokens.values()), dtype=torch.int64)
        if isinstance(self.optimizer, torch.optim.AdamW):
            for name, parameter in self.parameters.items():
                if self.steps_done > self.starts[name]:
                    moments = self.optimizer.state[parameter]
                    state[f"first/{name}"] = moments["exp_avg"]
                    state[f"second/{name}"] = moments["exp_avg_sq"]
        return state

    @torch.no_grad()
    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up an exported state: from here every step equals, bit for bit, what it would have been there."""
        steps, failed = (int(v) for v in state["steps"])
        self.steps_done = steps
        self.status = "non_finite" if failed else "ok"
        if self.tokens:
            self.tokens = dict(zip(self.tokens, state["tokens"].tolist(), strict=True))
        if self.optimizer is not None:
            self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"value/{name}"])
            if isinstance(self.optimizer, torch.optim.AdamW) and steps > self.starts[name]:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(steps - self.starts[name])),
                    "exp_avg": state[f"first/{name}"].clone().to(parameter.device),
                    "exp_avg_sq": state[f"second/{name}"].clone().to(parameter.device),
                }
