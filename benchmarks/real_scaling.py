"""The same small run on one and on several real actors of this machine, and where their time goes.

SmolLM2-135M's first blocks on Ray actors of one thread each. Inside every actor the unit's own thread is timed while it reads
(storage, model files, waiting for a chunk that is read ahead) and while it writes (with packing and checksums); the rest of a
unit is computing. `processor_of_busy_time` well below 1 says that something else had the processors: the figures of such a run say
little. `efficiency` is computing over actors × seconds of units, as the simulation has it. The simulation is then
given this machine's measured speed, and what it says is set beside what happened.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory import first_blocks

from cluster.group import ALONE, Membership, ShouldYield, WorkerGroup, stay
from cluster.ray_group import RayGroup
from cluster.session import ray_session
from pipeline.config import RunConfig
from pipeline.config_file import parse_config
from pipeline.costs import Costs, Device, placeholder_inputs
from pipeline.estimate import open_skeleton, shape_of
from pipeline.gguf_import import import_gguf
from pipeline.graph import Node, build_graph
from pipeline.prepare import prepare
from pipeline.reporter import Reporter
from pipeline.run import run_to_goals, shard_plan, worker_pools
from pipeline.sample_material import MODEL_FILE
from pipeline.simulate import Network, simulate
from pipeline.store import Store, open_store
from pipeline.worker import ChunkCache, Context, Task, make_handler

ASSETS = Path(__file__).parent.parent / "assets"
BLOCKS = 4


class Clock:
    """Seconds that the unit's thread spends in some calls; calls inside such a call count once."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.thread = 0
        self.inside = False

    def begin(self) -> None:
        self.spent, self.thread = {"read": 0.0, "write": 0.0}, threading.get_ident()

    def around(self, owner: type, name: str, kind: str) -> None:
        """Time a method of a class."""
        plain = getattr(owner, name)

        def timed(*args: Any, **more: Any) -> Any:
            if self.inside or threading.get_ident() != self.thread:
                return plain(*args, **more)
            self.inside, began = True, time.perf_counter()
            try:
                return plain(*args, **more)
            finally:
                self.inside = False
                self.spent[kind] += time.perf_counter() - began

        setattr(owner, name, timed)


def timed_handler(
    context: Context, name: str, should_yield: ShouldYield = stay, membership: Membership = ALONE
) -> Callable[[Task], dict[str, Any]]:
    """An actor's handler whose results tell `read_seconds` and `write_seconds`."""
    clock = Clock()
    for owner, method, kind in (
        (Store, "get", "read"),
        (Store, "read_range", "read"),
        (ChunkCache, "get", "read"),
        (Store, "put", "write"),
    ):
        clock.around(owner, method, kind)
    plain = make_handler(context, name, should_yield, membership)

    def handler(task: Task) -> dict[str, Any]:
        clock.begin()
        began = time.process_time()
        result = plain(task)
        spent = clock.spent | {"processor": time.process_time() - began}
        return result | {f"{kind}_seconds": seconds for kind, seconds in spent.items()}

    return handler


@contextmanager
def timed_workers(config: RunConfig, context: Context, report: Reporter) -> Iterator[WorkerGroup]:
    """As `pipeline.run.ray_workers`, with the clock inside, and the actors up before the first unit."""
    count = config.cluster.workers or 1
    with ray_session(None, count):
        group = RayGroup(partial(timed_handler, context), worker_pools(config.cluster))
        try:
            while len(group.workers()) < count:
                group.poll(0.2)
            yield group
        finally:
            group.close()


class Collector:
    """A reporter that keeps every unit's result."""

    def __init__(self) -> None:
        self.results: list[tuple[Node, dict[str, Any]]] = []

    def message(self, text: str) -> None:
        print(text)

    def begin(self, stage_totals: dict[str, tuple[int, int]]) -> None:
        pass

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        self.results.append((node, result))

    def event(self, event: object) -> None:
        pass


def config_for(model: Path, run: Path, workers: int) -> RunConfig:
    return parse_config(
        {
            "model": {"source": str(model)},
            "data": {"source": str(ASSETS / "wikipedia-calibration.txt"), "samples": 32, "sequence_length": 256},
            "scheme": {"bits": 3, "group_size": 64},
            "method": {"increment": "dense"},
            "optimizer": {"epochs": 3},
            "schedule": {"kind": "parallel"},
            "cluster": {"workers": workers},
            "storage": {"run": str(run), "chunk_samples": 4},
        }
    )


def one_run(model: Path, run: Path, workers: int) -> dict[str, Any]:
    """Seconds by use of one real run, and what the simulation says of it."""
    collector = Collector()
    prepared = prepare(config_for(model, run, workers), collector)
    finished = run_to_goals(prepared, collector, timed_workers)
    spent = seconds_by_use([result for node, result in collector.results if node.stage != "inspect"])
    training = seconds_by_use([result for node, result in collector.results if node.stage == "optimize"])
    processor = sum(result["processor_seconds"] for node, result in collector.results if node.stage != "inspect")
    wall = finished.seconds["units"]
    whole = workers * wall
    shares = {use: round(seconds / whole, 4) for use, seconds in spent.items()}
    return {
        "workers": workers,
        "seconds": round(wall, 2),
        "efficiency": shares["compute"],
        "shares": shares | {"waiting": round(1 - sum(shares.values()), 4)},
        "streaming_of_busy_time": round((spent["read"] + spent["write"]) / sum(spent.values()), 4),
        "processor_of_busy_time": round(processor / sum(spent.values()), 4),
        "training_seconds": {use: round(seconds, 2) for use, seconds in training.items()},
        "simulation": predicted(prepared.config, shard_plan(prepared), training["compute"], workers),
    }


def seconds_by_use(results: list[dict[str, Any]]) -> dict[str, float]:
    whole = sum(result["ended"] - result["started"] for result in results)
    read, write = (sum(result[f"{kind}_seconds"] for result in results) for kind in ("read", "write"))
    return {"compute": whole - read - write, "read": read, "write": write}


def predicted(config: RunConfig, shards: Any, training_seconds: float, workers: int) -> dict[str, float]:
    """The same run simulated, on a device that trains as fast as this one did."""
    skeleton, dtype = open_skeleton(config)
    shape = shape_of(skeleton, config, dtype)
    inputs = placeholder_inputs(config, len(skeleton), shards)
    graph = build_graph(inputs)
    nodes = [node for node in graph.nodes if node.stage == "optimize"]
    unit = Costs(inputs, shape, Device(flops=1.0), 0.0)
    flops = sum(unit.of(node).compute for node in nodes) / training_seconds
    costs = Costs(inputs, shape, Device(flops), 0.0)
    network = Network(link=3e8, store=6e8, handling=0.02, cache=float(config.storage.cache_mib << 20))
    by_name = {node.name: costs.of(node) for node in graph.nodes}
    found = simulate(graph, by_name, workers, network)
    return {
        "achieved_gflops": round(flops / 1e9, 1),
        "seconds": round(found.makespan, 2),
        "efficiency": round(found.efficiency, 4),
    }


def measure(counts: list[int]) -> dict[str, Any]:
    """Runs with these numbers of actors, one after another."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "model"
        import_gguf(str(ASSETS / MODEL_FILE), {}, open_store(str(whole)), torch.bfloat16)
        model = first_blocks(whole, BLOCKS, Path(scratch) / "model-cut")
        rows = []
        for count in counts:
            rows.append(one_run(model, Path(scratch) / f"run-{count}", count))
            print(json.dumps(rows[-1]), flush=True)
    first = rows[0]
    speedup = {row["workers"]: round(first["seconds"] / row["seconds"], 3) for row in rows}
    return {"runs": rows, "speedup": speedup}
