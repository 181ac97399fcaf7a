"""Where the clipping bounds begin: at the shrunken range that changes a linear's outputs least.

With independent inputs the outputs' error is Σ_c E[x_c²] · (ŵ_c − w_c)², so the second moments of the inputs say what every weight's
error counts. From the full range, signed steps of 1 / steps reach such bounds only late: at 2 bits and 32 steps a block, to begin
there is worth a tenth of the perplexity (benchmarks/results).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lsi.block import Hidden, run_block, watched_inputs
from lsi.linear import QuantizedLinear
from lsi.objective import products_in

Batches = Iterable[tuple[Hidden, Mapping[str, Any]]]


@contextmanager
def in_full_precision(linears: Iterable[QuantizedLinear]) -> Iterator[None]:
    """The linears compute with their unquantized weights."""
    linears = list(linears)
    for linear in linears:
        linear.plain = True
    try:
        yield
    finally:
        for linear in linears:
            linear.plain = False


@torch.no_grad()
def collect_moments(
    block: nn.Module,
    linears: Mapping[str, QuantizedLinear],
    batches: Batches,
    products: torch.dtype | None,
    run: Callable[[Callable[[], Tensor]], Tensor],
) -> dict[str, Float[Tensor, " in"]]:
    """Sum of the squares of every input channel of the linears, the block computing in full precision; of a linear that
    no input reached there is none. `run`: the engine's forward pass (`lsi.engine`)."""
    moments: dict[str, Tensor] = {}

    def add(name: str, seen: Tensor) -> None:
        found = seen.square().sum(0)
        moments[name] = moments[name] + found if name in moments else found

    def forward(inputs: Hidden, arguments: Mapping[str, Any]) -> Tensor:
        with products_in(products, inputs.device):
            return run_block(block, inputs, arguments)

    watchers = [(linear, partial(add, name)) for name, linear in linears.items()]
    with in_full_precision(linears.values()), watched_inputs(watchers):
        for inputs, arguments in batches:
            run(partial(forward, inputs.float(), arguments))
    return moments
