"""The processes that train a block together (`lsi.group`): where they meet, and what they have to agree on.

All of them run the same training unit. The first one alone commits and is told to leave; the others read what it reads, step as it
steps, and compute their part of its passes, or stand by where it passes alone (`Worker.together`).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.group import ALONE, Membership
from lsi.rows import Place

Number = TypeVar("Number", int, float)
# The first may measure and write for hours while the others wait; that one of them is gone is the driver's to find out.
_PATIENCE = timedelta(days=30)
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


class Members:
    """A process's place among them. `join` them before anything is agreed on."""

    def __init__(self, membership: Membership = ALONE) -> None:
        self.membership = membership
        self.size = membership.size
        self.leads = membership.rank == 0

    def join(self, device: str) -> None:
        """Returns when all are there. A process joins once; one without others does nothing."""
        if self.size == 1:
            return
        host, _, port = self.membership.address.rpartition(":")
        if host.startswith("127.") or host == "::1":
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, "lo")
        # Left to itself the store would listen on every interface.
        listening = _listen(host, int(port)) if self.leads else None
        store = dist.TCPStore(host, int(port), self.size, self.leads, master_listen_fd=listening)
        dist.init_process_group(
            _BACKENDS[device], store=store, rank=self.membership.rank, world_size=self.size, timeout=_PATIENCE
        )

    @torch.no_grad()
    def shared(self, batch: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """What `function` makes of a batch, of its shape and dtype; each process computes a part of the samples, and gets the others'."""
        if self.size == 1:
            return function(batch)
        place = Place(None)
        own = batch[place.rows(len(batch))]
        return place.gather(function(own) if len(own) else own, len(batch))

    def part(self, samples: Sequence[int]) -> Sequence[int]:
        """A process's own of some samples."""
        return samples if self.size == 1 else samples[Place(None).rows(len(samples))]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """The sums over all processes, in place."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor)

    def agree(self, number: Number) -> Number:
        """The first one's number, for all: what it found on storage, which may have changed before another looks, or what another
        processor may round otherwise."""
        if self.size == 1:
            return number
        told = torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else torch.int64)
        dist.broadcast(told, 0)
        return type(number)(told.item())

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """The first one's values, in place."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)


def _listen(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family).detach()
