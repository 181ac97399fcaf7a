"""What each member of a group holds of a tensor that ZeRO cuts up, and how the first one comes to read a whole one.

Parts are put together by all members at once. In a training step all come to the same places in the same order. What the first
one reads for itself it tells the others before; they listen wherever they may be ahead of it, and take part. One word goes before each
tensor: whatever happens to the first one between two of them, the others are listening, and not in the middle of something.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor


class Word(IntEnum):
    """What the first one is about to do: take a step, read no more, or read a tensor."""

    STEP = 0
    DISMISSED = 1
    MODULE = 2
    VALUE = 3
    FIRST_MOMENT = 4
    SECOND_MOMENT = 5


def bounds(numbers: int, rank: int, size: int) -> tuple[int, int]:
    """Which of a tensor's numbers a member holds, first and one past the last; of the last members some hold fewer or none."""
    length = -(-numbers // size)
    return min(rank * length, numbers), min((rank + 1) * length, numbers)


class Partners:
    """All processes of torch's default group; one alone has no others to wait for."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def own(self, flat: Tensor) -> Tensor:
        """This process's part of a tensor's numbers."""
        start, stop = bounds(flat.numel(), self.rank, self.size)
        return flat[start:stop]

    def tell(self, word: Word, number: int = 0) -> None:
        """Of the first one. Raises RuntimeError in another."""
        if self.rank:
            raise RuntimeError(f"{word.name}: of a group, the first member alone reads the state of a block")
        if self.size > 1:
            dist.broadcast(torch.tensor([word, number], dtype=torch.int64), 0)

    def hear(self) -> tuple[Word, int]:
        """Of the others: waits for the first one's next word."""
        heard = torch.empty(2, dtype=torch.int64)
        dist.broadcast(heard, 0)
        word, number = heard.tolist()
        return Word(word), number

    def take_over(self, tensor: Tensor) -> Tensor:
        """The first one's numbers; in memory that may be the given tensor's."""
        if self.size == 1:
            return tensor
        sent = tensor.contiguous()
        dist.broadcast(sent, 0)
        return sent

    def collect(self, part: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of which everybody has such a part, filled up to equal lengths; nothing in the others than the first."""
        if self.size == 1:
            return part.view(shape)
        whole = part.new_empty(self.size * part.numel() if self.rank == 0 else 0)
        dist.gather(part, list(whole.chunk(self.size)) if self.rank == 0 else None, dst=0)
        return whole[: shape.numel()].view(shape) if self.rank == 0 else whole

    def summed(self, tensor: Tensor) -> Tensor:
        """Over all; the tensor itself."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_of(self, answer: bool) -> bool:
        """Whether everybody says yes."""
        return int(self.summed(torch.tensor(int(answer), dtype=torch.int64))) == self.size
