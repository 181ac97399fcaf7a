"""Training from codes that are there already: the start is kept exactly, and steps move it."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lsi.grid import Grid, QuantizedWeight, grid_parameters, range_of, round_to_nearest
from lsi.increment import Increment, Kind
from lsi.linear import Clipping, Parts, QuantizedLinear
from lsi.objective import token_losses
from lsi.reconstruct import Method, Reconstruction

GRIDS = [Grid(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in (16, None) for symmetric in (True, False)]


def start_of(grid: Grid, dtype: torch.dtype, seed: int = 0) -> QuantizedWeight:
    """Codes, scales and zero points that no rounding of a weight would give."""
    generator = torch.Generator().manual_seed(seed)
    groups = grid.groups(64)
    codes = torch.randint(0, grid.levels + 1, (24, 64), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(24, groups, generator=generator) * 0.02 + 0.001).to(dtype)
    zero = torch.randint(0, grid.levels + 1, scale.shape, dtype=torch.uint8, generator=generator)
    if grid.symmetric:
        turned = torch.rand(scale.shape, generator=generator) < 0.5
        return QuantizedWeight(codes, torch.where(turned, -scale, scale), torch.full_like(zero, grid.middle))
    return QuantizedWeight(codes, scale, zero)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_range_gives_its_scale_and_zero_point_back(grid: Grid) -> None:
    start = start_of(grid, torch.bfloat16)
    scale, zero = grid_parameters(*range_of(start.scale.float(), start.zero_point.float(), grid), grid, torch.bfloat16)
    assert torch.equal(scale, start.scale.float())
    assert torch.equal(zero, start.zero_point.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("clipping", ["none", "direct", "learned"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_training_begins_at_the_start(grid: Grid, clipping: Clipping, dtype: torch.dtype) -> None:
    start = start_of(grid, dtype)
    # Another dtype than the scales': what the linear itself holds does not count.
    parts = Parts(clipping, Increment("diagonal"), True, torch.bfloat16)
    now = QuantizedLinear(nn.Linear(64, 24), grid, parts, start).quantized()
    assert torch.equal(now.codes, start.codes)
    assert torch.equal(now.zero_point, start.zero_point)
    assert now.scale.dtype is dtype
    if dtype is torch.float32:
        torch.testing.assert_close(now.scale, start.scale, rtol=2**-23, atol=0)
    else:
        assert torch.equal(now.scale, start.scale)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("clipping", ["direct", "learned"])
def test_the_range_of_a_grid_may_grow(clipping: Clipping, symmetric: bool) -> None:
    grid = Grid(3, 16, symmetric)
    start = start_of(grid, torch.float32)
    linear = QuantizedLinear(nn.Linear(64, 24), grid, Parts(clipping, Increment("none"), False, torch.float32), start)
    assert linear.clipping is not None
    for bound in (linear.clipping.lower, linear.clipping.upper):
        bound.data += 0.5
    assert (linear.quantized().scale / start.scale > 1.2).all()


def test_the_loss_of_the_next_token_is_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(3, 5, 7, generator=generator), torch.randint(0, 7, (3, 5), generator=generator)
    losses = token_losses(logits, tokens, "next_token")
    assert losses.shape == (3, 4)
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(losses.mean(), expected)


@pytest.mark.parametrize(("kind", "rate"), [("diagonal", 1.0), ("dense", 0.1), ("none", 0.1)])
def test_steps_on_the_next_token_lower_its_loss(kind: Kind, rate: float) -> None:
    """By increments, or without them by learned rounding."""
    torch.manual_seed(0)
    grid = Grid(3, 16, False)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 11, bias=False))
    names = ["0", "2"]
    starts = {name: round_to_nearest(model.get_submodule(name).weight, grid, torch.bfloat16) for name in names}
    parts = Parts("none", Increment(kind), kind == "none", torch.bfloat16)
    method = Method(grid, parts, {"increment": rate, "rounding": rate}, 40, loss="next_token")
    reconstruction = Reconstruction(model, names, method, starts)
    hidden, tokens = torch.randn(2, 12, 64), torch.randint(0, 11, (2, 12))
    losses = [reconstruction.step(hidden, tokens, {}) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]
    scales = {name: weight.scale for name, weight in reconstruction.quantized().items()}
    assert all(torch.equal(scales[name], starts[name].scale) for name in names), "increments alone move no scale"
