"""One worker as the driver sees it."""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actor import Actor, Presence, machine
from cluster.pools import Pool, Seated
from cluster.units import Unit


@dataclass
class Seat:
    """`call` is what the worker does now: its start, or the unit. `word` is the answer that is awaited since `asked`:
    at first where it is, then that it is still there."""

    worker: str
    pool: Pool
    node: str
    actor: Any
    watch: Any
    call: Any
    word: Any
    asked: float
    unit: Unit | None = None
    live: bool = False
    leaving: float | None = None  # since when
    memory: int = 0
    placed: bool = False
    _process: int | None = field(default=None, repr=False)  # a pidfd: a pid alone may be another's by then

    @property
    def seated(self) -> Seated:
        return Seated(self.pool, self.node, pending=not self.placed)

    def present(self, presence: Presence) -> None:
        """It runs, there."""
        self.placed, self.node = True, presence.node
        self.memory = presence.gpu_memory if self.pool.gpus else self.pool.memory
        if presence.machine and presence.machine == machine():
            with suppress(OSError, AttributeError):  # ended already, or no Linux
                self._process = os.pidfd_open(presence.pid)

    def ping(self) -> None:
        self.word, self.asked = self.actor.ping.remote(), time.monotonic()

    def end(self) -> None:
        """Whatever state its process is in. It may live on behind a broken connection, and hold what others need."""
        ray.kill(self.actor)
        if self._process is not None:
            # A stopped process does not hear Ray.
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
            os.close(self._process)
            self._process = None


def take_seat(worker: str, pool: Pool, node: str, setup: Any, versions: dict[str, str]) -> Seat:
    """Starts a worker on a node, or elsewhere if that one is gone by then."""
    options: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus}
    if pool.memory:
        options["memory"] = pool.memory
    strategy = NodeAffinitySchedulingStrategy(node, soft=True)
    actor = Actor.options(**options, scheduling_strategy=strategy).remote()  # type: ignore[attr-defined]
    return Seat(
        worker=worker,
        pool=pool,
        node=node,
        actor=actor,
        watch=actor.watch.remote(),
        call=actor.start.remote(setup, worker, versions),
        word=actor.present.remote(pool.gpus),
        asked=time.monotonic(),
    )
