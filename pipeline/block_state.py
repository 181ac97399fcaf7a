"""A block in training: its algorithm's settings, its best state so far, and how both are written down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lsi.block import get_linear, load_quantized, sharing_copy
from lsi.engine import Later
from lsi.equivalence import load_tensors
from lsi.grid import QuantizedWeight, clip_to_weights, quantize, widened
from lsi.increment import DEFAULT_LEARNING_RATE
from lsi.linear import Clipping
from lsi.reconstruct import Method, Reconstruction
from pipeline.activations import quantize_activations
from pipeline.artifacts import Artifact, read_tensors
from pipeline.config import RunConfig
from pipeline.factors import stored_factors
from pipeline.partition import bounds
from pipeline.store import Store
from pipeline.tensors import Part, TensorEntry, all_of
from pipeline.worker import Context, Worker

WEIGHTS_FILE = "quantized.safetensors"
# Of log scales and shifts, for both kinds of steps: OmniQuant's. From the identity 2e-2 is better (benchmarks/results).
EQUIVALENCE_LEARNING_RATE = 5e-3
# Of the way that clipping bounds need from the full range in signed steps: from where the search lets them begin (benchmarks/results).
WAY_FROM_SEARCH = 0.25
# Signed steps in which learned rounding can go half a grid step, all in one direction (benchmarks/results).
ROUNDING_STEPS = 32


def steps_per_epoch(config: RunConfig) -> int:
    """Optimizer steps in one pass; batches do not cross chunks."""
    size, batch = config.storage.chunk_samples, config.optimizer.batch_size
    full, rest = divmod(config.data.samples, size)
    return full * math.ceil(size / batch) + math.ceil(rest / batch)


def clipping_rate(clipping: Clipping, start: str, steps: int) -> float:
    """The default learning rate of clipping bounds that begin by the search or at the whole range, for so many steps of a block."""
    return 1e-1 if clipping == "learned" else (WAY_FROM_SEARCH if start == "search" else 1) / steps


def rounding_rate(steps: int) -> float:
    """The default learning rate of rounding offsets, in grid steps, for so many steps of a block.

    Signs of small batches' gradients are noisy: of many steps, most cancel, and what is left grows with the root of their number.
    """
    return 1 / math.sqrt(ROUNDING_STEPS * steps)


def learning_rates(config: RunConfig) -> dict[str, float]:
    """Of each part: the configured one, or the default."""
    optimizer, steps = config.optimizer, steps_per_epoch(config)
    total = max(1, optimizer.epochs * steps)
    # What joins late has its way to go in fewer steps.
    joined = max(1, (optimizer.epochs - optimizer.warm_epochs) * steps)
    method = config.method
    if not config.is_finetune:
        clipping = clipping_rate(method.clipping, method.clipping_start, total)
        increment, rounding = DEFAULT_LEARNING_RATE, rounding_rate(joined)
    else:
        # Its scales were made with care, and larger increments cost other texts more than they bring on its own: in short
        # runs, too (benchmarks/results). Codes begin on grid points, which only moves of more than half a step leave. Half of
        # a sigmoid's slope is lost.
        clipping = min(1.5e-3, 0.2 / total) * (2 if method.clipping == "learned" else 1)
        increment, rounding = min(1.5e-2, 2 / joined), 2 / joined
    return {
        "clipping": optimizer.clipping_learning_rate or clipping,
        "increment": optimizer.increment_learning_rate or increment,
        "rounding": optimizer.rounding_learning_rate or rounding,
        "equivalence": optimizer.equivalence_learning_rate or EQUIVALENCE_LEARNING_RATE,
    }


def make_method(context: Context) -> Method:
    """The algorithm's settings from the configuration."""
    config = context.config
    return Method(
        grid=config.scheme.grid,
        parts=config.method.parts(context.dtype, context.autocast),
        rates=learning_rates(config),
        total_steps=config.optimizer.epochs * steps_per_epoch(config),
        steps=config.optimizer.steps,
        loss="next_token" if config.is_finetune else config.method.loss,
        first_token=config.method.first_token,
        autocast=context.autocast,
        equivalence=config.method.equivalence_kinds(config.scheme),
        shifts=config.method.shifts,
        # What a fine-tune began with was made with data, and is kept rather than clipped without.
        fewest_tokens=0 if config.is_finetune else config.method.expert_tokens * config.optimizer.epochs,
        quantized_stream=config.method.quantized_stream_loss,
        warm_steps=config.optimizer.warm_epochs * steps_per_epoch(config),
        recompute=config.compute.recompute,
        checkpoint=config.compute.checkpoint,
        micro_batch=config.compute.micro_batch,
    )


@dataclass(frozen=True)
class BlockResult:
    """What a block becomes, by names within it: its quantized linears, and the other tensors that an equivalent
    transformation has changed, in the dtype they are stored in. All else stays as it is in the model."""

    weights: Mapping[str, QuantizedWeight]
    folded: Mapping[str, Tensor] = field(default_factory=dict)

    def load(self, block: nn.Module) -> None:
        """Give it to a plain block: what a loader of the checkpoint computes with."""
        load_tensors(block, self.folded)
        load_quantized(block, self.weights)

    def tensors(self) -> Iterator[Tensor]:
        """All of it, in an order of its own."""
        for _, weight in sorted(self.weights.items()):
            yield from (weight.codes, weight.scale, weight.zero_point)
        yield from (tensor for _, tensor in sorted(self.folded.items()))

    def pack(self) -> dict[str, Tensor]:
        """Flat tensors, for one file: NAME/codes, NAME/scale, NAME/zero_point of a linear, and NAME/folded."""
        packed = {
            f"{name}/{part}": tensor.cpu()
            for name, q in self.weights.items()
            for part, tensor in (("codes", q.codes), ("scale", q.scale), ("zero_point", q.zero_point))
        }
        return packed | {f"{name}/folded": tensor.cpu() for name, tensor in self.folded.items()}

    @staticmethod
    def unpack(tensors: Mapping[str, Tensor]) -> BlockResult:
        """The inverse of `pack`."""
        linears = sorted(key.removesuffix("/codes") for key in tensors if key.endswith("/codes"))
        parts = ("codes", "scale", "zero_point")
        weights = {name: QuantizedWeight(*(tensors[f"{name}/{part}"] for part in parts)) for name in linears}
        folded = {key.removesuffix("/folded"): t for key, t in tensors.items() if key.endswith("/folded")}
        return BlockResult(weights, folded)


def read_result(store: Store, artifact: Artifact) -> BlockResult:
    """A committed result. Raises CorruptArtifactError."""
    return BlockResult.unpack(read_tensors(store, artifact, WEIGHTS_FILE))


def as_loaded(worker: Worker, block: int, result: BlockResult) -> nn.Module:
    """A block of the caller's own that computes as a loader of the checkpoint would."""
    own = sharing_copy(worker.block(block))
    if worker.together:
        # Another processor of a group may have rounded otherwise, and all are to compute with what is committed.
        worker.members.take_over(result.tensors())
    result.load(own)
    quantize_activations(own, worker.linears(block), worker.config.scheme)
    return own


def result_of(reconstruction: Reconstruction, dtype: torch.dtype) -> BlockResult:
    """The present state of a block in training; what is not quantized is rounded to the dtype it is stored in."""
    folded = {name: tensor.to(dtype) for name, tensor in reconstruction.folded().items()}
    return BlockResult(reconstruction.quantized(), folded)


@dataclass
class Trained:
    """A block in training, and the grids of the linears it began with: before any step, and before anything is folded."""

    reconstruction: Reconstruction
    grids: Mapping[str, tuple[Tensor, Tensor]]

    def initial(self, worker: Worker, block: int) -> BlockResult:
        """The result it began with. Its codes are as many as the weights, and soon made again: they are not kept.

        Of experts that have seen too few tokens by now it is clipped without data.
        """
        trainee, method = worker.trainee(block), self.reconstruction.method
        if trainee.starts:
            return BlockResult(trainee.starts)
        weights, few = {}, set(self.reconstruction.untrained_experts())
        for name, grid in self.grids.items():
            weight = widened(get_linear(trainee.module, name).weight)
            if self.reconstruction.experts.get(name) in few:
                weights[name] = clip_to_weights(weight, method.grid, method.parts.scale_dtype)
                continue
            # Those that were read from storage are on the CPU.
            scale, zero = (part.to(weight.device).float() for part in grid)
            weights[name] = quantize(weight, scale, zero, method.grid, method.parts.scale_dtype)
        return BlockResult(weights)


@dataclass
class Best:
    """The best state on the present inputs; result None: the initial one, which is cheap to make again.

    untrained_experts: those that had seen too few tokens for it, and are clipped without data.
    """

    name: str
    loss: float
    result: BlockResult | None
    initial_loss: float
    untrained_experts: list[str] = field(default_factory=list)

    def meta(self) -> dict[str, Any]:
        losses = {"loss": number(self.loss), "initial_loss": number(self.initial_loss)}
        return {"kept": self.name, **losses, "untrained_experts": self.untrained_experts}

    def tensors(self) -> dict[str, Tensor]:
        return {f"best/{k}": t for k, t in self.result.pack().items()} if self.result else {}

    @staticmethod
    def unpack(meta: dict[str, Any] | None, tensors: Mapping[str, Tensor]) -> Best | None:
        if meta is None:
            return None
        packed = under("best/", tensors)
        result = BlockResult.unpack(packed) if packed else None
        losses = from_number(meta["loss"]), from_number(meta["initial_loss"])
        return Best(meta["kept"], losses[0], result, losses[1], meta["untrained_experts"])


def begin(worker: Worker, block: int) -> Trained:
    """A block at the start of its training."""
    reconstruction = _reconstruction(worker, block)
    return Trained(reconstruction, reconstruction.grids())


def _reconstruction(worker: Worker, block: int) -> Reconstruction:
    trainee = worker.trainee(block)
    reconstruction = Reconstruction(
        sharing_copy(trainee.module).to(worker.home),
        trainee.linears,
        make_method(worker.context),
        trainee.starts,
        stored_factors(worker.factors, worker.config.compute),
        worker.engine,
    )
    quantize_activations(reconstruction.block, trainee.linears, worker.config.scheme)
    return reconstruction


def pack_state(trained: Trained, best: Best | None) -> dict[str, Tensor | Later]:
    """All that training goes on from. Views where the block is on the CPU: write them before the next step."""
    state: dict[str, Tensor | Later] = {}
    for name, later in trained.reconstruction.export_lazily().items():
        state[f"state/{name}"] = replace(later, make=partial(_on_cpu, later))
    for name, (scale, zero) in trained.grids.items():
        state |= {f"grid/{name}/scale": scale.cpu(), f"grid/{name}/zero": zero.cpu()}
    return state | (best.tensors() if best else {})


def own_part(worker: Worker) -> Part:
    """What a process reads of a packed state: of a group that holds a block in parts, its part of every trained tensor."""
    if not worker.config.compute.partitions:
        return all_of
    rank, size = worker.members.membership.rank, worker.members.size

    def part(name: str, entry: TensorEntry) -> TensorEntry:
        if not name.startswith(("state/value/", "state/first/", "state/second/")):
            return entry
        start, stop = bounds(math.prod(entry.shape), rank, size)
        width = entry.dtype.itemsize
        return TensorEntry(entry.dtype, (stop - start,), entry.start + start * width, entry.start + stop * width)

    return part


def _on_cpu(later: Later) -> Tensor:
    return later.make().cpu()


def unpack_state(
    worker: Worker, block: int, tensors: dict[str, Tensor], best: dict[str, Any] | None
) -> tuple[Trained, Best | None]:
    """The inverse of `pack_state`; `best` is what `Best.meta` gave. Takes the state out of `tensors`, and lets go of it.

    Of the state its `own_part` is enough.
    """
    reconstruction, grids = _reconstruction(worker, block), under("grid/", tensors)
    began = {name: (grids[f"{name}/scale"], grids[f"{name}/zero"]) for name in reconstruction.linears}
    names = [name for name in tensors if name.startswith("state/")]
    reconstruction.import_state({name.removeprefix("state/"): tensors.pop(name) for name in names})
    return Trained(reconstruction, began), Best.unpack(best, tensors)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def number(value: float) -> float | None:
    """JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None


def from_number(value: float | None) -> float:
    """The inverse of `number` for a loss."""
    return math.inf if value is None else value
