"""One worker as the driver sees it: a process, or several that do every unit together."""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.actor import Actor, Failure, Presence, Returned, machine
from cluster.group import Setup
from cluster.pools import Pool, Seated
from cluster.units import Unit


@dataclass
class Process:
    """`call` is what it does now: its start, or the unit. `word` is the answer that is awaited since `asked`: at first
    where it is, then that it is still there."""

    node: str
    actor: Any
    watch: Any
    call: Any
    word: Any
    asked: float
    placed: bool = False
    gpu_memory: int = 0
    _handle: int | None = field(default=None, repr=False)  # a pidfd: a pid alone may be another's by then

    def present(self, presence: Presence) -> None:
        """It runs, there."""
        self.placed, self.node, self.gpu_memory = True, presence.node, presence.gpu_memory
        if presence.machine and presence.machine == machine():
            with suppress(OSError, AttributeError):  # ended already, or no Linux
                self._handle = os.pidfd_open(presence.pid)

    def ping(self) -> None:
        self.word, self.asked = self.actor.ping.remote(), time.monotonic()

    def end(self) -> None:
        """Whatever state it is in. It may live on behind a broken connection, and hold what others need."""
        ray.kill(self.actor)
        if self._handle is not None:
            # A stopped process does not hear Ray.
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            os.close(self._handle)
            self._handle = None


@dataclass
class Seat:
    """`processes`: the first is the one whose word counts. `answer` is its, while others are still at the unit."""

    worker: str
    pool: Pool
    processes: list[Process]
    bundles: PlacementGroup | None = None
    unit: Unit | None = None
    answer: dict | Failure | Returned | None = None
    live: bool = False
    leaving: float | None = None  # since when

    @property
    def node(self) -> str:
        return self.processes[0].node

    @property
    def memory(self) -> int:
        return min(process.gpu_memory for process in self.processes) if self.pool.gpus else self.pool.memory

    @property
    def busy(self) -> bool:
        return any(process.call is not None for process in self.processes)

    @property
    def refs(self) -> list[Any]:
        """All that is awaited of it."""
        return [ref for p in self.processes for ref in (p.call, p.watch, p.word) if ref is not None]

    @property
    def seated(self) -> list[Seated]:
        return [Seated(self.pool, process.node, pending=not process.placed) for process in self.processes]

    def give(self, unit: Unit) -> None:
        self.unit, self.answer = unit, None
        for process in self.processes:
            process.call = process.actor.run.remote(unit.payload)

    def leave(self) -> None:
        """Tell it to hand back what it does."""
        self.processes[0].actor.leave.remote()

    def end(self) -> None:
        for process in self.processes:
            process.end()
        if self.bundles is not None:
            remove_placement_group(self.bundles)


def take_seat(worker: str, pool: Pool, nodes: tuple[str, ...], setup: Setup, versions: dict[str, str]) -> Seat:
    """Starts a worker on these nodes; one of a single process elsewhere if that node is gone by then."""
    options: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus}
    if pool.memory:
        options["memory"] = pool.memory
    bundles = _bundles(pool, nodes) if len(nodes) > 1 else None
    actors = [
        Actor.options(**options, scheduling_strategy=_strategy(bundles, rank, node)).remote()  # type: ignore[attr-defined]
        for rank, node in enumerate(nodes)
    ]
    address = actors[0].address.remote() if bundles else ""
    processes = [
        Process(
            node=node,
            actor=actor,
            watch=actor.watch.remote(),
            call=actor.start.remote(setup, worker, versions, rank, len(nodes), address),
            word=actor.present.remote(pool.gpus),
            asked=time.monotonic(),
        )
        for rank, (node, actor) in enumerate(zip(nodes, actors, strict=True))
    ]
    return Seat(worker, pool, processes, bundles)


def _bundles(pool: Pool, nodes: tuple[str, ...]) -> PlacementGroup:
    """The room of a group, taken as a whole: half a group would wait for ever, and hold what another half needs."""
    needs = {name: each for name, each in pool.needs.items() if each > 0}
    return placement_group(
        [needs] * len(nodes), strategy="PACK", bundle_label_selector=[{"ray.io/node-id": node} for node in nodes]
    )


def _strategy(bundles: PlacementGroup | None, rank: int, node: str) -> Any:
    if bundles is None:
        return NodeAffinitySchedulingStrategy(node, soft=True)
    return PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=rank)
