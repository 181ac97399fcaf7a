"""The driver: from a configuration to a published checkpoint, resuming whatever is committed already."""

from __future__ import annotations

import hashlib
import json
import posixpath
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import torch

from cluster.group import WorkerGroup
from cluster.inline import InlineGroup
from cluster.loop import Outcome, run_units
from cluster.ray_group import RayGroup
from cluster.scheduler import Event, Instruction, UnitDone
from cluster.session import default_workers, ray_session
from cluster.units import ClusterError, Unit
from lsi.block import linear_names
from lsi.grid import Grid
from pipeline.artifacts import Artifact, CorruptArtifactError, Writer, committed, digest, discard, read_record
from pipeline.config import RunConfig
from pipeline.data import calibration_tokens, evaluation_tokens
from pipeline.errors import UserError
from pipeline.gguf_import import import_gguf
from pipeline.graph import TRANSIENT, Graph, Inputs, Node, build_graph
from pipeline.identity import autocast_dtype, check_claim, claim, claim_model, run_identity
from pipeline.merge import (
    CHECKPOINT_MANIFEST,
    CONFIG_FILE,
    checkpoint_layout,
    plan_shards,
    quantized_linears,
    shard_file,
    shard_intact,
    withdraw,
)
from pipeline.model_source import ModelSource, locate, open_model
from pipeline.perplexity import take_windows
from pipeline.skeleton import Skeleton, check_groups, check_tensors, make_skeleton
from pipeline.store import Store, absolute, open_store
from pipeline.tensors import tensor_bytes
from pipeline.weights import InspectTask, block_tensors
from pipeline.worker import Context, make_handler

PLAN_FILE = "plan.json"
# Healing one damaged artifact may uncover the next; storage that damages what is written would go on for ever.
MOST_PLANS = 50
OUTER = "outside the blocks"


class Reporter(Protocol):
    """Told what happens; decides what a person or a machine sees of it."""

    def message(self, text: str) -> None:
        """Something to know, in one line."""

    def begin(self, stage_totals: dict[str, tuple[int, int]]) -> None:
        """Units start: by stage, how many there are and how many are done already."""

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        """One unit is committed."""

    def event(self, event: Event | Instruction) -> None:
        """Anything of the cluster."""


class StoppedError(Exception):
    """The run ended before its goals, resumable. `interrupted`: on request."""

    def __init__(self, reason: str, *, interrupted: bool) -> None:
        super().__init__(reason)
        self.interrupted = interrupted


@dataclass
class Prepared:
    """A run before its units: everything checked, nothing expensive done."""

    config: RunConfig
    store: Store
    checkpoint: Store
    source: ModelSource
    skeleton: Skeleton
    context: Context
    tokens: Artifact
    texts: dict[str, Artifact]
    resolved: dict[str, Any]


@dataclass
class Finished:
    """What a run came to, for the report."""

    prepared: Prepared
    graph: Graph
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_mib: dict[str, float] = field(default_factory=dict)
    units_run: int = 0
    units_committed_before: int = 0


def checkpoint_url(config: RunConfig) -> str:
    return config.outputs.checkpoint or posixpath.join(config.storage.run, "checkpoint")


def open_source(config: RunConfig, store: Store, report: Reporter) -> tuple[ModelSource, dict[str, Any]]:
    """The model folder, and the fsspec options it is opened with. A GGUF file is converted into the run directory first."""
    options = config.storage.options
    trust = config.model.trust_remote_code
    if config.model.source.endswith(".gguf"):
        target = store.child("model")
        if not target.exists("config.json"):
            report.message(f"converting {config.model.source} to safetensors")
            dtype = {"float32": torch.float32, "float16": torch.float16}.get(config.model.dtype, torch.bfloat16)
            import_gguf(config.model.source, options, target, dtype)
        return open_model(target), options
    model_store = locate(config.model, options)
    return open_model(model_store, trust_remote_code=trust), model_store.options


def check_scheme(config: RunConfig, skeleton: Skeleton) -> None:
    """Refuse a scheme that does not fit the model."""
    names = linear_names(skeleton.blocks[0], skeleton.block_prefix(0), config.scheme.skip)
    if not names:
        raise UserError(
            f"scheme.skip {config.scheme.skip} leaves no linear of {type(skeleton.model).__name__}'s blocks to quantize; skip fewer"
        )
    check_groups(skeleton, names, config.scheme.group_size)


def check_place(checkpoint: Store, config: RunConfig, autocast: torch.dtype | None) -> None:
    """Refuse to overwrite a checkpoint that this run did not make."""
    if not checkpoint.exists(CONFIG_FILE):
        return
    try:
        theirs = json.loads(checkpoint.get(CHECKPOINT_MANIFEST))["identity"]
    except (FileNotFoundError, ValueError, KeyError):
        theirs = None
    if theirs != json.loads(json.dumps(run_identity(config, autocast))):
        raise UserError(f"{checkpoint.url} holds another checkpoint already; choose another outputs.checkpoint")


def commit_tokens(store: Store, name: str, tokens: torch.Tensor) -> Artifact:
    """Store tokens under their content; the same ones are written once."""
    key = hashlib.sha256(str(list(tokens.shape)).encode() + bytes(tensor_bytes(tokens))).hexdigest()
    artifact = Artifact("tokens", name, key)
    if intact(store, artifact) is None:
        writer = Writer(store, artifact)
        writer.write_tensors("tokens.safetensors", {"tokens": tokens})
        writer.commit({"shape": list(tokens.shape)})
    return artifact


def intact(store: Store, artifact: Artifact, report: Reporter | None = None) -> Any:
    """The record of a committed artifact whose files have their sizes; None otherwise, what is damaged being cleared away."""
    try:
        record = read_record(store, artifact)
        if record is None:
            return None
        sizes = store.list(artifact.path)
        for name, (size, _) in record.files.items():
            if sizes.get(f"{artifact.path}/{name}") != size:
                raise CorruptArtifactError(artifact, f"{name} is missing or has another size than was committed")
    except CorruptArtifactError as error:
        if report:
            report.message(f"damaged, will be redone: {error}")
        discard(store, artifact)
        return None
    return record


def prepare(config: RunConfig, report: Reporter) -> Prepared:
    """Check everything that can be checked without work, and store the tokens."""
    if config.compute.device == "cuda" and config.cluster.address is None and not torch.cuda.is_available():
        raise UserError(
            "compute.device is cuda, but this machine has no CUDA device; set compute.device to cpu or give cluster.address"
        )
    store = open_store(config.storage.run, config.storage.options)
    store.check_writable()
    autocast = autocast_dtype(config.compute)
    check_claim(store, config, autocast)
    source, model_options = open_source(config, store, report)
    skeleton = make_skeleton(source.config, trust_remote_code=config.model.trust_remote_code)
    check_tensors(skeleton, source)
    check_scheme(config, skeleton)
    dtype = source.dtype(config.model.dtype)
    checkpoint = open_store(checkpoint_url(config), config.storage.options)
    check_place(checkpoint, config, autocast)
    report.message(f"reading calibration text {config.data.source}")
    tokenizer = source.tokenizer()
    tokens = commit_tokens(store, "calibration", calibration_tokens(tokenizer, config.data))
    texts = {}
    evaluation = config.evaluation
    for name, text in evaluation.texts.items():
        found = evaluation_tokens(tokenizer, text, evaluation.windows * evaluation.length)
        texts[name] = commit_tokens(
            store, f"text-{name}", take_windows(found, evaluation.windows, evaluation.length, text)
        )
    claim(store, config, autocast)
    context = Context(
        config=config,
        run_url=absolute(store.url),
        model_url=absolute(source.store.url),
        checkpoint_url=absolute(checkpoint.url),
        dtype=dtype,
        autocast=autocast,
        model_options=model_options,
    )
    resolved = {"dtype": str(dtype), "autocast": str(autocast) if autocast else None}
    return Prepared(config, store, checkpoint, source, skeleton, context, tokens, texts, resolved)


@contextmanager
def ray_workers(config: RunConfig, context: Context, report: Reporter) -> Iterator[WorkerGroup]:
    """Actors on a private Ray or on the cluster of the configuration."""
    cluster = config.cluster
    # A private Ray is given as many CPUs as its workers ask for: fewer cores than that only make it slower.
    cpus = None if cluster.workers is None else max(1, int(cluster.workers * cluster.cpus_per_worker + 0.999))
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


class Driver:
    """Runs a prepared run's units on a group, again and again until nothing is needed."""

    def __init__(
        self, prepared: Prepared, start: Callable[[], WorkerGroup], report: Reporter, should_stop: Callable[[], bool]
    ) -> None:
        self.prepared = prepared
        self.store = prepared.store
        self.start = start
        self.report = report
        self.should_stop = should_stop
        self.peaks: dict[str, float] = {}
        self.units_run = 0

    @cached_property
    def group(self) -> WorkerGroup:
        """The workers, started when the first unit needs them: a finished run is confirmed without."""
        return self.start()

    def inspect(self) -> tuple[list[str], str]:
        """Digests of every block's weights and of what is outside the blocks."""
        fingerprint = self.prepared.source.fingerprint()
        parts: list[int | None] = [*range(len(self.prepared.skeleton)), None]
        artifacts = {}
        for part in parts:
            names = sorted(block_tensors(self.prepared.skeleton, part))
            key = digest({"kind": "inspect", "fingerprint": fingerprint, "names": names})
            artifacts[part] = Artifact("inspect", "outer" if part is None else f"block-{part:03d}", key)
        nodes = [
            Node(f"inspect/{a.name}", "inspect", -1, InspectTask(part, a), (), (a,), ())
            for part, a in artifacts.items()
        ]
        graph = Graph(nodes, list(artifacts.values()))
        self.complete(graph)
        records = {part: read_record(self.store, artifact) for part, artifact in artifacts.items()}
        digests = {part: record.meta["digest"] for part, record in records.items() if record is not None}
        named = {OUTER if part is None else f"block {part}": value for part, value in digests.items()}
        claim_model(self.store, named)
        return [digests[block] for block in range(len(self.prepared.skeleton))], digests[None]

    def complete(self, graph: Graph) -> int:
        """Run what is needed until the goals are committed. Returns how many units were there already. Raises StoppedError."""
        first: int | None = None
        for _ in range(MOST_PLANS):
            needed = self.needed(graph)
            if first is None:
                first = len(graph.nodes) - len(needed)
            self._begin(graph, needed)
            if not needed:
                return first
            outcome = self._run(graph, needed)
            if outcome.status == "replan":
                self.report.message(f"damaged, will be redone: {outcome.reason}")
            elif outcome.status != "done":
                raise StoppedError(outcome.reason, interrupted=outcome.status == "interrupted")
        raise StoppedError(
            f"artifacts were found damaged in {MOST_PLANS} plans one after another, the last: {outcome.reason}; check the storage.",
            interrupted=False,
        )

    def _begin(self, graph: Graph, needed: list[Node]) -> None:
        left = {node.name for node in needed}
        totals: dict[str, tuple[int, int]] = {}
        for node in graph.nodes:
            total, done = totals.get(node.stage, (0, 0))
            totals[node.stage] = (total + 1, done + (node.name not in left))
        self.report.begin(totals)

    def needed(self, graph: Graph) -> list[Node]:
        listed = committed(self.store, {a.kind for n in graph.nodes for a in n.makes})
        records: dict[str, bool] = {}

        def is_committed(artifact: Artifact) -> bool:
            if artifact.path not in records:
                records[artifact.path] = artifact.path in listed and self._good(artifact)
            return records[artifact.path]

        return graph.needed(is_committed)

    def _good(self, artifact: Artifact) -> bool:
        record = intact(self.store, artifact, self.report)
        if record is None or artifact.kind != "shard":
            return record is not None
        if shard_intact(self.prepared.checkpoint, record, thorough=True):
            return True
        self.report.message(f"damaged, will be redone: {self.prepared.checkpoint.describe(record.meta['file'])}")
        discard(self.store, artifact)
        return False

    def _run(self, graph: Graph, needed: list[Node]) -> Outcome:
        nodes = {node.name: node for node in needed}
        tidy = Tidy(self, graph, needed)

        def on_event(event: Event | Instruction) -> None:
            self.report.event(event)
            if isinstance(event, UnitDone) and event.unit in nodes:
                self._note(event.result)
                self.report.finished(nodes[event.unit], event.result)
                tidy.done(event.unit)

        units: list[Unit] = graph.units(needed)
        config = self.prepared.config.cluster
        return run_units(
            self.group, units, max_attempts=config.max_attempts, on_event=on_event, should_stop=self.should_stop
        )

    def _note(self, result: dict[str, Any]) -> None:
        self.units_run += 1
        name = result["worker"]
        self.peaks[name] = max(self.peaks.get(name, 0.0), result["peak_rss_mib"])


class Tidy:
    """Deletes activations and states when their last reader has committed, and those that an earlier driver left."""

    def __init__(self, driver: Driver, graph: Graph, needed: list[Node]) -> None:
        self.driver = driver
        self.enabled = not driver.prepared.config.storage.keep_activations
        left = {node.name for node in needed}
        self.readers = {path: names & left for path, names in graph.readers().items()}
        self.reads = {node.name: [a for a in node.reads if a.kind in TRANSIENT] for node in needed}
        makers = graph.producers()
        listed = committed(driver.store, TRANSIENT) if self.enabled else {}
        for path in listed:
            if path not in makers:
                continue
            artifact = next(a for a in makers[path].makes if a.path == path)
            if not self.readers.get(path) and makers[path].name not in left:
                discard(driver.store, artifact)

    def done(self, unit: str) -> None:
        for artifact in self.reads[unit]:
            waiting = self.readers[artifact.path]
            waiting.discard(unit)
            if self.enabled and not waiting:
                discard(self.driver.store, artifact)


def shard_plan(prepared: Prepared) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """The checkpoint's files: name, parameters, blocks whose results they hold."""
    config = prepared.config
    grid = Grid(config.scheme.bits, config.scheme.group_size, config.scheme.symmetric)
    layout = checkpoint_layout(prepared.skeleton, grid, config.scheme.skip, prepared.context.dtype)
    shards = plan_shards(layout, config.outputs.max_shard_mib << 20)
    linears = quantized_linears(prepared.skeleton, config.scheme.skip)
    return [
        (
            shard_file(index, len(shards)),
            tuple(names),
            tuple(sorted({linears[n.removesuffix(".weight")] for n in names if n.removesuffix(".weight") in linears})),
        )
        for index, names in enumerate(shards)
    ]


def graph_of(prepared: Prepared, blocks: list[str], outer: str) -> Graph:
    """The run's units, now that the weights are known."""
    config = prepared.config
    compute = prepared.resolved | config.compute.model_dump(mode="json") | {"torch": torch.__version__}
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
