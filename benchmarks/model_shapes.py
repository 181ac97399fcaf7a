"""Shapes of well-known models, as data, and the speeds that the simulation assumes where nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass

from lsi.grid import Grid
from pipeline.costs import Device, Shape

# An assumption, not a measurement: 40 % of an H100's 989 dense bfloat16 TFLOP/s, 70 % of its 3.35 TB/s.
H100 = Device(flops=0.40 * 989e12, memory=0.70 * 3.35e12)


@dataclass(frozen=True)
class Llama:
    """A Llama's configuration."""

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool = False

    def shape(self) -> Shape:
        head = self.hidden // self.heads
        keys = self.key_heads * head
        linears = [(self.hidden, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, self.hidden)]
        linears += [
            (self.intermediate, self.hidden),
            (self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        ]
        outer = (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden
        return Shape(self.blocks, self.hidden, tuple(linears), self.heads * head, outer)


MODELS = {
    "smollm2-135m": Llama(30, 576, 1536, 9, 3, 49152, tied=True),
    "llama-2-70b": Llama(80, 8192, 28672, 64, 8, 32000),
    "llama-3.1-405b": Llama(126, 16384, 53248, 128, 8, 128256),
}


def checkpoint_bytes(shape: Shape, grid: Grid) -> float:
    """The packed checkpoint: codes, a scale and a zero point a group, everything else in 16 bits."""
    groups = sum(out * grid.groups(width) for out, width in shape.linears)
    return shape.blocks * (shape.weights * grid.bits / 8 + groups * (2 + grid.bits / 8)) + shape.outer * shape.itemsize
