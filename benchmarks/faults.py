"""What is done to a run. Each fault strikes once, at a moment and a place that the trial's seed decides.

`strike` is called while the driver runs and returns the driver to wait for; after it the trial gives the same command again
until it is done. `setting` is laid around the whole trial and may change its configuration or environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psutil
from arena import Trial, family, kill, until

from pipeline.artifacts import RECORD
from pipeline.graph import KINDS

Driver = subprocess.Popen[bytes]
Strike = Callable[[Trial, Driver], Driver]
LEASE = 6.0
DEADLINE = 8.0


class SurvivedError(Exception):
    """A process that had to give way did not."""


def kill_actors(trial: Trial, driver: Driver) -> Driver:
    """SIGKILL to one actor or to all."""
    actors = trial.actors(driver)
    kill(trial.draw.sample(actors, trial.draw.randint(1, len(actors))) if actors else [])
    return driver


def kill_driver(trial: Trial, driver: Driver) -> Driver:
    """SIGKILL to the driver alone."""
    driver.kill()
    return driver


def kill_both(trial: Trial, driver: Driver) -> Driver:
    """SIGKILL to the driver and to all below it at one moment."""
    kill([*family(driver.pid), psutil.Process(driver.pid)])
    return driver


def kill_raylet(trial: Trial, driver: Driver) -> Driver:
    """SIGKILL to the Ray server of the driver's own machine: the driver must end, and say how to go on."""
    kill([process for process in family(driver.pid) if process.name() == "raylet"])
    return driver


def sigterm_actor(trial: Trial, driver: Driver) -> Driver:
    """SIGTERM to one actor: a machine that is taken away begins with it."""
    actors = trial.actors(driver)
    with suppress(psutil.NoSuchProcess):
        if actors:
            trial.draw.choice(actors).terminate()
    return driver


def sigterm_driver(trial: Trial, driver: Driver) -> Driver:
    """SIGTERM to the driver."""
    driver.send_signal(signal.SIGTERM)
    return driver


def zombie_worker(trial: Trial, driver: Driver) -> Driver:
    """One actor sleeps past its unit's deadline and then goes on with it."""
    actors = trial.actors(driver)
    if not actors:
        return driver
    sleeper = trial.draw.choice(actors)
    with suppress(psutil.NoSuchProcess):
        sleeper.suspend()
        _while_running(trial, driver, DEADLINE + trial.draw.uniform(2, 8))
        sleeper.resume()
    return driver


def paused_driver(trial: Trial, driver: Driver) -> Driver:
    """The driver sleeps past its lease, another takes the run over, the first wakes: it must end without a result."""
    if driver.poll() is not None:
        return driver
    os.kill(driver.pid, signal.SIGSTOP)
    published = trial.store.exists("result.json")  # then it fell asleep on its way out, and may end well
    time.sleep(LEASE + 1)
    second = trial.start()
    # Its workers were not paused: commits alone would not tell that the second driver has the run.
    until(lambda: has_term(trial, 2) or second.poll() is not None, 60, "the second driver has the lease")
    trial.wait_for_commits(trial.observe() + trial.draw.randint(1, 6), second)
    os.kill(driver.pid, signal.SIGCONT)
    if trial.wait(driver) == 0 and not published:
        raise SurvivedError("the driver that had lost its lease published")
    return second


def has_term(trial: Trial, term: int) -> bool:
    """Whether a lease of that term was ever taken."""
    return any(int(key.rpartition("/")[2].partition(".")[0]) >= term for key in trial.store.list("driver"))


def _while_running(trial: Trial, driver: Driver, seconds: float) -> None:
    with suppress(TimeoutError):
        until(lambda: (trial.observe(), driver.poll() is not None)[1], seconds, "the driver ends")


def torn_write(trial: Trial, driver: Driver) -> Driver:
    """A crash leaves a data file short: of an artifact that is not committed yet, or (a disk that lied) of a committed one."""
    kill_both(trial, driver)
    driver.wait()
    trial.observe()
    plan = json.loads(trial.store.get("plan.json")) if trial.store.exists("plan.json") else {"nodes": []}
    makes = [path for node in plan["nodes"] for path in node["makes"]]
    files = data_files(trial)
    if not files:
        return driver
    whole = trial.store.get(trial.draw.choice(files))
    torn = whole[: trial.draw.randrange(len(whole))]
    open_ends = [path for path in makes if path.startswith("hidden/") and path not in trial.seen]
    if open_ends and trial.draw.random() < 0.5:
        trial.store.put(f"{trial.draw.choice(open_ends)}/hidden.safetensors", torn)
    else:
        key = trial.draw.choice(files)
        trial.store.put(key, trial.store.get(key)[: len(torn)])
    return driver


def bit_flip(trial: Trial, driver: Driver) -> Driver:
    """One bit of one file of a committed artifact, record or data, while the run goes on or after a crash."""
    if trial.draw.random() < 0.5:
        kill_both(trial, driver)
        driver.wait()
    keys = [key for kind in KINDS for key in trial.store.list(kind)]
    artifacts = sorted({key.rpartition("/")[0] for key in keys if key.endswith(f"/{RECORD}")})
    if not artifacts:
        return driver
    chosen = trial.draw.choice(artifacts)
    with suppress(FileNotFoundError):  # its last reader committed a moment ago
        key = trial.draw.choice(sorted(trial.store.list(chosen)) or [f"{chosen}/{RECORD}"])
        data = bytearray(trial.store.get(key))
        data[trial.draw.randrange(len(data))] ^= 1 << trial.draw.randrange(8)
        trial.store.put(key, bytes(data))
    return driver


def data_files(trial: Trial) -> list[str]:
    return sorted(key for kind in KINDS for key, size in trial.store.list(kind).items() if size and RECORD not in key)


def clock_skew(trial: Trial, driver: Driver) -> Driver:
    """The lease's times are hours away, as if its holder's clock were wrong; then the driver dies."""
    hours = trial.draw.choice([-1, 1]) * trial.draw.uniform(1, 48)
    for key in trial.store.list("driver"):
        with suppress(FileNotFoundError, ValueError):
            if key.endswith(".json"):
                record = json.loads(trial.store.get(key))
                moment = datetime.fromisoformat(record["since"]) + timedelta(hours=hours)
                trial.store.put(key, json.dumps(record | {"since": moment.isoformat(timespec="seconds")}).encode())
            if trial.store.local:
                moved = time.time() + hours * 3600
                os.utime(trial.store.path(key), (moved, moved))
    _while_running(trial, driver, trial.draw.uniform(1, 4))
    if driver.poll() is None:
        driver.kill()
    return driver


def nothing_more(trial: Trial, driver: Driver) -> Driver:
    """The setting is the fault."""
    return driver


@contextmanager
def plain(trial: Trial, tree: dict[str, Any]) -> Iterator[None]:
    yield


@contextmanager
def two_nodes(trial: Trial, tree: dict[str, Any]) -> Iterator[None]:
    """A Ray cluster of two nodes on loopback; the driver is on the first."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    )
    try:
        trial.second_node = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
        trial.cluster = cluster
        tree["cluster"]["address"] = cluster.address
        yield
    finally:
        with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
            cluster.shutdown()


def kill_node(trial: Trial, driver: Driver) -> Driver:
    """SIGKILL to every process of the node without the driver."""
    node = trial.second_node
    below = [process for info in node.all_processes.values() for one in info for process in family(one.process.pid)]
    trial.cluster.remove_node(node, allow_graceful=False)
    kill(below)
    return driver


@dataclass(frozen=True)
class Fault:
    """`needs`: the configuration key without which it cannot be done; `extra`: keys it sets; `damages`: what was committed may
    rightly be made again; `faulty_door`: on S3, through the door where requests fail."""

    strike: Strike
    needs: str | None = None
    extra: tuple[tuple[str, Any], ...] = ()
    damages: bool = False
    faulty_door: bool = False
    setting: Callable[[Trial, dict[str, Any]], AbstractContextManager[None]] = plain


WITH_LEASE = (("storage.lease_seconds", LEASE),)
FAULTS = {
    "kill_actors": Fault(kill_actors),
    "kill_driver": Fault(kill_driver),
    "kill_both": Fault(kill_both),
    "kill_raylet": Fault(kill_raylet),
    "sigterm_actor": Fault(sigterm_actor),
    "sigterm_driver": Fault(sigterm_driver),
    "zombie_worker": Fault(zombie_worker, "cluster.deadline_seconds", (("cluster.deadline_seconds", DEADLINE),)),
    "paused_driver": Fault(paused_driver, "storage.lease_seconds", WITH_LEASE),
    "kill_node": Fault(kill_node, setting=two_nodes),
    "storage_errors": Fault(nothing_more, faulty_door=True),
    "torn_write": Fault(torn_write, damages=True),
    "bit_flip": Fault(bit_flip, damages=True),
    "clock_skew": Fault(clock_skew, "storage.lease_seconds", WITH_LEASE),
}
