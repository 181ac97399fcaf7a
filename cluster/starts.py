"""What keeps workers from starting: nodes on which they fail, and too little room. Neither goes unsaid."""

import math
import time
from collections.abc import Callable, Collection

from cluster.pools import Pool
from cluster.units import ClusterError, ClusterLostError

_MAX_FAILURES = 3
_NO_ROOM_SECONDS = 60.0
_REPLACE_SECONDS = 5.0  # the room of a lost worker is free again in less


class Starts:
    """Which nodes are barred, and until when: after some failures in a row a node gets no other worker."""

    def __init__(self, on_message: Callable[[str], None]) -> None:
        self._on_message = on_message
        self._failures: dict[str, int] = {}
        self._barred: dict[str, float] = {}
        self._last = ""
        self._any_succeeded = False

    def barred(self) -> set[str]:
        now = time.monotonic()
        return {node for node, until in self._barred.items() if until > now}

    def succeeded(self, node: str) -> None:
        self._failures.pop(node, None)
        self._any_succeeded = True

    def failed(self, node: str, reason: str, *, fatal: bool) -> None:
        """A fatal failure needs no second trial."""
        failures = self._failures[node] = self._failures.get(node, 0) + 1
        if fatal:
            self._last = f"A worker cannot start: {reason}"
        elif failures >= _MAX_FAILURES:
            self._last = f"A worker failed to start {failures} times in a row; the last time: {reason}"
        else:
            return
        self._barred[node] = math.inf
        self._on_message(f"node {node[:8]} gets no more workers. {self._last}")

    def no_room(self, node: str, what: str) -> None:
        """Ray took the worker, but never started it."""
        self._barred[node] = time.monotonic() + _NO_ROOM_SECONDS
        self._on_message(f"{what} found no room on node {node[:8]}; it is tried again when there may be some")

    def check_hope(self, nodes: Collection[str]) -> None:
        """Raises ClusterError if workers start on none of the nodes, ClusterLostError if one has started before."""
        if nodes and self._last and all(self._barred.get(node) == math.inf for node in nodes):
            raise (ClusterLostError if self._any_succeeded else ClusterError)(self._last)


class Shortage:
    """Says, once, that a pool has fewer workers than were asked for; not of one that is just being replaced."""

    def __init__(self, on_message: Callable[[str], None]) -> None:
        self._on_message = on_message
        self._full: dict[Pool, float] = {}
        self._told: dict[Pool, int] = {}

    def note(self, pool: Pool, count: int) -> None:
        """How many there are, the starting ones among them."""
        now, wanted = time.monotonic(), pool.most or 1
        if count >= wanted:
            self._full[pool] = now
            self._told.pop(pool, None)
        elif self._told.get(pool) != count and now - self._full.get(pool, -math.inf) >= _REPLACE_SECONDS:
            self._told[pool] = count
            self._on_message(f"the cluster has room for {count} of {wanted} {pool}; more are added when it has more")
