"""The lease as those see it who only watch: who holds the run, since when, and whether that one is alive.

No clocks are compared. On the holder's own machine its process is there or not; from elsewhere one look says how far its beat
has come, and further looks whether it goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pipeline.lease import Turn, is_gone, key_of, newest, this_machine
from pipeline.store import Store


@dataclass(frozen=True)
class Look:
    """What one look at an open term found. `at`: the watcher's clock when the beat was first seen where it stands."""

    term: int
    beat: int
    at: float
    moved: bool


class LeaseWatch:
    """Looks at a run's lease, as often as it is asked."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.last: Look | None = None

    def look(self) -> dict[str, Any] | None:
        """The open term: term, host, process, since, beat (how often it was renewed) and state; None if nobody holds the run.

        `state`: alive; gone (its process on this machine has ended); silent (its beat stood still for a lease's length while
        this watched); held (not to be told from one look from elsewhere).
        """
        turn = newest(self.store)
        if not turn.open:
            self.last = None
            return None
        self.last = look = self._follow(turn.term)
        holder = turn.holder
        return {
            "term": turn.term,
            "host": holder.host if holder else None,
            "pid": holder.pid if holder else None,
            "since": holder.since if holder else None,
            "beat": look.beat,
            "state": _state(turn, look),
        }

    def _follow(self, term: int) -> Look:
        beat, now = _beat(self.store, term), time.monotonic()
        before = self.last
        if before is None or before.term != term:
            return Look(term, beat, now, moved=False)
        return before if beat == before.beat else Look(term, beat, now, moved=True)


def _beat(store: Store, term: int) -> int:
    """How often the term was renewed; 0 where that is not there yet, or torn."""
    try:
        return int(store.get(key_of(term, "beat")))
    except (FileNotFoundError, ValueError):
        return 0


def _state(turn: Turn, look: Look) -> str:
    holder = turn.holder
    if holder is None:
        return "held"
    if holder.machine and holder.machine == this_machine():
        return "gone" if is_gone(holder) else "alive"
    if time.monotonic() - look.at > holder.seconds:
        return "silent"
    return "alive" if look.moved else "held"
