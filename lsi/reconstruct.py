"""Block reconstruction: train a block's quantization parameters so that its output stays that of the full-precision block.

`Reconstruction` is begun from a block, stepped over batches, exported and imported at any step boundary (the result does not
depend on it), and read out as quantized weights. A non-finite loss or gradient is a status, not an exception: the parameters
keep their last finite values and no later step changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lsi.block import Hidden, checkpoint_parts, replace_linears, run_block, trainable, widen_rest
from lsi.engine import Engine, Later, TorchEngine, at_hand
from lsi.equivalence import Equivalence
from lsi.experts import expert_of
from lsi.factors import Factorizer, factors_of
from lsi.grid import Grid, QuantizedWeight, clip_to_weights
from lsi.linear import SIDES, DirectClipping, LearnedRounding, Parts, QuantizedLinear
from lsi.objective import Frozen, LossKind, Objective, Outputs, Tokens, products_in
from lsi.start import Batches, collect_moments
from lsi.steps import Bounds, Group, Steps

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


def grouped(block: nn.Module, rates: Mapping[str, float], starts: Mapping[str, int]) -> list[Group]:
    """Parameters with their learning rates, by these, by their bounds and by their first steps."""
    groups: dict[tuple[float, Bounds, int], list[str]] = {}
    for name, rate in rates.items():
        groups.setdefault((rate, bounds_of(block, name), starts[name]), []).append(name)
    return [Group(tuple(names), *kind) for kind, names in groups.items()]


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
    """The trained state of one block. It takes the block over: its modules are changed, and an engine may put another in
    its place (`block`). Its tensors are not written to: they may be shared.

    `starts`: what its linears are quantized to already, where training begins there. `engine`: None for plain torch.
    """

    def __init__(
        self,
        block: nn.Module,
        names: list[str],
        method: Method,
        starts: Mapping[str, QuantizedWeight] | None = None,
        factorizer: Factorizer = factors_of,
        engine: Engine | None = None,
    ) -> None:
        self.method = method
        self.equivalence = None
        if method.equivalence:
            self.equivalence = Equivalence(
                block, method.equivalence, shifts=method.shifts, dtype=method.parts.scale_dtype
            )
        linears = replace_linears(
            block,
            names,
            method.grid,
            method.parts,
            starts,
            recompute=method.recompute,
            factorizer=factorizer,
        )
        if self.equivalence is not None:
            for name, side in self.equivalence.scaled():
                if name in linears:
                    linears[name].expect_scaling(side)
        widen_rest(block, linears.values())
        if method.checkpoint:
            checkpoint_parts(block)
        self.experts = {name: expert for name in sorted(names) if (expert := expert_of(block, name))}
        parameters = dict(trainable(linears))
        if self.equivalence is not None:
            parameters |= {f"let.{name}": p for name, p in self.equivalence.named_parameters()}
        self.rates = {name: method.rates[part_of(name)] for name in parameters}
        joins = {name: method.warm_steps if part_of(name) in JOINING else 0 for name in parameters}
        groups = grouped(block, self.rates, joins)
        self.attachment = (engine or TorchEngine()).attach(block, linears, parameters, method.steps, groups)
        self.block, self.parameters = self.attachment.block, self.attachment.parameters
        self.linears = {name: quantized_linear(self.block, name) for name in linears}
        # Tokens that an expert's linears saw: in all steps, and in the present one's part.
        self.tokens, self.seen = dict.fromkeys(self.experts, 0), dict.fromkeys(self.experts, 0)
        self.counting = False
        for name in self.experts:
            self.linears[name].register_forward_pre_hook(self._count(name))
        self.steps_done = 0
        self.status: Status = "ok"

    def _count(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if self.counting:  # not where the backward pass runs it again
                self.seen[name] += arguments[0].numel() // arguments[0].shape[-1]

        return hook

    def _add_tokens(self) -> None:
        if self.experts:
            seen = self.attachment.total(list(self.seen.values()))
            self.tokens = {name: before + new for (name, before), new in zip(self.tokens.items(), seen, strict=True)}
            self.seen = dict.fromkeys(self.experts, 0)

    def untrained_experts(self) -> list[str]:
        """Experts that saw too few of the steps' tokens so far, by name."""
        least = self.method.fewest_tokens * self.steps_done
        few = (name for name, seen in self.tokens.items() if seen * self.method.total_steps < least)
        return sorted({self.experts[name] for name in few})

    def _within(self, function: Callable[[], Result], without: Collection[str] = ()) -> Result:
        """What `function` returns on the block as the equivalent transformation leaves it, without some pairs."""
        return function() if self.equivalence is None else self.equivalence.within(self.block, function, without)

    def _untrained_pairs(self) -> list[str]:
        """Names of those within an expert that saw too few tokens: their scales have seen no more than it."""
        few = set(self.untrained_experts())
        owners = {f"{name}.weight": expert for name, expert in self.experts.items()}
        pairs = [] if self.equivalence is None else self.equivalence.pairs
        return [pair.name for pair in pairs if all(owners.get(site.tensor) in few for site in pair.sites)]

    @property
    def fresh(self) -> bool:
        """Whether the linears' weights are not on a grid already."""
        return all(linear.start is None for linear in self.linears.values())

    @torch.no_grad()
    def begin_clipping(self, batches: Batches) -> None:
        """Let the clipping begin where it changes the linears' outputs least on batches of (inputs, further arguments)."""

        def begin() -> None:
            moments = collect_moments(self.block, self.linears, batches, self.method.autocast, self.attachment.run)
            for name, linear in self.linears.items():
                with self.attachment.whole(linear, changing=True):
                    linear.begin_clipping(moments.get(name))

        self._within(begin)

    def step(
        self, inputs: Hidden, targets: Hidden | Tokens, arguments: Mapping[str, Any], frozen: Frozen = NOTHING_FROZEN
    ) -> float:
        """One update. Returns the loss before it. `targets`: the full-precision stream after the last of `frozen.following`.

        A loss or a gradient that is not finite leaves the parameters alone and sets the status; later steps return NaN.
        """
        if not self.parameters or self.status != "ok":
            return math.nan
        self.attachment.begin(self.steps_done, self.method.total_steps)
        loss, finite = self.attachment.step(self._share_of_loss(inputs, targets, arguments, frozen))
        self._add_tokens()
        if finite:
            self.steps_done += 1
        else:
            self.status = "non_finite"
        return loss

    def _share_of_loss(
        self, inputs: Hidden, targets: Hidden | Tokens, arguments: Mapping[str, Any], frozen: Frozen
    ) -> Tensor:
        """Give the parameters the gradients of this process's sequences of a batch, micro-batch by micro-batch. Returns what
        they add to its mean loss."""
        losses = []
        for part in self.attachment.parts(len(inputs), self.method.micro_batch):
            weight = (part.stop - part.start) / len(inputs)
            some = part if weight else slice(0, 1)
            # The backward pass is within, too: it computes parts of the forward pass again.
            backward = partial(self._backward, inputs[some], targets[some], arguments, frozen, weight)
            losses.append(self._within(backward))
        return torch.stack(losses).sum() if losses else torch.zeros((), device=inputs.device)

    def _backward(
        self, inputs: Hidden, targets: Hidden | Tokens, arguments: Mapping[str, Any], frozen: Frozen, weight: float
    ) -> Tensor:
        """Add the gradients of a micro-batch to the parameters'. weight: its part of the batch. Returns its part of the loss."""
        inputs = inputs.float()
        self.counting = weight > 0
        output = self.attachment.run(lambda: self._forward(inputs, arguments))
        self.counting = False
        loss = self.method.objective.losses(output, inputs, targets, frozen).mean() * weight
        self.attachment.backward(loss)
        return loss.detach()

    def _forward(self, inputs: Hidden, arguments: Mapping[str, Any]) -> Outputs:
        with products_in(self.method.autocast, inputs.device):
            return run_block(self.block, inputs, arguments)

    @torch.no_grad()
    def quantized(self) -> dict[str, QuantizedWeight]:
        """Codes, scales and zero points of the present parameters, by linear name. Of a group whose members hold parts, the first one's
        to ask for; of another all ask together."""
        few = set(self.untrained_experts())

        def quantized() -> dict[str, QuantizedWeight]:
            return {name: self._quantized(name, clip=self.experts.get(name) in few) for name in self.linears}

        return self._within(quantized, self._untrained_pairs())

    @torch.no_grad()
    def grids(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Scales and zero points of the present parameters, by linear name. All of a group ask for them together."""
        return self._within(lambda: {name: self._grid(name) for name in self.linears})

    def _grid(self, name: str) -> tuple[Tensor, Tensor]:
        with self.attachment.whole(self.linears[name], together=True):
            return self.linears[name].present_grid()

    def _quantized(self, name: str, *, clip: bool) -> QuantizedWeight:
        linear = self.linears[name]
        with self.attachment.whole(linear):
            return clip_to_weights(linear.weight, self.method.grid, linear.scale_dtype) if clip else linear.quantized()

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The block's other tensors that the equivalent transformation changes (norms, biases, routers), by name."""
        without = self._untrained_pairs()
        tensors = {} if self.equivalence is None else self.equivalence.transformed(self.block, without)
        in_linears = {f"{name}.{tensor}" for name in self.linears for tensor in ("weight", *SIDES)}
        return {name: tensor for name, tensor in tensors.items() if name not in in_linears}

    def export_lazily(self) -> dict[str, Later]:
        """Parameters, and AdamW's moments, to go on from elsewhere, one by one before the next step. Of a group as
        for `quantized`."""
        state = self.attachment.export_state()
        state["steps"] = at_hand(torch.tensor([self.steps_done, self.status == "non_finite"], dtype=torch.int64))
        if self.tokens:
            state["tokens"] = at_hand(torch.tensor(list(self.tokens.values()), dtype=torch.int64))
        return state

    def export_state(self) -> dict[str, Tensor]:
        """The same at once. Views: copy them before the next step."""
        return {name: later.make() for name, later in self.export_lazily().items()}

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Take up an exported state: from here every step equals, bit for bit, what it would have been there.

        The tensors are taken out of `state` one by one, so that what was read is not there beside all that is made of it.
        """
        steps, failed = (int(v) for v in state.pop("steps"))
        self.steps_done = steps
        self.status = "non_finite" if failed else "ok"
        if self.tokens:
            self.tokens = dict(zip(self.tokens, state.pop("tokens").tolist(), strict=True))
        self.attachment.import_state(state, steps)
