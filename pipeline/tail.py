"""The end of a model as one module: its last blocks, and behind them the final norm and the head as the family has them.

What a fine-tune trains, in the place of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lsi.block import Hidden, run_block
from lsi.grid import QuantizedWeight
from pipeline.skeleton import Arguments

Logits = Float[Tensor, "batch sequence vocabulary"]


class Tail(nn.Module):
    """Hidden states that enter the first of `blocks` to logits. `head` keeps its own dtype, and is shared by copies."""

    def __init__(self, blocks: list[nn.Module], head: Callable[[Hidden], Logits]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(self, hidden: Hidden, each: list[Arguments]) -> Logits:
        """`each`: what every block is called with."""
        for block, arguments in zip(self.blocks, each, strict=True):
            hidden = run_block(block, hidden, arguments)
        return self.head(hidden)


@dataclass(frozen=True)
class Trainee:
    """What a training unit trains: a module in full precision that is not to be changed, and the names of its linears.

    `arguments`: what it is called with, by the sequence length. `starts`: what its linears are quantized to already.
    """

    module: nn.Module
    linears: list[str]
    arguments: Callable[[int], Arguments]
    starts: Mapping[str, QuantizedWeight] | None = None


def local_name(index: int, name: str) -> str:
    """The name in the tail of something in its block `index`."""
    return f"blocks.{index}.{name}"


def of_block(index: int, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to the tail's block `index`, by names within that block."""
    prefix = local_name(index, "")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
