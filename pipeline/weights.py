"""Stage `inspect`: read every weight once, refuse what is not finite, and name it by its content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.artifacts import Artifact, Writer
from pipeline.skeleton import Skeleton, stored_name, tensor_names
from pipeline.tensors import tensor_bytes
from pipeline.worker import Worker


def block_tensors(skeleton: Skeleton, block: int | None) -> dict[str, torch.Tensor]:
    """Meta tensors by full name of one block, or of everything outside the blocks (None)."""
    if block is not None:
        return tensor_names(skeleton.blocks[block], skeleton.block_prefix(block))
    inside = skeleton.blocks_name + "."
    return {name: t for name, t in tensor_names(skeleton.model).items() if not name.startswith(inside)}


@dataclass(frozen=True)
class InspectTask:
    """Digest the weights of one block, or of everything outside the blocks (`block` None).

    Weights that are not finite, or not in the dtype that the run has them in, are no failure of the unit: the finding is
    committed as `refused`, and what to do about it as `remedy`.
    """

    block: int | None
    out: Artifact

    def __call__(self, worker: Worker) -> dict[str, Any]:
        hasher = hashlib.sha256()
        refused: dict[str, str] = {}
        for name in sorted(block_tensors(worker.skeleton, self.block)):
            pieces = worker.source.pieces(stored_name(name, worker.source, worker.skeleton.model))
            for piece, tensor in pieces.items():
                if tensor.is_floating_point():
                    refused = refused or _refusal(f"{name}{piece}", tensor, worker.context.dtype)
                hasher.update(f"{name}{piece}:{tensor.dtype}:{list(tensor.shape)};".encode())
                hasher.update(tensor_bytes(tensor))
            worker.leave_if_asked()
        result = {"digest": hasher.hexdigest(), "refused": None, "remedy": None} | refused
        Writer(worker.store, self.out).commit(result | {"stamp": worker.stamp()})
        return result


def _refusal(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> dict[str, str]:
    """What is wrong with a tensor's values, and the remedy; empty if nothing is."""
    # NaN is either extreme, and no value is beyond the range where these are not: one pass, no copy.
    if not tensor.numel() or torch.stack(torch.aminmax(tensor)).to(dtype).isfinite().all():
        return {}
    if count := int((~torch.isfinite(tensor)).sum()):
        return {
            "refused": f"{name} holds {count} values that are NaN or infinite",
            "remedy": "the model is damaged, get it again",
        }
    count = int((~torch.isfinite(tensor.to(dtype))).sum())
    return {
        "refused": f"{name} holds {count} values beyond the range of {dtype}",
        "remedy": "set model.dtype to bfloat16",
    }
