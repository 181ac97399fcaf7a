"""Runs a prepared run's units until its goals are committed, and tidies up behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from cluster.group import WorkerGroup
from cluster.loop import Outcome, run_units
from cluster.scheduler import Event, Instruction, UnitDone
from cluster.units import Unit
from pipeline.artifacts import Artifact, committed, digest, discard, intact, read_record
from pipeline.errors import UserError
from pipeline.graph import TRANSIENT, Graph, Node
from pipeline.identity import claim_model
from pipeline.lease import LeaseLostError
from pipeline.merge import shard_intact
from pipeline.optimize import TrainTask
from pipeline.partial import KIND as PARTIAL
from pipeline.partial import partial_owner, unit_name
from pipeline.prepare import Prepared, ensure_tokens
from pipeline.reporter import Reporter
from pipeline.store import Store
from pipeline.weights import InspectTask, block_tensors

# Healing one damaged artifact may uncover the next; storage that damages what is written would go on for ever.
MOST_PLANS = 50
OUTER = "outside the blocks"


class StoppedError(Exception):
    """The run ended before its goals, resumable. `interrupted`: on request."""

    def __init__(self, reason: str, *, interrupted: bool) -> None:
        super().__init__(reason)
        self.interrupted = interrupted


class GaveUpError(StoppedError):
    """The unit of `node` that trains a block failed for good, after `failures` attempts or lost workers."""

    def __init__(self, reason: str, node: Node, failures: int) -> None:
        super().__init__(reason, interrupted=False)
        self.node = node
        self.failures = failures


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
        # Shards that were read whole and found as committed: once a driver is enough.
        self.verified: set[Artifact] = set()
        self.damaged: set[str] = set()

    @cached_property
    def group(self) -> WorkerGroup:
        """The workers, started when the first unit needs them: a finished run is confirmed without."""
        return self.start()

    def inspect(self) -> tuple[list[str], str]:
        """Digests of every block's weights and of what is outside the blocks."""
        fingerprint, dtype = self.prepared.source.fingerprint(), str(self.prepared.context.dtype)
        parts: list[int | None] = [*range(len(self.prepared.skeleton)), None]
        artifacts = {}
        for part in parts:
            names = sorted(block_tensors(self.prepared.skeleton, part))
            key = digest({"kind": "inspect", "fingerprint": fingerprint, "names": names, "dtype": dtype})
            artifacts[part] = Artifact("inspect", "outer" if part is None else f"block-{part:03d}", key)
        nodes = [
            Node(f"inspect/{a.name}", "inspect", -1, InspectTask(part, a), (), (a,), ())
            for part, a in artifacts.items()
        ]
        graph = Graph(nodes, list(artifacts.values()))
        self.complete(graph)
        records = {part: read_record(self.store, artifact) for part, artifact in artifacts.items()}
        if refused := [record.meta for record in records.values() if record is not None and record.meta["refused"]]:
            listed = "; ".join(meta["refused"] for meta in refused)
            raise UserError(f"{self.prepared.source.store.url}: {listed}: {refused[0]['remedy']}")
        digests = {part: record.meta["digest"] for part, record in records.items() if record is not None}
        named = {OUTER if part is None else f"block {part}": value for part, value in digests.items()}
        claim_model(self.store, named)
        return [digests[block] for block in range(len(self.prepared.skeleton))], digests[None]

    def complete(self, graph: Graph) -> int:
        """Run what is needed until the goals are committed. Returns how many units were there already.

        Raises StoppedError, and LeaseLostError if another driver took over."""
        first: int | None = None
        for _ in range(MOST_PLANS):
            ensure_tokens(self.store, self.prepared.token_values, self.report.message)
            needed = self.needed(graph)
            if first is None:
                first = len(graph.nodes) - len(needed)
            self._begin(graph, needed)
            tidy = Tidy(self, graph, needed)
            if not needed:
                return first
            outcome = self._run(graph, needed, tidy)
            if outcome.status == "replan":
                self.report.message(f"damaged, will be redone: {outcome.reason}")
            elif self.prepared.lease and self.prepared.lease.lost:
                raise LeaseLostError(self.prepared.lease.lost)
            elif outcome.status != "done":
                self._check_lease()
                raise stopped(outcome, needed)
            elif lost := self._lost(graph, outcome):
                raise StoppedError(
                    f"{len(lost)} units are done, but what they committed is not at {self.store.url} as this machine sees it: "
                    "storage.run must be one place for all workers, an object store or a shared file system.",
                    interrupted=False,
                )
        raise StoppedError(
            f"artifacts were found damaged in {MOST_PLANS} plans one after another, the last: {outcome.reason}; check the storage.",
            interrupted=False,
        )

    def _check_lease(self) -> None:
        """A worker may be the first to notice that another driver took over. Raises LeaseLostError."""
        if self.prepared.lease is None:
            return
        try:
            self.prepared.lease.check()
        except LeaseLostError:
            raise
        except Exception as error:  # storage that cannot be asked: what stopped the run is what must be told
            self.report.message(f"the lease could not be checked: {self.store.clean(str(error))}")

    def _lost(self, graph: Graph, outcome: Outcome) -> list[str]:
        """Units that are done and whose artifacts were never here; those that were found damaged meanwhile are redone."""
        needed = [node for node in self.needed(graph) if node.name in outcome.results]
        # What is deleted after its last reader is missed again when something after it was damaged.
        kept = [node for node in needed if any(a.kind not in TRANSIENT for a in node.makes)]
        return [node.name for node in kept if not any(a.path in self.damaged for a in node.makes)]

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
        record = intact(self.store, artifact, self.report.message)
        if record is None:
            self.damaged.add(artifact.path)
            return False
        if artifact.kind != "shard":
            return True
        if artifact in self.verified or shard_intact(self.prepared.checkpoint, record):
            self.verified.add(artifact)
            return True
        self.report.message(f"damaged, will be redone: {self.prepared.checkpoint.describe(record.meta['file'])}")
        self.damaged.add(artifact.path)
        discard(self.store, artifact)
        return False

    def _run(self, graph: Graph, needed: list[Node], tidy: Tidy) -> Outcome:
        nodes = {node.name: node for node in needed}

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
        for note in result.get("notes", ()):
            self.report.message(note)
        name = result["worker"]
        self.peaks[name] = max(self.peaks.get(name, 0.0), result["peak_rss_mib"])


def stopped(outcome: Outcome, nodes: list[Node]) -> StoppedError:
    """Why the run cannot go on as planned."""
    node = next((n for n in nodes if n.name == outcome.unit), None)
    if outcome.status == "failed" and node is not None and isinstance(node.task, TrainTask) and node.task.replaceable:
        return GaveUpError(outcome.reason, node, outcome.failures)
    return StoppedError(outcome.reason, interrupted=outcome.status == "interrupted")


def sweep(store: Store, graph: Graph, left: set[str], kinds: tuple[str, ...]) -> None:
    """Remove what no unit of the plan makes or goes on from: of plans before a quarantine, and commits within done units."""
    if not any(node.stage == "optimize" for node in graph.nodes):
        return  # the plan of the inspection knows of nothing
    tasks = [node.task for node in graph.nodes if node.name in left]
    going_on = {(unit_name(t.block, t.unit), t.key[:16]) for t in tasks if isinstance(t, TrainTask)}
    makers = graph.producers()
    for path in committed(store, kinds):
        if path not in makers and not (path.startswith(f"{PARTIAL}/") and partial_owner(path) in going_on):
            discard(store, Artifact.parse(path))


class Tidy:
    """Deletes activations and states when their last reader has committed, and those that an earlier driver left."""

    def __init__(self, driver: Driver, graph: Graph, needed: list[Node]) -> None:
        self.driver = driver
        self.enabled = not driver.prepared.config.storage.keep_activations
        left = {node.name for node in needed}
        self.readers = {path: names & left for path, names in graph.readers().items()}
        self.reads = {node.name: [a for a in node.reads if a.kind in TRANSIENT] for node in needed}
        makers = graph.producers()
        sweep(driver.store, graph, left, TRANSIENT if self.enabled else (PARTIAL,))
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
