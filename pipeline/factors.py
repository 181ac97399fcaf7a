"""Factors of weights, kept in the store by content: a resumed run, another epoch on another worker and the next scheduled run
read them instead of finding them again.

An artifact is named by the weight's bytes and by all that decides the factors' bits, not by block or model. Two workers that
need the same one at the same time both make it, and the first commit stays. They outlive their run; in the run's own store
they go with it, at `storage.factors` nobody deletes them.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lsi.factors import VERSION, Factorizer, Factors, factors_of
from pipeline.artifacts import Artifact, CorruptArtifactError, Writer, digest, discard, read_record, read_tensors
from pipeline.config_sections import ComputeConfig
from pipeline.store import Store
from pipeline.tensors import tensor_bytes

KIND = "factors"
FILE = "factors.safetensors"


def factors_artifact(weight: Tensor, rank: int | None, dtype: torch.dtype, compute: ComputeConfig) -> Artifact:
    """Where the factors of a weight are."""
    key = digest(
        {
            "kind": KIND,
            "version": VERSION,
            "torch": torch.__version__,
            "device": weight.device.type,
            "threads": compute.threads,
            "weight": hashlib.sha256(tensor_bytes(weight.cpu())).hexdigest(),
            "shape": list(weight.shape),
            "rank": rank,
            "dtype": str(dtype),
        }
    )
    return Artifact(KIND, f"{weight.shape[0]}x{weight.shape[1]}-rank-{rank or min(weight.shape)}", key)


def stored_factors(store: Store, compute: ComputeConfig) -> Factorizer:
    """`lsi.factors.factors_of` with a store in front of it."""

    def factors(weight: Tensor, rank: int | None, dtype: torch.dtype) -> Factors:
        artifact = factors_artifact(weight, rank, dtype, compute)
        found = _read(store, artifact)
        if found is None:
            left, right = factors_of(weight, rank, dtype)
            writer = Writer(store, artifact)
            writer.write_tensors(FILE, {"left": left.cpu(), "right": right.cpu()})
            writer.commit({})
            return left, right
        return found["left"].to(weight.device), found["right"].to(weight.device)

    return factors


def _read(store: Store, artifact: Artifact) -> dict[str, Tensor] | None:
    """What is committed; None if nothing is, or if it is damaged, which is cleared away."""
    try:
        if read_record(store, artifact) is None:
            return None
        return read_tensors(store, artifact, FILE)
    except CorruptArtifactError:
        discard(store, artifact)
        return None
