"""A block without training: round-to-nearest, which needs the weights alone.

It is what no epochs give, and what takes the place of a block whose training failed for good (`pipeline.quarantine`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lsi.block import round_block
from pipeline.artifacts import Artifact, Writer
from pipeline.block_state import WEIGHTS_FILE, BlockResult
from pipeline.worker import Worker


@dataclass(frozen=True)
class RoundTask:
    """Round-to-nearest of one block; `quarantined` says why, where it takes the place of training."""

    block: int
    quantized: Artifact
    quarantined: str | None = None

    def __call__(self, worker: Worker) -> dict[str, Any]:
        weights = round_block(
            worker.block(self.block), worker.linears(self.block), worker.config.scheme.grid, worker.context.dtype
        )
        writer = Writer(worker.store, self.quantized)
        writer.write_tensors(WEIGHTS_FILE, BlockResult(weights).pack())
        status = "ok" if self.quarantined is None else "quarantined"
        writer.commit(
            {
                "block": self.block,
                "status": status,
                "reason": self.quarantined,
                "kept": "round_to_nearest",
                "loss": None,
                "initial_loss": None,
                "history": [worker.stamp()],
            }
        )
        return {"status": status}
