"""A block in training: its algorithm's settings, its best state so far, and how both are written down."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lsi.grid import QuantizedWeight
from lsi.increment import DEFAULT_LEARNING_RATE
from lsi.reconstruct import Method, Reconstruction
from pipeline.config import RunConfig
from pipeline.worker import Context, Worker

WEIGHTS_FILE = "quantized.safetensors"


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
        first_token=config.method.first_token,
        autocast=context.autocast,
    )


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
        weights = unpack_weights(under("best/", tensors))
        return Best(meta["kept"], from_number(meta["loss"]), weights or None, from_number(meta["initial_loss"]))


def begin(worker: Worker, block: int) -> Trained:
    """A block at the start of its training."""
    own: nn.Module = copy.deepcopy(worker.block(block))
    reconstruction = Reconstruction(own, worker.linears(block), make_method(worker.context))
    return Trained(reconstruction, reconstruction.quantized())


def pack_state(trained: Trained, best: Best | None) -> dict[str, Tensor]:
    """All that training goes on from. Views where the block is on the CPU: write them before the next step."""
    state = {f"state/{name}": tensor.cpu() for name, tensor in trained.reconstruction.export_state().items()}
    return state | (best.tensors() if best else {})


def unpack_state(
    worker: Worker, block: int, tensors: Mapping[str, Tensor], best: dict[str, Any] | None
) -> tuple[Trained, Best | None]:
    """The inverse of `pack_state`; `best` is what `Best.meta` gave."""
    trained = begin(worker, block)
    trained.reconstruction.import_state(under("state/", tensors))
    return trained, Best.unpack(best, tensors)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def number(value: float) -> float | None:
    """JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None


def from_number(value: float | None) -> float:
    """The inverse of `number` for a loss."""
    return math.inf if value is None else value
