"""Stage `optimize`: one epoch of one block, or a part of one, a unit.

Losses are compared only on equal inputs. Under a schedule that renews a block's inputs, that is the last stretch of units
with the same inputs (`Comparison`): there the untrained block and the state after every unit are measured over the same first
samples (`COMPARED_SAMPLES`), and the best of them becomes the result. So a block never ends worse than it began, on these.

A block whose training met a number that is not finite keeps the best of those states only if it was measured better than
round-to-nearest; otherwise it becomes round-to-nearest, which needs no data. Either is flagged by its status.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cluster.units import YieldUnit
from lsi.block import at_once, round_block
from lsi.equivalence import Equivalence, collect_ranges
from lsi.objective import Call, Frozen
from pipeline.artifacts import Artifact, Writer, intact, read_record, read_tensors
from pipeline.block_state import (
    WEIGHTS_FILE,
    Best,
    BlockResult,
    Trained,
    as_loaded,
    begin,
    make_method,
    number,
    own_part,
    pack_state,
    result_of,
    unpack_state,
)
from pipeline.capture import write_chunk
from pipeline.partial import Commits, Epoch
from pipeline.skeleton import Arguments
from pipeline.timetable import Comparison
from pipeline.worker import Chunk, DoneByAll, Worker
from pipeline.write_behind import behind

STATE_FILE = "state.safetensors"
# Second moments settle quickly; the clipping's start is taken from so many sequences, or the chunks that hold them.
START_SAMPLES = 8
# States of a block are compared over so many sequences, or the chunks that hold them: thousands of tokens, the same for each.
COMPARED_SAMPLES = 16

BlockStatus = Literal["ok", "non_finite", "fallback"]


def stream_file(chunk: int) -> str:
    """The file of one chunk in a stream artifact."""
    return f"chunk-{chunk:05d}.safetensors"


def permutation(size: int, *key: object) -> list[int]:
    """A permutation of 0 … size − 1 that depends on the key alone, on every machine."""
    return sorted(range(size), key=lambda i: hashlib.sha256(repr((*key, i)).encode()).digest())


def ending(trained: Trained, best: Best, status: BlockStatus) -> dict[str, Any]:
    """What a result's record says of how its training ended."""
    reason = None
    if trained.reconstruction.status != "ok":
        reason = f"not finite after {trained.reconstruction.steps_done} training steps"
    elif status != "ok":
        reason = "outputs of the quantized block are not finite"
    return {"status": status, "reason": reason, **best.meta()}


@dataclass(frozen=True)
class Piece:
    """A chunk of samples: its number among all, where a block's inputs are for it, and where its targets."""

    number: int
    inputs: Chunk
    targets: Chunk


@dataclass(frozen=True)
class TrainTask(DoneByAll):
    """Unit `unit` of block `block`, in epoch `epoch`. Outputs that nobody needs are None.

    `trains` is what it trains on, `passes` what its state is measured over and handed on for: the block's inputs, and the
    full-precision stream `ahead` blocks after it. `previous` is the state after the unit before, `state` the one to write,
    `stream` the block's own outputs on `passes`, `quantized` its result; all that it makes has the key `key`.
    """

    block: int
    unit: int
    epoch: int
    trains: tuple[Piece, ...]
    passes: tuple[Piece, ...]
    previous: Artifact | None
    state: Artifact | None
    stream: Artifact | None
    quantized: Artifact | None
    comparison: Comparison
    key: str
    ahead: int = 0
    # Whether a block whose training fails for good may be rounded without data instead.
    replaceable: ClassVar[bool] = True

    def __call__(self, worker: Worker) -> dict[str, Any]:
        members = worker.members
        if members.agree(members.leads and self._is_done(worker)):
            return {"taken_up_at_step": 0}
        read = {chunk for piece in (*self.trains, *self.passes) for chunk in (piece.inputs, piece.targets)}
        worker.chunks.drop_except({chunk.artifact.path for chunk in read})
        worker.keep_frozen(range(self.block, self.block + self.ahead + 1))
        self._await_first(worker)
        commits = Commits(worker, self.block, self.unit, self.key)
        epoch = commits.take_up() or self._begin(worker)
        taken_up = len(epoch.losses)
        worker.held = None
        if worker.config.compute.partitions:
            # It is read again to measure by the first member; none keeps it whole beside its part.
            worker.forget_block()
        try:
            self._train(worker, epoch, commits)
            if not (members.leads or worker.together):
                return self._stand_by(worker, epoch.trained)
            done = self._conclude(worker, epoch, lambda: commits.check(epoch))
        except YieldUnit:
            if members.leads:
                raise
            return {}  # it leaves with the first one, whose answer is the group's
        epoch.trained.reconstruction.attachment.dismiss()
        commits.clear()
        return done | {"taken_up_at_step": taken_up}

    def _is_done(self, worker: Worker) -> bool:
        """Whether all is committed: by a worker that was lost before it could say so."""
        makes = [artifact for artifact in (self.stream, self.state, self.quantized) if artifact]
        return all(intact(worker.store, artifact) for artifact in makes)

    def _await_first(self, worker: Worker) -> None:
        """Let the first chunk arrive while weights and state do."""
        first = self.passes[0] if self.comparison == "begins" else self._order(worker)[0]
        worker.chunks.prefetch([first.inputs, first.targets])

    def _order(self, worker: Worker) -> list[Piece]:
        """Of what is trained on, keyed by seed, block and epoch."""
        order = permutation(len(self.trains), worker.config.optimizer.seed, self.block, self.epoch)
        return [self.trains[place] for place in order]

    def _begin(self, worker: Worker) -> Epoch:
        """At the unit's first step."""
        trained, best, history = self._take_up(worker)
        if self.previous is None:
            self._start(worker, trained)
        if self.comparison == "begins" and (worker.members.leads or worker.together):
            initial = self._measure(worker, trained.initial(worker, self.block), None, worker.leave_if_asked)
            best = Best("initial", initial, None, initial)
        return Epoch(trained, best, history, [])

    def _start(self, worker: Worker, trained: Trained) -> None:
        """Let begin what has its first values from the inputs."""
        method, reconstruction = worker.config.method, trained.reconstruction
        equivalence = reconstruction.equivalence if method.equivalence_start == "smoothquant" else None
        search = method.clipping != "none" and method.clipping_start == "search" and reconstruction.fresh
        chunks = worker.config.storage.chunks_of(START_SAMPLES)
        if search:
            reconstruction.begin_clipping(self._batches_of_inputs(worker, chunks))
            trained.grids = reconstruction.grids()
        if equivalence:
            self._smooth(worker, equivalence)
        if equivalence and search:  # of other weights and inputs
            reconstruction.begin_clipping(self._batches_of_inputs(worker, chunks))

    def _smooth(self, worker: Worker, equivalence: Equivalence) -> None:
        """Start the equivalent transformation from the ranges of its inputs, as SmoothQuant does."""
        block = worker.block(self.block)
        equivalence.start(block, collect_ranges(block, equivalence.pairs, self._batches_of_inputs(worker)))

    def _batches_of_inputs(self, worker: Worker, most: int | None = None) -> Iterator[tuple[Tensor, Arguments]]:
        """The inputs of the first so many chunks that are trained on, with what the block is called with besides; None: of all."""
        for inputs in self._inputs(worker, self.trains[:most]):
            worker.leave_if_asked()
            yield inputs, worker.arguments(self.block, inputs.shape[1])

    def _take_up(self, worker: Worker) -> tuple[Trained, Best | None, list[dict[str, Any]]]:
        """The block after the unit before: still held by this worker, or rebuilt from its committed state."""
        # Let go of it at once: training changes it, and a unit that fails half-way must start from the committed state.
        held, worker.held = worker.held, None
        record = read_record(worker.store, self.previous) if self.previous else None
        holds = held is not None and record is not None and self.previous is not None and held[0] == self.previous.key
        if worker.members.agree(holds):
            assert held is not None, "a group holds what its first member holds"
            assert record is not None, "what was held was committed"
            trained, best = held[1]
            return trained, best, record.meta["history"]
        del held  # before there is another block beside it
        if self.previous is None:
            return begin(worker, self.block), None, []
        tensors = read_tensors(worker.store, self.previous, STATE_FILE, own_part(worker))
        assert record is not None, "read_tensors refuses what has no record"
        return *unpack_state(worker, self.block, tensors, record.meta["best"]), record.meta["history"]

    def _frozen(self, worker: Worker, sequence_length: int) -> Frozen:
        """The full-precision blocks that the loss runs."""

        def call(index: int) -> Call:
            return Call(worker.frozen_block(index), worker.arguments(index, sequence_length))

        itself = call(self.block) if worker.config.method.quantized_stream_loss else None
        return Frozen(tuple(call(self.block + 1 + n) for n in range(self.ahead)), itself)

    def _train(self, worker: Worker, epoch: Epoch, commits: Commits) -> None:
        """What is left of the steps."""
        order = self._order(worker)
        done = len(epoch.losses)
        for place, piece in enumerate(order):
            batches = self._batches(worker, piece.number)[done:]
            done = max(0, done - len(self._batches(worker, piece.number)))
            if not batches:
                continue
            inputs, targets = self._chunk(worker, piece, order[place + 1 : place + 2])
            arguments = worker.trainee_arguments(self.block, inputs.shape[1])
            frozen = self._frozen(worker, inputs.shape[1])
            for batch in batches:
                commits.check(epoch)
                pair = inputs[batch].to(worker.device), targets[batch].to(worker.device)
                epoch.losses.append(epoch.trained.reconstruction.step(*pair, arguments, frozen))

    def _batches(self, worker: Worker, chunk: int) -> list[list[int]]:
        """The samples of every step on a chunk, in the order in which they are taken."""
        config = worker.config
        size = min(config.storage.chunk_samples, config.data.samples - chunk * config.storage.chunk_samples)
        samples = permutation(size, config.optimizer.seed, self.block, self.epoch, chunk)
        step = config.optimizer.batch_size
        return [samples[start : start + step] for start in range(0, size, step)]

    def _chunk(self, worker: Worker, piece: Piece, following: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a chunk; the next ones begin to arrive meanwhile."""
        worker.chunks.prefetch(chunk for p in (piece, *following) for chunk in (p.inputs, p.targets))
        return worker.chunks.get(piece.inputs), worker.chunks.get(piece.targets)

    def _conclude(self, worker: Worker, epoch: Epoch, pause: Callable[[], None]) -> dict[str, Any]:
        """Measure the trained block, choose, and commit. Leaves `epoch` as it is, so that it can be committed meanwhile."""
        trained, best = epoch.trained, epoch.best
        stream = worker.writer(self.stream) if self.stream else None
        loss = None
        status: BlockStatus = trained.reconstruction.status
        if stream or best:
            now = result_of(trained.reconstruction, worker.context.dtype)
            loss = self._measure(worker, now, stream, pause)
            if best and self.quantized:
                best = self._with_few_clipped(worker, trained, best, pause)
            if best and loss < best.loss:
                few = trained.reconstruction.untrained_experts()
                best = Best(f"epoch {self.epoch}", loss, now, best.initial_loss, few)
            if best and self.quantized and not (status == "ok" and math.isfinite(best.loss)):
                best, status = self._or_rounded(worker, best, pause)
            if best and stream and self.quantized and best.result is not now:
                # The last stream is the result's, and the result is another state.
                held = best.result or trained.initial(worker, self.block)
                if not math.isfinite(self._measure(worker, held, stream, pause)) and status == "ok":
                    status = "non_finite"
        if stream:
            stream.commit({"loss": loss and number(loss), "stamp": worker.stamp()})
        history = [*epoch.history, self._entry(worker, epoch, loss)]
        if self.quantized is not None:
            assert best is not None
            return self._finish(worker, self.quantized, trained, best, status, history)
        return self._hand_on(worker, trained, best, history)

    def _with_few_clipped(self, worker: Worker, trained: Trained, best: Best, pause: Callable[[], None]) -> Best:
        """The initial result, if that is the best so far, with experts that saw few tokens clipped without data."""
        few = trained.reconstruction.untrained_experts()
        if best.result is not None or not few:
            return best
        clipped = trained.initial(worker, self.block)
        loss = self._measure(worker, clipped, None, pause)
        return replace(
            best, name="initial, few-token experts clipped", loss=loss, result=clipped, untrained_experts=few
        )

    def _or_rounded(self, worker: Worker, best: Best, pause: Callable[[], None]) -> tuple[Best, BlockStatus]:
        """After a number that was not finite: the best state if it is better than round-to-nearest, else that."""
        scheme, dtype = worker.config.scheme, worker.context.dtype
        weights = round_block(worker.block(self.block), worker.linears(self.block), scheme.grid, dtype)
        rounded = BlockResult(weights)
        loss = self._measure(worker, rounded, None, pause)
        if best.loss < loss:
            return best, "non_finite"
        return replace(best, name="round_to_nearest", loss=loss, result=rounded, untrained_experts=[]), "fallback"

    def _entry(self, worker: Worker, epoch: Epoch, loss: float | None) -> dict[str, Any]:
        """What the reports tell of this unit."""
        return {
            "unit": self.unit,
            "epoch": self.epoch,
            "training_loss": number(sum(epoch.losses) / len(epoch.losses)),
            "loss": None if loss is None else number(loss),
            "status": epoch.trained.reconstruction.status,
            "steps": epoch.trained.reconstruction.steps_done,
        } | worker.stamp()

    @torch.no_grad()
    def _measure(
        self,
        worker: Worker,
        result: BlockResult,
        stream: Writer | None,
        pause: Callable[[], None],
    ) -> float:
        """Mean loss of the block as a loader would compute it, over the samples that states are compared by; writes its own
        outputs for all that it passes to `stream`, and is infinite where one of these is not finite.

        `pause` is called between chunks, and may raise.
        """
        block = as_loaded(worker, self.block, result)
        compared = worker.config.storage.chunks_of(COMPARED_SAMPLES)
        error, count = 0.0, 0
        objective = make_method(worker.context).objective
        with behind(stream) if stream else nullcontext() as files:
            for piece, inputs, targets in self._pass(worker, self.passes[:compared]):
                pause()
                arguments, frozen = worker.arguments(self.block, inputs.shape[1]), self._frozen(worker, inputs.shape[1])
                outputs = worker.outputs(block, inputs, arguments)
                for output, some, wanted in zip(*map(at_once, (outputs, inputs, targets)), strict=True):
                    losses = objective.losses(output, some, wanted, frozen)
                    error += float(losses.sum(dtype=torch.float64))
                    count += losses.numel()
                if files:
                    write_chunk(files, stream_file(piece.number), outputs)
            if files:
                rest = self.passes[compared:]
                for piece, inputs in zip(rest, self._inputs(worker, rest), strict=True):
                    pause()
                    leaving = worker.outputs(block, inputs, worker.arguments(self.block, inputs.shape[1]))
                    error = error if leaving.isfinite().all() else math.inf
                    write_chunk(files, stream_file(piece.number), leaving)
        return worker.agreed(error / count if math.isfinite(error) else math.inf)

    def _pass(self, worker: Worker, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        for place, piece in enumerate(pieces):
            inputs, targets = self._chunk(worker, piece, pieces[place + 1 : place + 2])
            yield piece, inputs.to(worker.device), targets.to(worker.device)

    def _inputs(self, worker: Worker, pieces: Sequence[Piece]) -> Iterator[Tensor]:
        """Where targets are not asked for; the next ones begin to arrive meanwhile."""
        for place, piece in enumerate(pieces):
            worker.chunks.prefetch(p.inputs for p in pieces[place : place + 2])
            yield worker.chunks.get(piece.inputs).to(worker.device)

    def _hand_on(
        self, worker: Worker, trained: Trained, best: Best | None, history: list[dict[str, Any]]
    ) -> dict[str, Any]:
        assert self.state is not None
        writer = worker.writer(self.state)
        writer.write_tensors(STATE_FILE, pack_state(trained, best))
        writer.commit({"history": history, "best": best.meta() if best else None})
        worker.held = (self.state.key, (trained, best))
        return {"loss": history[-1]["loss"], "status": history[-1]["status"]}

    def _stand_by(self, worker: Worker, trained: Trained) -> dict[str, Any]:
        """Of a group's others that hold parts: the first one alone measures, chooses and commits. What it reads they serve."""
        trained.reconstruction.attachment.follow()
        worker.held = (self.state.key, (trained, None)) if self.state else None
        return {}

    def _finish(
        self,
        worker: Worker,
        out: Artifact,
        trained: Trained,
        best: Best,
        status: BlockStatus,
        history: list[dict[str, Any]],
    ) -> dict[str, Any]:
        meta = {"block": self.block, **ending(trained, best, status), "history": history}
        result = best.result or trained.initial(worker, self.block)
        if result.folded:
            meta["folded"] = sorted(result.folded)
        writer = worker.writer(out)
        writer.write_tensors(WEIGHTS_FILE, result.pack())
        writer.commit(meta)
        return {"loss": meta["loss"], "status": status}
