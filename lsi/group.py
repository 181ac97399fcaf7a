"""One block trained by a group of processes: each computes its part of every batch, and quantizes its own rows of every linear
(`lsi.rows`); gradients are summed, all take the same step.

A sum over n parts is another sum than over the whole batch: losses agree with one process's to rounding (1e-6 in float32), and not
to the byte; in bfloat16, which gradients of W_hat are summed in where products are, to its own. The size of the group is therefore part of what a result is named by. With the same size it repeats to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lsi.engine import Later, TorchAttachment, at_hand, cut
from lsi.experts import expert_of
from lsi.linear import QuantizedLinear
from lsi.rows import Place, SharedRows, enough_rows
from lsi.steps import Group, Steps


def share(samples: int, rank: int, size: int) -> tuple[int, int]:
    """Of a batch, as equal as can be: first and one past the last; of a batch with fewer samples than members some have none."""
    return samples * rank // size, samples * (rank + 1) // size


def even_parts(samples: int, rank: int, size: int, most: int | None) -> list[slice]:
    """A member's part of a batch, at most so many samples at once: as many passes for every member, where all have to come to the same
    linears. Those that it has no samples for are empty."""
    start, stop = share(samples, rank, size)
    own, passes = cut(start, stop, most), len(cut(0, -(-samples // size), most))
    return own + [slice(stop, stop)] * (passes - len(own))


class GroupEngine:
    """Plain torch in every process of a group (gloo on CPUs, NCCL on GPUs); None: of all processes.

    Every member attaches the same block, steps over the same batches and comes to the same state. batch_size: samples in a
    batch; one that is cut short may have fewer. Raises ValueError for members that would never have a sample.
    """

    def __init__(self, batch_size: int, members: dist.ProcessGroup | None = None) -> None:
        self.members = members
        size = dist.get_world_size(members)
        if size > batch_size:
            raise ValueError(
                f"a group of {size} for batches of {batch_size} samples leaves {size - batch_size} of its members without any: "
                f"take {batch_size} members, or larger batches"
            )

    def attach(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        parameters: Mapping[str, nn.Parameter],
        steps: Steps,
        groups: Sequence[Group],
    ) -> GroupAttachment:
        # Factors that two processors round differently would be two blocks under one set of gradients.
        with torch.no_grad():
            for tensor in (*block.parameters(), *block.buffers()):
                sent = tensor.clone(memory_format=torch.contiguous_format)
                dist.broadcast(sent, group=self.members, group_src=0)
                if not torch.equal(tensor, sent):  # what is equal anyway, as weights are, stays in memory once
                    # Put in its place and not written over: others may hold it. Products depend on the layout in memory.
                    tensor.data = torch.empty_like(tensor).copy_(sent)
        return GroupAttachment(block, linears, parameters, steps, groups, Place(self.members))

    def close(self) -> None:
        """Nothing is kept."""


def sharing(block: nn.Module, linears: Mapping[str, nn.Module], size: int) -> Iterator[tuple[str, QuantizedLinear]]:
    """The linears whose rows so many members share: those that all of them reach in every pass, that quantize their weight as it is,
    and that have rows for each."""
    for name, linear in linears.items():
        assert isinstance(linear, QuantizedLinear)
        routed = expert_of(block, name) is not None or "experts" in name.split(".")  # opened, or a model's own list
        transformed = linear.rows is not None or linear.columns is not None
        if not routed and not transformed and enough_rows(len(linear.weight), size):
            yield name, linear


class GroupAttachment(TorchAttachment):
    """One member's."""

    def __init__(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        parameters: Mapping[str, nn.Parameter],
        steps: Steps,
        groups: Sequence[Group],
        place: Place,
    ) -> None:
        self.place = place
        self.shared = {name: SharedRows(linear, place) for name, linear in sharing(block, linears, place.size)}
        # One member's rows of a parameter, by its name.
        self.own = {f"{name}.{part}": (rows, part) for name, rows in self.shared.items() for part in rows.own}
        narrowed = {name: self._own_rows(name, parameter) for name, parameter in parameters.items()}
        super().__init__(block, narrowed, steps, groups)

    def _own_rows(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        rows, part = self.own.get(name, (None, ""))
        return rows.own[part] if rows else parameter

    def begin(self, done: int, total: int) -> None:
        if done == 0:
            self._take_over(p for name, p in self.parameters.items() if name not in self.own)
        super().begin(done, total)

    def parts(self, samples: int, most: int | None) -> list[slice]:
        return even_parts(samples, self.place.rank, self.place.size, most)

    def total(self, counts: list[int]) -> list[int]:
        """Summed over the members."""
        summed = torch.tensor(counts, dtype=torch.int64, device=next(self.block.parameters()).device)
        self._sum([summed])
        found: list[int] = summed.tolist()
        return found

    @contextmanager
    def whole(self, module: nn.Module, *, changing: bool = False, together: bool = False) -> Iterator[None]:
        """All members come here together. What is written is the first member's, for the same reason as in `GroupEngine.attach`."""
        shared = [rows for rows in self.shared.values() if rows.linear is module]
        for rows in shared:
            rows.widen()
        yield
        if changing:
            self._take_over(module.parameters())
        for rows in shared:
            rows.narrow()

    def export_state(self) -> dict[str, Later]:
        """All members ask for it together."""
        state = super().export_state()
        for name, rows in self.shared.items():
            state |= {f"value/{name}.{part}": at_hand(whole) for part, whole in rows.refresh().items()}
        for key, (rows, _) in self.own.items():
            for moment in (f"first/{key}", f"second/{key}"):
                if moment in state:
                    state[moment] = at_hand(rows.all_rows(state[moment].make()))
        return state

    def import_state(self, state: dict[str, Tensor], steps: int) -> None:
        for name, (rows, _) in self.own.items():
            for key in (f"value/{name}", f"first/{name}", f"second/{name}"):
                if key in state:
                    state[key] = state[key][rows.rows]
        super().import_state(state, steps)

    def _take_over(self, parameters: Iterable[Tensor]) -> None:
        """The first member's values."""
        for parameter in parameters:
            dist.broadcast(parameter.detach(), group=self.place.members, group_src=0)

    def _share(self, loss: Tensor, gradients: Mapping[str, Tensor]) -> None:
        self._sum([loss, *(gradient for name, gradient in gradients.items() if name not in self.own)])

    def _agree(self, finite: Tensor) -> bool:
        """Some gradients are one member's alone."""
        failed = (~finite).to(torch.int32)
        self._sum([failed])
        return not failed

    def _sum(self, tensors: list[Tensor]) -> None:
        works = [dist.all_reduce(tensor, group=self.place.members, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()
