"""Workers that are Ray actors: a process or a group of them each, one unit at a time, on whatever machine has room."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.actor import LEAVE_SECONDS, Failure, Presence, Returned
from cluster.events import Event, UnitDone, UnitFailed, UnitReturned, WorkerJoined, WorkerLeaving, WorkerLost
from cluster.group import Setup
from cluster.lookout import Lookout, View
from cluster.metrics import Metrics
from cluster.pools import Pool, check_pools, check_room, places
from cluster.scheduler import State
from cluster.seat import Process, Seat, take_seat
from cluster.starts import Shortage, Starts
from cluster.units import ClusterLostError, Unit

_PLACE_SECONDS = 60.0  # for Ray to start a process where its own books say that there is room
_AWAY_SECONDS = 5.0


def silent(text: str) -> None:
    pass


class RayGroup:
    """As many workers as the pools ask for and the cluster has room for; they come and go with its machines.

    A worker that does not answer for `deadline` seconds is lost. `versions` are the driver's, as of `versions.here`:
    a worker with others is not taken. `on_message` hears of what a person should know. Raises ClusterError where not
    one worker of a pool fits; pools after the first may find no room. Close it to give the cluster's resources back.
    """

    def __init__(
        self,
        setup: Setup,
        pools: Sequence[Pool],
        *,
        deadline: float = 60.0,
        patience: float = 300.0,
        versions: Mapping[str, str] | None = None,
        on_message: Callable[[str], None] = silent,
    ) -> None:
        check_pools(pools)
        self.patience = patience
        self._setup = setup
        self._pools = pools
        self._deadline = deadline
        self._versions = dict(versions or {})
        self._names = (f"worker-{number}" for number in itertools.count())
        self._seats: dict[str, Seat] = {}
        self._starts = Starts(on_message)
        self._shortage = Shortage(on_message)
        self._metrics = Metrics()
        self._lookout = Lookout()
        self._seen: View | None = None
        self._polled = time.monotonic()
        try:
            check_room(pools[0], self._lookout.view.machines)
            self._fill()
        except BaseException:
            self.close()
            raise

    def workers(self) -> list[WorkerJoined]:
        return [_joined(seat) for seat in self._seats.values() if seat.live and seat.leaving is None]

    def submit(self, worker: str, unit: Unit) -> None:
        seat = self._seats.get(worker)
        if seat is None:
            return  # lost a moment ago: the event that says so is on its way to the caller
        if seat.busy:
            raise RuntimeError(f"Worker {worker} was given unit {unit.name} while it is busy.")
        seat.give(unit)

    def poll(self, timeout: float) -> list[Event]:
        if self._lookout.gone:
            raise ClusterLostError(
                f"The cluster is lost: {self._lookout.gone}. What was committed stays; start the cluster again and repeat."
            )
        self._forgive()
        ready = self._ready(timeout)
        events = [event for seat in list(self._seats.values()) for event in self._news(seat, ready)]
        events += self._look()
        self._polled = time.monotonic()
        self._metrics.count(events)
        return events

    def show(self, counts: Mapping[State, int]) -> None:
        self._metrics.units(counts)
        self._metrics.workers(seat.pool.kind for seat in self._seats.values() if seat.live)

    def close(self) -> None:
        self._lookout.close()
        for seat in self._seats.values():
            seat.end()
        self._seats.clear()

    def _forgive(self) -> None:
        # After a pause of this process (Ctrl-Z, say) the answers need a moment to come in.
        away = time.monotonic() - self._polled
        if away > _AWAY_SECONDS:
            for process in (process for seat in self._seats.values() for process in seat.processes):
                process.asked += away

    def _ready(self, timeout: float) -> set[Any]:
        refs = [ref for seat in self._seats.values() for ref in seat.refs]
        if not refs:
            time.sleep(timeout)
            return set()
        ray.wait(refs, num_returns=1, timeout=timeout)
        return set(ray.wait(refs, num_returns=len(refs), timeout=0)[0])

    def _news(self, seat: Seat, ready: set[Any]) -> list[Event]:
        events: list[Event] = []
        # The answers first: a unit that was done before its worker died is done.
        for awaited, step in (("call", self._answer), ("word", self._hear), ("watch", self._end_of_watch)):
            for process in seat.processes:
                # Looked up now: a step may have asked anew.
                if getattr(process, awaited) in ready and seat.worker in self._seats:
                    events += step(seat, process)
        return events + (self._overdue(seat) if seat.worker in self._seats else [])

    def _answer(self, seat: Seat, process: Process) -> list[Event]:
        call, process.call = process.call, None
        try:
            answer = ray.get(call)
        except RayTaskError as error:  # raised outside the handler, as by a result that cannot be pickled
            answer = Failure("retry", f"{type(error.cause).__name__}: {_first_line(error.cause)}", str(error))
        except RayError as error:  # whatever else Ray says of a call means that its process cannot be counted on
            return self._lose(seat, _cause(error))
        if isinstance(seat.answer, Failure):
            return []  # it is being looked into
        failed = isinstance(answer, Failure)
        if failed or process is seat.processes[0]:
            seat.answer = answer
        if seat.unit is None:
            process.asked = time.monotonic()  # it runs, and what it is asked next it is asked now
            return self._lose(seat, answer.message, fatal=answer.kind == "fatal") if failed else self._started(seat)
        if failed and seat.pool.members > 1:
            # One that dies is a failure to the others, who may be heard first: the unit's own only if all are alive.
            for each in seat.processes:
                each.ping()
            return []
        still = seat.busy and not isinstance(answer, Returned)
        return [] if still else self._ended(seat, seat.unit)

    def _ended(self, seat: Seat, unit: Unit) -> list[Event]:
        events = self._unit_events(seat, unit, seat.answer)
        failed, seat.unit, seat.answer = isinstance(seat.answer, Failure), None, None
        if failed and seat.pool.members > 1:
            # It goes: the others wait in the middle of the unit for one that has left it.
            events = [*self._leaving(seat), *events]
        return events if seat.leaving is None else [*events, *self._retire(seat)]

    def _unit_events(self, seat: Seat, unit: Unit, answer: Any) -> list[Event]:
        if isinstance(answer, Failure):
            return [UnitFailed(unit.name, seat.worker, answer.kind, answer.message, answer.traceback)]
        if isinstance(answer, Returned):
            return [*self._leaving(seat), UnitReturned(unit.name, seat.worker)]
        return [UnitDone(unit.name, seat.worker, answer)]

    def _started(self, seat: Seat) -> list[Event]:
        """It joins once all its processes have started and said where they are, in whichever order these are heard: one
        that is given a unit before could be stopped, and taken for one that never found room."""
        if seat.live or seat.busy or not all(process.placed for process in seat.processes):
            return []
        seat.live = True
        self._starts.succeeded(seat.node)
        return [_joined(seat)]

    def _hear(self, seat: Seat, process: Process) -> list[Event]:
        word, process.word = process.word, None
        process.asked = time.monotonic()
        try:
            answer = ray.get(word)
        except RayError as error:
            return self._lose(seat, _cause(error))
        if isinstance(answer, Presence):
            process.present(answer)
            return self._started(seat)
        heard = all(each.word is None for each in seat.processes)
        return self._ended(seat, seat.unit) if seat.unit and isinstance(seat.answer, Failure) and heard else []

    def _end_of_watch(self, seat: Seat, process: Process) -> list[Event]:
        watch, process.watch = process.watch, None
        try:
            ray.get(watch)
        except RayError as error:
            return self._lose(seat, _cause(error))
        seat.leave()  # if another of its processes was told
        return self._told_to_leave(seat)

    def _overdue(self, seat: Seat) -> list[Event]:
        now = time.monotonic()
        if seat.leaving is not None and now - seat.leaving > LEAVE_SECONDS:
            return self._lose(seat, f"did not give its unit back within {LEAVE_SECONDS:.0f} s of being told to leave")
        for process in seat.processes:
            waited = now - process.asked
            if process.word is None:
                if waited > self._deadline / 4:
                    process.ping()
            elif (process.placed or process.call is None) and waited > self._deadline:
                return self._lose(seat, f"has not answered for {self._deadline:g} s")
            elif not process.placed and process.call is not None and waited > _PLACE_SECONDS:
                self._starts.no_room(process.node, f"a worker of {seat.pool.cpus:g} CPUs and {seat.pool.gpus:g} GPUs")
                self._end(seat)
                break
        return []

    def _look(self) -> list[Event]:
        view = self._lookout.view
        if view is self._seen:
            return []
        staying = [seat for seat in self._seats.values() if seat.leaving is None]
        events: list[Event] = []
        for seat in (s for s in staying if any(process.node in view.draining for process in s.processes)):
            seat.leave()
            events += self._told_to_leave(seat)
        self._fill()
        return events

    def _fill(self) -> None:
        self._seen = view = self._lookout.view
        seated = [process for seat in self._seats.values() for process in seat.seated]
        for pool, nodes in places(self._pools, view.machines, seated, self._starts.barred()):
            worker = next(self._names)
            self._seats[worker] = take_seat(worker, pool, nodes, self._setup, self._versions)
        for pool in self._pools:
            self._shortage.note(pool, sum(seat.pool == pool for seat in self._seats.values()))

    def _told_to_leave(self, seat: Seat) -> list[Event]:
        events = self._leaving(seat)
        return events if seat.unit is not None else [*events, *self._retire(seat)]

    def _leaving(self, seat: Seat) -> list[Event]:
        if seat.leaving is not None:
            return []
        seat.leaving = time.monotonic()
        return [WorkerLeaving(seat.worker)] if seat.live else []

    def _retire(self, seat: Seat) -> list[Event]:
        self._end(seat)
        return [WorkerLost(seat.worker, "it was told to leave, and left", on_request=True)] if seat.live else []

    def _lose(self, seat: Seat, reason: str, *, fatal: bool = False) -> list[Event]:
        self._end(seat)
        if seat.live:
            return [WorkerLost(seat.worker, reason)]
        self._starts.failed(seat.node, reason, fatal=fatal)
        if not any(other.live for other in self._seats.values()):
            self._starts.check_hope([machine.node for machine in self._lookout.view.machines])
        return []

    def _end(self, seat: Seat) -> None:
        del self._seats[seat.worker]
        seat.end()


def _joined(seat: Seat) -> WorkerJoined:
    return WorkerJoined(seat.worker, seat.pool.kind, seat.memory)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _cause(error: Exception) -> str:
    """Ray's account of a death ends in general advice of many lines."""
    lines = str(error).splitlines()
    telling = next((line for line in lines if line.startswith("The actor is dead because")), _first_line(error))
    return telling.removeprefix("The actor is dead because ").split(" Some common causes")[0].strip().rstrip(".")
