"""The whole quantized model in one worker, its scales to be trained: what the end-to-end stage computes with.

Blocks are those of the results, a byte a weight and the scales beside it, with the family's own norms and head around them. They
are kept (`end_to_end.resident`), or read again for every pass: then memory is one block's, whatever the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lsi.block import run_block
from lsi.equivalence import load_tensors
from lsi.objective import products_in
from lsi.scales import ScaledLinear, head_pass, replace_by_scaled
from pipeline.activations import quantize_activations
from pipeline.artifacts import Artifact, read_meta, read_tensors
from pipeline.block_state import read_result
from pipeline.mixture import has_mixture
from pipeline.worker import Worker

# Of one sequence: hidden states that enter the first block, and those that leave the full-precision model's last.
Ends = tuple[Tensor, Tensor]
Write = Callable[[int, dict[str, Tensor]], None]


def block_file(index: int) -> str:
    """The file of one block's factors or gradients in an artifact of the whole model's."""
    return f"block-{index:03d}.safetensors"


@dataclass(frozen=True)
class Opened:
    """A block, and its quantized linears by name."""

    block: nn.Module
    linears: dict[str, ScaledLinear]

    def put(self, factors: dict[str, Tensor] | None) -> None:
        """Compute with a state's factors, or with the result's own scales."""
        for name, linear in self.linears.items():
            linear.put(factors[f"value/{name}"] if factors else torch.ones_like(linear.factor))

    def freeze(self, experts: Collection[str]) -> None:
        """Leave the scales of these experts as they are."""
        for name, linear in self.linears.items():
            linear.factor.requires_grad_(name.rpartition(".")[0] not in experts)

    def take_gradients(self) -> dict[str, Tensor]:
        """Of its factors, which have none afterwards; zeros where no token came by, or that are frozen."""
        found = {}
        for name, linear in self.linears.items():
            gradient, linear.factor.grad = linear.factor.grad, None
            found[name] = torch.zeros_like(linear.factor) if gradient is None else gradient
        return found


class Student:
    """`results`: what every block was quantized to. After an exception it is of no use any more."""

    def __init__(self, worker: Worker, results: tuple[Artifact, ...]) -> None:
        self.worker = worker
        self.results = results
        self.resident = worker.config.end_to_end.resident
        self.around = worker.surroundings()
        self.scales: Artifact | None = None
        self.kept: dict[int, Opened] = {}

    def load(self, scales: Artifact | None) -> None:
        """Compute with the factors of a state; None: with the results' own scales."""
        if scales != self.scales:
            self.scales = scales
            for index, opened in self.kept.items():
                opened.put(self._factors(index))

    def losses(self, ends: list[Ends]) -> float:
        """Divergence, summed over the tokens."""
        return self._head(self._pass(ends, None), ends, backward=False)[0]

    def backward(self, ends: list[Ends], write: Write) -> float:
        """The same, with its gradient for the factors of every block, which `write` is given block by block."""
        return self._one_by_one(ends, write) if self.resident else self._block_by_block(ends, write)

    def _factors(self, index: int) -> dict[str, Tensor] | None:
        return read_tensors(self.worker.store, self.scales, block_file(index)) if self.scales else None

    def _open(self, index: int) -> Opened:
        if index in self.kept:
            return self.kept[index]
        worker = self.worker
        worker.leave_if_asked()
        result = read_result(worker.store, self.results[index])
        block = worker.new_block(index, without=result.weights.keys())
        load_tensors(block, result.folded)
        weights = {name: weight.to(worker.device) for name, weight in result.weights.items()}
        opened = Opened(block, replace_by_scaled(block, weights, recompute=worker.config.compute.recompute))
        quantize_activations(block, worker.linears(index), worker.config.scheme)
        opened.put(self._factors(index))
        if has_mixture(block):
            # What is clipped without data is not to follow a few tokens here either.
            opened.freeze(read_meta(worker.store, self.results[index]).get("untrained_experts", ()))
        if self.resident:
            self.kept[index] = opened
        return opened

    def _run(self, index: int, opened: Opened, hidden: Tensor) -> Tensor:
        arguments = self.worker.arguments(index, hidden.shape[1])
        with products_in(self.worker.context.autocast, hidden.device):
            if self.worker.config.compute.checkpoint and torch.is_grad_enabled():
                again: Any = checkpoint(
                    run_block, opened.block, hidden, arguments, use_reentrant=False, preserve_rng_state=False
                )
                return again
            return run_block(opened.block, hidden, arguments)

    @torch.no_grad()
    def _pass(self, ends: list[Ends], entered: list[list[Tensor]] | None) -> list[Tensor]:
        """What leaves the last block; what entered each goes to `entered`."""
        hidden = [one.float() for one, _ in ends]
        for index in range(len(self.results)):
            self.worker.leave_if_asked()
            if entered is not None:
                entered.append(hidden)
            opened = self._open(index)
            hidden = [self._run(index, opened, one) for one in hidden]
            del opened  # before there is another one
        return hidden

    def _head(self, leaving: list[Tensor], ends: list[Ends], *, backward: bool) -> tuple[float, list[Tensor | None]]:
        passes = [
            head_pass(self.around.head, one, pair[1], backward=backward)
            for one, pair in zip(leaving, ends, strict=True)
        ]
        return sum((loss for loss, _ in passes), 0.0), [gradient for _, gradient in passes]

    def _one_by_one(self, ends: list[Ends], write: Write) -> float:
        """One sequence after another through all blocks."""
        total = 0.0
        for pair in ends:
            self.worker.leave_if_asked()
            hidden = pair[0].float()
            for index in range(len(self.results)):
                hidden = self._run(index, self._open(index), hidden)
            loss, [gradient] = self._head([hidden], [pair], backward=True)
            total += loss
            if math.isfinite(loss):
                hidden.backward(gradient)
        for index in range(len(self.results)):
            write(index, self._open(index).take_gradients())
        return total

    def _block_by_block(self, ends: list[Ends], write: Write) -> float:
        """All sequences through one block after another, and back: a block is read twice, and runs forward twice."""
        entered: list[list[Tensor]] = []
        leaving = self._pass(ends, entered)
        total, gradients = self._head(leaving, ends, backward=True)
        for index in reversed(range(len(self.results))):
            self.worker.leave_if_asked()
            opened, before = self._open(index), [one.requires_grad_() for one in entered.pop()]
            for place, one in enumerate(before):
                self._run(index, opened, one).backward(gradients[place])
                gradients[place] = one.grad
            write(index, opened.take_gradients())
            del opened
        return total
