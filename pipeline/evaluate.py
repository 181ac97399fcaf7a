"""Stage `evaluate`: perplexity of the model before and after, with one block in memory at a time.

The quantized model's is found in parts of some blocks each: only the last part waits for the last block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lsi.block import load_quantized, round_block, run_block
from pipeline.activations import quantize_activations
from pipeline.artifacts import Artifact, Writer, read_tensors
from pipeline.block_state import read_result
from pipeline.capture import TOKENS_FILE, write_chunk
from pipeline.perplexity import negative_log_likelihood, perplexity
from pipeline.skeleton import Surroundings
from pipeline.worker import Worker


def windows_at_once(worker: Worker, tokens: Tensor) -> int:
    """As many windows as have their hidden states in the memory that activations may take, and one at least."""
    size = tokens.shape[1] * worker.skeleton.model.config.hidden_size * worker.context.dtype.itemsize
    return max(1, (worker.config.storage.cache_mib << 20) // size)


def window_file(window: int) -> str:
    """The file of one window's hidden states."""
    return f"window-{window:05d}.safetensors"


def _likelihood(surroundings: Surroundings, batches: list[Tensor], hidden: list[Tensor]) -> float:
    """Negative log likelihood of some windows that have passed all blocks."""
    pairs = zip(batches, hidden, strict=True)
    return sum(negative_log_likelihood(surroundings.logits(batch, states), batch) for batch, states in pairs)


# checkpoint and tuned: of a fine-tune, before and after.
Variant = Literal["full_precision", "round_to_nearest", "quantized", "checkpoint", "tuned"]


@dataclass(frozen=True)
class EvaluateTask:
    """Perplexity of one variant on one text, or a part of the way there: blocks `start` … `stop` − 1.

    `quantized` holds the results of these blocks, or nothing where they are as the source has them or rounded. `before` has the hidden states that enter
    block `start`, a file for each window; None: begin with the tokens. The last part commits the perplexity to `out`, the
    others the hidden states that leave their blocks.
    """

    variant: Variant
    text: Artifact
    start: int
    stop: int
    quantized: tuple[Artifact, ...]
    before: Artifact | None
    out: Artifact

    @torch.no_grad()
    def __call__(self, worker: Worker) -> dict[str, Any]:
        tokens = read_tensors(worker.store, self.text, TOKENS_FILE)["tokens"]
        worker.release()
        last = self.stop == len(worker.skeleton)
        surroundings = worker.surroundings() if last or self.before is None else None
        writer, total, size = Writer(worker.store, self.out), 0.0, windows_at_once(worker, tokens)
        for first in range(0, len(tokens), size):
            batches = [window.unsqueeze(0).long().to(worker.device) for window in tokens[first : first + size]]
            hidden = self._through(worker, surroundings, batches, first)
            if last and surroundings:
                total += _likelihood(surroundings, batches, hidden)
            else:
                for place, states in enumerate(hidden):
                    write_chunk(writer, window_file(first + place), states)
        result = {"perplexity": perplexity(total, *tokens.shape)} if last else {}
        writer.commit(result | {"stamp": worker.stamp()})
        return result

    def _through(
        self, worker: Worker, surroundings: Surroundings | None, batches: list[Tensor], first: int
    ) -> list[Tensor]:
        """Some windows behind this part's blocks, each block being read once for all of them."""
        if self.before is not None:
            files = [window_file(first + place) for place in range(len(batches))]
            hidden = [read_tensors(worker.store, self.before, file)["hidden"].to(worker.device) for file in files]
        else:
            assert surroundings is not None
            hidden = [surroundings.embed(batch) for batch in batches]
        for index in range(self.start, self.stop):
            worker.leave_if_asked()
            self._run_block(worker, index, hidden)
        return hidden

    def _run_block(self, worker: Worker, index: int, hidden: list[Tensor]) -> None:
        block = self._variant_of(worker, index)
        for place, states in enumerate(hidden):
            hidden[place] = run_block(block, states, worker.arguments(index, states.shape[1]))

    def _variant_of(self, worker: Worker, index: int) -> nn.Module:
        # One block after another: nothing gained by keeping any.
        block = self._weights_of(worker, index)
        if self.quantized or self.variant == "round_to_nearest":
            quantize_activations(block, worker.linears(index), worker.config.scheme)
        return block

    def _weights_of(self, worker: Worker, index: int) -> nn.Module:
        if self.quantized:
            result = read_result(worker.store, self.quantized[index - self.start])
            # At 70B the linears are 1.7 GB a block, and this unit is the last that everything waits for.
            block = worker.new_block(index, without=result.weights.keys())
            result.load(block)
            return block
        block = worker.new_block(index)
        if self.variant == "round_to_nearest":
            grid, dtype = worker.config.scheme.grid, worker.context.dtype
            load_quantized(block, round_block(block, worker.linears(index), grid, dtype))
        return block
