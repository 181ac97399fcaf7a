"""Which activations of a block are quantized: the inputs of its linears, and q, k and v inside its attention.

What transformers lets a model's attention be replaced by, it calls after the rotation; the block's own code stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lsi.activations import quantize_inputs, quantized_attention
from lsi.grid import Grid
from pipeline.config_sections import SchemeConfig
from pipeline.errors import UserError

ATTENTION = "lsi_quantized"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' call of an attention function; `operand_grid` is what `quantize_activations` left on the module."""
    grid = module.operand_grid
    assert isinstance(grid, Grid)
    output = quantized_attention(
        query,
        key,
        value,
        attention_mask,
        grid,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        causal=bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal,
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)


def attentions(block: nn.Module) -> list[nn.Module]:
    """The modules of a block that look their attention function up."""
    return [module for module in block.modules() if hasattr(module, "config") and hasattr(module, "is_causal")]


def quantize_activations(block: nn.Module, names: Iterable[str], scheme: SchemeConfig) -> None:
    """Quantize what the scheme asks for in a block of the caller's own; its linears are `names`, plain or in training.

    All that computes with quantized weights goes through here: training, measuring, streams of rounded blocks, evaluation.
    """
    grid = scheme.activation_grid
    if grid is None:
        return
    quantize_inputs(block, names, grid)
    for module in attentions(block) if scheme.quantize_qkv else ():
        config: Any = module.config
        config._attn_implementation = ATTENTION
        module.operand_grid = grid  # type: ignore[assignment]


def check_attention(scheme: SchemeConfig, model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """Refuse to quantize q, k and v of a model whose attention cannot be replaced."""
    if not scheme.quantize_qkv:
        return
    replaceable = model._can_set_attn_implementation() and all(attentions(block) for block in blocks)
    # Sinks are a further operand, known to the family's own function alone.
    if not replaceable or any(hasattr(module, "sinks") for block in blocks for module in block.modules()):
        raise UserError(
            f"scheme.quantize_qkv is true, but the attention of {type(model).__name__} cannot be replaced by one that quantizes "
            "its operands: set scheme.quantize_qkv to false"
        )
