"""The terms of a block's memory in training: what is there all through, and what a step, a linear or a token adds.

With W the numbers of the largest linear, and everything computed from a weight in float32:

    a linear   W' while it is made is three matrices of 4·W: the weight widened, the increment, their sum. In the backward pass
               W', the gradient of W_hat and the gradient of W' are. Without recomputation W' and W_hat stay for every linear.
    a token    what its way through the block leaves for the backward pass, `saved_per_token`
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lsi.factors import MANY
from pipeline.artifacts import PIECE
from pipeline.config import RunConfig
from pipeline.costs import factored, size_of_factors
from pipeline.plan_shapes import BlockShape

# What a process in training holds beside tensors: buffers of products, and what malloc keeps of tensors below 32 MiB. Then
# DeepSpeed's modules, and what malloc keeps where tensors are put together from parts. All measured on Linux.
WORK, DEEPSPEED, IN_PARTS = 0.10 * 2**30, 0.05 * 2**30, 0.10 * 2**30


@dataclass(frozen=True)
class Engine:
    """What of a worker's choices decides its memory. products: bytes of a number in products. offload_*: kept in host memory
    by DeepSpeed; without, everything lies on the device. parts: members of a group that DeepSpeed cuts a block's tensors up for."""

    name: Literal["torch", "deepspeed"] = "torch"
    device: Literal["cpu", "cuda"] = "cpu"
    micro_batch: int = 1
    recompute: bool | None = None
    checkpoint: bool = False
    products: int = 2
    offload_parameters: bool = False
    offload_optimizer: bool = False
    parts: int = 1


class BlockMemory:
    """Bytes, by a block's sizes, the configuration and the engine."""

    def __init__(self, shape: BlockShape, config: RunConfig, engine: Engine) -> None:
        self.shape, self.config, self.engine = shape, config, engine
        self.increment = config.method.increments
        self.cuda = engine.device == "cuda"
        self.block = float((shape.weights + shape.rest) * shape.itemsize)

    def _factored(self) -> bool:
        return factored(self.increment)

    def _rank(self, shape: tuple[int, int]) -> int:
        return min(self.increment.rank or min(shape), *shape)

    def factor_size(self) -> float:
        """Of all factors of a block, bytes."""
        return sum(size_of_factors(*shape, self.increment) for shape in self.shape.linears)

    def groups(self) -> int:
        return sum(out * self.config.scheme.grid.groups(width) for out, width in self.shape.linears)

    def _trained_in(self, shape: tuple[int, int]) -> float:
        method, (out, width) = self.config.method, shape
        total = self.increment.entries(out, width) + (out * width if method.rounding == "learned" else 0)
        return float(total + (2 * out * self.config.scheme.grid.groups(width) if method.clipping != "none" else 0))

    def trained_numbers(self) -> float:
        return sum(self._trained_in(shape) for shape in self.shape.linears)

    def largest_trained(self) -> float:
        """Of the largest trained tensor, numbers."""
        every = self.config.method.rounding == "learned" or (not self._factored() and self.increment.kind == "dense")
        return float(math.prod(self.shape.largest)) if every else 2.0 * self.groups()

    def result_size(self) -> float:
        """Codes, scales and zero points."""
        return float(self.shape.weights + self.groups() * (self.shape.itemsize + 1))

    def boundary(self, samples: int) -> float:
        """Hidden states of some samples."""
        return float(samples * self.config.data.sequence_length * self.shape.hidden * self.shape.itemsize)

    def cached(self) -> float:
        """Activations on the host: what is kept, and what is read ahead of inputs and targets."""
        data, storage = self.config.data, self.config.storage
        chunk = self.boundary(min(storage.chunk_samples, data.samples))
        kept = min(float(storage.cache_mib << 20), 2 * self.boundary(data.samples))
        ahead = min(4 * chunk, 2 * self.boundary(data.samples))
        return max(kept, 2 * chunk) + (ahead if kept < 2 * self.boundary(data.samples) else 0.0)

    def saved_per_token(self, *, whole: bool = False) -> float:
        """Bytes that a token leaves in a block for the backward pass, its linears keeping their inputs alone. whole: of all of it, though
        its parts be run again."""
        s, p = self.shape, self.engine.products
        attention = p * (5 * s.attention + 2 * s.keys)
        wide = p * (4 if s.gated else 2) * s.intermediate * s.passes
        # Inputs, the stream between the parts, their normed inputs, outputs, their error, and the gradients of two of these.
        if self.engine.checkpoint and not whole:
            return 4.0 * 10 * s.hidden + max(attention, wide)
        return 4.0 * 8 * s.hidden + attention + wide

    def _frozen_per_token(self) -> float:
        s, p = self.shape, self.engine.products
        return 4.0 * 3 * s.hidden + p * (5 * s.attention + 2 * s.keys + 3 * s.intermediate * s.passes)

    def passing_per_token(self) -> float:
        """Bytes of a token on its way through a block that nothing is kept of, and of the error of its outputs."""
        s = self.shape
        wide = (3 if s.gated else 2) * s.intermediate * s.passes
        return max(s.itemsize * (5 * s.hidden + wide), s.itemsize * 3 * s.hidden + 4.0 * 4 * s.hidden)

    def _starting_per_token(self) -> float:
        """The same in float32 with products in their dtype, while what enters a linear is widened and squared."""
        s, p = self.shape, self.engine.products
        squared = p + (4.0 if p < 4 else 0.0) + 4.0
        wide = max((3.0 if s.gated else 2.0) * p, squared) * s.intermediate * s.passes
        return 4.0 * 2 * s.hidden + max(wide, squared * s.attention)

    def _recomputes(self, shape: tuple[int, int]) -> bool:
        return math.prod(shape) >= MANY if self.engine.recompute is None else self.engine.recompute

    def _kept(self, shape: tuple[int, int]) -> float:
        """What a linear that does not recompute keeps between the passes: W' and what the product has of W_hat, factors in
        float32 where they are kept narrower, and the increment where it is scaled."""
        if self._recomputes(shape):
            return 0.0
        whole = 4.0 * sum(shape) * self._rank(shape) if self._factored() else 0.0
        widened = whole if whole > size_of_factors(*shape, self.increment) else 0.0
        if self._multiplied_narrow(shape):
            widened = 6.0 * shape[1] * self._rank(shape)
        scaled = 8 if self.config.method.equivalence and self.increment.kind != "none" else 0
        return math.prod(shape) * (4 + self.engine.products + scaled) + widened

    def _multiplied_narrow(self, shape: tuple[int, int]) -> bool:
        """Whether U is multiplied in the dtype that it is kept in."""
        narrow = self._factored() and size_of_factors(*shape, self.increment) == 2 * sum(shape) * self._rank(shape)
        return narrow and self.engine.products == 2

    def making(self, shape: tuple[int, int], *, training: bool = True) -> float:
        """What is made of a linear at once until there are its codes, or in training its gradients."""
        out, width = shape
        whole, rank = 4.0 * out * width, self._rank(shape) if self._factored() else 0
        narrow = self._multiplied_narrow(shape)
        # U is widened, or it is as it is, and its product and M · Vh are there in its dtype, too.
        left, right = (0.0, 6.0 * width * rank) if narrow else (4.0 * out * rank, 4.0 * width * rank)
        matrices = 3.0 + narrow if self.increment.kind != "none" else 2.0
        matrices += self.config.method.rounding == "learned"
        # Where an equivalent transformation is trained, the range follows it by the difference of two more.
        matrices += 2 * (training and bool(self.config.method.equivalence))
        return max(matrices * whole + left + right, whole + left + 3 * right)

    def backward(self) -> dict[str, float]:
        """The fullest linear in the backward pass, the last one first: gradients so far, what is kept of those that are to
        come, and what is made of itself."""
        several = self.config.samples_of_a_step > self.engine.micro_batch
        # In parts, a gradient is cut up when the next one comes: those of one more linear are whole.
        cut_up = self.engine.parts > 1
        kept = sum(self._kept(shape) for shape in self.shape.linears)
        gradients = 4 * self.trained_numbers() if several and not cut_up else 0.0
        fullest: dict[str, float] = {}
        for shape in reversed(self.shape.linears):
            made = self.making(shape)
            if not self._recomputes(shape):
                made = 4.0 * math.prod(shape)  # W' and W_hat are among what is kept
            now = {"gradients": gradients, "kept between the passes": kept, "one linear": made}
            if sum(now.values()) > sum(fullest.values()):
                fullest = now
            if cut_up:
                gradients = 4 * self._trained_in(shape)
            else:
                gradients += 0.0 if several else 4 * self._trained_in(shape)
            kept -= self._kept(shape)
        return fullest

    def state(self, steps_done: bool, best: bool = False) -> dict[str, float]:
        """What of a block in training is where it is trained."""
        terms = self._fixed(best)
        if self.engine.name == "torch":
            return terms | self._frozen_part() | self._trained_part(steps_done)
        away = self.engine
        if self.cuda and away.offload_parameters:
            # The linear that computes and the one that is read ahead.
            terms["linears that are fetched"] = 2.0 * math.prod(self.shape.largest) * self.shape.itemsize
        elif self.cuda or not away.offload_parameters:
            terms |= self._part_of(self._frozen_part())
        if not (self.cuda and away.offload_optimizer):
            terms |= self._part_of(self._trained_part(steps_done))
        return terms if self.cuda else terms | self._at_home(steps_done)

    def _part_of(self, terms: dict[str, float]) -> dict[str, float]:
        """What a member holds of what a group has once."""
        return {name: size / self.engine.parts for name, size in terms.items()}

    def together(self) -> dict[str, float]:
        """Of a group: the largest linear as it is put together from the members' parts, and gloo's copy of its largest tensor."""
        if self.engine.parts == 1 or self.cuda:  # on a GPU it is among what is fetched
            return {}
        out, width = self.shape.largest
        weight, values = float(out * width * self.shape.itemsize), 4 * self._trained_in((out, width))
        factors = size_of_factors(out, width, self.increment)
        copied = max(weight, self.largest_trained() * 4, factors / 2)
        return {"a linear put together": weight + factors + values + copied}

    def _at_home(self, steps_done: bool) -> dict[str, float]:
        """What DeepSpeed keeps in host memory."""
        if self.engine.name == "torch":
            return {}
        kept = self._frozen_part() if self.engine.offload_parameters else {}
        return self._part_of(kept | (self._trained_part(steps_done) if self.engine.offload_optimizer else {}))

    def _fixed(self, best: bool) -> dict[str, float]:
        terms = {"grids": self.groups() * (self.shape.itemsize + 1.0)}
        if not self.cuda:
            terms["libraries at work"] = WORK + DEEPSPEED * (self.engine.name == "deepspeed")
            terms["libraries at work"] += IN_PARTS * (self.engine.parts > 1)
        if self.increment.kind == "dense" and not self._factored():
            terms["grids"] += 4.0 * self.groups()
        if best:
            terms["best state so far"] = self.result_size()
        method = self.config.method
        frozen = method.look_ahead + (method.quantized_stream_loss > 0)
        terms["frozen blocks of the loss"] = frozen * float(self.shape.weights * self.engine.products)
        return terms

    def _frozen_part(self) -> dict[str, float]:
        return {"weights": self.block, "factors": self.factor_size()}

    def _trained_part(self, steps_done: bool) -> dict[str, float]:
        numbers = self.trained_numbers()
        # DeepSpeed has the values twice, its own and the optimizer's, and gradients of both for good; the rest is what one
        # run came to (dense, half of LLaMA-2-70B's width), not counted.
        terms = {"trained values": (4 if self.engine.name == "torch" else 22) * numbers}
        if steps_done and self.config.optimizer.steps == "adamw":
            terms["AdamW's moments"] = 8 * numbers
        return terms

    def _transformed(self, *, training: bool) -> float:
        """Weights as an equivalent transformation leaves them, in float32; in training what they are made from and their
        gradients, too."""
        if not self.config.method.equivalence:
            return 0.0
        return (12.0 if training else 4.0) * self.shape.weights

    def step_terms(self) -> dict[str, float]:
        """What one step adds on the device."""
        config = self.config
        tokens = self.engine.micro_batch * config.data.sequence_length
        saved = self.saved_per_token() + config.method.look_ahead * self._frozen_per_token()
        transformed = {"transformed weights": self._transformed(training=True)}
        return self.backward() | transformed | self.together() | {"activations": tokens * saved}

    def _chunk_tokens(self) -> float:
        data = self.config.data
        return float(min(self.config.storage.chunk_samples, data.samples) * data.sequence_length)

    def _read(self, size: float) -> float:
        """Of a file that is read: its bytes beside its tensors."""
        return min(size, float(PIECE))
