"""The increment's algebra: W' = W + U · M · Vh."""

import pytest
import torch
from material import incremented, normal
from tolerances import assert_close, assert_same
from torch import Tensor

from lsi.factors import factorize
from lsi.increment import KINDS, DenseIncrement, FactoredIncrement, Increment, Kind, make_increment, shifted

INCREMENTS = [*map(Increment, ("none", "diagonal", "dense")), Increment("corner", corner=3), Increment("band", band=2)]
RANKED = [Increment("diagonal", rank=4), Increment("dense", rank=4), Increment("band", rank=4, band=2)]
KIND = pytest.mark.parametrize("kind", [*INCREMENTS, *RANKED], ids=lambda i: f"{i.kind}-{i.rank}")
SHAPES = pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)], ids=["square", "tall", "wide"])


def factored(weight: Tensor, increment: Increment) -> FactoredIncrement:
    """One step of it is a unit entry of M, so that the tests can speak of M itself."""
    module = FactoredIncrement(weight, 1.0, increment)
    module._unit = lambda entries: entries  # type: ignore[method-assign]
    return module


def diagonal(weight: Tensor) -> FactoredIncrement:
    return factored(weight, Increment("diagonal"))


def step_of(weight: Tensor, groups: int = 2) -> Tensor:
    return normal(weight.shape[0], groups, seed=5).abs() + 0.1


@SHAPES
@KIND
def test_begins_at_the_weight_itself(kind: Increment, shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    assert_same(incremented(make_increment(kind, weight, step_of(weight)), weight), weight)


@SHAPES
def test_diagonal_equals_incremented_singular_values(shape: tuple[int, int]) -> None:
    """W + U · diag(I) · Vh against the direct form U · diag(S + I) · Vh."""
    weight = normal(*shape)
    module = diagonal(weight)
    module.diagonal.data = normal(min(shape), seed=1)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    assert_close(incremented(module, weight), left @ torch.diag(singular + module.diagonal) @ right)


@SHAPES
def test_singular_values_are_counted_from_the_largest(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    module = diagonal(weight)
    module.diagonal.data[0] = 2.5
    before, after = torch.linalg.svdvals(weight), torch.linalg.svdvals(incremented(module, weight))
    expected = before.clone()
    expected[0] += 2.5
    assert_close(after, expected)


@SHAPES
def test_diagonal_gradient_is_u_g_v(shape: tuple[int, int]) -> None:
    weight, gradient = normal(*shape), normal(*shape, seed=2)
    module = diagonal(weight)
    incremented(module, weight).backward(gradient)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    expected = torch.stack([left[:, j] @ gradient @ right[j] for j in range(min(shape))])
    assert module.diagonal.grad is not None
    assert_close(module.diagonal.grad, expected)


@SHAPES
def test_factors_are_orthogonal_and_rebuild_the_weight(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    left, right = factorize(weight)
    identity = torch.eye(min(shape))
    assert_close(left.T @ left, identity)
    assert_close(right @ right.T, identity)
    middle = left.T @ weight @ right.T
    assert_close(middle, torch.diag(torch.linalg.svdvals(weight)))
    assert_close(left @ middle @ right, weight)


def test_factors_are_orthogonal_without_full_rank() -> None:
    weight = normal(12, 2) @ normal(2, 8, seed=1)
    left, right = factorize(weight)
    assert_close(left.T @ left, torch.eye(8))
    assert_close(right @ right.T, torch.eye(8))


@SHAPES
def test_signs_of_the_factors_are_fixed(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    left, right = factorize(weight)
    peaks = left.gather(0, left.abs().argmax(0, keepdim=True))
    assert (peaks > 0).all()
    # Negating the weight must go into Vh: U's signs are not free.
    opposite_left, opposite_right = factorize(-weight)
    assert_close(opposite_left, left)
    assert_close(opposite_right, -right)


def test_factors_are_the_same_every_time() -> None:
    first, again = factorize(normal(20, 8)), factorize(normal(20, 8))
    assert_same(first[0], again[0])
    assert_same(first[1], again[1])


def test_dense_is_a_free_difference_in_grid_steps() -> None:
    weight, delta = normal(6, 8), normal(6, 8, seed=1)
    step = step_of(weight)
    module = DenseIncrement(weight, step)
    module.increment.data = delta
    expected = weight + delta * step.repeat_interleave(4, dim=1)
    assert_same(incremented(module, weight), expected)
    module.increment.data = delta / step.repeat_interleave(4, dim=1)
    assert_close(incremented(module, weight), weight + delta)


def test_dense_gradient_is_in_grid_steps() -> None:
    weight, gradient = normal(6, 8), normal(6, 8, seed=2)
    step = step_of(weight)
    module = DenseIncrement(weight, step)
    incremented(module, weight).backward(gradient)
    assert module.increment.grad is not None
    assert_same(module.increment.grad, gradient * step.repeat_interleave(4, dim=1))


def middle_of(module: FactoredIncrement, rank: int) -> Tensor:
    """M, entry by entry, from the module's parameters."""
    middle = torch.zeros(rank, rank)
    if module.diagonal is not None:
        middle += torch.diag(module.diagonal.detach())
    if module.corner is not None:
        size = len(module.corner)
        middle[:size, :size] += module.corner.detach()
    if module.band is not None:
        half = len(module.band) // 2
        for row in range(rank):
            for column in range(max(row - half, 0), min(row + half + 1, rank)):
                middle[row, column] += module.band.detach()[column - row + half, row]
    return middle


@SHAPES
@pytest.mark.parametrize("increment", [*INCREMENTS[3:], *RANKED], ids=lambda i: f"{i.kind}-{i.rank}")
def test_equals_the_product_of_the_factors(increment: Increment, shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    module = factored(weight, increment)
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed + 1)
    rank = increment.rank or min(shape)
    left, right = factorize(weight, rank)
    assert_close(incremented(module, weight), weight + left @ middle_of(module, rank) @ right)


@pytest.mark.parametrize("kind", ["diagonal", "corner", "band"])
def test_narrow_products_are_those_of_float32_but_for_their_rounding(kind: Kind) -> None:
    """Value and gradient; and the start is the weight itself all the same."""
    weight, gradient, narrow = normal(48, 64), normal(48, 64, seed=7), torch.bfloat16
    found = []
    for products in (None, narrow):
        module = factored(weight, Increment(kind, corner=8, factors=narrow, products=products))
        assert_same(incremented(module, weight), weight)
        for seed, parameter in enumerate(module.parameters()):
            parameter.data = normal(*parameter.shape, seed=20 + seed)
        moved = incremented(module, weight)
        moved.backward(gradient)
        found.append([moved - weight, *(parameter.grad for parameter in module.parameters())])
    for wide, narrowed in zip(*found, strict=True):
        assert wide.dtype == narrowed.dtype == torch.float32
        assert 0 < (wide - narrowed).norm() < 1e-2 * wide.norm()


def test_a_band_as_wide_as_the_matrix_is_every_entry() -> None:
    weight, middle = normal(8, 8), normal(8, 8, seed=3)
    band = factored(weight, Increment("band", band=7))
    dense = factored(weight, Increment("dense", rank=8))
    dense.corner.data = middle
    rows = torch.arange(8)
    for offset in range(-7, 8):
        inside = rows[(rows + offset >= 0) & (rows + offset < 8)]
        band.band.data[offset + 7, inside] = middle[inside, inside + offset]
    assert_close(incremented(band, weight), incremented(dense, weight))


def test_shifted_rows() -> None:
    rows = torch.arange(3.0).unsqueeze(-1) + 1
    assert shifted(rows, 0).flatten().tolist() == [1, 2, 3]
    assert shifted(rows, 1).flatten().tolist() == [2, 3, 0]
    assert shifted(rows, -2).flatten().tolist() == [0, 0, 1]
    assert shifted(rows, 5).flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize("increment", [*INCREMENTS[1:], *RANKED], ids=lambda i: f"{i.kind}-{i.rank}")
def test_entries_of_one_step_change_the_weights_by_one_step(increment: Increment) -> None:
    """Root mean square, for random signs: what makes one learning rate fit every kind. A band loses what leaves the matrix."""
    weight = normal(60, 40)
    module = make_increment(increment, weight, torch.full((60, 2), 0.25))
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1
    parts = len(list(module.parameters()))
    change = (incremented(module, weight) - weight).square().mean().sqrt().item()
    assert change == pytest.approx(0.25 * parts**0.5, rel=0.2)


@KIND
def test_number_of_trained_values(kind: Increment) -> None:
    weight = normal(6, 8)
    module = make_increment(kind, weight, step_of(weight))
    assert sum(parameter.numel() for parameter in module.parameters()) == kind.entries(6, 8)
    assert not module.state_dict().keys() - {"increment", "diagonal", "corner", "band"}


@pytest.mark.parametrize("increment", [Increment("diagonal", rank=7), Increment("corner", corner=7)])
def test_a_rank_above_the_weights_is_refused(increment: Increment) -> None:
    with pytest.raises(ValueError, match="rank 7 for a weight of"):
        make_increment(increment, normal(6, 8), step_of(normal(6, 8)))


def test_every_kind_is_tested_here() -> None:
    assert {increment.kind for increment in INCREMENTS} == set(KINDS)
