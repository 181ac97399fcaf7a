"""The increment's algebra: W' = W + U · M · Vh."""

import pytest
import torch
from material import normal
from tolerances import assert_close, assert_same
from torch import Tensor

from lsi.increment import (
    DEFAULT_LEARNING_RATE,
    KINDS,
    DenseIncrement,
    DiagonalIncrement,
    factorize,
    make_increment,
)

KIND = pytest.mark.parametrize("kind", sorted(KINDS))
SHAPES = pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)], ids=["square", "tall", "wide"])


def step_of(weight: Tensor, groups: int = 2) -> Tensor:
    return normal(weight.shape[0], groups, seed=5).abs() + 0.1


@SHAPES
@KIND
def test_begins_at_the_weight_itself(kind: str, shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    assert_same(make_increment(kind, weight, step_of(weight))(weight), weight)


@SHAPES
def test_diagonal_equals_incremented_singular_values(shape: tuple[int, int]) -> None:
    """W + U · diag(I) · Vh against the direct form U · diag(S + I) · Vh."""
    weight = normal(*shape)
    module = DiagonalIncrement(weight)
    module.increment.data = normal(min(shape), seed=1)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    assert_close(module(weight), left @ torch.diag(singular + module.increment) @ right)


@SHAPES
def test_singular_values_are_counted_from_the_largest(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    module = DiagonalIncrement(weight)
    module.increment.data[0] = 2.5
    before, after = torch.linalg.svdvals(weight), torch.linalg.svdvals(module(weight))
    expected = before.clone()
    expected[0] += 2.5
    assert_close(after, expected)


@SHAPES
def test_diagonal_gradient_is_u_g_v(shape: tuple[int, int]) -> None:
    weight, gradient = normal(*shape), normal(*shape, seed=2)
    module = DiagonalIncrement(weight)
    module(weight).backward(gradient)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    expected = torch.stack([left[:, j] @ gradient @ right[j] for j in range(min(shape))])
    assert module.increment.grad is not None
    assert_close(module.increment.grad, expected)


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
    assert_same(module(weight), expected)
    module.increment.data = delta / step.repeat_interleave(4, dim=1)
    assert_close(module(weight), weight + delta)


def test_dense_gradient_is_in_grid_steps() -> None:
    weight, gradient = normal(6, 8), normal(6, 8, seed=2)
    step = step_of(weight)
    module = DenseIncrement(weight, step)
    module(weight).backward(gradient)
    assert module.increment.grad is not None
    assert_same(module.increment.grad, gradient * step.repeat_interleave(4, dim=1))


@pytest.mark.parametrize(("kind", "count"), [("none", 0), ("diagonal", 6), ("dense", 48)])
def test_number_of_trained_values(kind: str, count: int) -> None:
    weight = normal(6, 8)
    module = make_increment(kind, weight, step_of(weight))
    assert sum(parameter.numel() for parameter in module.parameters()) == count
    assert not module.state_dict().keys() - {"increment"}


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(KeyError, match="band"):
        make_increment("band", normal(6, 8), step_of(normal(6, 8)))


def test_every_kind_has_a_learning_rate() -> None:
    assert DEFAULT_LEARNING_RATE.keys() == KINDS.keys()
