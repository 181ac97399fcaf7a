"""The quantized stream through blocks that do not write it while they train: chunk by chunk, as the capture goes.

Under `parallel` all blocks' states after an epoch are passed over by the same samples, one block after another, so that every
block trains on what all blocks before it have become, however many they are. A quarantined block, which has no training to
write its outputs, is passed the same way under every schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lsi.block import outputs_of
from pipeline.artifacts import Artifact, Writer
from pipeline.block_state import as_loaded, read_result
from pipeline.capture import CHUNK_FILE, write_chunk
from pipeline.worker import Chunk, Worker


@dataclass(frozen=True)
class SweepTask:
    """The outputs of a quantized block on one chunk of its inputs. `quantized`: a result, or a snapshot in the same form."""

    block: int
    inputs: Chunk
    quantized: Artifact
    out: Artifact

    @torch.no_grad()
    def __call__(self, worker: Worker) -> dict[str, Any]:
        worker.chunks.prefetch([self.inputs])  # arrives while the weights do
        if worker.swept is None or worker.swept[0] != self.quantized.path:
            worker.swept = None
            result = read_result(worker.store, self.quantized)
            worker.swept = self.quantized.path, as_loaded(worker, self.block, result)
        hidden = worker.chunks.get(self.inputs).to(worker.device)
        output = outputs_of(worker.swept[1], hidden, worker.arguments(self.block, hidden.shape[1]))
        writer = Writer(worker.store, self.out)
        write_chunk(writer, CHUNK_FILE, output)
        writer.commit({"stamp": worker.stamp()})
        return {}
