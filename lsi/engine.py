"""Where a block's tensors live while it is trained, and who steps them: all that the reconstruction loop asks for.

An engine takes a block in (`attach`) and gives an `Attachment`. `TorchEngine` is plain torch: all stays where it is. Another
engine may move tensors away between their uses and keep the optimizer's state elsewhere, or give the attachment another
module of the same structure; whoever reads tensors outside a forward pass does so within `whole`.

    attachment = engine.attach(block, linears, parameters, steps, groups)
    part = attachment.part(len(hidden))
    output = attachment.run(lambda: attachment.block(hidden[part]))
    loss, finite = attachment.step(loss_of(output), factor)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lsi.steps import Bounds, Steps, make_optimizer, set_rates


@dataclass(frozen=True)
class Group:
    """Parameters, by name, that are stepped alike. bounds: where they are put back after a step, None for anywhere."""

    names: tuple[str, ...]
    rate: float
    bounds: Bounds = None


@runtime_checkable
class Attachment(Protocol):
    """One block in an engine. Not to be used any more once the engine has taken in another."""

    block: nn.Module
    parameters: Mapping[str, nn.Parameter]

    def part(self, samples: int) -> slice:
        """Which samples of a batch this process computes: all, or its share of a group's (`lsi.group`), which may be none."""

    def total(self, counts: list[int]) -> list[int]:
        """The sums of whole numbers over all processes that share the batches."""

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """What a forward pass over the block returns; the gradients of the step before are forgotten."""

    def step(self, loss: Tensor, factor: float) -> tuple[float, bool]:
        """Backward and one update with `factor` times the groups' rates; `loss` is this part's share of the batch's.

        A parameter that the loss does not reach takes part with a gradient of zeros. Returns the batch's loss, and whether
        it and all gradients are finite: if not, nothing is changed.
        """

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within it the module's tensors can be read, outside a forward pass."""

    def export_state(self) -> dict[str, Tensor]:
        """value/NAME of every parameter, and first/NAME and second/NAME, AdamW's moments. Views, until the next step."""

    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Take up an exported state after `steps` updates: what follows equals, bit for bit, what it would have been."""


@runtime_checkable
class Engine(Protocol):
    """Takes blocks in, one after the other."""

    def attach(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        parameters: Mapping[str, nn.Parameter],
        steps: Steps,
        groups: Sequence[Group],
    ) -> Attachment:
        """The block belongs to the engine from now on. linears: the parts of it, by name, whose tensors are used together.
        parameters: what is trained, each in one of the groups."""

    def close(self) -> None:
        """Let go of what is kept from block to block; attachments are of no use afterwards."""


class TorchEngine:
    """Everything stays on the block's device."""

    def attach(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        parameters: Mapping[str, nn.Parameter],
        steps: Steps,
        groups: Sequence[Group],
    ) -> TorchAttachment:
        return TorchAttachment(block, parameters, steps, groups)

    def close(self) -> None:
        """Nothing is kept."""


class Alone:
    """What an attachment says whose process has the batches to itself."""

    def part(self, samples: int) -> slice:
        """All of them."""
        return slice(0, samples)

    def total(self, counts: list[int]) -> list[int]:
        """As they are."""
        return counts


class TorchAttachment(Alone):
    def __init__(
        self, block: nn.Module, parameters: Mapping[str, nn.Parameter], steps: Steps, groups: Sequence[Group]
    ) -> None:
        self.block = block
        self.parameters: Mapping[str, nn.Parameter] = dict(parameters)
        self.optimizer = make_optimizer(
            steps, [(group.rate, group.bounds, [parameters[name] for name in group.names]) for group in groups]
        )

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        return function()

    def step(self, loss: Tensor, factor: float) -> tuple[float, bool]:
        loss.backward()
        loss = loss.detach()
        for parameter in self.parameters.values():
            # A linear that the batch does not reach (an expert) takes part with zeros: one step count serves all.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        self._share([loss, *gradients])
        finite = bool(torch.isfinite(torch.stack([loss, *[g.square().sum() for g in gradients]])).all())
        if finite:
            set_rates(self.optimizer, factor)
            self.optimizer.step()
        return loss.item(), finite

    def _share(self, tensors: list[Tensor]) -> None:
        """Sum the tensors in place over all processes that share the batches; here there is one."""

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def export_state(self) -> dict[str, Tensor]:
        state = {f"value/{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            if moments := self.optimizer.state.get(parameter):
                state[f"first/{name}"] = moments["exp_avg"]
                state[f"second/{name}"] = moments["exp_avg_sq"]
        return state

    @torch.no_grad()
    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"value/{name}"])
            if f"first/{name}" in state:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(steps)),
                    "exp_avg": state[f"first/{name}"].clone().to(parameter.device),
                    "exp_avg_sq": state[f"second/{name}"].clone().to(parameter.device),
                }
