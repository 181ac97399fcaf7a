"""Which ready unit goes to which idle worker.

An idle worker takes, of the units it can run and in this order: the best of the affinity it holds, unless a free one
has a strictly better priority; the best free one; the best at all. Free is a unit whose affinity no worker holds (or
that has none): taking another one makes two workers load the same thing. A unit without affinity displaces nothing, so
its worker goes on holding.

Workers that can run the same units share a lane of heaps. Only the units' own kinds and sizes tell lanes apart, so
that there are few of them, and one where no unit asks for anything.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from cluster.lane import Lane
from cluster.plan import Plan
from cluster.units import Unit

Shape = tuple[str | None, int]
"""Kind, and how many of the units' sizes fit. A worker's kind is None where it runs all, "" where no unit asks for it."""


class Placement:
    """The ready units, the idle workers and what each worker holds. Units go by their rank."""

    def __init__(self, units: Sequence[Unit], plan: Plan) -> None:
        self._affinity = [units[place].affinity for place in plan.by_rank]
        self._level = [plan.levels[place] for place in plan.by_rank]
        self._kinds = {unit.kind for unit in units} - {None}
        self._sizes = sorted({unit.memory for unit in units} - {0})
        # What each unit asks for, in a lane's terms.
        self._asked: list[Shape] = [
            (units[place].kind, bisect_right(self._sizes, units[place].memory)) for place in plan.by_rank
        ]
        self.ready: set[int] = set()
        self._lanes: dict[Shape, Lane] = {}
        self._lane_of: dict[str, Shape] = {}
        self._held: dict[str, str] = {}
        self._holders: dict[str, int] = {}
        self._idle_holders: dict[tuple[str, Shape], dict[str, None]] = {}
        self._fresh: deque[str] = deque()

    @property
    def idle(self) -> set[str]:
        return {worker for lane in self._lanes.values() for worker in lane.idle}

    def can_run(self, worker: str, rank: int) -> bool:
        return _fits(self._asked[rank], self._lane_of[worker])

    def add_unit(self, rank: int) -> None:
        affinity, asked = self._affinity[rank], self._asked[rank]
        self.ready.add(rank)
        for shape, lane in self._lanes.items():
            if _fits(asked, shape):
                lane.add(rank, affinity)
        if affinity is not None and affinity in self._holders:
            self._fresh.append(affinity)

    def add_worker(self, worker: str, kind: str | None, memory: int) -> None:
        """A new one, idle."""
        shape = self._lane_of[worker] = self._shape(kind, memory)
        if shape not in self._lanes:
            self._open(shape)
        self.free_worker(worker)

    def free_worker(self, worker: str) -> None:
        """It has ended its unit."""
        shape = self._lane_of[worker]
        self._lanes[shape].idle[worker] = None
        if (held := self._held.get(worker)) is not None:
            self._idle_holders.setdefault((held, shape), {})[worker] = None

    def forget(self, worker: str) -> None:
        """A busy worker holds its affinity no longer."""
        self._release(worker)

    def remove_worker(self, worker: str) -> None:
        if worker in self._lane_of:
            self._unidle(worker)
            self._release(worker)
            del self._lane_of[worker]

    def next_pair(self) -> tuple[str, int] | None:
        """Takes one idle worker and its unit, None when no idle worker can run a ready unit."""
        worker = self._next_holder() or self._next_idle()
        if worker is None:
            return None
        rank = self._choose(worker)
        self._unidle(worker)
        self.ready.remove(rank)
        self._hold(worker, self._affinity[rank])
        return worker, rank

    def _shape(self, kind: str | None, memory: int) -> Shape:
        sizes = bisect_right(self._sizes, memory) if memory else len(self._sizes)
        if kind is None or not self._kinds:
            return None, sizes
        return kind if kind in self._kinds else "", sizes

    def _open(self, shape: Shape) -> None:
        lane = Lane(self.ready, self._holders)
        for rank in sorted(self.ready):
            if _fits(self._asked[rank], shape):
                lane.add(rank, self._affinity[rank])
        self._lanes[shape] = lane
        # Those that can do little choose first: what they leave is for those that can do more.
        self._lanes = dict(sorted(self._lanes.items(), key=lambda item: _capability(item[0])))

    def _next_holder(self) -> str | None:
        # Holders of what has just become ready come first. Otherwise a worker that merely waited longer would take
        # the unit away from an idle worker that holds its affinity.
        while self._fresh:
            affinity = self._fresh[0]
            for shape, lane in self._lanes.items():
                if (holders := self._idle_holders.get((affinity, shape))) and lane.head(affinity) is not None:
                    return next(iter(holders))
            self._fresh.popleft()
        return None

    def _next_idle(self) -> str | None:
        for lane in self._lanes.values():
            if lane.idle and lane.best() is not None:
                return next(iter(lane.idle))
        return None

    def _choose(self, worker: str) -> int:
        lane = self._lanes[self._lane_of[worker]]
        own = lane.head(held) if (held := self._held.get(worker)) is not None else None
        free = lane.free_head()
        if own is not None and not (free is not None and self._level[free] < self._level[own]):
            return own
        best = free if free is not None else lane.best()
        if best is None:
            raise AssertionError("a ready unit is in no heap")
        return best

    def _unidle(self, worker: str) -> None:
        shape = self._lane_of[worker]
        self._lanes[shape].idle.pop(worker, None)
        if (held := self._held.get(worker)) is not None and (holders := self._idle_holders.get((held, shape))):
            holders.pop(worker, None)
            if not holders:
                del self._idle_holders[held, shape]

    def _hold(self, worker: str, affinity: str | None) -> None:
        if affinity is None or affinity == self._held.get(worker):
            return
        self._release(worker)
        self._held[worker] = affinity
        self._holders[affinity] = self._holders.get(affinity, 0) + 1

    def _release(self, worker: str) -> None:
        affinity = self._held.pop(worker, None)
        if affinity is None:
            return
        self._holders[affinity] -= 1
        if not self._holders[affinity]:
            del self._holders[affinity]
            for lane in self._lanes.values():
                lane.released(affinity)


def _fits(asked: Shape, there: Shape) -> bool:
    return (asked[0] is None or there[0] in (None, asked[0])) and asked[1] <= there[1]


def _capability(shape: Shape) -> tuple[int, int]:
    return (2 if shape[0] is None else int(shape[0] != ""), shape[1])
