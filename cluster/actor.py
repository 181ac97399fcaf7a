"""A process of a worker: does a unit at a time, answers pings, and leaves when it is told to."""

import os
import platform
import signal
import socket
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from cluster.group import Handler, Membership, Setup, failure_of, stay
from cluster.units import FailureKind, YieldUnit
from cluster.versions import check_same

LEAVE_SECONDS = 5.0  # from the notice to the end of the process; machines that are taken away give little more


@dataclass(frozen=True)
class Failure:
    """An exception by its contents: itself it might not survive the way, or need a module that the driver lacks."""

    kind: FailureKind
    message: str
    traceback: str


@dataclass(frozen=True)
class Returned:
    """The unit was handed back with what it had committed."""


@dataclass(frozen=True)
class Presence:
    """Where the process runs. Processes of one `machine` know each other's pids."""

    node: str
    pid: int
    machine: str
    gpu_memory: int


@ray.remote(concurrency_groups={"watch": 1, "word": 1}, max_restarts=0, max_task_retries=0)  # type: ignore[call-overload]
class Actor:
    """`start` and `run` share the default group's one thread: what the setup sets for its thread holds for the units.
    (The constructor runs on another, the process's main thread: the one that may take signals.)"""

    def __init__(self) -> None:
        self._leaving = threading.Event()
        # Ray's own handler would end the process in the middle of a unit.
        signal.signal(signal.SIGTERM, lambda number, frame: self._leave())

    def start(
        self, setup: Setup, name: str, versions: Mapping[str, str], rank: int, size: int, address: str
    ) -> Failure | None:
        # Of a group the first one hands the unit back: the others cannot know between which two steps.
        should_yield = self._leaving.is_set if rank == 0 else stay
        try:
            check_same(versions, platform.node())
            self._handler: Handler = setup(name, should_yield, Membership(rank, size, address))
        except Exception as error:
            return Failure(*failure_of(error), traceback.format_exc())
        return None

    def run(self, payload: Any) -> dict | Failure | Returned:
        try:
            return self._handler(payload)
        except YieldUnit as error:
            if self._leaving.is_set():
                return Returned()
            return Failure(
                "retry", f"gave its unit back though nobody had asked it to: {error}", traceback.format_exc()
            )
        except Exception as error:
            return Failure(*failure_of(error), traceback.format_exc())

    @ray.method(concurrency_group="watch")
    def watch(self) -> None:
        """Returns when the worker has been told to leave. Raises, for the driver, when the process is gone: without a
        call under way nobody would notice the loss of an idle worker until a unit had been spent on it."""
        self._leaving.wait()

    @ray.method(concurrency_group="word")
    def present(self, gpus: float) -> Presence:
        node = ray.get_runtime_context().get_node_id()
        return Presence(node, os.getpid(), machine(), _gpu_memory(gpus) if gpus else 0)

    @ray.method(concurrency_group="word")
    def address(self) -> str:
        """A free one on this machine, as the cluster knows it: on loopback where Ray is."""
        host = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as probe:
            return f"{host}:{probe.getsockname()[1]}"

    @ray.method(concurrency_group="word")
    def ping(self) -> None:
        pass

    @ray.method(concurrency_group="word")
    def leave(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if not self._leaving.is_set():
            self._leaving.set()
            # The driver ends this process as soon as its unit is back; but it may be gone itself.
            timer = threading.Timer(LEAVE_SECONDS, os._exit, args=[1])
            timer.daemon = True
            timer.start()


def machine() -> str:
    """Names the space that this process's pid belongs to, machine and container; empty where the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:
            return f"{boot.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _gpu_memory(gpus: float) -> int:
    """Bytes of this worker's part of its smallest GPU, 0 where they cannot be told."""
    from ray._private.thirdparty import pynvml

    try:
        pynvml.nvmlInit()
        handles = [_handle(pynvml, str(name)) for name in ray.get_gpu_ids()]
        return int(min(pynvml.nvmlDeviceGetMemoryInfo(handle).total for handle in handles) * min(1.0, gpus))
    except (pynvml.NVMLError, ValueError):
        return 0


def _handle(pynvml: Any, name: str) -> Any:
    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
