"""Where a block's tensors live while it is trained, and who steps them: all that the reconstruction loop asks for.

An engine takes a block in (`attach`) and gives an `Attachment`. `TorchEngine` is plain torch: all stays where it is. Another
engine may move tensors away between their uses and keep the optimizer's state elsewhere, or give the attachment another
module of the same structure; whoever reads tensors outside a forward pass does so within `whole`.

    attachment = engine.attach(block, linears, parameters, steps, groups)
    attachment.begin(done, total)
    for part in attachment.parts(len(hidden), micro_batch):
        loss = loss_of(attachment.run(lambda: attachment.block(hidden[part])))
        attachment.backward(loss)
    loss, finite = attachment.step(sum of the losses, detached)

A step may be of several parts, each run and taken backward by itself: their gradients add up.

The processes of a group may each hold a part of a tensor only. Then reading one takes all of them: `begin_clipping`, `import_state` and
`whole` with `together` are called by all; what the first one reads alone, the others serve from `begin` and from `follow`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lsi.steps import Group, Steps, make_optimizer, set_rates


@dataclass(frozen=True)
class Later:
    """A tensor that is put together when it is asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def at_hand(tensor: Tensor) -> Later:
    """One that is there already."""
    return Later(tensor.dtype, tuple(tensor.shape), lambda: tensor)


@runtime_checkable
class Attachment(Protocol):
    """One block in an engine. Not to be used any more once the engine has taken in another."""

    block: nn.Module
    parameters: Mapping[str, nn.Parameter]

    def parts(self, samples: int, most: int | None) -> list[slice]:
        """Which samples of a batch this process computes, at most so many at once: all, or its share of a group's (`lsi.group`).

        The share may be nothing. An empty slice stands for a pass that counts nothing, and is computed all the same.
        """

    def total(self, counts: list[int]) -> list[int]:
        """The sums of whole numbers over all processes that share the batches."""

    def begin(self, done: int, total: int) -> None:
        """Before the step after `done` of `total` ones: no gradients, and the groups' rates; those that have not joined yet
        stay as they are."""

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """What a forward pass over the block returns."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of what was run last."""

    def step(self, loss: Tensor) -> tuple[float, bool]:
        """One update with the gradients since `begin`; `loss` is what they are of, without its graph.

        A parameter that the loss does not reach takes part with a gradient of zeros. Returns the batch's loss, and whether
        it and all gradients are finite: if not, nothing is changed.
        """

    def whole(
        self, module: nn.Module, *, changing: bool = False, together: bool = False
    ) -> AbstractContextManager[None]:
        """Within it the module's tensors can be read, outside a forward pass; and its trained parameters written to if
        `changing`. together: all processes of a group come here, as they have to where they are changed."""

    def export_state(self) -> dict[str, Later]:
        """value/NAME of every parameter, and first/NAME and second/NAME, AdamW's moments. Views, until the next step."""

    def follow(self) -> None:
        """Of a group's others, when they have nothing to do: serve what the first one reads until it says `dismiss`."""

    def dismiss(self) -> None:
        """Of a group's first: nothing is read any more until the next step."""

    def import_state(self, state: dict[str, Tensor], steps: int) -> None:
        """Take up an exported state after `steps` updates: what follows equals, bit for bit, what it would have been. A process
        that holds parts may be given its own, flat."""


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

    def parts(self, samples: int, most: int | None) -> list[slice]:
        """All of them."""
        return cut(0, samples, most)

    def total(self, counts: list[int]) -> list[int]:
        """As they are."""
        return counts

    def follow(self) -> None:
        """Everybody holds all."""

    def dismiss(self) -> None:
        """Nobody follows."""


def cut(start: int, stop: int, most: int | None) -> list[slice]:
    """A range in parts of at most so many; None: in one."""
    size = most or max(1, stop - start)
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def sum_by_itself(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a module's forward: what it adds to its input's gradient is summed before others' parts are added.

    Rounding depends on the order of a sum, and this one is what engines come to that watch every module from its input to its
    output (DeepSpeed's). So all engines take the same steps, to the bit.
    """
    return tuple(a.view_as(a) if isinstance(a, Tensor) and a.requires_grad else a for a in arguments)


class TorchAttachment(Alone):
    def __init__(
        self, block: nn.Module, parameters: Mapping[str, nn.Parameter], steps: Steps, groups: Sequence[Group]
    ) -> None:
        self.block = block
        for module in block.modules():
            module.register_forward_pre_hook(sum_by_itself)
        self.parameters: Mapping[str, nn.Parameter] = dict(parameters)
        self.steps = steps
        self.starts = {name: group.start for group in groups for name in group.names}
        self.optimizer = make_optimizer(steps, groups, parameters)

    def begin(self, done: int, total: int) -> None:
        set_rates(self.optimizer, self.steps, done, total)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(done >= self.starts[name])
        self.optimizer.zero_grad(set_to_none=True)

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, loss: Tensor) -> tuple[float, bool]:
        for parameter in self.parameters.values():
            # A linear that the batch does not reach (an expert) takes part with zeros: one step count serves all.
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        self._share(loss, gradients)
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients.values()]
        finite = self._agree(torch.isfinite(torch.stack([loss, *norms])).all())
        if finite:
            self.optimizer.step()
        # They are as large as what is trained, and nobody reads them after the step.
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), finite

    def _share(self, loss: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Sum the loss and the parameters' gradients in place over all processes that share the batches; here there is one."""

    def _agree(self, finite: Tensor) -> bool:
        """Whether it holds in all of these processes."""
        return bool(finite)

    def whole(
        self, module: nn.Module, *, changing: bool = False, together: bool = False
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def export_state(self) -> dict[str, Later]:
        state = {f"value/{name}": at_hand(p.detach()) for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            if moments := self.optimizer.state.get(parameter):
                state[f"first/{name}"] = at_hand(moments["exp_avg"])
                state[f"second/{name}"] = at_hand(moments["exp_avg_sq"])
        return state

    @torch.no_grad()
    def import_state(self, state: dict[str, Tensor], steps: int) -> None:
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            parameter.copy_(state.pop(f"value/{name}"))
            if f"first/{name}" in state:
                self.optimizer.state[parameter] = {
                    # Where AdamW in one pass looks for it.
                    "step": torch.tensor(float(steps - self.starts[name]), device=parameter.device),
                    "exp_avg": state.pop(f"first/{name}").clone().to(parameter.device),
                    "exp_avg_sq": state.pop(f"second/{name}").clone().to(parameter.device),
                }
