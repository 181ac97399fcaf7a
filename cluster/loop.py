"""Runs a set of units on a group of workers: polls, feeds the scheduler and carries out what it says."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TypeGuard

from cluster.events import End, Event, GaveUp, Instruction, Status, StopRequested, UnitDone, UnitFailed, WorkerLost
from cluster.group import WorkerGroup
from cluster.retry import exponential
from cluster.scheduler import Scheduler
from cluster.units import Unit

_ROUND = 0.2  # seconds between two looks at `should_stop`


@dataclass(frozen=True)
class Outcome:
    """`results` holds those of the units that were done, whatever the status; `unit` and `failures` as in `End`."""

    status: Status
    reason: str
    results: dict[str, dict]
    unit: str | None = None
    failures: int = 0


def ignore(event: Event | Instruction) -> None:
    pass


def never() -> bool:
    return False


class _Held:
    """Failures that the scheduler may not see yet: until it does, the unit is not offered again. And the departures of
    workers after them, who did not take the units with them."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, UnitFailed | WorkerLost]] = []
        self._count = 0

    def add(self, event: UnitFailed, seconds: float) -> None:
        self._push(time.monotonic() + seconds, event)

    def add_departure(self, event: WorkerLost) -> bool:
        """Whether there is something that it has to wait for."""
        due = [when for when, _, failure in self._heap if failure.worker == event.worker]
        if due and event.on_request:
            self._push(max(due), event)
        return bool(due) and event.on_request

    def _push(self, when: float, event: UnitFailed | WorkerLost) -> None:
        self._count += 1  # keeps the order of arrival, and events out of the comparison
        heappush(self._heap, (when, self._count, event))

    def due(self, everything: bool) -> list[UnitFailed | WorkerLost]:
        now = time.monotonic()
        due = []
        while self._heap and (everything or self._heap[0][0] <= now):
            due.append(heappop(self._heap)[2])
        return due

    def timeout(self) -> float:
        return min(_ROUND, max(0.0, self._heap[0][0] - time.monotonic())) if self._heap else _ROUND


class _Patience:
    """How long nothing has run because nobody who is there could."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None

    def lost(self, stuck: str | None) -> list[Event]:
        if stuck is None:
            self._since = None
            return []
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since < self._seconds:
            return []
        waited = f" for {self._seconds:.0f} s" if self._seconds else ""
        return [GaveUp(f"Nothing could run{waited}: {stuck}. Add machines for such workers, or ask for smaller ones.")]


class _Run:
    """One scheduler and the group that carries out what it says."""

    def __init__(
        self, group: WorkerGroup, units: list[Unit], max_attempts: int, on_event: Callable[[Event | Instruction], None]
    ) -> None:
        self.scheduler = Scheduler(units, max_attempts)
        self.results: dict[str, dict] = {}
        self._group = group
        self._units = {unit.name: unit for unit in units}
        self._on_event = on_event

    def feed(self, event: Event) -> End | None:
        if isinstance(event, UnitDone) and self.scheduler.runs(event.unit, event.worker):
            self.results[event.unit] = event.result
        for instruction in self.scheduler.handle(event):
            self._on_event(instruction)
            if isinstance(instruction, End):
                return instruction
            self._group.submit(instruction.worker, self._units[instruction.unit])
        return None


def run_units(
    group: WorkerGroup,
    units: Iterable[Unit],
    *,
    max_attempts: int = 3,
    backoff: Callable[[str, int], float] = exponential,
    on_event: Callable[[Event | Instruction], None] = ignore,
    should_stop: Callable[[], bool] = never,
) -> Outcome:
    """Returns when nothing runs any more, so that the group can be given the next set of units.

    Where units are ready and nobody can run them, it waits for as long as the group says and then fails the run.

    `on_event` hears of every event as it arrives, and of every instruction before it is carried out.
    """
    run = _Run(group, list(units), max_attempts, on_event)
    held, patience = _Held(), _Patience(group.patience)
    arrived: list[Event] = [*group.workers()]
    while True:
        if not run.scheduler.draining and should_stop():
            arrived.append(StopRequested("Stopped on request."))
        ripe: list[Event] = [*held.due(everything=run.scheduler.draining)]
        for event in arrived:
            on_event(event)
            if _may_wait(event, run.scheduler):
                held.add(event, backoff(event.unit, run.scheduler.attempts(event.unit) + 1))
            elif not (isinstance(event, WorkerLost) and held.add_departure(event)):
                ripe.append(event)
        for event in ripe:
            if end := run.feed(event):
                group.show(run.scheduler.counts)
                return Outcome(end.status, end.reason, run.results, end.unit, end.failures)
        group.show(run.scheduler.counts)
        arrived = patience.lost(run.scheduler.stuck) or group.poll(held.timeout())


def _may_wait(event: Event, scheduler: Scheduler) -> TypeGuard[UnitFailed]:
    return (
        isinstance(event, UnitFailed)
        and event.kind in ("retry", "outage")
        and scheduler.runs(event.unit, event.worker)
        and not scheduler.draining
    )
