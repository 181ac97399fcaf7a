"""Which ready unit goes to which idle worker.

An idle worker takes, in this order: the best ready unit of the affinity it holds, unless a strictly better one is
free; the best free unit; the best unit at all. Free is a unit whose affinity no worker holds (or that has none):
taking another one makes two workers load the same thing. A unit without affinity displaces nothing, so its worker
goes on holding.

Everything is a heap with lazy deletion, so that an event costs O(log n) whatever the number of units and of workers:
an entry counts only while its unit is ready, and is dropped when it comes up otherwise. A unit that becomes ready
twice has two equal entries, which is harmless.
"""

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush

from cluster.units import Unit

Key = tuple[tuple[int, ...], int]  # (priority, place in the declaration): a total order that names the unit


class Placement:
    """The ready units, the idle workers and what each worker holds. Units go by their place in the declaration."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._keys: list[Key] = [(unit.priority, place) for place, unit in enumerate(units)]
        self._affinity = [unit.affinity for unit in units]
        self.ready: set[int] = set()
        self.idle: dict[str, None] = {}  # in the order in which they became idle
        self._held: dict[str, str] = {}
        self._holders: dict[str, int] = {}
        self._idle_holders: dict[str, dict[str, None]] = {}
        self._queues: dict[str | None, list[Key]] = {affinity: [] for affinity in self._affinity}
        self._free: list[tuple[Key, str | None]] = []
        self._entry: dict[str | None, Key] = {}  # the one entry of each affinity in `_free` that counts
        self._all: list[Key] = []
        self._fresh: deque[str] = deque()

    def add_unit(self, place: int) -> None:
        key, affinity = self._keys[place], self._affinity[place]
        self.ready.add(place)
        heappush(self._all, key)
        heappush(self._queues[affinity], key)
        if affinity is None or affinity not in self._holders:
            self._offer(key, affinity)
        elif affinity in self._idle_holders:
            self._fresh.append(affinity)

    def add_worker(self, worker: str) -> None:
        self.idle[worker] = None
        if (held := self._held.get(worker)) is not None:
            self._idle_holders.setdefault(held, {})[worker] = None

    def remove_worker(self, worker: str) -> None:
        self._unidle(worker)
        self._release(worker)

    def next_pair(self) -> tuple[str, int] | None:
        """Takes one idle worker and its unit, None when either has run out."""
        if not self.idle or not self.ready:
            self._fresh.clear()
            return None
        worker = self._next_worker()
        place = self._choose(worker)
        self._unidle(worker)
        self.ready.remove(place)
        self._hold(worker, self._affinity[place])
        return worker, place

    def _next_worker(self) -> str:
        # Holders of what has just become ready come first. Otherwise a worker that merely waited longer would take
        # the unit away from an idle worker that holds its affinity.
        while self._fresh:
            affinity = self._fresh[0]
            if (holders := self._idle_holders.get(affinity)) and self._head(affinity):
                return next(iter(holders))
            self._fresh.popleft()
        return next(iter(self.idle))

    def _choose(self, worker: str) -> int:
        own = self._head(held) if (held := self._held.get(worker)) is not None else None
        free = self._free_head()
        if own and not (free and free[0] < own[0]):
            return own[1]
        best = free or self._clean(self._all)
        if best is None:
            raise AssertionError("a ready unit is in no heap")
        return best[1]

    def _clean(self, heap: list[Key]) -> Key | None:
        while heap and heap[0][1] not in self.ready:
            heappop(heap)
        return heap[0] if heap else None

    def _head(self, affinity: str | None) -> Key | None:
        return self._clean(self._queues[affinity])

    def _free_head(self) -> Key | None:
        # An affinity has one entry, for the head of its queue: freeing it then costs the same for any number of units.
        while self._free:
            key, affinity = self._free[0]
            if self._entry.get(affinity) != key:
                heappop(self._free)
                continue
            head = None if affinity in self._holders else self._head(affinity)
            if head == key:
                return key
            heappop(self._free)
            del self._entry[affinity]
            if head:
                self._offer(head, affinity)
        return None

    def _offer(self, key: Key, affinity: str | None) -> None:
        if affinity not in self._entry or key < self._entry[affinity]:
            self._entry[affinity] = key
            heappush(self._free, (key, affinity))

    def _unidle(self, worker: str) -> None:
        self.idle.pop(worker, None)
        if (held := self._held.get(worker)) is not None and (holders := self._idle_holders.get(held)):
            holders.pop(worker, None)
            if not holders:
                del self._idle_holders[held]

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
            if head := self._head(affinity):
                self._offer(head, affinity)
