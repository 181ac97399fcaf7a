"""Mixtures of experts: transformers fuses a block's experts when it loads them, checkpoints keep them one by one.

The skeleton holds opened experts (`lsi.experts`), so that each of their linears is read, trained and stored like any other.
Their names in a checkpoint are its family's own, by transformers' table of conversions: Mixtral's
`block_sparse_moe.experts.0.w1` is `mlp.experts.0.gate_proj` here.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from lsi.experts import OpenedExperts, open_experts

EXPERT = re.compile(r"(.+\.\d+)\.(gate_proj|up_proj|down_proj)(\.weight)")
ALL_PARTS = ("gate_proj", "up_proj", "down_proj")
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def _last(pattern: str) -> str:
    return pattern.removesuffix(".weight").rpartition(".")[2]


def expert_parts(model: PreTrainedModel) -> dict[str, str]:
    """What the family's checkpoints call an expert's gate_proj, up_proj and down_proj; empty if they keep none apart."""
    parts: dict[str, str] = {}
    for change in get_model_conversion_mapping(model):
        if isinstance(change, WeightConverter):
            ours = FUSED.get(_last(change.target_patterns[0]), ())
            theirs = [_last(pattern) for pattern in change.source_patterns if ".experts.*." in pattern]
            if len(ours) == len(theirs):
                parts |= zip(ours, theirs, strict=True)
    return parts if len(parts) == len(ALL_PARTS) else {}


def open_mixtures(model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """Open the experts of every block, where checkpoints keep them apart. Elsewhere they stay fused, and unquantized."""
    if expert_parts(model):
        for block in blocks:
            open_experts(block)


def has_mixture(model: nn.Module) -> bool:
    """Whether some block has opened experts."""
    return any(isinstance(module, OpenedExperts) for module in model.modules())


def original_names(names: list[str], model: PreTrainedModel) -> dict[str, str]:
    """Tensors of a model with opened experts by their names in the family's checkpoints; equal ones elsewhere."""
    if not has_mixture(model):
        return {name: name for name in names}
    parts = expert_parts(model)
    mapping = get_model_conversion_mapping(model)
    renamings = [change.reverse_transform() for change in mapping if isinstance(change, WeightRenaming)]
    found = {}
    for name in names:
        expert = EXPERT.fullmatch(name)
        original = f"{expert[1]}.{parts[expert[2]]}{expert[3]}" if expert and ".experts." in name else name
        for renaming in renamings:
            original = renaming.rename_source_key(original)[0]
        found[name] = original
    return found
