"""What a unit costs: products, bytes read and written, from the model's shapes and the configuration alone.

Products (floating point operations), P being the weights of a block's linears, L the sequence length, A the width of attention:

    forward   a token         2·P + 2·L·A                       (A: queries' width; half of the square, as it is causal)
    training  a step          3 · forward · tokens in the batch   forward, gradient of inputs, gradient of W'
              with look-ahead + 2 · forward for each further block  forward, gradient of inputs
              with the loss on the quantized stream + 1 · forward
              with diagonal   + 4 · Σ out·in·min(out, in)         W' = W + U·diag(I)·Vh and its gradient's projection
    end to end, a token       blocks · (3 · forward) and the head: forward and gradient of its inputs, and the target's logits
    memory    a step          `_FAKE_QUANTIZATION` bytes a weight, `_DENSE` more for a dense increment and its AdamW

The processes of a group share the sequences of a step, and with plain torch those of passes without gradients and the rows that are
quantized; what they send each other is not counted.

The memory figures are counted from the elementwise operations of `lsi.linear` and torch's AdamW in float32, not measured;
`_SEARCH` is measured, beside `_FAKE_QUANTIZATION`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lsi.factors import ITERATIONS, LARGEST_PART, MANY, SMALL
from lsi.grid import narrowed, shrunken
from lsi.increment import Increment
from pipeline.artifacts import Artifact
from pipeline.block_state import steps_per_epoch
from pipeline.capture import CaptureTask, EmbedTask
from pipeline.config import RunConfig
from pipeline.end_to_end import GradientTask, ScaledTask, UpdateTask
from pipeline.evaluate import EvaluateTask
from pipeline.graph import Inputs, Node
from pipeline.merge import MergeTask
from pipeline.optimize import COMPARED_SAMPLES, Piece, TrainTask
from pipeline.worker import Chunk

_FAKE_QUANTIZATION = 160  # ten passes forward and ten backward, each reading and writing four bytes
_SEARCH = 22  # for every range that is tried, on pieces that stay in a cache
_CODES = 40
_DENSE = 100  # AdamW: four tensors read and three written in several kernels, and the check for finite gradients


@dataclass(frozen=True)
class Shape:
    """A model's sizes. `linears`: (out, in) of the quantized linears of one block; `outer`: parameters outside the blocks;
    `attention`: width of all query heads; `itemsize`: bytes of a stored number."""

    blocks: int
    hidden: int
    linears: tuple[tuple[int, int], ...]
    attention: int
    outer: int
    itemsize: int = 2

    @property
    def weights(self) -> int:
        return sum(out * width for out, width in self.linears)


@dataclass(frozen=True)
class Device:
    """What a worker achieves: floating point operations a second in products, bytes a second in elementwise work, and what
    part of the products' speed factors come to, their products among them (measured on one thread)."""

    flops: float
    memory: float = math.inf
    decompositions: float = 0.5


@dataclass(frozen=True)
class Read:
    """One artifact that a unit reads: the bytes of its first pass, and those of each further one."""

    path: str
    size: float
    again: tuple[float, ...] = ()

    @property
    def passes(self) -> tuple[float, ...]:
        """Bytes of every pass."""
        return self.size, *self.again


@dataclass(frozen=True)
class Cost:
    """Of one unit. `weights` bytes are read unless the worker holds `block` (None: always); `state` unless it holds that;
    `reads` arrive in `chunks` pieces one after another, beside the computing; `writes` by path. Of these `behind` bytes are written chunk by
    chunk beside the last `last_pass` seconds of computing."""

    compute: float = 0.0
    block: int | None = None
    weights: float = 0.0
    state: Read | None = None
    new_state: str | None = None
    reads: tuple[Read, ...] = ()
    chunks: int = 1
    writes: tuple[tuple[str, float], ...] = ()
    behind: float = 0.0
    last_pass: float = 0.0
    releases: bool = False  # lets go of all that its worker holds


class Costs:
    """The costs of a run's units."""

    def __init__(self, inputs: Inputs, shape: Shape, device: Device, checkpoint_bytes: float) -> None:
        self.config: RunConfig = inputs.config
        self.shape, self.device = shape, device
        self.shards = max(1, len(inputs.shards))
        self.shard_bytes = checkpoint_bytes / self.shards
        grid = self.config.scheme.grid
        self.groups = sum(out * grid.groups(width) for out, width in shape.linears)
        self.trained = trained_numbers(self.config, shape)
        self.codes = shape.weights + self.groups * (shape.itemsize + 1.0)
        compute = self.config.compute
        # Processes that share the sequences of a step, those of passes without gradients, and what is computed from the weights.
        self.members = compute.group
        self.passing = 1 if compute.partitions else compute.group
        self.quantizing = 1 if compute.partitions or self.config.method.equivalence else compute.group
        self.block_bytes = float(shape.weights * shape.itemsize)
        self.outer_bytes = float(shape.outer * shape.itemsize)

    def of(self, node: Node) -> Cost:
        """One unit's cost."""
        match node.task:
            case EmbedTask() as task:
                size = self._activations(task.stop - task.start)
                return Cost(weights=self.outer_bytes, writes=((task.out.path, size),))
            case CaptureTask() as task:
                return self._capture(task)
            case TrainTask() as task:
                return self._train(task)
            case GradientTask() as task:
                return self._gradient(task)
            case UpdateTask() as task:
                return self._update(task)
            case ScaledTask() as task:
                factors = Read(task.scales.path, 4.0 * self.groups)
                return Cost(reads=(Read(task.result.path, self.codes), factors), writes=((task.out.path, self.codes),))
            case EvaluateTask() as task:
                return self._evaluate(task)
            case MergeTask() as task:
                reads = tuple(Read(a.path, self.codes) for a in task.quantized.values())
                outer = self.outer_bytes / self.shards
                return Cost(weights=outer, reads=reads, writes=((task.out.path, self.shard_bytes),), releases=True)
        [out] = node.makes  # rounding to nearest
        return Cost(block=node.block, weights=self.block_bytes, writes=((out.path, self.codes),))

    def _activations(self, samples: int) -> float:
        return float(samples * self.config.data.sequence_length * self.shape.hidden * self.shape.itemsize)

    def _samples(self, chunk: int) -> int:
        data, size = self.config.data, self.config.storage.chunk_samples
        return min(size, data.samples - chunk * size)

    def _forward(self, tokens: int, length: int) -> float:
        """Seconds of one block's forward pass."""
        return tokens * 2.0 * (self.shape.weights + length * self.shape.attention) / self.device.flops

    def _pass(self, samples: int) -> float:
        """Seconds of one process for a block's forward pass over so many."""
        length = self.config.data.sequence_length
        return self._forward(samples * length, length)

    def epoch(self, ahead: int = 0) -> float:
        """Seconds of one block's training steps over all samples, with the loss taken `ahead` blocks further on."""
        config, steps = self.config, steps_per_epoch(self.config)
        increment = config.method.increments
        every_weight = config.method.rounding == "learned" or (increment.kind == "dense" and increment.rank is None)
        ranks = (out * width * (increment.rank or min(out, width)) for out, width in self.shape.linears)
        factors = sum(ranks) if factored(increment) else 0
        memory = self.shape.weights * (_FAKE_QUANTIZATION + _DENSE * every_weight)
        passes = 3 + 2 * ahead + self._own_passes()
        weights = 4.0 * factors / self.device.flops + memory / self.device.memory
        return passes * self._pass(config.data.samples) / self.members + steps * weights / self.quantizing

    def step(self) -> float:
        """Seconds of one of these steps, with a whole batch and nothing beside the block."""
        return self.epoch() / steps_per_epoch(self.config)

    def beginning(self) -> float:
        """Seconds until a block can be stepped: its factors, where its clipping begins."""
        config, shape = self.config, self.shape
        increment, device = config.method.increments, self.device
        work = sum(factor_work(*linear, increment.rank) for linear in shape.linears) if factored(increment) else 0.0
        searches = config.method.clipping != "none" and config.method.clipping_start == "search"
        grid = config.scheme.grid
        tried = searches * len(shrunken(grid) + narrowed(grid)) * _SEARCH
        return work / (device.flops * device.decompositions) + tried * shape.weights / device.memory

    def codes_of_a_state(self) -> float:
        """Seconds for the codes of all linears."""
        increment, shape = self.config.method.increments, self.shape
        ranks = (out * width * (increment.rank or min(out, width)) for out, width in shape.linears)
        products = 2.0 * sum(ranks) if factored(increment) else 0.0
        return products / self.device.flops + shape.weights * _CODES / self.device.memory

    def factor_bytes(self) -> float:
        """Of all factors of a block; they are kept."""
        increment = self.config.method.increments
        return sum(size_of_factors(*linear, increment) for linear in self.shape.linears)

    def _own_passes(self) -> int:
        """Of the full-precision block on the quantized stream, in each pass over the samples."""
        return int(self.config.method.quantized_stream_loss > 0)

    def _capture(self, task: CaptureTask) -> Cost:
        samples = self._samples(int(task.out.name.rpartition("-")[2]))
        size = self._activations(samples)
        return Cost(
            compute=self._pass(samples) / self.passing,
            block=task.block,
            weights=self.block_bytes,
            reads=(Read(task.inputs.artifact.path, size),),
            writes=((task.out.path, size),),
        )

    def _train(self, task: TrainTask) -> Cost:
        compared = task.comparison != "none"
        method = self.config.method
        smooths = bool(method.equivalence) and method.equivalence_start == "smoothquant" and task.previous is None
        samples, passed = self._samples_of(task.trains), self._samples_of(task.passes)
        states = (task.comparison == "begins") + bool(task.stream or compared)
        # They are measured over the first chunks; with a stream to write, one of them runs over the others as well.
        first = self.config.storage.chunks_of(COMPARED_SAMPLES)
        measured = self._samples_of(task.passes[:first])
        # All of a group take the losses of all that is measured.
        losses = (1 / self.passing + task.ahead + self._own_passes()) * self._pass(measured)
        streaming = losses + self._pass(passed - measured) / self.passing if task.stream else 0.0
        measuring = (states - bool(task.stream)) * losses + streaming
        writes: list[tuple[str, float]] = []
        if task.stream:
            writes.append((task.stream.path, self._activations(passed)))
        if task.state:
            writes.append((task.state.path, self.state_bytes(compared)))
        if task.quantized:
            writes.append((task.quantized.path, self.codes))
        begins = task.previous is None
        if begins and self.config.storage.factors is None and (factors := self.factor_bytes()):
            writes.append((f"factors/{task.block}", factors))
        before = compared and task.comparison != "begins"
        previous = Read(task.previous.path, self.state_bytes(before)) if task.previous else None
        inputs, measured_chunks = numbered(task.trains), numbered(task.passes[:first], targets=True)
        passes = [numbered(task.trains, targets=True), *([inputs] * smooths)]
        passes += [measured_chunks] * (states - bool(task.stream))
        if task.stream:
            passes.append([*measured_chunks, *numbered(task.passes[first:])])
        return Cost(
            compute=begins * self.beginning()
            + self.epoch(task.ahead) * samples / self.config.data.samples
            + measuring
            + states * self.codes_of_a_state()
            + smooths * self._pass(samples),
            block=task.block,
            weights=(1 + task.ahead) * self.block_bytes,
            state=previous,
            new_state=task.state.path if task.state else None,
            reads=self._reads(passes),
            chunks=len(task.trains),
            writes=tuple(writes),
            behind=self._activations(passed) if task.stream else 0.0,
            last_pass=streaming,
        )

    def _samples_of(self, pieces: Iterable[Piece]) -> int:
        return sum(self._samples(piece.number) for piece in pieces)

    def _reads(self, passes: Sequence[Iterable[tuple[int, Chunk]]]) -> tuple[Read, ...]:
        """Of passes over chunks, by the artifact that holds them."""
        sizes: dict[str, list[float]] = {}
        for index, chunks in enumerate(passes):
            for number, chunk in chunks:
                read = sizes.setdefault(chunk.artifact.path, [0.0] * len(passes))
                read[index] += self._activations(self._samples(number))
        return tuple(Read(path, size, tuple(again)) for path, (size, *again) in sizes.items())

    def state_bytes(self, compared: bool) -> float:
        """Value and AdamW's two moments in float32; with the best result so far where losses are compared."""
        numbers = 3 if self.config.optimizer.steps == "adamw" else 1
        return 4.0 * numbers * self.trained + (self.codes if compared else 0.0)

    def _gradient(self, task: GradientTask) -> Cost:
        """A worker that was at this stage before holds the model: what it reads are scales and activations."""
        samples = len(task.share.samples)
        tokens, passes = samples * self.config.data.sequence_length, 3 if task.backward else 1
        # Half of `outer` is the head's products; forward, the gradient of its inputs, and the target's.
        head = (passes if task.backward else 2) * tokens * self.shape.outer / self.device.flops
        shared = samples / -(-samples // self.passing)
        state, scales = task.scales, 4.0 * self.groups * self.shape.blocks
        codes = self.codes * self.shape.blocks
        again = not self.config.end_to_end.resident
        chunk = self._activations(self._samples(task.share.chunk))
        gradient = 4.0 * self.groups * self.shape.blocks
        return Cost(
            compute=((passes + (again and task.backward)) * self.shape.blocks * self._pass(samples) + head) / shared,
            block=None if again else -1,
            weights=codes * (1 + (again and task.backward)) + self.outer_bytes,
            reads=(
                Read(task.inputs.artifact.path, chunk),
                Read(task.targets.artifact.path, chunk),
                *((Read(state.path, scales),) if state else ()),
            ),
            writes=((task.out.path, gradient),) if task.backward else (),
        )

    def _update(self, task: UpdateTask) -> Cost:
        numbers = self.groups * self.shape.blocks
        reads = [Read(a.path, 4.0 * numbers) for a in task.gradients]
        reads += [Read(task.previous.path, 12.0 * numbers)] if task.previous else []
        return Cost(reads=tuple(reads), writes=((task.out.path, 12.0 * numbers),))

    def _evaluate(self, task: EvaluateTask) -> Cost:
        config = self.config.evaluation
        window = config.length * self.shape.hidden * self.shape.itemsize
        groups = math.ceil(config.windows / max(1, (self.config.storage.cache_mib << 20) // window))
        tokens, blocks = config.windows * config.length, task.stop - task.start
        last = task.stop == self.shape.blocks
        head = (
            last * tokens * self.shape.outer / self.device.flops
        )  # half of `outer` is the head's products, twice each
        reads = [Read(a.path, groups * self.codes) for a in task.quantized]
        reads += [Read(task.before.path, float(config.windows * window))] if task.before else []
        outer = self.outer_bytes if last or not task.before else 0.0
        return Cost(
            compute=blocks * self._forward(tokens, config.length) + head,
            # What is quantized is read as codes alone.
            weights=(0 if task.quantized else groups * blocks * self.block_bytes) + outer,
            reads=tuple(reads),
            writes=() if last else ((task.out.path, float(config.windows * window)),),
            releases=True,
        )


def numbered(pieces: Iterable[Piece], *, targets: bool = False) -> list[tuple[int, Chunk]]:
    """The chunks of their inputs, and of their targets, with their numbers."""
    return [
        (piece.number, chunk) for piece in pieces for chunk in (piece.inputs, *([piece.targets] if targets else []))
    ]


def factored(increment: Increment) -> bool:
    """Whether M lies between factors."""
    return increment.kind != "none" and not (increment.kind == "dense" and increment.rank is None)


def size_of_factors(out: int, width: int, increment: Increment) -> float:
    """Bytes of U and Vh of one weight."""
    if not factored(increment):
        return 0.0
    itemsize = increment.factors.itemsize if increment.factors else (2 if out * width >= MANY else 4)
    return float((out + width) * min(increment.rank or out, out, width) * itemsize)


def factor_work(out: int, width: int, rank: int | None) -> float:
    """Operations for the factors of one weight, as `lsi.factors` finds them. A whole decomposition of m × n takes about
    14·m·n² + 8·n³ (Golub and Van Loan, section 8.6)."""
    small, large = min(out, width), max(out, width)
    if rank is None or small <= SMALL or rank > LARGEST_PART * small:
        return 14.0 * large * small**2 + 8.0 * small**3
    size = rank + max(16, rank // 8)
    products = 2.0 * out * width * size * (2 + 2 * ITERATIONS)
    bases = 4.0 * size**2 * (out + width) * (1 + ITERATIONS)
    return products + bases + 2.0 * width * size * rank + 22.0 * size**3


def trained_numbers(config: RunConfig, shape: Shape) -> int:
    """Trained numbers in one block, without those of an equivalent transformation: one or two a channel."""
    grid = config.scheme.grid
    total = 0
    for out, width in shape.linears:
        total += config.method.increments.entries(out, width)
        total += out * width if config.method.rounding == "learned" else 0
        total += 2 * out * grid.groups(width) if config.method.clipping != "none" else 0
    return total


def placeholder_inputs(
    config: RunConfig, blocks: int, shards: list[tuple[str, tuple[str, ...], tuple[int, ...]]]
) -> Inputs:
    """What a graph is built from when only its shape matters: addresses without weights or texts behind them."""
    nowhere = Artifact("tokens", "plan", "")
    fixed: dict[str, Any] = {"tokens": nowhere, "texts": dict.fromkeys(config.evaluation.texts, nowhere)}
    names = [f"block-{block}" for block in range(blocks)]
    return Inputs(
        config=config,
        blocks=blocks,
        block_digests=names,
        outer_digest="",
        model_config_digest="",
        compute={},
        shards=shards,
        **fixed,
    )
