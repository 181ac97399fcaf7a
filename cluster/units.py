"""What a unit of work is, and how the code that does one says what went wrong."""

from dataclasses import dataclass
from typing import Any, Literal

FailureKind = Literal["retry", "outage", "replan", "fatal"]


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work that may run anywhere, may run twice, and leaves its real outcome on storage.

    `priority` orders the ready units (smaller first; ties go to the longest chain of dependants, then to the declaration). Units of one `affinity` are
    cheaper on the worker that ran one of them last, because it still holds what they share. `kind` is the class of
    workers it needs (None: any), `memory` the bytes it needs there.
    """

    name: str
    payload: Any
    depends_on: tuple[str, ...] = ()
    priority: tuple[int, ...] = ()
    affinity: str | None = None
    kind: str | None = None
    memory: int = 0


class UnitError(Exception):
    """A failure whose cure the handler knows.

    "retry": transient, trying again may help. "outage": the same, but what failed is around the unit (its storage, say) and
    says nothing against it. "replan": an input that was believed to be there is missing or
    corrupt, so the plan is wrong and the caller must make another. "fatal": no retry will help (disk full, input
    refused).
    """

    def __init__(self, kind: FailureKind, message: str) -> None:
        # Both go to `args`: an exception is unpickled by calling its class with them, and one that refuses them
        # breaks the process that receives it.
        super().__init__(kind, message)
        self.kind: FailureKind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


class YieldUnit(Exception):  # noqa: N818  (not an error)
    """Raised by a handler that was asked to leave: what it has is committed, and the unit goes on elsewhere from there."""


class ClusterError(Exception):
    """The workers themselves cannot be had: the message says what was asked, what there is and what to do."""


class ClusterLostError(ClusterError):
    """There were workers, and there will be none any more: units may have run, and what they committed stays."""
