"""Mixtures of experts: fused expert tensors opened into one linear each, for calibration and in the checkpoint.

transformers keeps the experts of a block in two tensors, gate_up_proj (experts, 2 · inner, hidden) and down_proj
(experts, hidden, inner). Opened, expert i is the modules i.gate_proj, i.up_proj and i.down_proj in the same place, whose
weights are views of these tensors until somebody replaces them.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def linear_from(weight: Float[Tensor, "out in"]) -> nn.Linear:
    """A linear without bias around a weight, not copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


class Expert(nn.Module):
    """One gated feed-forward part: down(activation(gate(x)) · up(x))."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear_from(gate), linear_from(up), linear_from(down)
        self.act_fn = activation

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        hidden: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return hidden


class OpenedExperts(nn.Module):
    """Takes the fused module's place, with its call: hidden states, and the experts and weights of each token's choices."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        gate_up, down, activation = fused.gate_up_proj, fused.down_proj, fused.act_fn
        assert isinstance(gate_up, Tensor)
        assert isinstance(down, Tensor)
        assert isinstance(activation, nn.Module)
        for number, (rows, columns) in enumerate(zip(gate_up, down, strict=True)):
            gate, up = rows.chunk(2)
            self.add_module(str(number), Expert(gate, up, columns, activation))

    def experts(self) -> list[Expert]:
        """In their order."""
        return [module for module in self.children() if isinstance(module, Expert)]

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens choices"],
        top_k_weights: Float[Tensor, "tokens choices"],
    ) -> Float[Tensor, "tokens hidden"]:
        output = torch.zeros_like(hidden_states)
        if output.is_meta:
            # Shapes alone: who goes where is not known there.
            return output
        for number, expert in enumerate(self.experts()):
            token, choice = torch.where(top_k_index == number)
            if len(token):
                part = expert(hidden_states[token]) * top_k_weights[token, choice, None]
                output.index_add_(0, token, part.to(output.dtype))
        return output


def _can_be_opened(module: Any) -> bool:
    """Whether a module is fused experts in the layout of Mixtral and Qwen3-MoE: not biased, transposed or interleaved."""
    tensors = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    fused = all(isinstance(tensor, nn.Parameter) and tensor.ndim == 3 for tensor in tensors)
    return fused and module.is_concatenated and module.has_gate and not (module.has_bias or module.is_transposed)


def open_experts(block: nn.Module) -> list[str]:
    """Open the fused experts of a block and return their names; none in a block without a mixture, or with another layout."""
    names = [name for name, module in block.named_modules() if _can_be_opened(module)]
    for name in names:
        block.set_submodule(name, OpenedExperts(block.get_submodule(name)))
    return names


def expert_of(block: nn.Module, name: str) -> str | None:
    """The name of the opened expert that a linear of the block belongs to; None if to none."""
    expert = name.rpartition(".")[0]
    return expert if expert and isinstance(block.get_submodule(expert), Expert) else None
