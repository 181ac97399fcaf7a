"""What happens to units and workers, and what is to be done about it: the words between scheduler, loop and group."""

from dataclasses import dataclass, field
from typing import Literal

from cluster.units import FailureKind

Status = Literal["done", "replan", "failed", "interrupted"]


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker is there and idle. Names are never used twice: a lost worker's replacement has another one.

    `kind` is the class it belongs to, None where it runs units of every kind; `memory` the bytes that one unit may need on it, 0 where nobody knows.
    """

    worker: str
    kind: str | None = None
    memory: int = 0


@dataclass(frozen=True, slots=True)
class WorkerLeaving:
    """It gets no further unit; what it runs goes on. Its end is told by `WorkerLost`."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """`on_request`: it had been told to leave, gave back what it ran, and went."""

    worker: str
    reason: str
    on_request: bool = False


@dataclass(frozen=True, slots=True)
class UnitDone:
    unit: str
    worker: str
    result: dict


@dataclass(frozen=True, slots=True)
class UnitReturned:
    """Handed back with what it had committed, because its worker was asked to leave: neither an attempt nor a loss."""

    unit: str
    worker: str


@dataclass(frozen=True, slots=True)
class UnitFailed:
    """`traceback` is the worker's own, for the log alone."""

    unit: str
    worker: str
    kind: FailureKind
    message: str
    traceback: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class StopRequested:
    reason: str


@dataclass(frozen=True, slots=True)
class GaveUp:
    """Nobody waits any longer for a worker that can run what is left."""

    reason: str


@dataclass(frozen=True, slots=True)
class Assign:
    unit: str
    worker: str


@dataclass(frozen=True, slots=True)
class End:
    """Nothing runs any more and nothing will be handed out.

    `unit` is the one that failed for good, after all its attempts or losses: those `failures`. None if no single unit did.
    """

    status: Status
    reason: str
    unit: str | None = field(default=None, compare=False)
    failures: int = field(default=0, compare=False)


Event = WorkerJoined | WorkerLeaving | WorkerLost | UnitDone | UnitReturned | UnitFailed | StopRequested | GaveUp
Instruction = Assign | End
