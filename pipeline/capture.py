"""Stage `capture`: full-precision hidden states at every block boundary, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.artifacts import Artifact, Writer, read_tensors
from pipeline.worker import Chunk, PassedByAll, Worker
from pipeline.write_behind import Behind

CHUNK_FILE = "hidden.safetensors"
TOKENS_FILE = "tokens.safetensors"


def write_chunk(writer: Writer | Behind, file: str, hidden: Tensor) -> None:
    writer.write_tensors(file, {"hidden": hidden.cpu()})


@dataclass(frozen=True)
class EmbedTask:
    """Boundary 0: samples `start` … `stop` − 1 of the calibration tokens through the embeddings."""

    tokens: Artifact
    start: int
    stop: int
    out: Artifact

    def __call__(self, worker: Worker) -> dict[str, Any]:
        tokens = read_tensors(worker.store, self.tokens, TOKENS_FILE)["tokens"][self.start : self.stop]
        hidden = worker.surroundings().embed(tokens.long().to(worker.device))
        writer = Writer(worker.store, self.out)
        write_chunk(writer, CHUNK_FILE, hidden)
        writer.commit({"stamp": worker.stamp()})
        return {}


@dataclass(frozen=True)
class CaptureTask(PassedByAll):
    """Boundary `block` + 1 of one chunk, from boundary `block` of the same chunk."""

    block: int
    inputs: Chunk
    out: Artifact

    @torch.no_grad()
    def __call__(self, worker: Worker) -> dict[str, Any]:
        worker.chunks.prefetch([self.inputs])  # arrives while the weights do
        block = worker.block(self.block)
        hidden = worker.chunks.get(self.inputs).to(worker.device)
        output = worker.outputs(block, hidden, worker.arguments(self.block, hidden.shape[1]))
        writer = worker.writer(self.out)
        write_chunk(writer, CHUNK_FILE, output)
        writer.commit({"stamp": worker.stamp()})
        return {}
