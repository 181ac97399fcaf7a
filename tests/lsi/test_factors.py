"""Factors: what the range finder promises, against whole decompositions, and that rounding them costs nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from material import NAMES, incremented, make_layer, make_task, normal
from tolerances import assert_same
from torch import Tensor

from lsi.factors import MANY, factor_dtype, factorize, factors_of, leading
from lsi.grid import Grid
from lsi.increment import Increment, make_increment
from lsi.linear import Parts
from lsi.reconstruct import Method, Reconstruction

PLACE = torch.arange(1, 193)
# Singular values as trained weights have them: falling by a power, some outliers over a bulk; and of noise, the hardest.
SPECTRA = {
    "falling": PLACE**-0.6,
    "outlying": torch.where(PLACE < 12, 10 / PLACE, 1 - PLACE / 400),
    "flat": torch.ones(192),
}
SHAPES = pytest.mark.parametrize("shape", [(192, 448), (448, 192)], ids=["wide", "tall"])


def weight_of(spectrum: str, shape: tuple[int, int]) -> Tensor:
    noise = normal(*shape)
    if spectrum == "flat":
        return noise
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    return (left * SPECTRA[spectrum]) @ right


@pytest.mark.parametrize("rank", [16, 48])
@SHAPES
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_leading_factors_are_orthonormal_and_leading(spectrum: str, shape: tuple[int, int], rank: int) -> None:
    weight = weight_of(spectrum, shape)
    left, right = leading(weight, rank)
    assert left.shape == (shape[0], rank)
    assert right.shape == (rank, shape[1])
    identity = torch.eye(rank)
    assert (left.T @ left - identity).abs().max() < 1e-5
    assert (right @ right.T - identity).abs().max() < 1e-5
    found, true = ((left.T @ weight) * right).sum(-1), torch.linalg.svdvals(weight)[:rank]
    assert (found <= true * (1 + 1e-5)).all()
    assert (found >= 0.9 * true).all()


def test_separated_directions_are_found_themselves() -> None:
    weight = weight_of("outlying", (192, 448))
    (left, right), (whole_left, whole_right) = leading(weight, 16), factorize(weight, 16)
    assert (left[:, :2] - whole_left[:, :2]).abs().max() < 1e-3
    assert (right[:2] - whole_right[:2]).abs().max() < 1e-3


@SHAPES
def test_a_whole_decomposition_gives_the_weight_back(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    left, right = factorize(weight)
    singular = torch.linalg.svdvals(weight)
    assert ((left * singular) @ right - weight).norm() < 1e-5 * weight.norm()


def test_leading_factors_depend_on_the_weight_alone() -> None:
    weight = normal(192, 448)
    first = leading(weight, 16)
    torch.manual_seed(5)
    for one, again in zip(first, leading(weight, 16), strict=True):
        assert_same(one, again)


def test_small_matrices_are_factored_whole() -> None:
    weight = normal(192, 448)
    for ours, whole in zip(factors_of(weight, 16, torch.float32), factorize(weight, 16), strict=True):
        assert_same(ours, whole)


def test_layout_is_the_same_whichever_way_they_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(192, 448)
    whole = factors_of(weight, 16, torch.float32)
    monkeypatch.setattr("lsi.factors.SMALL", 100)
    ranged = factors_of(weight, 16, torch.float32)
    assert not torch.equal(ranged[0], whole[0])
    assert [factor.stride() for factor in ranged] == [factor.stride() for factor in whole] == [(16, 1), (448, 1)]


def test_large_weights_have_their_factors_in_bfloat16() -> None:
    small, large = torch.empty(MANY - 1, device="meta"), torch.empty(MANY, device="meta")
    assert [factor_dtype(weight, None) for weight in (small, large)] == [torch.float32, torch.bfloat16]
    assert factor_dtype(large, torch.float32) is torch.float32


@pytest.mark.parametrize("kind", ["diagonal", "corner", "band"])
def test_rounded_factors_leave_the_weight_exact(kind: str) -> None:
    increment = Increment(kind, corner=4, factors=torch.bfloat16)  # type: ignore[arg-type]
    weight, step = normal(48, 32), torch.full((48, 2), 0.1)
    module = make_increment(increment, weight, step)
    assert {buffer.dtype for buffer in module.buffers()} == {torch.bfloat16}
    assert_same(incremented(module, weight), weight)


def test_a_block_in_training_keeps_rounded_factors_as_they_are() -> None:
    parts = Parts("learned", Increment("diagonal", factors=torch.bfloat16), False, torch.float32)
    method = Method(Grid(2, 32, symmetric=False), parts, {"clipping": 1e-1, "increment": 5e-2}, total_steps=20)
    reconstruction = Reconstruction(make_layer(), NAMES, method)
    kept = {b.dtype for linear in reconstruction.linears.values() for b in linear.increment.buffers()}
    assert kept == {torch.bfloat16}


def test_rounded_factors_train_as_well() -> None:
    method = Method(
        Grid(2, 32, symmetric=False),
        Parts("learned", Increment("diagonal"), False, torch.float32),
        {"clipping": 1e-1, "increment": 5e-2},
        total_steps=20,
    )
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        parts = replace(method.parts, increment=Increment("diagonal", factors=dtype))
        reconstruction = Reconstruction(make_layer(), NAMES, replace(method, parts=parts))
        task = make_task(samples=4)
        losses[dtype] = [reconstruction.step(task.inputs, task.targets, task.arguments) for _ in range(20)][-1]
    assert losses[torch.bfloat16] < 1.05 * losses[torch.float32]
