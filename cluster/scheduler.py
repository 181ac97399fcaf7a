"""Decides what runs where: events in, instructions out.

No I/O, no clock, no Ray: whatever can happen to a cluster can be played to it in microseconds, and the same events
always give the same instructions.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from enum import Enum
from types import MappingProxyType

from cluster.events import (
    Assign,
    End,
    Event,
    GaveUp,
    Instruction,
    Status,
    StopRequested,
    UnitDone,
    UnitFailed,
    UnitReturned,
    WorkerJoined,
    WorkerLeaving,
    WorkerLost,
)
from cluster.placement import Placement
from cluster.plan import Plan
from cluster.units import FailureKind, Unit

# A machine that is taken away says nothing against the unit it ran, so losses have a limit of their own: it only stops a unit
# that itself brings its worker down, by its memory say.
MAX_LOSSES = 20


class State(Enum):
    WAITING = "waiting"
    READY = "ready"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Scheduler:
    """The state of one set of units. Units go by their place in the declaration inside, by name outside."""

    def __init__(self, units: Iterable[Unit], max_attempts: int, max_losses: int = MAX_LOSSES) -> None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts is {max_attempts}; a unit needs at least one attempt.")
        self._units = list(units)
        self._max_attempts = max_attempts
        self._max_losses = max_losses
        self._plan = Plan(self._units)
        self._places = self._plan.places
        self._missing, self._dependents = list(self._plan.missing), self._plan.dependents
        self._state = [State.WAITING] * len(self._units)
        self._counts = Counter(dict.fromkeys(State, 0))
        self._counts[State.WAITING] = len(self._units)
        self._attempts: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._workers: set[str] = set()
        self._leaving: set[str] = set()
        self._lost: set[str] = set()
        self._running: dict[str, int] = {}
        self._placement = Placement(self._units, self._plan)
        self._drain: End | None = None
        self._ended = False
        for place, missing in enumerate(self._missing):
            if not missing:
                self._make_ready(place)

    @property
    def counts(self) -> Mapping[State, int]:
        return MappingProxyType(self._counts)

    @property
    def running(self) -> Mapping[str, str]:
        """Worker to unit."""
        return {worker: self._units[place].name for worker, place in self._running.items()}

    @property
    def draining(self) -> bool:
        return self._drain is not None

    @property
    def workers(self) -> int:
        """How many are there, those that are leaving among them."""
        return len(self._workers)

    @property
    def stuck(self) -> str | None:
        """Why nothing runs though units are ready: nobody who is there can run them. None where something runs."""
        if self._ended or self.draining or self._running or not self._placement.ready:
            return None
        first = self._units[self._plan.by_rank[min(self._placement.ready)]]
        there = len(self._workers - self._leaving)
        return (
            f"{len(self._placement.ready)} units are ready, but none of the {there} workers there can run one; "
            f"the first, {first.name}, needs a worker of {_needs(first)}"
        )

    def attempts(self, unit: str) -> int:
        """How many attempts of the unit have failed so far."""
        return self._attempts[self._places[unit]]

    def runs(self, unit: str, worker: str) -> bool:
        """Whether an event of this unit from this worker counts; all others are a lost worker's or another plan's."""
        place = self._running.get(worker)
        return place is not None and self._units[place].name == unit

    def handle(self, event: Event) -> list[Instruction]:
        if self._ended:
            return []
        match event:
            case WorkerJoined(worker, kind, memory):
                self._join(worker, kind, memory)
            case WorkerLeaving(worker):
                self._leave(worker)
            case WorkerLost(worker, reason):
                self._lose(worker, reason)
            case UnitDone(unit, worker):
                if self.runs(unit, worker):
                    self._finish(worker)
            case UnitFailed(unit, worker, kind, message):
                if self.runs(unit, worker):
                    self._fail(worker, kind, message)
            case UnitReturned(unit, worker):
                if self.runs(unit, worker):
                    self._make_ready(self._free(worker))
            case GaveUp(reason):
                self._start_drain("failed", reason)
            case StopRequested(reason):
                self._start_drain("interrupted", reason)
        return self._instructions()

    def _join(self, worker: str, kind: str | None, memory: int) -> None:
        # A lost worker never comes back under its name, so a join that arrives after the loss is only late.
        if worker not in self._workers and worker not in self._lost:
            self._workers.add(worker)
            self._placement.add_worker(worker, kind, memory)

    def _leave(self, worker: str) -> None:
        if worker in self._workers:
            self._leaving.add(worker)
            self._placement.remove_worker(worker)

    def _lose(self, worker: str, reason: str) -> None:
        self._lost.add(worker)
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        self._leaving.discard(worker)
        self._placement.remove_worker(worker)
        if worker in self._running:
            place = self._running.pop(worker)
            self._losses[place] += 1
            message = f"lost its worker {self._losses[place]} times; the last time: {worker}: {reason}"
            self._again_or_fail(place, self._losses[place], self._max_losses, message)

    def _finish(self, worker: str) -> None:
        place = self._free(worker)
        self._move(place, State.DONE)
        for dependent in self._dependents[place]:
            self._missing[dependent] -= 1
            if not self._missing[dependent]:
                self._make_ready(dependent)

    def _fail(self, worker: str, kind: FailureKind, message: str) -> None:
        if kind in ("retry", "outage"):
            # What ails may be the worker: it holds nothing any more, so that the next attempt goes to whoever waited longest.
            self._placement.forget(worker)
            self._try_again(self._free(worker), message, blame=kind == "retry")
            return
        place = self._free(worker)
        self._move(place, State.FAILED)
        self._start_drain("replan" if kind == "replan" else "failed", f"Unit {self._units[place].name}: {message}")

    def _try_again(self, place: int, message: str, *, blame: bool) -> None:
        self._attempts[place] += 1
        attempts = self._attempts[place]
        message = f"failed {attempts} times; the last time: {message}"
        self._again_or_fail(place, attempts, self._max_attempts, message, blame=blame)

    def _again_or_fail(self, place: int, failures: int, most: int, message: str, *, blame: bool = True) -> None:
        if failures < most:
            self._make_ready(place)
            return
        self._move(place, State.FAILED)
        name = self._units[place].name
        self._drain = self._drain or End("failed", f"Unit {name} {message}", name if blame else None, failures)

    def _start_drain(self, status: Status, reason: str) -> None:
        # The first reason stands: what fails while the rest winds up is often its consequence.
        self._drain = self._drain or End(status, reason)

    def _free(self, worker: str) -> int:
        if worker not in self._leaving:
            self._placement.free_worker(worker)
        return self._running.pop(worker)

    def _make_ready(self, place: int) -> None:
        self._move(place, State.READY)
        self._placement.add_unit(self._plan.ranks[place])

    def _move(self, place: int, state: State) -> None:
        self._counts[self._state[place]] -= 1
        self._counts[state] += 1
        self._state[place] = state

    def _instructions(self) -> list[Instruction]:
        if self._counts[State.DONE] == len(self._units):
            return self._end(End("done", f"All {len(self._units)} units are done."))
        if self._drain is not None:
            return [] if self._running else self._end(self._drain)
        assigned: list[Instruction] = []
        while pair := self._placement.next_pair():
            worker, place = pair[0], self._plan.by_rank[pair[1]]
            self._running[worker] = place
            self._move(place, State.RUNNING)
            assigned.append(Assign(self._units[place].name, worker))
        return assigned

    def _end(self, end: End) -> list[Instruction]:
        self._ended = True
        return [end]

    def validate(self) -> None:
        """Raises AssertionError where the state contradicts itself; linear in the units, for tests."""
        of_state = {state: {p for p, s in enumerate(self._state) if s is state} for state in State}
        _hold(
            self._counts == {state: len(places) for state, places in of_state.items()}, "counts differ from the states"
        )
        ready = {self._plan.by_rank[rank] for rank in self._placement.ready}
        _hold(ready == of_state[State.READY], "the ready units and the placement differ")
        _hold(sorted(self._running.values()) == sorted(of_state[State.RUNNING]), "units and workers are not one to one")
        idle, busy = self._placement.idle, self._running.keys()
        _hold(self._workers == idle | busy | self._leaving, "a worker is neither idle nor busy nor leaving")
        _hold(not idle & busy, "a worker is idle and busy")
        _hold(not idle & self._leaving, "a leaving worker is offered units")
        _hold(not self._workers & self._lost, "a lost worker is still counted")
        for place, state in enumerate(self._state):
            self._validate_unit(place, state, of_state[State.DONE])
        stopped = self.draining or self._ended
        could = any(self._placement.can_run(worker, rank) for worker in idle for rank in self._placement.ready)
        _hold(stopped or not could, "a worker idles beside a ready unit that it can run")
        _hold(not (self._ended and self._running), "a unit runs after the end")
        _hold(self._ended or not self.draining or bool(self._running), "drained, but no end was given")

    def _validate_unit(self, place: int, state: State, done: set[int]) -> None:
        missing = sum(self._places[name] not in done for name in dict.fromkeys(self._units[place].depends_on))
        name = self._units[place].name
        _hold(missing == self._missing[place], f"{name}: {missing} dependencies are missing, counted otherwise")
        _hold((missing > 0) == (state is State.WAITING), f"{name} is {state.value} with {missing} dependencies missing")
        _hold(self._attempts[place] <= self._max_attempts, f"{name} was tried too often")
        _hold(self._losses[place] <= self._max_losses, f"{name} was tried too often after losses")
        exhausted = self._attempts[place] == self._max_attempts or self._losses[place] == self._max_losses
        _hold(not exhausted or state is State.FAILED, f"{name} is {state.value} after its last attempt")
        _hold(state is not State.FAILED or self.draining, f"{name} failed and work goes on")


def _hold(condition: bool, message: str) -> None:
    if not condition:  # not `assert`: python -O must not turn the check off
        raise AssertionError(message)


def _needs(unit: Unit) -> str:
    kind = f"kind {unit.kind}" if unit.kind else "any kind"
    return f"{kind} with {unit.memory / 2**30:.1f} GiB" if unit.memory else kind
