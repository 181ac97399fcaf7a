"""Stage `optimize`: one epoch of one block a unit.

Losses are compared only on equal inputs. Under a schedule that renews a block's inputs, that is the last stretch of epochs
with the same inputs (`Comparison`): there the untrained block and the state after every epoch are measured over all samples,
and the best of them becomes the result. So a block never ends worse than it began.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lsi.block import load_quantized, round_block, run_block
from lsi.grid import QuantizedWeight
from lsi.increment import DEFAULT_LEARNING_RATE
from lsi.reconstruct import Method, Reconstruction, token_losses
from pipeline.artifacts import Artifact, Writer, read_record, read_tensors
from pipeline.capture import write_chunk
from pipeline.config import RunConfig
from pipeline.worker import Chunk, Context, Worker, stamp

STATE_FILE = "state.safetensors"
WEIGHTS_FILE = "quantized.safetensors"

Comparison = Literal["none", "begins", "goes_on"]


def stream_file(chunk: int) -> str:
    """The file of one chunk in a stream artifact."""
    return f"chunk-{chunk:05d}.safetensors"


def steps_per_epoch(config: RunConfig) -> int:
    """Optimizer steps in one pass; batches do not cross chunks."""
    size, batch = config.storage.chunk_samples, config.optimizer.batch_size
    full, rest = divmod(config.data.samples, size)
    return full * math.ceil(size / batch) + math.ceil(rest / batch)


def learning_rates(config: RunConfig) -> dict[str, float]:
    """Of each part: the configured one, or the default."""
    optimizer, total = config.optimizer, max(1, config.optimizer.epochs * steps_per_epoch(config))
    clipping = 1e-1 if config.method.clipping == "learned" else 1 / total
    return {
        "clipping": optimizer.clipping_learning_rate or clipping,
        "increment": optimizer.increment_learning_rate or DEFAULT_LEARNING_RATE,
        "rounding": optimizer.rounding_learning_rate or 1 / total,
    }


def make_method(context: Context) -> Method:
    """The algorithm's settings from the configuration."""
    config = context.config
    return Method(
        grid=config.scheme.grid,
        parts=config.method.parts(context.dtype),
        rates=learning_rates(config),
        total_steps=config.optimizer.epochs * steps_per_epoch(config),
        steps=config.optimizer.steps,
        loss=config.method.loss,
        autocast=context.autocast,
    )


def permutation(size: int, *key: object) -> list[int]:
    """A permutation of 0 … size − 1 that depends on the key alone, on every machine."""
    return sorted(range(size), key=lambda i: hashlib.sha256(repr((*key, i)).encode()).digest())


def pack_weights(weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """Flat tensors of a block's quantized linears, for one file."""
    return {
        f"{name}/{part}": tensor.cpu()
        for name, q in weights.items()
        for part, tensor in (("codes", q.codes), ("scale", q.scale), ("zero_point", q.zero_point))
    }


def unpack_weights(tensors: Mapping[str, Tensor]) -> dict[str, QuantizedWeight]:
    """The inverse of `pack_weights`."""
    names = sorted({key.rpartition("/")[0] for key in tensors})
    return {n: QuantizedWeight(tensors[f"{n}/codes"], tensors[f"{n}/scale"], tensors[f"{n}/zero_point"]) for n in names}


@dataclass(frozen=True)
class TrainTask:
    """Epoch `epoch` of block `block`. Outputs that nobody needs are None.

    `inputs` and `targets` are the chunks of the block's inputs and of the full-precision outputs. `previous` is the state
    after the epoch before, `state` the one to write, `stream` the outputs on `inputs`, `quantized` the block's result.
    """

    block: int
    epoch: int
    inputs: tuple[Chunk, ...]
    targets: tuple[Chunk, ...]
    previous: Artifact | None
    state: Artifact | None
    stream: Artifact | None
    quantized: Artifact | None
    comparison: Comparison

    def __call__(self, worker: Worker) -> dict[str, Any]:
        started = time.time()
        worker.chunks.drop_except({chunk.artifact.path for chunk in (*self.inputs, *self.targets)})
        trained, best, history = self._take_up(worker)
        if self.comparison == "begins":
            initial = self._measure(worker, trained.initial, None)
            best = Best("initial", initial, None, initial)
        mean_loss = self._train(worker, trained.reconstruction)
        stream = Writer(worker.store, self.stream) if self.stream else None
        loss = None
        if stream or best:
            now = trained.reconstruction.quantized()
            loss = self._measure(worker, now, stream)
            if best and loss < best.loss:
                best = Best(f"epoch {self.epoch}", loss, now, best.initial_loss)
            elif best and stream and self.quantized:
                # The last stream is the result's, and the result is an earlier state.
                self._measure(worker, best.weights or trained.initial, stream)
        if stream:
            stream.commit({"loss": loss and number(loss)})
        entry = {
            "epoch": self.epoch,
            "training_loss": number(mean_loss),
            "loss": None if loss is None else number(loss),
            "status": trained.reconstruction.status,
            "steps": trained.reconstruction.steps_done,
        } | stamp(worker.name, started)
        history = [*history, entry]
        if self.quantized is not None:
            assert best is not None
            return self._finish(worker, self.quantized, trained, best, history)
        return self._hand_on(worker, trained, best, history)

    def _take_up(self, worker: Worker) -> tuple[Trained, Best | None, list[dict[str, Any]]]:
        """The block after the epoch before: still held by this worker, or rebuilt from its committed state."""
        # Let go of it at once: training changes it, and a unit that fails half-way must start from the committed state.
        held, worker.held = worker.held, None
        if self.previous is None:
            return begin(worker, self.block), None, []
        record = read_record(worker.store, self.previous)
        if held is not None and held[0] == self.previous.key and record is not None:
            trained, best = held[1]
            return trained, best, record.meta["history"]
        del held
        tensors = read_tensors(worker.store, self.previous, STATE_FILE)
        assert record is not None, "read_tensors refuses what has no record"
        trained = begin(worker, self.block)
        trained.reconstruction.import_state(
            {k.removeprefix("state/"): t for k, t in tensors.items() if k.startswith("state/")}
        )
        return trained, Best.unpack(record.meta["best"], tensors), record.meta["history"]

    def _train(self, worker: Worker, reconstruction: Reconstruction) -> float:
        """One pass in an order keyed by seed, block and epoch. Returns the mean loss of its steps."""
        config = worker.config
        order = permutation(len(self.inputs), config.optimizer.seed, self.block, self.epoch)
        losses: list[float] = []
        for place, chunk in enumerate(order):
            inputs, targets = self._chunk(worker, chunk, order[place + 1 : place + 2])
            samples = permutation(len(inputs), config.optimizer.seed, self.block, self.epoch, chunk)
            for start in range(0, len(samples), config.optimizer.batch_size):
                batch = samples[start : start + config.optimizer.batch_size]
                arguments = worker.arguments(self.block, inputs.shape[1])
                losses.append(
                    reconstruction.step(inputs[batch].to(worker.device), targets[batch].to(worker.device), arguments)
                )
        return sum(losses) / len(losses)

    def _chunk(self, worker: Worker, chunk: int, following: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a chunk; the next ones begin to arrive meanwhile."""
        worker.chunks.prefetch([self.inputs[chunk], self.targets[chunk]])
        worker.chunks.prefetch(c for n in following for c in (self.inputs[n], self.targets[n]))
        return worker.chunks.get(self.inputs[chunk]), worker.chunks.get(self.targets[chunk])

    @torch.no_grad()
    def _measure(self, worker: Worker, weights: Mapping[str, QuantizedWeight], stream: Writer | None) -> float:
        """Mean loss of the block as a loader would compute it, over all samples; writes the outputs to `stream`."""
        block = copy.deepcopy(worker.block(self.block))
        load_quantized(block, weights)
        error, count = 0.0, 0
        for chunk, inputs, targets in self._pass(worker):
            output = run_block(block, inputs, worker.arguments(self.block, inputs.shape[1]))
            losses = token_losses(output, targets, worker.config.method.loss)
            error += float(losses.sum(dtype=torch.float64))
            count += losses.numel()
            if stream:
                write_chunk(stream, stream_file(chunk), output)
        return error / count if math.isfinite(error) else math.inf

    def _pass(self, worker: Worker) -> Iterator[tuple[int, Tensor, Tensor]]:
        for chunk in range(len(self.inputs)):
            inputs, targets = self._chunk(worker, chunk, [n for n in (chunk + 1,) if n < len(self.inputs)])
            yield chunk, inputs.to(worker.device), targets.to(worker.device)

    def _hand_on(
        self, worker: Worker, trained: Trained, best: Best | None, history: list[dict[str, Any]]
    ) -> dict[str, Any]:
        assert self.state is not None
        tensors = {f"state/{name}": tensor.cpu() for name, tensor in trained.reconstruction.export_state().items()}
        meta = {"history": history, "best": best.meta() if best else None}
        writer = Writer(worker.store, self.state)
        writer.write_tensors(STATE_FILE, tensors | (best.tensors() if best else {}))
        writer.commit(meta)
        worker.held = (self.state.key, (trained, best))
        return {"loss": history[-1]["loss"], "status": history[-1]["status"]}

    def _finish(
        self, worker: Worker, out: Artifact, trained: Trained, best: Best, history: list[dict[str, Any]]
    ) -> dict[str, Any]:
        meta = {
            "block": self.block,
            "status": trained.reconstruction.status,
            **best.meta(),
            "history": history,
        }
        writer = Writer(worker.store, out)
        writer.write_tensors(WEIGHTS_FILE, pack_weights(best.weights or trained.initial))
        writer.commit(meta)
        return {"loss": meta["loss"], "status": meta["status"]}


@dataclass(frozen=True)
class RoundTask:
    """Round-to-nearest of one block: what training for no epochs gives."""

    block: int
    quantized: Artifact

    def __call__(self, worker: Worker) -> dict[str, Any]:
        started = time.time()
        weights = round_block(
            worker.block(self.block), worker.linears(self.block), worker.config.scheme.grid, worker.context.dtype
        )
        writer = Writer(worker.store, self.quantized)
        writer.write_tensors(WEIGHTS_FILE, pack_weights(weights))
        entry = stamp(worker.name, started)
        writer.commit(
            {
                "block": self.block,
                "status": "ok",
                "kept": "round_to_nearest",
                "loss": None,
                "initial_loss": None,
                "history": [entry],
            }
        )
        return {}


@dataclass
class Trained:
    """A block in training, and the codes it began with."""

    reconstruction: Reconstruction
    initial: dict[str, QuantizedWeight]


@dataclass
class Best:
    """The best state on the present inputs; weights None: the initial one, which is cheap to make again."""

    name: str
    loss: float
    weights: dict[str, QuantizedWeight] | None
    initial_loss: float

    def meta(self) -> dict[str, Any]:
        return {"kept": self.name, "loss": number(self.loss), "initial_loss": number(self.initial_loss)}

    def tensors(self) -> dict[str, Tensor]:
        return {f"best/{k}": t for k, t in pack_weights(self.weights or {}).items()}

    @staticmethod
    def unpack(meta: dict[str, Any] | None, tensors: Mapping[str, Tensor]) -> Best | None:
        if meta is None:
            return None
        weights = unpack_weights({k.removeprefix("best/"): t for k, t in tensors.items() if k.startswith("best/")})
        return Best(meta["kept"], from_number(meta["loss"]), weights or None, from_number(meta["initial_loss"]))


def begin(worker: Worker, block: int) -> Trained:
    """A block at the start of its training."""
    own: nn.Module = copy.deepcopy(worker.block(block))
    reconstruction = Reconstruction(own, worker.linears(block), make_method(worker.context))
    return Trained(reconstruction, reconstruction.quantized())


def number(value: float) -> float | None:
    """JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None


def from_number(value: float | None) -> float:
    """The inverse of `number` for a loss."""
    return math.inf if value is None else value
