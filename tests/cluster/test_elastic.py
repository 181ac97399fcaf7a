"""Machines that come, are drained, vanish, and take the cluster with them: several real nodes on loopback."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import handlers
import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from cluster import guard, session
from cluster.events import Event, Instruction, WorkerJoined, WorkerLeaving, WorkerLost
from cluster.loop import run_units
from cluster.pools import Pool
from cluster.ray_group import RayGroup
from cluster.units import Unit

pytestmark = pytest.mark.ray


class Nodes:
    """A cluster whose machines are processes here; its head has no room for a worker."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.cluster = Cluster(shutdown_at_exit=False)  # or only the main thread could add nodes
        self.add(cpus=1, include_dashboard=False)

    def add(self, cpus: int, **more: Any) -> Any:
        with session._loopback():
            return self.cluster.add_node(
                num_cpus=cpus,
                node_ip_address="127.0.0.1",
                temp_dir=self.directory,
                object_store_memory=80 * 2**20,
                **more,
            )

    def vanish(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any) -> None:
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int(time.time() * 1000) + 60_000
        assert GcsClient(address=self.cluster.address).drain_node(node.node_id, reason, "test", deadline)[0]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    directory = session._directory()
    with session._environment(RAY_USAGE_STATS_ENABLED="0", RAY_TMPDIR=directory, PYTHONPATH=str(Path(__file__).parent)):
        (Path(directory) / "ray").mkdir()  # where Ray writes down its address
        nodes = Nodes(directory)
        with session.ray_session(nodes.cluster.address):
            yield nodes
        nodes.cluster.shutdown()
    guard.end_all(directory, spare=os.getpid())
    shutil.rmtree(directory, ignore_errors=True)


class Story:
    """What a run told, and what the test does to the cluster in the middle of it, from another thread."""

    def __init__(self) -> None:
        self.events: list[Event | Instruction] = []

    def told(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def when(self, condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
        def wait_and_act() -> None:
            while not condition():
                time.sleep(0.02)
            act()

        thread = threading.Thread(target=wait_and_act, daemon=True)
        thread.start()
        return thread


def reported(mark: Path) -> Callable[[], bool]:
    return mark.exists


def test_the_run_goes_on_without_a_node_that_vanished_on_one_that_came(nodes: Nodes, tmp_path: Path) -> None:
    first, mark, story = nodes.add(cpus=2), tmp_path / "pid", Story()
    group = RayGroup(handlers.setup, [Pool("train", cpus=2)])
    try:
        plan = [Unit("a", {"do": "sleep", "mark": str(mark)}, kind="train"), Unit("b", {"do": "nothing"}, ("a",))]
        gone = story.when(reported(mark), lambda: nodes.vanish(first))
        came = story.when(lambda: bool(story.told(WorkerLost)), lambda: nodes.add(cpus=2))
        outcome = run_units(group, plan, max_attempts=1, on_event=story.events.append)
        gone.join()
        came.join()
        assert outcome.status == "done"
        assert outcome.results["a"]["pid"] != int(mark.read_text())
        assert len(story.told(WorkerLost)) == 1
        assert [joined.kind for joined in story.told(WorkerJoined)] == ["train", "train"]
    finally:
        group.close()


def test_a_drained_node_gives_its_units_back_and_gets_no_others(nodes: Nodes, tmp_path: Path) -> None:
    (drained,) = nodes.cluster.worker_nodes
    mark, story = tmp_path / "pid", Story()
    group = RayGroup(handlers.setup, [Pool("train", cpus=2)])
    try:
        told = story.when(reported(mark), lambda: nodes.drain(drained))
        came = story.when(lambda: bool(story.told(WorkerLost)), lambda: nodes.add(cpus=2))
        plan = [Unit("a", {"do": "yield", "mark": str(mark)})]
        outcome = run_units(group, plan, max_attempts=1, on_event=story.events.append)
        told.join()
        came.join()
        assert outcome.results["a"]["went on from"] == int(mark.read_text())
        assert [type(event) for event in story.events if isinstance(event, WorkerLeaving | WorkerLost)] == [
            WorkerLeaving,
            WorkerLost,
        ]
    finally:
        group.close()


# A process of its own: a minute later Ray ends every process that has ever known the head node.
HEADLESS = """
import sys, threading, time
import psutil
import handlers
from pathlib import Path
from cluster import lookout
from cluster.loop import run_units
from cluster.pools import Pool
from cluster.ray_group import RayGroup
from cluster.session import ray_session
from cluster.units import ClusterError, Unit

def kill_head(mark):
    while not mark.exists():
        time.sleep(0.02)
    next(p for p in psutil.Process().children(recursive=True) if "gcs_server" in p.name()).kill()

lookout.HEAD_SECONDS = 2.0
threading.Thread(target=kill_head, args=[Path(sys.argv[1])], daemon=True).start()
try:
    with ray_session("local", cpus=1):
        group = RayGroup(handlers.setup, [Pool("train")])
        try:
            run_units(group, [Unit("a", {"do": "sleep", "mark": sys.argv[1]})])
        finally:
            group.close()
except ClusterError as error:
    print(error)
"""


def test_the_loss_of_the_head_node_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", HEADLESS, str(tmp_path / "pid")]
    environment = {**os.environ, "PYTHONPATH": path}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("The cluster is lost: the head node at 127.0.0.1:")
    assert answer.stdout.endswith("What was committed stays; start the cluster again and repeat.\n")
