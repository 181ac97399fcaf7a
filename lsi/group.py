"""One block trained by a group of processes: each computes its part of every batch, gradients are summed, all take the same step.

A sum over n parts is another sum than over the whole batch: losses agree with one process's to rounding (1e-6 in float32), and not
to the byte. The size of the group is therefore part of what a result is named by. With the same size it repeats to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lsi.engine import TorchAttachment, cut
from lsi.steps import Group, Steps


def share(samples: int, rank: int, size: int) -> tuple[int, int]:
    """Of a batch, as equal as can be: first and one past the last; of a batch with fewer samples than members some have none."""
    return samples * rank // size, samples * (rank + 1) // size


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
        return GroupAttachment(block, parameters, steps, groups, self.members)

    def close(self) -> None:
        """Nothing is kept."""


class GroupAttachment(TorchAttachment):
    """One member's."""

    def __init__(
        self,
        block: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        steps: Steps,
        groups: Sequence[Group],
        members: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(block, parameters, steps, groups)
        self.members = members
        self.rank, self.size = dist.get_rank(members), dist.get_world_size(members)

    def begin(self, done: int, total: int) -> None:
        if done == 0:
            self._take_over(self.parameters.values())
        super().begin(done, total)

    def parts(self, samples: int, most: int | None) -> list[slice]:
        return cut(*share(samples, self.rank, self.size), most)

    def total(self, counts: list[int]) -> list[int]:
        """Summed over the members."""
        summed = torch.tensor(counts, dtype=torch.int64, device=next(self.block.parameters()).device)
        self._share([summed])
        found: list[int] = summed.tolist()
        return found

    @contextmanager
    def whole(self, module: nn.Module, *, changing: bool = False, together: bool = False) -> Iterator[None]:
        """What is written is the first member's, for the same reason as in `GroupEngine.attach`."""
        yield
        if changing:
            self._take_over(module.parameters())

    def _take_over(self, parameters: Iterable[Tensor]) -> None:
        """The first member's values."""
        for parameter in parameters:
            dist.broadcast(parameter.detach(), group=self.members, group_src=0)

    def _share(self, tensors: list[Tensor]) -> None:
        works = [dist.all_reduce(tensor, group=self.members, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()
