"""What a group of workers must do; everything else here is written against this face."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.events import Event, WorkerJoined
from cluster.scheduler import State
from cluster.units import FailureKind, Unit, UnitError

Handler = Callable[[Any], dict]
"""Does one unit, given its payload. May be called twice with the same one."""

ShouldYield = Callable[[], bool]
"""Whether this worker has been told to leave: its unit commits what it has and raises `YieldUnit` within seconds."""


@dataclass(frozen=True)
class Membership:
    """A process's place among those that are one worker: all of them are given every unit.

    What the first, rank 0, returns is the unit's result, and it alone is told to leave. `address`: host:port on the first
    one's machine where the others can meet it; nobody listens there yet. Empty for a worker of one process.
    """

    rank: int = 0
    size: int = 1
    address: str = ""


ALONE = Membership()

Setup = Callable[[str, ShouldYield, Membership], Handler]
"""Called once in each process of a worker with the worker's name. Must be picklable."""


def stay() -> bool:
    """The `ShouldYield` of a worker that nobody asks to leave."""
    return False


class WorkerGroup(Protocol):
    """Workers that each do one unit at a time. Names are never used twice.

    `patience`: seconds for which it makes sense to wait for a worker that can run what no present one can.
    """

    patience: float

    def workers(self) -> list[WorkerJoined]:
        """The live ones that were ready before; those that become ready later join by an event."""

    def submit(self, worker: str, unit: Unit) -> None: ...

    def poll(self, timeout: float) -> list[Event]:
        """What has happened, as soon as anything has; an empty list after `timeout` seconds of nothing."""

    def show(self, counts: Mapping[State, int]) -> None:
        """Told after every round how the units stand, for whoever watches."""

    def close(self) -> None: ...


def failure_of(error: Exception) -> tuple[FailureKind, str]:
    """An exception that says nothing of its cure is taken for transient: a real defect comes back on every attempt."""
    if isinstance(error, UnitError):
        return error.kind, error.message
    return "retry", f"{type(error).__name__}: {error}"
