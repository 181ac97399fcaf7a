"""Training of a fine-tune: one epoch of the last blocks, all of them together, a unit.

The checkpoint's own hidden states enter; the loss is the cross entropy of the next token behind the head, on the text of choice,
so that no full-precision model is needed. The checkpoint's state and that after every epoch are measured over all samples, and
the best of them is the result: it never ends worse than it began.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lsi.block import run_block, sharing_copy
from lsi.objective import token_losses
from pipeline.artifacts import Artifact, Writer, intact
from pipeline.block_state import WEIGHTS_FILE, Best, BlockResult, Trained
from pipeline.optimize import BlockStatus, Piece, TrainTask, ending
from pipeline.tail import of_block
from pipeline.worker import Worker


@dataclass(frozen=True)
class TuneTask(TrainTask):
    """Epoch `epoch` of the blocks from `block` on. All its targets are one chunk, the tokens of all samples.

    `results`: what the last epoch makes, the result of each block; `quantized` is the first of them, as in `TrainTask`.
    """

    results: tuple[Artifact, ...] = ()
    replaceable: ClassVar[bool] = False

    def _is_done(self, worker: Worker) -> bool:
        makes = self.results or (self.state,)
        return all(intact(worker.store, artifact) for artifact in makes if artifact)

    def _chunk(self, worker: Worker, piece: Piece, following: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        inputs, tokens = super()._chunk(worker, piece, following)
        start = piece.number * worker.config.storage.chunk_samples
        return inputs, tokens[start : start + len(inputs)]

    def _or_rounded(self, worker: Worker, best: Best, pause: Callable[[], None]) -> tuple[Best, BlockStatus]:
        """After a number that was not finite: the best state, which may be the checkpoint's own."""
        return best, "non_finite"

    @torch.no_grad()
    def _measure(self, worker: Worker, result: BlockResult, stream: Writer | None, pause: Callable[[], None]) -> float:
        """Mean cross entropy as a loader would compute it, over all samples, a batch at a time: logits are large."""
        trainee = worker.trainee(self.block)
        tail = sharing_copy(trainee.module)
        result.load(tail)
        total, count, size = 0.0, 0, worker.config.optimizer.batch_size
        for _, inputs, tokens in self._pass(worker, self.passes):
            arguments = trainee.arguments(inputs.shape[1])
            for hidden, target in zip(inputs.split(size), tokens.split(size), strict=True):
                pause()
                losses = token_losses(run_block(tail, hidden, arguments), target, "next_token")
                total += float(losses.sum(dtype=torch.float64))
                count += losses.numel()
        return worker.agreed(total / count if math.isfinite(total) else math.inf)

    def _finish(
        self,
        worker: Worker,
        out: Artifact,
        trained: Trained,
        best: Best,
        status: BlockStatus,
        history: list[dict[str, Any]],
    ) -> dict[str, Any]:
        weights = (best.result or trained.initial(worker, self.block)).weights
        common = ending(trained, best, status)
        for place, artifact in enumerate(self.results):
            writer = worker.writer(artifact)
            writer.write_tensors(WEIGHTS_FILE, BlockResult(of_block(place, weights)).pack())
            # They were trained in one go, which is told once.
            writer.commit({"block": self.block + place, **common, "history": [] if place else history})
        return {"loss": common["loss"], "status": status}
