"""A run as units with exact dependencies: what each reads and makes, by content address.

The schedules differ in what a block trains on alone (`pipeline.timetable`). Everything else, and so the code that runs, is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.units import Unit
from lsi import ALGORITHM
from pipeline.artifacts import Artifact, digest
from pipeline.block_state import learning_rates
from pipeline.capture import CHUNK_FILE, CaptureTask, EmbedTask
from pipeline.config import RunConfig
from pipeline.data_free import RoundTask, StreamTask
from pipeline.end_to_end import GradientTask, ScaledTask, Share, UpdateTask, compared_of, steps_of
from pipeline.evaluate import EvaluateTask, Variant
from pipeline.merge import MergeTask
from pipeline.optimize import Piece, TrainTask, stream_file
from pipeline.partial import unit_name
from pipeline.timetable import Reading, timetable_of
from pipeline.worker import Chunk, Task

# Artifacts that are deleted once their last reader has committed.
TRANSIENT = ("hidden", "stream", "state", "partial", "gradient", "scales")
KINDS = (*TRANSIENT, "factors", "quarantine", "quantized", "scaled", "evaluation", "shard")
# Blocks that one unit of the quantized model's evaluation passes.
EVALUATION_PART = 10
# Sums on a CPU and on a GPU differ: all units but the merge, which computes nothing, go to one kind of workers.
TRAIN = "train"


@dataclass(frozen=True)
class Node:
    """One unit: a task, what it reads and what it makes. `stage` and `block` are for people and for placement."""

    name: str
    stage: str
    block: int
    task: Task
    reads: tuple[Artifact, ...]
    makes: tuple[Artifact, ...]
    priority: tuple[int, ...]
    affinity: str | None = None


@dataclass
class Graph:
    """All units of a run. `goals` are the artifacts that the run is for."""

    nodes: list[Node] = field(default_factory=list)
    goals: list[Artifact] = field(default_factory=list)

    def producers(self) -> dict[str, Node]:
        return {artifact.path: node for node in self.nodes for artifact in node.makes}

    def needed(self, committed: Callable[[Artifact], bool]) -> list[Node]:
        """The units that must run, walking back from the goals and stopping at what is committed."""
        producers = self.producers()
        found: dict[str, Node] = {}
        seen: set[str] = set()
        open_ends = list(self.goals)
        while open_ends:
            artifact = open_ends.pop()
            if artifact.path in seen:
                continue
            seen.add(artifact.path)
            node = producers.get(artifact.path)
            if node is None or committed(artifact):
                continue
            if node.name not in found:
                found[node.name] = node
                open_ends += node.reads
        return [node for node in self.nodes if node.name in found]

    def units(self, needed: Iterable[Node]) -> list[Unit]:
        """The scheduler's units of some nodes; what other nodes make is there already."""
        chosen = list(needed)
        producers = {artifact.path: node.name for node in chosen for artifact in node.makes}
        return [
            Unit(
                name=node.name,
                payload=node.task,
                depends_on=tuple(sorted({producers[a.path] for a in node.reads if a.path in producers})),
                priority=node.priority,
                affinity=node.affinity,
                kind=None if node.stage == "merge" else TRAIN,
            )
            for node in chosen
        ]

    def readers(self) -> dict[str, set[str]]:
        """Names of the units that read each artifact, by its path."""
        found: dict[str, set[str]] = {}
        for node in self.nodes:
            for artifact in node.reads:
                found.setdefault(artifact.path, set()).add(node.name)
        return found


@dataclass(frozen=True)
class Inputs:
    """What a graph is built from, all known before any unit of it runs.

    `quarantined` has the blocks that are not trained, each with the reason, for people (`pipeline.quarantine`).
    """

    config: RunConfig
    blocks: int
    tokens: Artifact
    texts: Mapping[str, Artifact]
    block_digests: list[str]
    outer_digest: str
    model_config_digest: str
    compute: Mapping[str, Any]
    shards: list[tuple[str, tuple[str, ...], tuple[int, ...]]]
    quarantined: Mapping[int, str] = field(default_factory=dict)


def chunk_ranges(samples: int, size: int) -> list[tuple[int, int]]:
    """First sample and the one after the last, of each chunk."""
    return [(start, min(start + size, samples)) for start in range(0, samples, size)]


def _last_part(blocks: int) -> int:
    """The first block of the last part of an evaluation."""
    return (blocks - 1) // EVALUATION_PART * EVALUATION_PART


def address_of(piece: Piece) -> list[Any]:
    """What of a chunk decides bytes."""
    return [piece.number, piece.inputs.artifact.key, piece.targets.artifact.key]


class Builder:
    """Adds the stages' units one after another.

    `first`: the first block that has a result. `shard_kind`: what the checkpoint's shards are, in their addresses.
    """

    first = 0
    shard_kind = "shard"

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.config = inputs.config
        self.graph = Graph()
        self.base = {"algorithm": ALGORITHM, "compute": dict(inputs.compute), "model": inputs.model_config_digest}
        self.ranges = chunk_ranges(self.config.data.samples, self.config.storage.chunk_samples)
        # Of every block alike.
        self.timetable = table = timetable_of(self.config)
        self.handed_on = table.handed_on()
        self.readings = [(table.training(u), table.passing(u), table.comparison(u)) for u in range(table.units)]
        self.hidden: list[list[Artifact]] = []
        self.streams: dict[tuple[int, int], Artifact] = {}
        self.quantized: list[Artifact] = []
        # What is evaluated and merged: the blocks' results, or these with scales trained end to end.
        self.final: list[Artifact] = []

    def key(self, kind: str, **reads: Any) -> str:
        return digest({"kind": kind, **self.base, **reads})

    def add(self, node: Node) -> None:
        self.graph.nodes.append(node)

    def build(self) -> Graph:
        """The whole run."""
        if self.config.optimizer.epochs:
            self._embed()
            for block in range(self.inputs.blocks):
                while len(self.hidden) <= self._target(block):
                    self._capture(len(self.hidden) - 1)
                if block in self.inputs.quarantined:
                    self._stream_rounded(block, self._round(block, "round"))
                else:
                    self._train(block)
        else:
            for block in range(self.inputs.blocks):
                self._round(block, "000")
        self.final = self._end_to_end() if self.config.end_to_end.epochs else self.quantized
        self._evaluate()
        self._merge()
        # Without training, hidden states are captured for the last stage alone, which may take a part of the samples.
        return Graph(self.graph.needed(lambda artifact: False), self.graph.goals)

    def _ahead(self, block: int) -> int:
        """Full-precision blocks that a block's outputs pass before its loss is taken: as many as are asked for, and are left."""
        return min(self.config.method.look_ahead, self.inputs.blocks - 1 - block)

    def _target(self, block: int) -> int:
        """The boundary of the full-precision stream at which a block's loss is taken."""
        return block + 1 + self._ahead(block)

    def _embed(self) -> None:
        self.hidden.append([])
        for chunk, (start, stop) in enumerate(self.ranges):
            key = self.key(
                "embed", tokens=self.inputs.tokens.key, range=[start, stop], weights=self.inputs.outer_digest
            )
            out = Artifact("hidden", f"boundary-000-chunk-{chunk:05d}", key)
            self.hidden[0].append(out)
            task = EmbedTask(self.inputs.tokens, start, stop, out)
            self.add(Node(f"embed/{chunk:05d}", "capture", 0, task, (), (out,), (0, 0, 0, chunk)))

    def _capture(self, block: int) -> None:
        self.hidden.append([])
        for chunk, source in enumerate(self.hidden[block]):
            key = self.key("capture", inputs=source.key, weights=self.inputs.block_digests[block])
            out = Artifact("hidden", f"boundary-{block + 1:03d}-chunk-{chunk:05d}", key)
            self.hidden[block + 1].append(out)
            task = CaptureTask(block, Chunk(source, CHUNK_FILE), out)
            name = f"capture/{block:03d}/{chunk:05d}"
            # It comes with the first block that trains on it.
            priority = (max(0, block - self.config.method.look_ahead), 0, 0, chunk)
            self.add(Node(name, "capture", block, task, (source,), (out,), priority, f"block {block}"))

    def _hands_on(self, block: int, unit: int) -> bool:
        """Whether the block after reads this block's outputs after this unit."""
        return block + 1 < self.inputs.blocks and unit in self.handed_on

    def _inputs_of(self, block: int, reading: Reading) -> dict[int, Chunk]:
        """A block's inputs, by the chunks' numbers."""
        if block == 0 or reading.source is None:
            return {number: Chunk(self.hidden[block][number], CHUNK_FILE) for number in reading.chunks}
        stream = self.streams[block - 1, reading.source]
        return {number: Chunk(stream, stream_file(number)) for number in reading.chunks}

    def _pieces(self, block: int, reading: Reading) -> tuple[Piece, ...]:
        """Inputs with their targets."""
        targets = self.hidden[self._target(block)]
        return tuple(
            Piece(number, chunk, Chunk(targets[number], CHUNK_FILE))
            for number, chunk in self._inputs_of(block, reading).items()
        )

    def _settings(self, *sections: str) -> dict[str, Any]:
        """What of the configuration decides a training unit's bytes. Defaults do as much as what was typed."""
        settings = {name: getattr(self.config, name).model_dump(mode="json") for name in sections}
        settings["learning_rates"] = learning_rates(self.config)
        settings["chunk_samples"] = self.config.storage.chunk_samples
        return settings

    def _train(self, block: int) -> None:
        table, ahead = self.timetable, self._ahead(block)
        settings = self._settings("scheme", "method", "optimizer")
        previous: Artifact | None = None
        # Under a schedule block 0's inputs never change, but its losses are compared like every other block's.
        for unit, (training, passing, compare) in enumerate(self.readings):
            trains, passes = self._pieces(block, training), self._pieces(block, passing)
            key = self.key(
                "train",
                settings=settings,
                weights=self.inputs.block_digests[block],
                unit=unit,
                epoch=table.epoch(unit),
                trains=[address_of(piece) for piece in trains],
                passes=[address_of(piece) for piece in passes],
                following=self.inputs.block_digests[block + 1 : block + 1 + ahead],
                previous=previous.key if previous else None,
                comparison=compare,
            )
            last = unit == table.last
            name = unit_name(block, unit)
            state = None if last else Artifact("state", name, key)
            quantized = Artifact("quantized", f"block-{block:03d}", key) if last else None
            stream = Artifact("stream", name, key) if self._hands_on(block, unit) else None
            if stream:
                self.streams[block, unit] = stream
            if quantized:
                self.quantized.append(quantized)
            outputs = (previous, state, stream, quantized)
            task = TrainTask(block, unit, table.epoch(unit), trains, passes, *outputs, compare, key, ahead)
            read = (chunk.artifact for piece in (*trains, *passes) for chunk in (piece.inputs, piece.targets))
            reads = tuple(dict.fromkeys((*read, *((previous,) if previous else ()))))
            makes = tuple(a for a in (stream, state, quantized) if a)
            node_name = f"optimize/{block:03d}/{unit:03d}"
            self.add(Node(node_name, "optimize", block, task, reads, makes, (block, 1, unit), f"block {block}"))
            previous = state

    def _round(self, block: int, name: str) -> Artifact:
        scheme, reason = self.config.scheme.model_dump(mode="json"), self.inputs.quarantined.get(block)
        # The weights are the same either way; what is said of them is not.
        decision = {} if reason is None else {"quarantined": True}
        key = self.key("round", scheme=scheme, weights=self.inputs.block_digests[block], **decision)
        out = Artifact("quantized", f"block-{block:03d}", key)
        self.quantized.append(out)
        task = RoundTask(block, out, reason)
        self.add(Node(f"optimize/{block:03d}/{name}", "optimize", block, task, (), (out,), (block, 1, 0)))
        return out

    def _stream_rounded(self, block: int, quantized: Artifact) -> None:
        """What the blocks after a quarantined one train on: its outputs, once for each of its inputs."""
        made: dict[tuple[Chunk, ...], Artifact] = {}
        for unit, (_, passing, _) in enumerate(self.readings):
            if not self._hands_on(block, unit):
                continue
            inputs = self._inputs_of(block, passing)
            chunks = tuple(inputs.values())
            if chunks not in made:
                addresses = [[number, chunk.artifact.key] for number, chunk in inputs.items()]
                key = self.key("rounded stream", quantized=quantized.key, inputs=addresses)
                made[chunks] = out = Artifact("stream", unit_name(block, unit), key)
                task = StreamTask(block, inputs, quantized, out)
                name = f"optimize/{block:03d}/stream-{unit:03d}"
                reads = (*dict.fromkeys(chunk.artifact for chunk in chunks), quantized)
                self.add(Node(name, "optimize", block, task, reads, (out,), (block, 1, unit), f"block {block}"))
            self.streams[block, unit] = made[chunks]

    def _end_to_end(self) -> list[Artifact]:
        """The steps of the last stage, and what it makes of every block."""
        if not self.hidden:
            self._embed()
        while len(self.hidden) <= self.inputs.blocks:
            self._capture(len(self.hidden) - 1)
        results, steps = tuple(self.quantized), steps_of(self.config)
        key = self.key(
            "end to end",
            settings=self._settings("scheme") | self.config.end_to_end.address(),
            seed=self.config.optimizer.seed,
            results=[a.key for a in results],
            ends=[a.key for boundary in (self.hidden[0], self.hidden[-1]) for a in boundary],
            weights=[*self.inputs.block_digests, self.inputs.outer_digest],
        )
        scales: Artifact | None = None
        compared = compared_of(self.config)
        before = self._gradients(key, "before", -1, compared, None, backward=False)
        for step, shares in enumerate(steps):
            gradients = self._gradients(key, f"step-{step:04d}", step, shares, scales)
            previous, scales = scales, Artifact("scales", f"step-{step:04d}", key)
            task = UpdateTask(step, len(steps), self.inputs.blocks, gradients, previous, scales)
            reads = (*gradients, *((previous,) if previous else ()))
            self._add_end(f"step-{step:04d}/update", task, reads, scales, (step, 1), 0)
        assert scales is not None
        after = self._gradients(key, "after", len(steps), compared, scales, backward=False)
        made = []
        for block, result in enumerate(results):
            out = Artifact("scaled", f"block-{block:03d}", key)
            ended = ScaledTask(block, result, scales, before, after, out)
            self._add_end(
                f"block-{block:03d}", ended, (result, scales, *before, *after), out, (len(steps), 1, block), block
            )
            made.append(out)
        return made

    def _gradients(
        self, key: str, name: str, step: int, shares: list[Share], scales: Artifact | None, *, backward: bool = True
    ) -> tuple[Artifact, ...]:
        """Units of a step that share its sequences."""
        made = []
        for place, share in enumerate(shares):
            out = Artifact("gradient", f"{name}-{place:02d}", key)
            inputs, targets = (self.hidden[boundary][share.chunk] for boundary in (0, -1))
            chunks = Chunk(inputs, CHUNK_FILE), Chunk(targets, CHUNK_FILE)
            task = GradientTask(share, tuple(self.quantized), scales, *chunks, out, backward)
            reads = (*self.quantized, inputs, targets, *((scales,) if scales else ()))
            self._add_end(f"{name}/{place:02d}", task, reads, out, (step, 0, place), place)
            made.append(out)
        return tuple(made)

    def _add_end(
        self, name: str, task: Task, reads: tuple[Artifact, ...], out: Artifact, order: tuple[int, ...], place: int
    ) -> None:
        """A unit of the last stage: after all blocks, and where the whole model may be at hand already."""
        priority, affinity = (self.inputs.blocks, -1, *order), f"end to end {place}"
        self.add(Node(f"end_to_end/{name}", "end_to_end", -1, task, reads, (out,), priority, affinity))

    def _evaluate(self) -> None:
        variants: list[Variant] = [*self.config.evaluation.baselines, "quantized"]
        weights = [*self.inputs.block_digests, self.inputs.outer_digest]
        for variant in variants:
            results = tuple(self.final) if variant == "quantized" else ()
            scheme = self.config.scheme.model_dump(mode="json") if variant == "round_to_nearest" else None
            for name, text in self.inputs.texts.items():
                reads = {"variant": variant, "text": text.key, "scheme": scheme}
                key = self.key("evaluate", **reads, weights=weights, results=[a.key for a in results])
                out = Artifact("evaluation", f"{variant}-{name}", key)
                before = self._evaluate_parts(name, text, reads) if results else None
                start = _last_part(self.inputs.blocks) if results else 0
                task = EvaluateTask(variant, text, start, self.inputs.blocks, results[start:], before, out)
                self._add_evaluation(f"evaluate/{variant}/{name}", task)
                self.graph.goals.append(out)

    def _evaluate_parts(self, name: str, text: Artifact, reads: dict[str, Any]) -> Artifact | None:
        """All parts of the quantized model's evaluation but the last; without a stage after the blocks they come while later ones train."""
        before: Artifact | None = None
        for start in range(0, _last_part(self.inputs.blocks), EVALUATION_PART):
            stop = start + EVALUATION_PART
            weights = [*self.inputs.block_digests[:stop], self.inputs.outer_digest]
            results = tuple(self.final[:stop])
            key = self.key("evaluation states", **reads, weights=weights, results=[a.key for a in results])
            out = Artifact("hidden", f"evaluation-{name}-boundary-{stop:03d}", key)
            task = EvaluateTask("quantized", text, start, stop, results[start:], before, out)
            self._add_evaluation(f"evaluate/quantized/{name}/{stop:03d}", task)
            before = out
        return before

    def _add_evaluation(self, name: str, task: EvaluateTask) -> None:
        reads = (*task.quantized, *((task.before,) if task.before else ()))
        self.add(Node(name, "evaluate", -1, task, reads, (task.out,), (self.inputs.blocks, 0)))

    def shard_task(self, file: str, names: tuple[str, ...], results: Mapping[int, Artifact], out: Artifact) -> Task:
        """What makes a shard."""
        return MergeTask(file, names, results, out)

    def _merge(self) -> None:
        weights = [self.inputs.outer_digest, *self.inputs.block_digests]
        for file, names, blocks in self.inputs.shards:
            results = {block: self.final[block - self.first] for block in blocks}
            # A shard is a place, too: the same weights merged elsewhere are another artifact.
            place = self.config.outputs.checkpoint
            key = self.key(
                self.shard_kind,
                file=file,
                place=place,
                names=names,
                results=[a.key for a in results.values()],
                weights=weights,
            )
            out = Artifact("shard", file.removesuffix(".safetensors"), key)
            task = self.shard_task(file, names, results, out)
            reads = tuple(results.values())
            self.add(Node(f"merge/{file}", "merge", -1, task, reads, (out,), (self.inputs.blocks, 1)))
            self.graph.goals.append(out)
        # The report reads them, and so do the next merge and evaluation, though nothing of this run may need them any more.
        self.graph.goals += [*self.quantized, *(a for a in self.final if a.kind != "quantized")]


def build_graph(inputs: Inputs) -> Graph:
    """All units of a run."""
    return Builder(inputs).build()
