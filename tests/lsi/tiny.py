"""A tiny random block of every family that declares equivalent transformations, with what its model calls it with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from material import Task
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lsi.block import run_block
from lsi.experts import open_experts

HIDDEN, HEADS, HEAD_SIZE, INNER, LENGTH = 32, 4, 8, 48, 9
COMMON = {
    "vocab_size": 40,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_SIZE,
    "pad_token_id": 0,
}
OPT = {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 32}
MIXTURE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GEMMA = {"sliding_window": 4, "query_pre_attn_scalar": 6}


@dataclass(frozen=True)
class Case:
    """A configuration; `attention` eager where soft-capping must take part. opened: experts as linears."""

    model_type: str
    changes: dict[str, Any]
    attention: str = "sdpa"
    opened: bool = False
    layer: int = 0


CASES = {
    "llama": Case("llama", {}),
    "llama-one-kv-head": Case("llama", {"num_key_value_heads": 1}),
    "llama-no-groups": Case("llama", {"num_key_value_heads": HEADS}),
    "llama-biased": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Case("mistral", {"sliding_window": 4}),
    "qwen2": Case("qwen2", {}),
    "qwen3": Case("qwen3", {}),
    "gemma2-sliding": Case("gemma2", GEMMA | {"attn_logit_softcapping": 2.0}, "eager"),
    "gemma2-full": Case("gemma2", GEMMA | {"attn_logit_softcapping": 2.0}, "eager", layer=1),
    "gemma3": Case("gemma3_text", GEMMA),
    "phi3": Case("phi3", {}),
    "phi3-no-groups": Case("phi3", {"num_key_value_heads": HEADS}),
    "phi3-partial": Case("phi3", {"partial_rotary_factor": 0.5}),
    "opt": Case("opt", OPT),
    "opt-post-norm": Case("opt", OPT | {"do_layer_norm_before": False}),
    "mixtral": Case("mixtral", MIXTURE),
    "mixtral-opened": Case("mixtral", MIXTURE, opened=True),
    "qwen3-moe": Case("qwen3_moe", MIXTURE),
    "qwen3-moe-opened": Case("qwen3_moe", MIXTURE, opened=True),
    "qwen3-moe-dense": Case("qwen3_moe", MIXTURE | {"mlp_only_layers": [0]}),
}


def randomize(block: nn.Module, seed: int = 0) -> None:
    """Weights large enough that attention and routing are far from uniform; norms' weights and biases all different."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in block.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = center + 0.3 * noise


def make_case(name: str, *, samples: int = 3) -> tuple[nn.Module, Task]:
    """The same block and task at every call; the targets are the block's own outputs."""
    case = CASES[name]
    config = AutoConfig.for_model(case.model_type, **(COMMON | case.changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=case.attention).float().eval()
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers)
    block, seen = layers[case.layer], {}
    block.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(torch.arange(1, 1 + LENGTH).expand(samples, LENGTH))
    block._forward_pre_hooks.clear()
    block._forward_pre_hooks_with_kwargs.clear()
    arguments = {k: v for k, v in seen.items() if k not in ("past_key_values", "use_cache", "hidden_states")}
    randomize(block)
    block.requires_grad_(False)
    inputs = torch.randn(samples, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1))
    targets = run_block(block, inputs, arguments)
    if case.opened:
        open_experts(block)
    return block, Task(inputs, targets, arguments)
