"""Stage `evaluate`: perplexity of the model before and after, with one block in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lsi.block import load_quantized, round_block, run_block
from pipeline.artifacts import Artifact, Writer, read_tensors
from pipeline.block_state import WEIGHTS_FILE, BlockResult
from pipeline.capture import TOKENS_FILE
from pipeline.perplexity import negative_log_likelihood, perplexity
from pipeline.skeleton import Surroundings
from pipeline.worker import Worker


def windows_at_once(worker: Worker, tokens: Tensor) -> int:
    """As many windows as have their hidden states in the memory that activations may take, and one at least."""
    size = tokens.shape[1] * worker.skeleton.model.config.hidden_size * worker.context.dtype.itemsize
    return max(1, (worker.config.storage.cache_mib << 20) // size)


Variant = Literal["full_precision", "round_to_nearest", "quantized"]


@dataclass(frozen=True)
class EvaluateTask:
    """Perplexity of one variant on one text; `quantized` holds a result for every block, or nothing for the baselines."""

    variant: Variant
    text: Artifact
    quantized: tuple[Artifact, ...]
    out: Artifact

    @torch.no_grad()
    def __call__(self, worker: Worker) -> dict[str, Any]:
        tokens = read_tensors(worker.store, self.text, TOKENS_FILE)["tokens"]
        worker.release()
        surroundings = worker.surroundings()
        total = sum(self._group(worker, surroundings, group) for group in tokens.split(windows_at_once(worker, tokens)))
        result = {"perplexity": perplexity(total, *tokens.shape)}
        Writer(worker.store, self.out).commit(result | {"stamp": worker.stamp()})
        return result

    def _group(self, worker: Worker, surroundings: Surroundings, tokens: Tensor) -> float:
        """Negative log likelihood of some windows, each block being read once for all of them."""
        batches = [window.unsqueeze(0).long().to(worker.device) for window in tokens]
        hidden = [surroundings.embed(batch) for batch in batches]
        for index in range(len(worker.skeleton)):
            worker.leave_if_asked()
            self._run_block(worker, index, hidden)
        pairs = zip(batches, hidden, strict=True)
        return sum(negative_log_likelihood(surroundings.logits(batch, states), batch) for batch, states in pairs)

    def _run_block(self, worker: Worker, index: int, hidden: list[Tensor]) -> None:
        block = self._variant_of(worker, index)
        for place, states in enumerate(hidden):
            hidden[place] = run_block(block, states, worker.arguments(index, states.shape[1]))

    def _variant_of(self, worker: Worker, index: int) -> nn.Module:
        # One block after another: nothing gained by keeping any.
        if self.variant == "quantized":
            result = BlockResult.unpack(read_tensors(worker.store, self.quantized[index], WEIGHTS_FILE))
            # At 70B the linears are 1.7 GB a block, and this unit is the last that everything waits for.
            block = worker.new_block(index, without=result.weights.keys())
            result.load(block)
            return block
        block = worker.new_block(index)
        if self.variant == "round_to_nearest":
            load_quantized(
                block, round_block(block, worker.linears(index), worker.config.scheme.grid, worker.context.dtype)
            )
        return block
