"""A transformer block with its linears replaced: the family's own module runs the forward pass, nothing is re-written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lsi.grid import Grid, QuantizedWeight, round_to_nearest
from lsi.linear import Parts, QuantizedLinear

Hidden = Float[Tensor, "batch sequence hidden"]


def is_skipped(name: str, skip: list[str]) -> bool:
    """Whether a linear's full name matches a pattern: the name, its last parts, or an fnmatch pattern."""
    return any(name == pattern or name.endswith("." + pattern) or fnmatch(name, pattern) for pattern in skip)


def is_gate(name: str, linear: nn.Linear) -> bool:
    """Whether a linear only weighs parts of a mixture: it has one output (Qwen2-MoE's shared_expert_gate) or belongs to a
    router. It costs next to nothing, and engines expect it in full precision."""
    return linear.out_features == 1 or "router" in name.split(".")


def linear_names(block: nn.Module, prefix: str, skip: list[str]) -> list[str]:
    """Names within the block of the linears that are quantized, gates left out; `prefix` is the block's name in the model."""
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    names = [name for name, linear in linears.items() if not is_gate(name, linear)]
    return [name for name in names if not is_skipped(f"{prefix}.{name}", skip)]


def get_linear(block: nn.Module, name: str) -> nn.Linear:
    """A linear of a block by its name within it."""
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def replace_linears(
    block: nn.Module,
    names: list[str],
    grid: Grid,
    parts: Parts,
    starts: Mapping[str, QuantizedWeight] | None = None,
    **settings: Any,
) -> dict[str, QuantizedLinear]:
    """Put trainable quantized linears in the place of the named ones, freeze the rest, and return them by name.

    `starts`: what they are quantized to already, by name. `settings` are further ones of `QuantizedLinear`.
    """
    block.requires_grad_(False)
    replaced = {}
    for name in names:
        start = (starts or {}).get(name)
        replaced[name] = QuantizedLinear(get_linear(block, name), grid, parts, start, **settings)
        block.set_submodule(name, replaced[name])
    return replaced


def sharing_copy(block: nn.Module) -> nn.Module:
    """A block whose modules and parameters are its own and whose numbers are the other's: put new tensors in the place of
    old ones, as `load_quantized` does, and never write into these."""
    memo: dict[int, Tensor] = {id(t): t.detach() for t in block.buffers()}
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in block.parameters()}
    copied: nn.Module = copy.deepcopy(block, memo)
    return copied


def checkpoint_parts(block: nn.Module) -> None:
    """Let attention and feed-forward part keep only their inputs for the backward pass, and be run again there; those of
    each block where several are one module."""
    for part in block.children():
        if isinstance(part, nn.ModuleList):  # is never called itself
            for inner in part:
                checkpoint_parts(inner)
            continue
        inside = (module for module in part.modules() if module is not part)
        if any(isinstance(module, QuantizedLinear) for module in inside):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)


@torch.no_grad()
def widen_rest(block: nn.Module, linears: Iterable[nn.Module]) -> None:
    """Everything but `linears`, the quantized ones, in float32: it is small, and their weights and factors are widened one by one."""
    theirs = {module for linear in linears for module in linear.modules()}
    for module in block.modules():
        if module not in theirs:
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None and tensor.is_floating_point():
                        tensor.data = tensor.float()


@contextmanager
def watched_inputs(watchers: Iterable[tuple[nn.Module, Callable[[Tensor], None]]]) -> Iterator[None]:
    """Within it each module's watcher sees what enters the module, detached and a token a row."""

    def hook(watch: Callable[[Tensor], None], module: nn.Module, arguments: tuple[Any, ...]) -> None:
        watch(arguments[0].detach().float().flatten(0, -2))

    handles = [module.register_forward_pre_hook(partial(hook, watch)) for module, watch in watchers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_block(
    block: nn.Module, hidden: Hidden, arguments: Mapping[str, Any]
) -> Float[Tensor, "batch sequence channels"]:
    """The block's hidden states, or logits where the head is in it; some families return a tuple with them first."""
    output = block(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def at_once(hidden: Tensor) -> tuple[Tensor, ...]:
    """A batch in the pieces that passes without gradients take: on a CPU single sequences, so that what lies between a block's
    layers stays in the processor's cache; on a GPU all of it."""
    return hidden.split(1) if hidden.device.type == "cpu" else (hidden,)


def outputs_of(block: nn.Module, hidden: Hidden, arguments: Mapping[str, Any]) -> Hidden:
    """What `run_block` returns, piece by piece. For passes without gradients."""
    return torch.cat([run_block(block, piece, arguments) for piece in at_once(hidden)])


def trainable(linears: Mapping[str, QuantizedLinear]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every trained parameter as (linear name.part, tensor), in a fixed order."""
    for name in sorted(linears):
        for part, parameter in linears[name].named_parameters():
            yield f"{name}.{part}", parameter


@torch.no_grad()
def load_quantized(block: nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    """Give W_hat to a plain block's linears, rounded to their dtype: what a loader of the checkpoint computes with.

    The former weights are let go of, not written over: others may hold them.
    """
    for name, quantized in weights.items():
        weight = get_linear(block, name).weight
        weight.data = quantized.dequantize(weight.dtype).to(weight.device)


@torch.no_grad()
def round_block(block: nn.Module, names: list[str], grid: Grid, scale_dtype: torch.dtype) -> dict[str, QuantizedWeight]:
    """Round-to-nearest of every named linear."""
    return {name: round_to_nearest(get_linear(block, name).weight, grid, scale_dtype) for name in names}
