"""The whole quantized model in one worker, its scales to be trained: what the end-to-end stage computes with.

Blocks are those of the results, a byte a weight and the scales beside it, with the family's own norms and head around them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lsi.block import run_block
from lsi.equivalence import load_tensors
from lsi.objective import products_in
from lsi.scales import ScaledLinear, head_pass, replace_by_scaled
from pipeline.activations import quantize_activations
from pipeline.artifacts import Artifact, read_tensors
from pipeline.block_state import read_result
from pipeline.worker import Worker


def block_file(index: int) -> str:
    """The file of one block's tensors in an artifact of the whole model's."""
    return f"block-{index:03d}.safetensors"


class Student:
    """`results`: what every block was quantized to. `load` before the first pass."""

    def __init__(self, worker: Worker, results: tuple[Artifact, ...]) -> None:
        self.worker = worker
        self.results = results
        self.linears: list[dict[str, ScaledLinear]] = []
        self.blocks = [self._block(index, artifact) for index, artifact in enumerate(results)]
        self.around = worker.surroundings()
        self.scales: Artifact | None = None

    def _block(self, index: int, artifact: Artifact) -> nn.Module:
        worker = self.worker
        worker.leave_if_asked()
        result = read_result(worker.store, artifact)
        block = worker.new_block(index, without=result.weights.keys())
        load_tensors(block, result.folded)
        weights = {name: weight.to(worker.device) for name, weight in result.weights.items()}
        self.linears.append(replace_by_scaled(block, weights))
        quantize_activations(block, worker.linears(index), worker.config.scheme)
        return block

    def load(self, scales: Artifact | None) -> None:
        """Compute with the factors of a state; None: with the results' own scales."""
        if scales == self.scales:
            return
        for index, linears in enumerate(self.linears):
            state = read_tensors(self.worker.store, scales, block_file(index)) if scales else {}
            for name, linear in linears.items():
                linear.put(state[f"value/{name}"] if scales else torch.ones_like(linear.factor))
        self.scales = scales

    def loss(self, hidden: Tensor, target: Tensor, *, backward: bool) -> float:
        """Divergence summed over the tokens of some sequences. `hidden` enters the first block, `target` leaves the
        full-precision model's last. With `backward` the factors' gradients are added up."""
        with torch.set_grad_enabled(backward), products_in(self.worker.context.autocast, hidden.device):
            leaving = hidden.float()
            for index, block in enumerate(self.blocks):
                arguments = self.worker.arguments(index, hidden.shape[1])
                leaving = self._run(block, leaving, arguments)
        total, gradient = head_pass(self.around.head, leaving, target, backward=backward)
        if gradient is not None and math.isfinite(total):
            leaving.backward(gradient)
        return total

    def _run(self, block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        if self.worker.config.compute.checkpoint and torch.is_grad_enabled():
            result: Tensor = checkpoint(
                run_block, block, hidden, arguments, use_reentrant=False, preserve_rng_state=False
            )
            return result
        return run_block(block, hidden, arguments)

    def zero_gradients(self) -> None:
        """Before a new sum."""
        for _, _, linear in self.all_linears():
            linear.factor.grad = None

    def gradients(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Of every block's factors, by linear; zeros where no token came by."""
        for index, linears in enumerate(self.linears):
            factors = {name: linear.factor for name, linear in linears.items()}
            yield index, {name: torch.zeros_like(f) if f.grad is None else f.grad for name, f in factors.items()}

    def all_linears(self) -> Iterator[tuple[int, str, ScaledLinear]]:
        """With their blocks and names."""
        for index, linears in enumerate(self.linears):
            for name, linear in linears.items():
                yield index, name, linear
