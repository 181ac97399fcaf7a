"""The ready units that one class of workers can run.

Everything is a heap with lazy deletion, so that an event costs O(log n) whatever the number of units and of workers:
an entry counts only while its unit is ready, and is dropped when it comes up otherwise. A unit that becomes ready
twice has two equal entries, which is harmless. Units go by their rank.
"""

from collections.abc import Container
from heapq import heappop, heappush


class Lane:
    """`ready` and `held` are the placement's own: the ranks that are ready, and the affinities that a worker holds."""

    def __init__(self, ready: Container[int], held: Container[str]) -> None:
        self.idle: dict[str, None] = {}  # in the order in which they became idle
        self._ready = ready
        self._held = held
        self._all: list[int] = []
        self._queues: dict[str | None, list[int]] = {}
        self._free: list[tuple[int, str | None]] = []
        self._entry: dict[str | None, int] = {}  # the one entry of each affinity in `_free` that counts

    def add(self, rank: int, affinity: str | None) -> None:
        heappush(self._all, rank)
        heappush(self._queues.setdefault(affinity, []), rank)
        if affinity is None or affinity not in self._held:
            self._offer(rank, affinity)

    def released(self, affinity: str) -> None:
        """No worker holds the affinity any more."""
        if (head := self.head(affinity)) is not None:
            self._offer(head, affinity)

    def best(self) -> int | None:
        return self._clean(self._all)

    def head(self, affinity: str | None) -> int | None:
        queue = self._queues.get(affinity)
        return self._clean(queue) if queue else None

    def free_head(self) -> int | None:
        # An affinity has one entry, for the head of its queue: freeing it then costs the same for any number of units.
        while self._free:
            rank, affinity = self._free[0]
            if self._entry.get(affinity) != rank:
                heappop(self._free)
                continue
            head = None if affinity in self._held else self.head(affinity)
            if head == rank:
                return rank
            heappop(self._free)
            del self._entry[affinity]
            if head is not None:
                self._offer(head, affinity)
        return None

    def _clean(self, heap: list[int]) -> int | None:
        while heap and heap[0] not in self._ready:
            heappop(heap)
        return heap[0] if heap else None

    def _offer(self, rank: int, affinity: str | None) -> None:
        if affinity not in self._entry or rank < self._entry[affinity]:
            self._entry[affinity] = rank
            heappush(self._free, (rank, affinity))
