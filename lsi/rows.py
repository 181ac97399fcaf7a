"""The rows of a linear shared out over the processes of a group: each quantizes its own, and all multiply with all of them.

What is computed from a weight in every step (the grid, rounding, their gradients, the update) takes as long as the products of one or two
sequences; without this every process of a group would do all of it. A row is an output channel, so no grid crosses two shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lsi.grid import QuantizedWeight
from lsi.increment import DenseIncrement, FactoredIncrement
from lsi.linear import QuantizedLinear


def enough_rows(count: int, size: int) -> bool:
    """Whether so many rows leave none of so many processes without one."""
    return (size - 1) * -(-count // size) < count


class Place:
    """One process's among those of a group; None: of all processes."""

    def __init__(self, members: dist.ProcessGroup | None) -> None:
        self.members = members
        self.rank, self.size = dist.get_rank(members), dist.get_world_size(members)

    def rows(self, count: int) -> slice:
        """Its own of so many: the last processes may have fewer, or none."""
        most = -(-count // self.size)
        return slice(min(self.rank * most, count), min((self.rank + 1) * most, count))

    @torch.no_grad()
    def gather(self, own: Tensor, count: int) -> Tensor:
        """The rows of all, so many."""
        most = -(-count // self.size)
        padded = own.contiguous()
        if len(own) < most:
            padded = own.new_zeros(most, *own.shape[1:])
            padded[: len(own)] = own
        whole = own.new_empty(self.size * most, *own.shape[1:])
        dist.all_gather(list(whole.split(most)), padded, group=self.members)
        return whole[:count]


class _Gathered(torch.autograd.Function):
    """The rows of all; a process's own gradient is the sum over what all have made of them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, place: Place, count: int) -> Tensor:
        ctx.place = place
        return place.gather(own, count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Not every backend can scatter what it sums.
        summed = gradients[0].contiguous()
        dist.all_reduce(summed, group=ctx.place.members)
        return summed[ctx.place.rows(len(summed))], None, None


def row_tensors(linear: QuantizedLinear) -> list[str]:
    """The tensors of a linear that have its output channels in their first dimension, but for its bias."""
    names = ["weight"]
    if linear.clipping is not None:
        names += ["clipping.lower", "clipping.upper"]
    if linear.rounding is not None:
        names.append("rounding.offset")
    if isinstance(linear.increment, FactoredIncrement):
        names.append("increment.left")
    if isinstance(linear.increment, DenseIncrement):
        names += ["increment.increment", "increment.step"]
    return names


class SharedRows:
    """A linear that quantizes a process's own rows. The whole tensors stay where they are, and the linear has views of them: of what is
    trained, others' rows are as they were at the last `refresh`.

    `own`: the trained parameters' own rows, by name within the linear.
    """

    def __init__(self, linear: QuantizedLinear, place: Place) -> None:
        self.linear, self.place = linear, place
        self.count = len(linear.weight)
        self.rows = place.rows(self.count)
        self.start = linear.start
        self.whole = {name: _attribute(linear, name) for name in row_tensors(linear)}
        views = {name: tensor.detach()[self.rows] for name, tensor in self.whole.items()}
        self.own = {n: nn.Parameter(v) for n, v in views.items() if isinstance(self.whole[n], nn.Parameter)}
        self.narrowed: dict[str, Tensor] = {**views, **self.own}
        self.narrow()

    def narrow(self) -> None:
        """Let the linear have its own rows."""
        self._set(self.narrowed)
        start, rows = self.start, self.rows
        if start is not None:
            self.linear.start = QuantizedWeight(start.codes[rows], start.scale[rows], start.zero_point[rows])
        self.linear.gather = self._gather

    def widen(self) -> None:
        """Let it have all of them, as all processes have left them. All of the group come here together."""
        self.refresh()
        self._set(self.whole)
        self.linear.start, self.linear.gather = self.start, None

    def refresh(self) -> dict[str, Tensor]:
        """The whole of what is trained, brought up to date, by name within the linear. All of the group come here together."""
        for name, own in self.own.items():
            self.whole[name].detach().copy_(self.all_rows(own.detach()))
        return {name: self.whole[name].detach() for name in self.own}

    def all_rows(self, own: Tensor) -> Tensor:
        """What all processes have of a tensor with a row for each of the linear's."""
        return self.place.gather(own, self.count)

    def _set(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            module, _, attribute = name.rpartition(".")
            setattr(self.linear.get_submodule(module), attribute, tensor)

    def _gather(self, own: Tensor) -> Tensor:
        gathered: Tensor = _Gathered.apply(own, self.place, self.count)
        return gathered


def _attribute(linear: QuantizedLinear, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    found: Tensor = getattr(linear.get_submodule(module), attribute)
    return found
