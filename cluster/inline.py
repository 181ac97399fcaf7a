"""Workers without processes, for tests and for a debugger."""

import time
import traceback
from collections import deque
from collections.abc import Mapping

from cluster.events import Event, UnitDone, UnitFailed, WorkerJoined
from cluster.group import ALONE, Setup, failure_of, stay
from cluster.scheduler import State
from cluster.units import Unit


class InlineGroup:
    """Runs the submitted units inside `poll`, one at a time, in the order of submission."""

    patience = 0.0  # nobody will join

    def __init__(self, setup: Setup, workers: int = 1) -> None:
        self._handlers = {name: setup(name, stay, ALONE) for name in (f"inline-{i}" for i in range(workers))}
        self._submitted: deque[tuple[str, Unit]] = deque()

    def workers(self) -> list[WorkerJoined]:
        return [WorkerJoined(worker) for worker in self._handlers]

    def submit(self, worker: str, unit: Unit) -> None:
        self._submitted.append((worker, unit))

    def poll(self, timeout: float) -> list[Event]:
        if not self._submitted:
            time.sleep(timeout)
            return []
        worker, unit = self._submitted.popleft()
        try:
            return [UnitDone(unit.name, worker, self._handlers[worker](unit.payload))]
        except Exception as error:
            return [UnitFailed(unit.name, worker, *failure_of(error), traceback.format_exc())]

    def show(self, counts: Mapping[State, int]) -> None:
        pass

    def close(self) -> None:
        self._submitted.clear()
