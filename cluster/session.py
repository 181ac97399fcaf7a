"""Ray for the length of a `with`: a private one on this machine, or a connection to a cluster."""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants

from cluster import guard
from cluster.units import ClusterError

_CONNECT_SECONDS = 3.0
_LONGEST_DIRECTORY = 40  # a socket's path has at most 107 bytes, and Ray puts 65 after its directory
_OBJECT_STORE = 128 * 2**20  # payloads and results are small: what units read and write is on storage


@contextmanager
def ray_session(address: str | None, cpus: int | None = None) -> Iterator[None]:
    """None or "local" starts a private Ray on 127.0.0.1 with `cpus` CPUs (all there are by default) and ends it after;
    anything else ("auto", "host:port", "ray://host:port") connects to a running cluster."""
    local = address is None or address == "local"
    with _private_ray(cpus) if local else _connection(str(address)):
        yield


@contextmanager
def _private_ray(cpus: int | None) -> Iterator[None]:
    directory = _directory()
    command = [sys.executable, "-I", guard.__file__, directory]
    # A session of its own, or Ctrl-C would end the guard together with those it guards against.
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        # The workers must find the handlers' modules wherever the driver found them.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        with _environment(RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=path), _loopback():
            _init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                _temp_dir=directory,
            )
        yield
    finally:
        ray.shutdown()
        watcher.communicate()


@contextmanager
def _connection(address: str) -> Iterator[None]:
    if address != "auto":
        _check_listens(address)
    try:
        _init(address=address)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _nobody(address, str(error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _init(**options: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    # Ray's core takes SIGTERM for itself, prints addresses and ends the process: the caller's handler would never run.
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _directory() -> str:
    directory = tempfile.mkdtemp(prefix="ray-")
    if len(directory) <= _LONGEST_DIRECTORY:
        return directory
    os.rmdir(directory)
    return tempfile.mkdtemp(prefix="ray-", dir="/tmp")


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _loopback() -> Iterator[None]:
    # Ray puts the machine's own address in the place of 127.0.0.1 wherever it is built for clusters, and then listens
    # on every interface. Its switch for that is read from the environment when ray is imported: too early for us.
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _environment(**{ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _check_listens(address: str) -> None:
    """Ray itself tries for a long time before it gives up."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"{address} is no address of a Ray cluster; give host:port, ray://host:port, auto or local.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _nobody(address, str(error)) from error


def _nobody(address: str, why: str) -> ClusterError:
    reason = why.splitlines()[0].rstrip(".") if why else "no reason given"
    return ClusterError(
        f"No Ray cluster answers at {address} ({reason}); "
        "start one with `ray start --head`, or leave the address out to run on this machine."
    )


def default_workers(cpus_per_worker: float, gpus_per_worker: float) -> int:
    """As many as the machines of the cluster have room for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(_room(node, cpus_per_worker, gpus_per_worker) for node in nodes)


def _room(node: dict[str, float], cpus: float, gpus: float) -> int:
    # Machine by machine: a worker cannot use the rests of two.
    asked = [(node.get("CPU", 0.0), cpus), (node.get("GPU", 0.0), gpus)]
    return min(int(there / each) for there, each in asked if each > 0)


def check_room(workers: int, cpus_per_worker: float, gpus_per_worker: float) -> None:
    """Ray waits silently, and for ever, for resources that a cluster does not have."""
    if workers < 1 or cpus_per_worker < 0 or gpus_per_worker < 0 or not (cpus_per_worker or gpus_per_worker):
        raise ClusterError(
            f"{workers} workers of {cpus_per_worker:g} CPUs and {gpus_per_worker:g} GPUs were asked for; "
            "at least one worker is needed, and each needs a CPU, a GPU or a part of one."
        )
    room = default_workers(cpus_per_worker, gpus_per_worker)
    if workers > room:
        there = ray.cluster_resources()
        raise ClusterError(
            f"{workers} workers of {cpus_per_worker:g} CPUs and {gpus_per_worker:g} GPUs each were asked for, but the "
            f"cluster has room for {room} ({there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs): "
            "ask for fewer or smaller workers, or add machines."
        )
