"""The checks that conftest.py switches on are really on."""

import pytest
import torch
from jaxtyping import TypeCheckError

from lsi.grid import Grid, QuantizedWeight, fake_quantize, round_to_nearest

GRID = Grid(4, None, symmetric=False)


def test_a_vector_is_no_weight() -> None:
    with pytest.raises(TypeCheckError, match="weight"):
        round_to_nearest(torch.ones(8), GRID, torch.float32)


def test_scale_and_zero_point_must_agree() -> None:
    with pytest.raises(TypeCheckError, match="zero"):
        fake_quantize(torch.ones(4, 8), torch.ones(4, 2), torch.ones(4, 1), GRID)


def test_codes_must_be_unsigned() -> None:
    with pytest.raises(TypeCheckError, match="codes"):
        QuantizedWeight(torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.uint8))
