"""From a prepared run to its goals: workers, graph, driver."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from cluster import versions
from cluster.group import WorkerGroup
from cluster.inline import InlineGroup
from cluster.pools import Pool
from cluster.ray_group import RayGroup
from cluster.session import ray_session
from cluster.units import ClusterError, ClusterLostError
from pipeline.artifacts import collect_garbage
from pipeline.config import RunConfig
from pipeline.config_sections import ClusterConfig
from pipeline.driver import Driver, GaveUpError, StoppedError
from pipeline.errors import UserError
from pipeline.estimate import human_bytes
from pipeline.finetune_merge import copied_shards, packed_owners
from pipeline.finetune_plan import build_finetune, trained_linears
from pipeline.graph import KINDS, TRAIN, Graph, Inputs, build_graph
from pipeline.identity import check_claim, package_version, packages_of, record_end
from pipeline.lease import hold
from pipeline.merge import plan_shards, scheme_layout, shards_with_blocks, unpublished, withdraw
from pipeline.packed_source import PackedSource
from pipeline.prepare import Prepared
from pipeline.quarantine import follow_decisions, forget, give_up
from pipeline.reporter import Reporter, Together
from pipeline.store import Store, nothing
from pipeline.watch import watching
from pipeline.worker import Context, make_handler

PLAN_FILE = "plan.json"
# Driver and workers exchange pickles of these, and other versions of them may round otherwise.
COMPARED = ("ray", "lsi-quant")


@dataclass
class Finished:
    """What a run came to, for the report."""

    prepared: Prepared
    graph: Graph
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_mib: dict[str, float] = field(default_factory=dict)
    units_run: int = 0
    units_committed_before: int = 0
    # Who did each unit and when, by name, as in `watch.FIELDS`; units of drivers that were killed may be missing.
    units: dict[str, list[Any]] = field(default_factory=dict)


def worker_pools(config: ClusterConfig, members: int = 1) -> list[Pool]:
    """Workers that train, each a group of so many processes, and those that do what needs no GPU."""
    memory = int((config.memory_gib or 0) * 2**30)
    train = Pool(TRAIN, config.cpus_per_worker, config.gpus_per_worker, memory, most=config.workers, members=members)
    return [train, Pool("cpu", config.cpus_per_worker, most=config.cpu_workers)] if config.cpu_workers else [train]


@contextmanager
def ray_workers(config: RunConfig, context: Context, report: Reporter) -> Iterator[WorkerGroup]:
    """Actors on a private Ray or on the cluster of the configuration."""
    cluster = config.cluster
    # A private Ray is given as many CPUs as its workers ask for: fewer cores than that only make it slower.
    asked = (cluster.workers or 0) * config.compute.group + cluster.cpu_workers
    cpus = None if cluster.workers is None else max(1, math.ceil(asked * cluster.cpus_per_worker))
    try:
        with ray_session(cluster.address, cpus, dashboard=cluster.dashboard, on_message=report.message):
            report.message(f"Ray actors at {cluster.address or 'this machine'}")
            group = RayGroup(
                partial(make_handler, context),
                worker_pools(cluster, config.compute.group),
                deadline=cluster.deadline_seconds,
                versions=versions.here((*COMPARED, *packages_of(config.compute))),
                on_message=report.message,
            )
            try:
                yield group
            except ClusterLostError as error:
                raise StoppedError(str(error), interrupted=False) from error
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
    """The checkpoint's files: name, parameters, blocks whose results they hold. None where none is published."""
    config, source = prepared.config, prepared.source
    if isinstance(source, PackedSource):
        linears = trained_linears(config, prepared.skeleton)
        return copied_shards(source, packed_owners(prepared.skeleton, source, linears))
    if unpublished(config, prepared.skeleton):
        return []
    layout = scheme_layout(prepared.skeleton, config.scheme, prepared.context.dtype)
    shards = plan_shards(layout, config.outputs.max_shard_mib << 20)
    return shards_with_blocks(shards, prepared.skeleton)


def graph_of(prepared: Prepared, blocks: list[str], outer: str, quarantined: dict[int, str]) -> Graph:
    """The run's units, now that the weights and the quarantined blocks are known."""
    config = prepared.config
    compute = (
        prepared.resolved
        | config.compute.address()
        | {
            "torch": torch.__version__,
            "transformers": package_version("transformers"),
        }
        | ({"deepspeed": package_version("deepspeed")} if config.compute.engine == "deepspeed" else {})
    )
    build = build_finetune if config.is_finetune else build_graph
    return build(
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
            quarantined=quarantined,
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
    store.check_fence()
    store.put(PLAN_FILE, json.dumps(plan, sort_keys=True).encode())


@contextmanager
def leased(prepared: Prepared, report: Reporter) -> Iterator[None]:
    """This process as the run's only driver: what is published and discarded within is fenced, garbage is collected around it.

    Raises UserError if another driver is alive.
    """
    with hold(prepared.store, prepared.config.storage.lease_seconds, report.message) as lease:
        plain = prepared.context
        prepared.lease = lease
        prepared.context = replace(plain, term=lease.term, nonce=lease.holder.nonce)
        prepared.store.check_fence = prepared.checkpoint.check_fence = lease.check
        try:
            # Another configuration may have claimed the directory since it was looked at.
            check_claim(prepared.store, prepared.config, plain.resolved)
            record_end(prepared.store, prepared.config)
            sweep(prepared, report)
            try:
                yield
            except StoppedError:
                with suppress(Exception):  # why it stopped is what must be told
                    sweep(prepared, report)
                raise
            sweep(prepared, report)
        finally:
            prepared.lease, prepared.context = None, plain
            prepared.store.check_fence = prepared.checkpoint.check_fence = nothing


def sweep(prepared: Prepared, report: Reporter) -> None:
    """Remove what dead attempts left. No worker of this driver may be at work."""
    freed = collect_garbage(prepared.store, (*KINDS, "tokens"))
    if freed:
        report.message(f"removed {human_bytes(freed)} that attempts left which never committed")


def run_to_goals(
    prepared: Prepared,
    report: Reporter,
    workers: Workers = ray_workers,
    should_stop: Callable[[], bool] = lambda: False,
    restrict: Callable[[Graph, Driver], None] = lambda graph, driver: None,
    *,
    strict: bool = False,
    retry_quarantined: bool = False,
) -> Finished:
    """Run every unit that is needed, under the caller's lease or one of its own. Raises UserError or StoppedError; what was
    committed stays.

    A block whose training fails for good is quarantined, and a new plan goes on without; `strict` stops there instead,
    `retry_quarantined` first forgets the blocks that were.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        if prepared.lease is None:
            stack.enter_context(leased(prepared, report))
        lease = prepared.lease

        def stop() -> bool:
            return should_stop() or (lease is not None and lease.lost is not None)

        watch = stack.enter_context(watching(prepared.store))
        start = partial(stack.enter_context, workers(prepared.config, prepared.context, report))
        driver = Driver(prepared, start, Together(report, watch), watch.between(stop))
        blocks, outer = driver.inspect()
        inspected = time.monotonic()
        if retry_quarantined:
            forget(prepared.store)
        graph, before = _complete(driver, blocks, outer, restrict, strict=strict)
    seconds = {"start_and_inspect": inspected - began, "units": time.monotonic() - inspected}
    return Finished(prepared, graph, seconds, driver.peaks, driver.units_run, before, watch.units)


def _complete(
    driver: Driver, blocks: list[str], outer: str, restrict: Callable[[Graph, Driver], None], *, strict: bool
) -> tuple[Graph, int]:
    """Plan and run, again whenever a block is quarantined. Returns the last plan, and how many of the first one's units were done."""
    prepared, report = driver.prepared, driver.report
    before: int | None = None
    for decisions in follow_decisions(prepared.store, report, len(blocks), strict=strict):
        graph = graph_of(prepared, blocks, outer, decisions)
        write_plan(prepared.store, graph)
        restrict(graph, driver)
        needed = driver.needed(graph)
        if any(n.stage == "merge" for n in needed):
            withdraw(prepared.checkpoint)
        before = len(graph.nodes) - len(needed) if before is None else before
        try:
            driver.complete(graph)
            return graph, before
        except GaveUpError as error:
            give_up(prepared.store, error, strict=strict)
    raise StoppedError("what was decided on failed blocks cannot be read back; check the storage.", interrupted=False)
