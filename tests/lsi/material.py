"""Weights, a tiny decoder layer, and numerical gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tolerances import assert_same
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from lsi.grid import QuantizedWeight

HIDDEN = 64
NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
NAMES += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    if bias is not None:
        linear.bias.data = bias.clone()
    return linear


def hard_weights() -> Tensor:
    """Rows of 15: every triple of a grid of quarters (many ties), random rows, of one sign, of zeros, with far values."""
    quarters = [quarter / 4 for quarter in range(-8, 9)]
    ties = torch.tensor([*itertools.product(quarters, repeat=3), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)]).reshape(-1, 15)
    random = normal(512, 15) * 0.02
    # Not above 1e4, where a scale would not fit float16.
    far = normal(32, 15, seed=1) * 10.0 ** normal(32, 15, seed=2).mul(4).clamp(max=4)
    half_empty = normal(4, 15, seed=3)
    half_empty[:, :6] = 0
    rows = [torch.zeros(15), torch.full((15,), -0.0), torch.ones(15), -torch.ones(15), torch.full((15,), 1e-10)]
    return torch.cat([ties, random, random.abs(), -random.abs(), far, half_empty, torch.stack(rows)])


def assert_same_weight(actual: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert_same(actual.codes, expected.codes)
    assert_same(actual.scale, expected.scale)
    assert_same(actual.zero_point, expected.zero_point)


def numeric_gradient(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a scalar function, entry by entry."""
    gradient = torch.empty_like(at)
    for index in range(at.numel()):
        values = []
        for sign in (1, -1):
            moved = at.detach().clone()
            moved.view(-1)[index] += sign * step
            values.append(function(moved).item())
        gradient.view(-1)[index] = (values[0] - values[1]) / (2 * step)
    return gradient


@dataclass(frozen=True)
class Task:
    """Data to reconstruct a layer on: its inputs, its own outputs, and what its forward pass needs besides."""

    inputs: Tensor
    targets: Tensor
    arguments: Mapping[str, Any]


def config(*, bias: bool = False) -> LlamaConfig:
    made = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, attention_bias=bias
    )
    made._attn_implementation = "sdpa"
    return made


def make_layer(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> LlamaDecoderLayer:
    """The same random layer at every call."""
    layer = LlamaDecoderLayer(config(bias=bias), 0)
    for seed, (name, parameter) in enumerate(layer.named_parameters()):
        if name.endswith("bias") or parameter.ndim == 2:
            parameter.data = normal(*parameter.shape, seed=seed) * 0.1
    return layer.to(dtype)


def make_task(*, seed: int = 0, bias: bool = False, samples: int = 2, length: int = 8) -> Task:
    inputs = normal(samples, length, HIDDEN, seed=100 + seed)
    positions = torch.arange(length).unsqueeze(0)
    rotary = LlamaRotaryEmbedding(config())(inputs, positions)
    arguments = {"position_embeddings": rotary, "attention_mask": None}
    with torch.no_grad():
        return Task(inputs, make_layer(bias=bias)(inputs, **arguments), arguments)


def incremented(module: nn.Module, weight: Tensor) -> Tensor:
    """W' of an increment's module."""
    change = module()
    return weight if change is None else weight + change
