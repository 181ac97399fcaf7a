"""What blocks are called with besides the hidden states (masks, positions, rotary embeddings), found without reading weights.

A family's own code makes these from the tokens' positions; of the embeddings it asks shape, dtype and device. That is not taken
on trust: the model runs twice, with two different sets of made-up weights. Where the two do not give the same arguments,
weights decide them, and then they are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model_source import ModelSource
from pipeline.skeleton import Arguments, Skeleton, load_surroundings, surround


def call_arguments(
    skeleton: Skeleton, source: ModelSource, sequence_length: int, dtype: torch.dtype, device: str = "cpu"
) -> list[Arguments]:
    """The arguments of each block, for any batch of whole sequences of this length."""
    found = [made_up_arguments(skeleton, sequence_length, dtype, device, slope) for slope in (0.0, 1.0)]
    if same(*found) and not _stored_buffers(skeleton):
        return found[0]
    return load_surroundings(skeleton, source, dtype, device).arguments(sequence_length)


def made_up_arguments(
    skeleton: Skeleton, sequence_length: int, dtype: torch.dtype, device: str, slope: float = 1.0
) -> list[Arguments]:
    """The arguments under weights of which every row is the same one, in memory only once."""

    def fill(model: nn.Module) -> None:
        for module in model.modules():
            for name, meta in module._parameters.items():
                if meta is not None:
                    row = slope * torch.linspace(0.5, 1.5, meta.shape[-1], device=device)
                    module._parameters[name] = nn.Parameter(row.to(dtype).expand(meta.shape), requires_grad=False)

    return surround(skeleton, fill, device).arguments(sequence_length)


def _stored_buffers(skeleton: Skeleton) -> bool:
    """Whether a buffer outside the blocks has its values in the checkpoint."""
    inside = skeleton.blocks_name + "."
    parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
    return any(name not in parameters and not name.startswith(inside) for name in skeleton.model.state_dict())


def same(one: Any, other: Any) -> bool:
    """Whether two arguments, or two lists of them, are equal to the last bit; what cannot be compared is not."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
