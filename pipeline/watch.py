"""What a driver leaves in the run directory for those who watch from elsewhere: `progress.json`.

It says who drives, which workers there are and what each runs, the last failures, and for every unit that was done who did it
and when. It decides nothing: a torn or missing one is as good as none, and a run never stops because it cannot be written.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cluster.scheduler import Assign, Event, Instruction, UnitDone, UnitFailed, UnitReturned, WorkerJoined, WorkerLost
from pipeline.graph import Node
from pipeline.identity import read_json
from pipeline.store import Store

PROGRESS_FILE = "progress.json"
FIELDS = ("unit", "worker", "host", "pid", "started", "ended", "peak_rss_mib")
EVERY = 5.0
# Nothing new is news too: by this a watcher tells a long unit from a driver that is gone.
HEARTBEAT = 30.0
FAILURES = 20
# A list that is long is written less often: five seconds for every so many units.
UNITS_AT_ONCE = 10_000


def read_progress(store: Store) -> dict[str, Any]:
    """What the last driver left, with its defaults where it left nothing or something torn."""
    nothing: dict[str, Any] = {
        "driver": None,
        "written": None,
        "end": None,
        "stages": {},
        "workers": {},
        "failures": [],
        "units": [],
    }
    return nothing | (read_json(store, PROGRESS_FILE) or {})


class Watch:
    """A reporter that keeps the file."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.driver = {"host": socket.gethostname(), "pid": os.getpid(), "since": round(time.time(), 1)}
        self.stages: dict[str, list[int]] = {}
        self.workers: dict[str, dict[str, Any]] = {}
        self.failures: deque[dict[str, Any]] = deque(maxlen=FAILURES)
        # Those of earlier drivers too: a unit's artifact may be deleted before the run ends.
        self.units: dict[str, list[Any]] = {}
        with suppress(Exception):  # each backend raises its own, and none is worth a run
            self.units = {entry[0]: entry for entry in read_progress(store)["units"]}
        self.changed = True
        self.last = -HEARTBEAT

    def message(self, text: str) -> None:
        pass

    def begin(self, stage_totals: dict[str, tuple[int, int]]) -> None:
        self.stages |= {stage: [done, total] for stage, (total, done) in stage_totals.items()}
        self.changed = True

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        self.stages[node.stage][0] += 1
        known = result | {"unit": node.name}
        self.units[node.name] = [_rounded(known[name]) for name in FIELDS]

    def event(self, event: Event | Instruction) -> None:
        self.changed = True
        match event:
            case WorkerJoined(worker):
                self.workers.setdefault(worker, {"host": None, "unit": None, "since": _now()})
            case WorkerLost(worker, on_request=True):
                self.workers.pop(worker, None)
            case WorkerLost(worker, reason):
                unit = self.workers.pop(worker, {}).get("unit")
                self._failed(unit, worker, f"its worker was lost: {reason}")
            case Assign(unit, worker):
                self._busy(worker, unit=unit)
            case UnitDone(_, worker, result):
                self._busy(worker, unit=None, host=result.get("host"))
            case UnitFailed(unit, worker, _, message):
                self._failed(unit, worker, message)
                self._busy(worker, unit=None)
            case UnitReturned(_, worker):
                self._busy(worker, unit=None)

    def _busy(self, worker: str, **what: Any) -> None:
        if worker in self.workers:  # else it was lost a moment ago
            self.workers[worker] |= what | {"since": _now()}

    def _failed(self, unit: str | None, worker: str, reason: str) -> None:
        first_line = (reason.splitlines() or [""])[0]
        self.failures.append({"time": _now(), "unit": unit, "worker": worker, "reason": first_line})

    def tick(self) -> None:
        """Write if it is time. Called often."""
        pace = EVERY * max(1.0, len(self.units) / UNITS_AT_ONCE)
        since = time.monotonic() - self.last
        if (self.changed and since >= pace) or since >= max(pace, HEARTBEAT):
            self.write(None)

    def write(self, end: str | None) -> None:
        self.changed, self.last = False, time.monotonic()
        whole = {
            "driver": self.driver,
            "written": _now(),
            "end": end,
            "stages": self.stages,
            "workers": {} if end else self.workers,
            "failures": list(self.failures),
            "units": list(self.units.values()),
        }
        with suppress(Exception):
            self.store.put(PROGRESS_FILE, json.dumps(whole).encode())

    def between(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """A `should_stop` that writes on the way: the loop asks it several times a second."""

        def asked() -> bool:
            self.tick()
            return should_stop()

        return asked


@contextmanager
def watching(store: Store) -> Iterator[Watch]:
    """A watch that says at the end how the driver ended."""
    watch = Watch(store)
    watch.write(None)
    try:
        yield watch
    except BaseException as error:
        watch.write((str(error).splitlines() or [""])[0] or type(error).__name__)
        raise
    watch.write("done")


def _now() -> float:
    return round(time.time(), 1)


def _rounded(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value
