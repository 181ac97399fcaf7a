"""U and Vh of a weight: all of them by a singular value decomposition, or the leading ones by a randomized range finder.

On the weight's device. The increment form W + U · M · Vh keeps W exact whatever the factors' error, so what they must be is
orthonormal, and the directions along which W is large. `leading` promises (and the tests hold it to, on falling, flat and
outlying spectra):

    orthonormal   UᵀU and Vh Vhᵀ within 1e-5 of the identity, every entry
    leading       each singular value at most 10 % below the true one, and above it by rounding only

`factorize` is exact up to float32's rounding: relative reconstruction error below 1e-5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Factors = tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]
# What gives a weight's leading factors (rank None: all of them) in a dtype: `factors_of`, or a cache in front of it.
Factorizer = Callable[[Tensor, int | None, torch.dtype], Factors]

# Part of the address of stored factors. Raise it with any change that alters a bit of them.
VERSION = 2
# Whole decompositions of smaller matrices take seconds. Above, time grows with the cube: 62 s at 4096 on one thread.
SMALL = 1536
# The range finder costs as much as a whole decomposition from about this part of the rank on.
LARGEST_PART = 1 / 3
ITERATIONS = 2
# From so many numbers on, factors are kept in bfloat16 unless told otherwise: below they are no burden.
MANY = 1 << 24


def factor_dtype(weight: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype that factors are kept in; None asks for bfloat16 where the weight is large.

    Rounded factors are other directions by 0.2 %, along which M is trained as well; W stays exact.
    """
    return wanted or (torch.bfloat16 if weight.numel() >= MANY else torch.float32)


def factors_of(weight: Float[Tensor, "out in"], rank: int | None, dtype: torch.dtype) -> Factors:
    """The leading `rank` factors by the way that is faster for this shape, rounded to `dtype`.

    In memory both lie row by row: a product's sums depend on the layout, so there must be one.
    """
    ranged = rank is not None and min(weight.shape) > SMALL and rank <= LARGEST_PART * min(weight.shape)
    left, right = leading(weight, rank) if ranged and rank is not None else factorize(weight, rank)
    return left.to(dtype).contiguous(), right.to(dtype).contiguous()


def factorize(weight: Float[Tensor, "out in"], rank: int | None = None) -> Factors:
    """U and Vh of the thin SVD, singular values in falling order, the leading `rank` of them, signs fixed."""
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    return signed(left[:, :rank], right[:rank])


def leading(weight: Float[Tensor, "out in"], rank: int) -> Factors:
    """Approximately the leading `rank` factors: subspace iteration from a random start (Halko, Martinsson and Tropp,
    arXiv 0909.4061, algorithm 4.4), the same for every weight of a shape.

    The iterations multiply in bfloat16: what that errs turns the basis by less than the iterations leave open, and what is
    made of the basis is float32.
    """
    size = min(rank + max(16, rank // 8), *weight.shape)
    narrow = weight.to(torch.bfloat16)
    basis = orthonormal(roughly(narrow, _start(weight, size)))
    for _ in range(ITERATIONS):
        basis = orthonormal(roughly(narrow, orthonormal(roughly(narrow.T, basis))))
    del narrow
    # Of the small triangle alone: a decomposition of all columns takes three times as long.
    inputs, triangle = torch.linalg.qr(weight.T @ basis)
    left, _, right = torch.linalg.svd(triangle.T, full_matrices=False)
    return signed(basis @ left[:, :rank], right[:rank] @ inputs.T)


def roughly(narrow: Float[Tensor, "n m"], columns: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    """A product in bfloat16, which is what processors multiply fastest; in the columns' dtype again."""
    return (narrow @ columns.to(narrow.dtype)).to(columns.dtype)


def _start(weight: Tensor, size: int) -> Float[Tensor, "in size"]:
    key = hashlib.sha256(repr((VERSION, tuple(weight.shape), size)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.randn(weight.shape[1], size, generator=generator).to(weight)


def orthonormal(columns: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """An orthonormal basis of what the columns span."""
    return torch.linalg.qr(columns).Q


def signed(left: Float[Tensor, "out rank"], right: Float[Tensor, "rank in"]) -> Factors:
    """Each pair's sign is free: the largest entry of every column of U is made positive, so that equal weights give equal
    factors."""
    peak = left.gather(0, left.abs().argmax(0, keepdim=True)).squeeze(0)
    sign = torch.where(peak < 0, -1.0, 1.0).to(left.dtype)
    return left * sign, right * sign.unsqueeze(-1)
