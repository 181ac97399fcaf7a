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

    Weights that are not finite are no failure of the unit: the finding is committed as `refused`, a sentence for the user.
    """

    block: int | None
    out: Artifact

    def __call__(self, worker: Worker) -> dict[str, Any]:
        hasher = hashlib.sha256()
        refused = None
        for name in sorted(block_tensors(worker.skeleton, self.block)):
            pieces = worker.source.pieces(stored_name(name, worker.source, worker.skeleton.model))
            for piece, tensor in pieces.items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    count = int((~torch.isfinite(tensor)).sum())
                    refused = refused or f"{name}{piece} holds {count} values that are NaN or infinite"
                hasher.update(f"{name}{piece}:{tensor.dtype}:{list(tensor.shape)};".encode())
                hasher.update(tensor_bytes(tensor))
            worker.leave_if_asked()
        result = {"digest": hasher.hexdigest(), "refused": refused}
        Writer(worker.store, self.out).commit(result | {"stamp": worker.stamp()})
        return result
