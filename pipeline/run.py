"""From a prepared run to its goals: workers, graph, driver."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from cluster.group import WorkerGroup
from cluster.inline import InlineGroup
from cluster.ray_group import RayGroup
from cluster.session import default_workers, ray_session
from cluster.units import ClusterError
from pipeline.config import RunConfig
from pipeline.driver import Driver
from pipeline.errors import UserError
from pipeline.graph import Graph, Inputs, build_graph
from pipeline.identity import package_version
from pipeline.merge import checkpoint_layout, plan_shards, quantized_linears, shards_with_blocks, withdraw
from pipeline.prepare import Prepared
from pipeline.reporter import Reporter
from pipeline.store import Store
from pipeline.worker import Context, make_handler

PLAN_FILE = "plan.json"


@dataclass
class Finished:
    """What a run came to, for the report."""

    prepared: Prepared
    graph: Graph
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_mib: dict[str, float] = field(default_factory=dict)
    units_run: int = 0
    units_committed_before: int = 0


@contextmanager
def ray_workers(config: RunConfig, context: Context, report: Reporter) -> Iterator[WorkerGroup]:
    """Actors on a private Ray or on the cluster of the configuration."""
    cluster = config.cluster
    # A private Ray is given as many CPUs as its workers ask for: fewer cores than that only make it slower.
    cpus = None if cluster.workers is None else max(1, math.ceil(cluster.workers * cluster.cpus_per_worker))
    try:
        with ray_session(cluster.address, cpus):
            workers = cluster.workers or max(1, default_workers(cluster.cpus_per_worker, cluster.gpus_per_worker))
            report.message(f"{workers} Ray actors at {cluster.address or 'this machine'}")
            group = RayGroup(partial(make_handler, context), workers, cluster.cpus_per_worker, cluster.gpus_per_worker)
            try:
                yield group
            finally:
                group.close()
    except ClusterError as error:
        raise UserError(str(error)) from error


@contextmanager
def inline_workers(config: RunConfig, context: Context, report: Reporter) -> Iterator[WorkerGroup]:
    """The driver's own process: for tests, debugging, and work too small for actors."""
    yield InlineGroup(partial(make_handler, context))


Workers = Callable[[RunConfig, Context, Reporter], Any]


def shard_plan(prepared: Prepared) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """The checkpoint's files: name, parameters, blocks whose results they hold."""
    config = prepared.config
    grid = config.scheme.grid
    layout = checkpoint_layout(prepared.skeleton, grid, config.scheme.skip, prepared.context.dtype)
    shards = plan_shards(layout, config.outputs.max_shard_mib << 20)
    return shards_with_blocks(shards, quantized_linears(prepared.skeleton, config.scheme.skip))


def graph_of(prepared: Prepared, blocks: list[str], outer: str) -> Graph:
    """The run's units, now that the weights are known."""
    config = prepared.config
    compute = (
        prepared.resolved
        | config.compute.model_dump(mode="json")
        | {
            "torch": torch.__version__,
            "transformers": package_version("transformers"),
        }
    )
    return build_graph(
        Inputs(
            config=config,
            blocks=len(blocks),
            tokens=prepared.tokens,
            texts=prepared.texts,
            block_digests=blocks,
            outer_digest=outer,
            model_config_digest=hashlib.sha256(prepared.source.side_files["config.json"]).hexdigest(),
            compute=compute,
            shards=shard_plan(prepared),
        )
    )


def write_plan(store: Store, graph: Graph) -> None:
    """The units by name, for `lsi status`: it must tell what is left without the model."""
    plan = {
        "goals": [a.path for a in graph.goals],
        "nodes": [
            {"name": n.name, "stage": n.stage, "reads": [a.path for a in n.reads], "makes": [a.path for a in n.makes]}
            for n in graph.nodes
        ],
    }
    store.put(PLAN_FILE, json.dumps(plan, sort_keys=True).encode())


def run_to_goals(
    prepared: Prepared,
    report: Reporter,
    workers: Workers = ray_workers,
    should_stop: Callable[[], bool] = lambda: False,
    restrict: Callable[[Graph, Driver], None] = lambda graph, driver: None,
) -> Finished:
    """Run every unit that is needed. Raises UserError or StoppedError; what was committed stays."""
    began = time.monotonic()
    with ExitStack() as stack:
        start = partial(stack.enter_context, workers(prepared.config, prepared.context, report))
        driver = Driver(prepared, start, report, should_stop)
        graph = graph_of(prepared, *driver.inspect())
        inspected = time.monotonic()
        write_plan(prepared.store, graph)
        restrict(graph, driver)
        if any(n.stage == "merge" for n in driver.needed(graph)):
            withdraw(prepared.checkpoint)
        before = driver.complete(graph)
    seconds = {"start_and_inspect": inspected - began, "units": time.monotonic() - inspected}
    return Finished(prepared, graph, seconds, driver.peaks, driver.units_run, before)
