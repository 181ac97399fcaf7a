"""Stage `evaluate`: perplexity of the model before and after, with one block in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lsi.block import load_quantized, round_block, run_block
from pipeline.artifacts import Artifact, Writer, read_tensors
from pipeline.optimize import WEIGHTS_FILE, unpack_weights
from pipeline.perplexity import negative_log_likelihood, perplexity
from pipeline.worker import Worker

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
        tokens = read_tensors(worker.store, self.text, "tokens.safetensors")["tokens"]
        surroundings = worker.surroundings()
        hidden = [surroundings.embed(window.unsqueeze(0).long().to(worker.device)) for window in tokens]
        for index in range(len(worker.skeleton)):
            self._run_block(worker, index, hidden)
        total = 0.0
        for window, states in zip(tokens, hidden, strict=True):
            batch = window.unsqueeze(0).long().to(worker.device)
            total += negative_log_likelihood(surroundings.logits(batch, states), batch)
        result = {"perplexity": perplexity(total, *tokens.shape)}
        Writer(worker.store, self.out).commit(result)
        return result

    def _run_block(self, worker: Worker, index: int, hidden: list[Tensor]) -> None:
        block = self._variant_of(worker, index)
        for place, states in enumerate(hidden):
            hidden[place] = run_block(block, states, worker.arguments(index, states.shape[1]))

    def _variant_of(self, worker: Worker, index: int) -> nn.Module:
        # One block after another: nothing gained by keeping any.
        block = worker.new_block(index)
        if self.variant == "round_to_nearest":
            load_quantized(block, round_block(block, worker.linears(index), worker.grid, worker.context.dtype))
        elif self.variant == "quantized":
            load_quantized(block, unpack_weights(read_tensors(worker.store, self.quantized[index], WEIGHTS_FILE)))
        return block
