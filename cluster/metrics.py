"""What a run shows to Prometheus, through Ray's own exporter on each node (the driver's node has these).

The names as Prometheus sees them; Ray puts `ray_` before those that are given here, and adds labels of its own.

| name | kind | what |
|---|---|---|
| `ray_lsi_units_waiting`, `ray_lsi_units_ready`, `ray_lsi_units_running`, `ray_lsi_units_done`, `ray_lsi_units_failed` | gauge | units of the plan that runs, by state; those that were committed before are in no plan |
| `ray_lsi_workers` | gauge, by `kind` | workers that are there |
| `ray_lsi_workers_lost_total` | counter | workers lost, those that left on request among them |
| `ray_lsi_unit_attempts_failed_total` | counter | attempts of units that ended in an exception |
| `ray_lsi_units_returned_total` | counter | units handed back by workers that left |

Ray passes values on every ten seconds. Without the extra `ray[default]` there is no exporter: the values are recorded and
nobody hears of them.
"""

from collections import Counter as Tally
from collections.abc import Iterable, Mapping

from ray.util.metrics import Counter, Gauge

from cluster.events import Event, UnitFailed, UnitReturned, WorkerLost
from cluster.scheduler import State


class Metrics:
    """Records how units and workers stand, and counts what goes wrong."""

    def __init__(self) -> None:
        self._units = {
            state: Gauge(f"lsi_units_{state.value}", description=f"Units of the running set that are {state.value}.")
            for state in State
        }
        self._workers = Gauge("lsi_workers", description="Workers that are there.", tag_keys=("kind",))
        self._kinds: set[str] = set()
        self._counters = {
            WorkerLost: Counter("lsi_workers_lost_total", description="Workers lost."),
            UnitFailed: Counter("lsi_unit_attempts_failed_total", description="Attempts that ended in an exception."),
            UnitReturned: Counter("lsi_units_returned_total", description="Units handed back by leaving workers."),
        }

    def units(self, counts: Mapping[State, int]) -> None:
        for state, gauge in self._units.items():
            gauge.set(counts[state])

    def workers(self, kinds: Iterable[str | None]) -> None:
        tally = Tally(kind or "any" for kind in kinds)
        self._kinds |= tally.keys()
        for kind in self._kinds:  # a kind that has none left must come down to 0
            self._workers.set(tally[kind], tags={"kind": kind})

    def count(self, events: Iterable[Event]) -> None:
        for event in events:
            if counter := self._counters.get(type(event)):
                counter.inc()
