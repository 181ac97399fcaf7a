"""The one place for tolerances. What can be equal bit for bit is compared with `assert_same`, not with these."""

import torch
from torch import Tensor

# Relative to the largest value compared, so that a small entry of a large sum is not held to its own size.
RELATIVE = {
    # Products over at most a hundred terms: each rounds by 2^-24, and the factors of an SVD are good to some 2^-20.
    torch.float32: 1e-5,
    # Central differences with a step of 1e-6: (1e-6)^2 of truncation and 2^-53 / 1e-6 = 1e-10 of cancellation, times
    # the curvature of a quotient by a scale of some 1e-2.
    torch.float64: 1e-6,
    # Eight bits of mantissa (2^-9 a rounding), through the half dozen products of a block.
    torch.bfloat16: 3e-2,
}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal up to the tolerance of `dtype`, in which the values were computed (None: the one they have)."""
    assert actual.shape == expected.shape
    actual, expected, dtype = actual.detach(), expected.detach(), dtype or actual.dtype
    limit = RELATIVE[dtype] * float(expected.abs().max())
    off = float((actual.double() - expected.double()).abs().max())
    assert off <= limit, f"off by {off:.3e}, {limit:.3e} allowed for {dtype}"


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, NaN and the sign of zero included."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(bits(actual), bits(expected))


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
