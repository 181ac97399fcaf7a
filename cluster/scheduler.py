"""Decides what runs where: events in, instructions out.

No I/O, no clock, no Ray: whatever can happen to a cluster can be played to it in microseconds, and the same events
always give the same instructions.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Literal

from cluster.placement import Placement
from cluster.units import FailureKind, Unit

# A machine that is taken away says nothing against the unit it ran, so losses have a limit of their own: it only stops a unit
# that itself brings its worker down, by its memory say.
MAX_LOSSES = 20
Status = Literal["done", "replan", "failed", "interrupted"]


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker is there and idle. Names are never used twice: a lost worker's replacement has another one."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class UnitDone:
    unit: str
    worker: str
    result: dict


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


Event = WorkerJoined | WorkerLost | UnitDone | UnitFailed | StopRequested
Instruction = Assign | End


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
        self._places = _places(self._units)
        self._missing, self._dependents = _graph(self._units, self._places)
        _check_acyclic(self._units, self._places, self._missing, self._dependents)
        self._state = [State.WAITING] * len(self._units)
        self._counts = Counter(dict.fromkeys(State, 0))
        self._counts[State.WAITING] = len(self._units)
        self._attempts: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._workers: set[str] = set()
        self._lost: set[str] = set()
        self._running: dict[str, int] = {}
        self._placement = Placement(self._units)
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
            case WorkerJoined(worker):
                self._join(worker)
            case WorkerLost(worker, reason):
                self._lose(worker, reason)
            case UnitDone(unit, worker):
                if self.runs(unit, worker):
                    self._finish(worker)
            case UnitFailed(unit, worker, kind, message):
                if self.runs(unit, worker):
                    self._fail(worker, kind, message)
            case StopRequested(reason):
                self._start_drain("interrupted", reason)
        return self._instructions()

    def _join(self, worker: str) -> None:
        # A lost worker never comes back under its name, so a join that arrives after the loss is only late.
        if worker not in self._workers and worker not in self._lost:
            self._workers.add(worker)
            self._placement.add_worker(worker)

    def _lose(self, worker: str, reason: str) -> None:
        self._lost.add(worker)
        if worker not in self._workers:
            return
        self._workers.remove(worker)
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
        place = self._free(worker)
        if kind == "retry":
            self._try_again(place, message)
            return
        self._move(place, State.FAILED)
        self._start_drain("replan" if kind == "replan" else "failed", f"Unit {self._units[place].name}: {message}")

    def _try_again(self, place: int, message: str) -> None:
        self._attempts[place] += 1
        attempts = self._attempts[place]
        self._again_or_fail(place, attempts, self._max_attempts, f"failed {attempts} times; the last time: {message}")

    def _again_or_fail(self, place: int, failures: int, most: int, message: str) -> None:
        if failures < most:
            self._make_ready(place)
            return
        self._move(place, State.FAILED)
        name = self._units[place].name
        self._drain = self._drain or End("failed", f"Unit {name} {message}", name, failures)

    def _start_drain(self, status: Status, reason: str) -> None:
        # The first reason stands: what fails while the rest winds up is often its consequence.
        self._drain = self._drain or End(status, reason)

    def _free(self, worker: str) -> int:
        self._placement.add_worker(worker)
        return self._running.pop(worker)

    def _make_ready(self, place: int) -> None:
        self._move(place, State.READY)
        self._placement.add_unit(place)

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
            worker, place = pair
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
        _hold(self._placement.ready == of_state[State.READY], "the ready units and the placement differ")
        _hold(sorted(self._running.values()) == sorted(of_state[State.RUNNING]), "units and workers are not one to one")
        _hold(self._workers == self._placement.idle.keys() | self._running.keys(), "a worker is neither idle nor busy")
        _hold(not self._placement.idle.keys() & self._running.keys(), "a worker is idle and busy")
        _hold(not self._workers & self._lost, "a lost worker is still counted")
        for place, state in enumerate(self._state):
            self._validate_unit(place, state, of_state[State.DONE])
        stopped = self.draining or self._ended
        _hold(stopped or not (self._placement.idle and self._placement.ready), "a worker idles beside a ready unit")
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


def _places(units: Sequence[Unit]) -> dict[str, int]:
    places = {unit.name: place for place, unit in enumerate(units)}
    if len(places) < len(units):
        twice = [name for name, count in Counter(unit.name for unit in units).items() if count > 1]
        raise ValueError(f"Unit names must be unique; given more than once: {_listed(twice)}.")
    return places


def _graph(units: Sequence[Unit], places: Mapping[str, int]) -> tuple[list[int], list[list[int]]]:
    """For each unit how many dependencies it waits for, and which units wait for it."""
    missing = [0] * len(units)
    dependents: list[list[int]] = [[] for _ in units]
    for place, unit in enumerate(units):
        for name in dict.fromkeys(unit.depends_on):
            if name not in places:
                raise ValueError(f"Unit {unit.name} depends on {name}, which is not among the units.")
            dependents[places[name]].append(place)
            missing[place] += 1
    return missing, dependents


def _check_acyclic(
    units: Sequence[Unit], places: Mapping[str, int], missing: Sequence[int], dependents: Sequence[Sequence[int]]
) -> None:
    left = list(missing)
    free = [place for place, count in enumerate(left) if not count]
    for place in free:  # grows while it is walked
        for dependent in dependents[place]:
            left[dependent] -= 1
            if not left[dependent]:
                free.append(dependent)
    if len(free) < len(units):
        stuck = {place for place, count in enumerate(left) if count}
        raise ValueError(f"Units wait for each other in a circle: {_circle(units, places, stuck)}.")


def _circle(units: Sequence[Unit], places: Mapping[str, int], stuck: set[int]) -> str:
    """Every stuck unit depends on a stuck one, so walking up from any must come round."""
    path = [min(stuck)]
    while True:
        before = next(places[name] for name in units[path[-1]].depends_on if places[name] in stuck)
        if before in path:
            names = [units[place].name for place in [*path[path.index(before) :], before]]
            return " waits for ".join(names)
        path.append(before)


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
