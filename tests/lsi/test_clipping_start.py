"""Where clipping begins: the range that changes a linear's outputs least, found again by trying, and better than the full one."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from material import NAMES, make_layer, make_task
from torch import Tensor, nn

from lsi.block import run_block
from lsi.grid import NARROWING, SHRINKING, Grid, fake_quantize, grid_parameters, group_range, nearest_range
from lsi.increment import Increment
from lsi.linear import CLIPPING_START, SMALLEST_BOUND, Clipping, Parts, QuantizedLinear
from lsi.reconstruct import Method, Reconstruction

METHOD = Method(
    grid=Grid(2, 32, symmetric=False),
    parts=Parts("direct", Increment("none"), True, torch.float32),
    rates={"clipping": 1e-2, "rounding": 1e-2, "equivalence": 5e-3},
    total_steps=8,
    steps="signed",
)


def material(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails, and second moments that differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 64, generator=generator) * torch.randn(12, 64, generator=generator)
    return weight, torch.randn(64, generator=generator).mul(2).exp()


@pytest.mark.parametrize("importance", ["even", "uneven"])
@pytest.mark.parametrize("grid", [Grid(2, 16, False), Grid(3, None, True), Grid(3, None, True, positive=True)], ids=str)
def test_the_nearest_range_is_the_best_of_all_that_are_tried(grid: Grid, importance: str) -> None:
    weight, moments = material()
    moments = torch.ones(64) if importance == "even" else moments
    found = nearest_range(weight, grid, torch.bfloat16, moments)
    groups = grid.groups(64)
    low, high = group_range(weight.view(12, groups, -1), grid)
    both = [(part, part) for part in SHRINKING]
    one_end = [(p, 0.0) for p in SHRINKING] + [(0.0, p) for p in SHRINKING if not grid.positive]
    tried = one_end if grid.symmetric else both

    def errors(of_low: float | Tensor, of_high: float | Tensor) -> Tensor:
        scale, zero = grid_parameters(low * of_low, high * of_high, grid, torch.bfloat16)
        error = (fake_quantize(weight, scale, zero, grid) - weight).square() * moments
        return error.view(12, groups, -1).sum(-1)

    first = torch.tensor(tried)[torch.stack([errors(*parts) for parts in tried]).argmin(0)]
    one_end = [(1.0, 1.0), *((p, 1.0) for p in NARROWING), *((1.0, p) for p in NARROWING)]
    again = [first * torch.tensor(parts) for parts in ([(1.0, 1.0)] if grid.symmetric else one_end)]
    table = torch.stack([errors(*parts.unbind(-1)) for parts in again])
    best = torch.stack(again).gather(0, table.argmin(0)[None, ..., None].expand(1, *first.shape))[0]
    assert torch.equal(torch.stack(found, -1), best)
    assert torch.equal(first, best) == grid.symmetric
    if grid.symmetric:
        assert bool(found[1].any()) != grid.positive
    ways = [nearest_range(weight, grid, torch.bfloat16, counted) for counted in (None, torch.ones(64))]
    assert torch.equal(torch.stack(ways[0]), torch.stack(ways[1]))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("clipping", ["learned", "direct"])
def test_bounds_begin_at_the_range_that_was_found(clipping: Clipping, symmetric: bool) -> None:
    grid = replace(METHOD.grid, symmetric=symmetric)
    weight, moments = material()
    linear = nn.Linear(64, 12, bias=False)
    linear.weight.data = weight
    quantized = QuantizedLinear(linear, grid, replace(METHOD.parts, clipping=clipping))
    quantized.begin_clipping(moments)
    assert quantized.clipping is not None
    parts = nearest_range(weight, grid, torch.float32, moments)
    largest = torch.tensor(CLIPPING_START).sigmoid() if clipping == "learned" else torch.tensor(1.0)
    for bound, part in zip(quantized.clipping(*map(torch.ones_like, parts)), parts, strict=True):
        torch.testing.assert_close(bound, part.clamp(min=SMALLEST_BOUND).minimum(largest))


@pytest.mark.parametrize("equivalence", [(), ("norm",)], ids=str)
def test_a_block_begins_nearer_to_full_precision(equivalence: tuple[str, ...]) -> None:
    """With an equivalent transformation too, whose inputs and weights are what counts."""
    task = make_task()
    plain = Reconstruction(make_layer(), NAMES, replace(METHOD, equivalence=equivalence))
    begun = Reconstruction(make_layer(), NAMES, replace(METHOD, equivalence=equivalence))
    if begun.equivalence is not None:
        for way in (plain, begun):
            assert way.equivalence is not None
            for parameter in way.equivalence.parameters():
                parameter.data += torch.linspace(-1, 1, parameter.numel())
    begun.begin_clipping([(task.inputs, task.arguments)])
    losses = [way.step(task.inputs, task.targets, task.arguments) for way in (plain, begun)]
    assert losses[1] < 0.9 * losses[0]


def test_nothing_else_changes() -> None:
    """The block computes as before with the bounds put back, and experts' counts are of steps alone."""
    task = make_task()
    way = Reconstruction(make_layer(), NAMES, METHOD)
    before = {name: value.clone() for name, value in way.parameters.items()}
    expected = run_block(copy.deepcopy(way.block), task.inputs, task.arguments)
    way.begin_clipping([(task.inputs, task.arguments)])
    assert any(not torch.equal(before[name], value) for name, value in way.parameters.items() if ".clipping." in name)
    assert all(torch.equal(before[name], value) for name, value in way.parameters.items() if ".clipping." not in name)
    with torch.no_grad():
        for name, value in before.items():
            way.parameters[name].copy_(value)
    assert torch.equal(run_block(way.block, task.inputs, task.arguments), expected)
