"""Looks at the cluster's nodes from a thread of its own: when the head node is gone, such a look may hang for a minute."""

import socket
import threading
import time
from dataclasses import dataclass

import ray
from ray._private.state import state
from ray.exceptions import RayError

from cluster.pools import Machine

_EVERY = 1.0
# Ray itself ends the driver's process after 60 s without its head node, without an exception.
HEAD_SECONDS = 20.0


@dataclass(frozen=True)
class View:
    """`machines` take work. `draining` will be taken away; `alive` are all that have not been yet. By node id."""

    machines: tuple[Machine, ...]
    draining: frozenset[str]
    alive: frozenset[str]


class Lookout:
    """`view` is the latest look. `gone` says why there will be no other."""

    def __init__(self) -> None:
        self.view = look()
        self.gone: str | None = None
        self._address = ray.get_runtime_context().gcs_address
        self._seen = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._watch_head, name="head", daemon=True).start()
        threading.Thread(target=self._watch_nodes, name="nodes", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _watch_nodes(self) -> None:
        while not self._closed.wait(_EVERY):
            try:
                self.view = look()
            except (RayError, OSError, RuntimeError):  # the watch of the head tells; Ray may be shut down meanwhile
                continue

    def _watch_head(self) -> None:
        host, _, port = self._address.rpartition(":")
        while not self._closed.wait(_EVERY):
            before = time.monotonic()
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=_EVERY).close()
                self._seen = time.monotonic()
            except OSError as error:
                # Time in which this process itself stood still says nothing of the head node.
                self._seen += max(0.0, time.monotonic() - before - 2 * _EVERY)
                if time.monotonic() - self._seen > HEAD_SECONDS:
                    self.gone = f"the head node at {self._address} has not answered for {HEAD_SECONDS:.0f} s ({error})"


def look() -> View:
    """The nodes as the head node knows them now."""
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    draining = frozenset(state.get_draining_nodes())
    free = state.available_resources_per_node()
    machines = tuple(
        Machine(node, total, free.get(node, total)) for node, total in sorted(nodes.items()) if node not in draining
    )
    return View(machines, draining, frozenset(nodes))
