"""What a block's parts are called and where a family departs from LLaMA: all that equivalent transformations need to know.

A new family is one entry in `FAMILIES`, found by the model type of the block's configuration. What can be read from the
block itself (heads, biases, fused projections, opened experts, a post-norm) is not declared.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """Names within a block. Projections that name the same linear are fused in it: q, k, v or gate, up, in this order.

    gate: None where the feed-forward part is not gated. query_norm, key_norm: norms between projection and rotation.
    one_plus: norms multiply by (1 + weight). rotary: None, "whole" head or the "partial" one of its configuration.
    experts, router: of a mixture, in those blocks that have them.
    """

    model_types: tuple[str, ...]
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    one_plus: bool = False
    rotary: str | None = "whole"


FAMILIES = (
    Family(("llama", "mistral", "qwen2", "mixtral")),
    Family(("qwen3", "qwen3_moe"), query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
    Family(("gemma2",), mlp_norm="pre_feedforward_layernorm", one_plus=True),
    Family(
        ("gemma3_text",),
        mlp_norm="pre_feedforward_layernorm",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        one_plus=True,
    ),
    Family(
        ("phi3",),
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
        rotary="partial",
    ),
    Family(
        ("opt",),
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        output="self_attn.out_proj",
        gate=None,
        up="fc1",
        down="fc2",
        rotary=None,
    ),
)


def find_family(model_type: str) -> Family:
    """The declaration of a model type. Raises ValueError naming the declared ones."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    declared = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise ValueError(
        f"model type {model_type!r} declares no equivalent transformation; train without it, or take one of: {declared}"
    )


def model_type_of(block: nn.Module) -> str:
    """The model type in the configuration that a decoder block's attention holds, else the block's class name."""
    config = getattr(getattr(block, "self_attn", None), "config", None)
    return str(getattr(config, "model_type", type(block).__name__))


def family_of(block: nn.Module) -> Family:
    """The declaration of a decoder block's model type. Raises ValueError as `find_family` does."""
    return find_family(model_type_of(block))
