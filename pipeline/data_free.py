"""A block without training: round-to-nearest, which needs the weights alone.

It is what no epochs give, and what takes the place of a block whose training failed for good (`pipeline.quarantine`). In a
chain of blocks that train, a second unit then runs the rounded block over its inputs, for the blocks after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lsi.block import round_block
from pipeline.artifacts import Artifact, Writer
from pipeline.block_state import WEIGHTS_FILE, BlockResult, as_loaded, read_result
from pipeline.capture import write_chunk
from pipeline.optimize import stream_file
from pipeline.worker import Chunk, PassedByAll, Worker
from pipeline.write_behind import behind


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


@dataclass(frozen=True)
class StreamTask(PassedByAll):
    """The outputs of a rounded block on chunks of its inputs, by their numbers: what the next block trains on."""

    block: int
    inputs: Mapping[int, Chunk]
    quantized: Artifact
    stream: Artifact

    @torch.no_grad()
    def __call__(self, worker: Worker) -> dict[str, Any]:
        worker.chunks.drop_except({chunk.artifact.path for chunk in self.inputs.values()})
        chunks = list(self.inputs.items())
        worker.chunks.prefetch(chunk for _, chunk in chunks[:1])  # arrives while the weights do
        block = as_loaded(worker, self.block, read_result(worker.store, self.quantized))
        writer = worker.writer(self.stream)
        with behind(writer) as files:
            for place, (number, chunk) in enumerate(chunks):
                worker.leave_if_asked()
                worker.chunks.prefetch(coming for _, coming in chunks[place : place + 2])
                hidden = worker.chunks.get(chunk).to(worker.device)
                output = worker.outputs(block, hidden, worker.arguments(self.block, hidden.shape[1]))
                write_chunk(files, stream_file(number), output)
        writer.commit({"loss": None, "stamp": worker.stamp()})
        return {}
