"""Workers that are Ray actors: one process each, one unit at a time, on whatever machine has room."""

import itertools
import threading
import traceback
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.group import Handler, Setup, failure_of, stay
from cluster.scheduler import Event, UnitDone, UnitFailed, WorkerJoined, WorkerLost
from cluster.session import check_room
from cluster.units import ClusterError, FailureKind, Unit

_MAX_START_FAILURES = 3


@dataclass(frozen=True)
class _Failure:
    """An exception by its contents: itself it might not survive the way, or need a module that the driver lacks."""

    kind: FailureKind
    message: str
    traceback: str


@ray.remote(concurrency_groups={"watch": 1}, max_restarts=0, max_task_retries=0)  # type: ignore[call-overload]
class _Worker:
    """`start` and `run` share the default group's one thread: what the setup sets for its thread holds for the units.
    (The constructor would run on another one.)"""

    def start(self, setup: Setup, name: str) -> _Failure | None:
        try:
            self._handler: Handler = setup(name, stay)
        except Exception as error:
            return _Failure(*failure_of(error), traceback.format_exc())
        return None

    def run(self, payload: Any) -> dict | _Failure:
        try:
            return self._handler(payload)
        except Exception as error:
            return _Failure(*failure_of(error), traceback.format_exc())

    @ray.method(concurrency_group="watch")
    def watch(self) -> None:
        """Never returns. Its end tells that the process is gone: without a call under way nobody would notice the
        loss of an idle worker until a unit had been spent on it."""
        threading.Event().wait()


@dataclass
class _Seat:
    """One worker as the driver sees it. `call` is what it does now: its start, or the unit."""

    worker: str
    actor: Any
    watch: Any
    call: Any
    failures: int  # starts in a row before this one that came to nothing
    unit: Unit | None = None
    live: bool = False


class RayGroup:
    """Replaces every worker that is lost. Close it to give the cluster's resources back."""

    def __init__(self, setup: Setup, workers: int, cpus_per_worker: float, gpus_per_worker: float = 0) -> None:
        check_room(workers, cpus_per_worker, gpus_per_worker)
        self._setup = setup
        self._options = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker}
        self._names = (f"worker-{number}" for number in itertools.count())
        self._seats: dict[str, _Seat] = {}
        for _ in range(workers):
            self._start(failures=0)

    def workers(self) -> list[str]:
        return [seat.worker for seat in self._seats.values() if seat.live]

    def submit(self, worker: str, unit: Unit) -> None:
        seat = self._seats.get(worker)
        if seat is None:
            return  # lost a moment ago: the event that says so is on its way to the caller
        if seat.call is not None:
            raise RuntimeError(f"Worker {worker} was given unit {unit.name} while it is busy.")
        seat.unit, seat.call = unit, seat.actor.run.remote(unit.payload)

    def poll(self, timeout: float) -> list[Event]:
        ready = self._ready(timeout)
        events: list[Event] = []
        for seat in list(self._seats.values()):
            # The answer first: a unit that was done before its worker died is done.
            if seat.call in ready:
                events += self._answer(seat)
            if seat.watch in ready and seat.worker in self._seats:
                events += self._lose(seat, _end_of(seat.watch))
        return events

    def close(self) -> None:
        for seat in self._seats.values():
            ray.kill(seat.actor)
        self._seats.clear()

    def _ready(self, timeout: float) -> set[Any]:
        refs = [ref for seat in self._seats.values() for ref in (seat.call, seat.watch) if ref is not None]
        ray.wait(refs, num_returns=1, timeout=timeout)
        return set(ray.wait(refs, num_returns=len(refs), timeout=0)[0])

    def _start(self, failures: int) -> None:
        worker = next(self._names)
        actor = _Worker.options(**self._options).remote()  # type: ignore[attr-defined]
        watch, call = actor.watch.remote(), actor.start.remote(self._setup, worker)
        self._seats[worker] = _Seat(worker, actor, watch, call, failures)

    def _answer(self, seat: _Seat) -> list[Event]:
        call, seat.call = seat.call, None
        try:
            answer = ray.get(call)
        except RayTaskError as error:  # raised outside the handler, as by a result that cannot be pickled
            answer = _Failure("retry", f"{type(error.cause).__name__}: {_first_line(error.cause)}", str(error))
        except RayError as error:  # whatever else Ray says of a call means that its process cannot be counted on
            return self._lose(seat, error)
        if seat.unit is None:
            return self._started(seat, answer)
        unit, seat.unit = seat.unit, None
        if isinstance(answer, _Failure):
            return [UnitFailed(unit.name, seat.worker, answer.kind, answer.message, answer.traceback)]
        return [UnitDone(unit.name, seat.worker, answer)]

    def _started(self, seat: _Seat, failure: _Failure | None) -> list[Event]:
        if failure is None:
            seat.live, seat.failures = True, 0
            return [WorkerJoined(seat.worker)]
        if failure.kind == "fatal":
            raise ClusterError(f"A worker cannot start: {failure.message}")
        self._replace(seat, failure.message)
        return []

    def _lose(self, seat: _Seat, error: Exception) -> list[Event]:
        reason = _cause(error)
        self._replace(seat, reason)
        return [WorkerLost(seat.worker, reason)] if seat.live else []

    def _replace(self, seat: _Seat, reason: str) -> None:
        del self._seats[seat.worker]
        ray.kill(seat.actor)  # it may live on behind a broken connection, and hold what its replacement needs
        failures = 0 if seat.live else seat.failures + 1
        if failures == _MAX_START_FAILURES:
            raise ClusterError(f"A worker failed to start {failures} times in a row; the last time: {reason}")
        self._start(failures)


def _end_of(watch: Any) -> Exception:
    try:
        ray.get(watch)
    except RayError as error:
        return error
    return RuntimeError("the watch of a worker returned")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _cause(error: Exception) -> str:
    """Ray's account of a death ends in general advice of many lines."""
    lines = str(error).splitlines()
    telling = next((line for line in lines if line.startswith("The actor is dead because")), _first_line(error))
    return telling.split(" Some common causes")[0].strip()
