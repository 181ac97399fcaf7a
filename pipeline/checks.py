"""What a configuration asks of a model, checked on its skeleton alone."""

from __future__ import annotations

import torch
from torch import nn

from lsi.block import get_linear, is_skipped, linear_names
from lsi.experts import OpenedExperts
from lsi.families import family_of, find_family
from lsi.pairs import find_pairs
from pipeline.activations import check_attention
from pipeline.call_arguments import made_up_arguments
from pipeline.config import RunConfig
from pipeline.config_sections import MethodConfig, SchemeConfig
from pipeline.errors import UserError
from pipeline.merge import unpublished
from pipeline.mixture import has_mixture
from pipeline.packed_format import unreadable
from pipeline.presets import preset_values
from pipeline.skeleton import Skeleton, check_groups, check_length, longest_sequence


def check_run(config: RunConfig, skeleton: Skeleton) -> None:
    """Refuse what a configuration asks of a model that the model cannot give. Needs no weights."""
    check_calls(skeleton)
    check_scheme(config, skeleton)
    check_equivalence(config, skeleton)
    check_look_ahead(config.method, skeleton)
    check_mixture(config, skeleton)
    check_lengths(config, skeleton)
    check_purpose(config, skeleton)


def check_calls(skeleton: Skeleton) -> None:
    """Refuse a family whose blocks cannot be run one by one, on any batch."""
    try:
        made_up_arguments(skeleton, 2, torch.float32, "cpu")
    except UserError:
        raise
    except Exception as error:  # what a family's own code raises around blocks that are not its own
        raise UserError(
            f"{type(skeleton.model).__name__}: its blocks cannot be run one by one ({type(error).__name__}: {error}); this architecture is "
            "not supported"
        ) from error


def check_scheme(config: RunConfig, skeleton: Skeleton) -> None:
    """Refuse a scheme that does not fit the model."""
    everything = [name for name, _ in skeleton.model.named_modules()]
    for pattern in config.scheme.skip:
        # Lists for several families have patterns, and the head is called otherwise in some.
        plain = pattern != "lm_head" and not set(pattern) & set("*?[")
        if plain and not any(is_skipped(name, [pattern]) for name in everything):
            raise UserError(
                f"scheme.skip {pattern!r} is the name of no part of {type(skeleton.model).__name__}, such as {everything[-1]}: correct it, or leave it out"
            )
    found = False
    for index in range(len(skeleton)):
        names = linear_names(skeleton.blocks[index], skeleton.block_prefix(index), config.scheme.skip)
        check_groups(skeleton, index, names, config.scheme.group_size)
        check_readable(skeleton, index, names, config.scheme)
        check_fused(skeleton, index, config.scheme)
        check_rank(skeleton, index, names, config.method)
        check_experts(skeleton, index, names, config.scheme)
        found = found or bool(names)
    if not found:
        raise UserError(
            f"{type(skeleton.model).__name__}: its blocks hold no linear layers that scheme.skip {config.scheme.skip} does not leave "
            "alone, so there is nothing to quantize; skip fewer, or this architecture is not supported"
        )
    check_attention(config.scheme, skeleton.model, skeleton.blocks)


def check_lengths(config: RunConfig, skeleton: Skeleton) -> None:
    """Refuse sequences longer than a table of learned positions."""
    limit = longest_sequence(skeleton.model)
    check_length("data.sequence_length", config.data.sequence_length, limit)
    if config.evaluation.texts:
        check_length("evaluation.length", config.evaluation.length, limit)


def check_purpose(config: RunConfig, skeleton: Skeleton) -> None:
    """Refuse a run that would leave neither a checkpoint nor a perplexity."""
    if not config.evaluation.texts and (reason := unpublished(config, skeleton)):
        raise UserError(
            f"nothing would come of this run: no checkpoint is published because {reason}, and evaluation.texts names no text "
            "to evaluate on; give one there"
        )


def check_readable(skeleton: Skeleton, index: int, names: list[str], scheme: SchemeConfig) -> None:
    """Refuse linears that compressed-tensors would save and not load."""
    if scheme.activation_bits:
        return
    linears = {name: get_linear(skeleton.blocks[index], name) for name in names}
    if small := [n for n, one in linears.items() if unreadable(one.out_features, one.in_features, scheme.grid)]:
        listed = ", ".join(f"{name} ({linears[name].out_features})" for name in small)
        raise UserError(
            f"scheme.symmetric is false, but compressed-tensors cannot load the zero points of 4 bits of linears with 8 outputs or less, in "
            f"groups: {listed}; set scheme.symmetric to true, scheme.group_size to null, or add them to scheme.skip"
        )


def check_fused(skeleton: Skeleton, index: int, scheme: SchemeConfig) -> None:
    """Refuse experts that stay in one tensor, and so in full precision, unless they are skipped knowingly."""
    for name, module in skeleton.blocks[index].named_modules():
        parameters = module.named_parameters(recurse=False)
        fused = [f"{part} {tuple(one.shape)}" for part, one in parameters if one.ndim == 3 and min(one.shape) > 1]
        known = isinstance(module, nn.Conv1d) or is_skipped(f"{skeleton.block_prefix(index)}.{name}", scheme.skip)
        if fused and not known:
            raise UserError(
                f"block {index} holds experts in one tensor, {name}.{fused[0]}, in a layout that is not known, so that they would stay in full "
                f"precision: add {name} to scheme.skip for that"
            )


def check_rank(skeleton: Skeleton, index: int, names: list[str], method: MethodConfig) -> None:
    """Refuse a rank, a corner or a band that some linear is too small for."""
    asked = method.increments.smallest_rank
    key = "rank" if method.rank == asked else method.increment
    beyond = 1 if key == "band" else 0  # the main diagonal
    ranks = {name: min(get_linear(skeleton.blocks[index], name).weight.shape) for name in names}
    if small := {name: rank for name, rank in ranks.items() if rank < asked}:
        listed = ", ".join(f"{name} ({rank})" for name, rank in small.items())
        raise UserError(
            f"method.{key} {asked - beyond} is above the rank of {listed}: set method.{key} to {min(small.values()) - beyond} or less"
        )


def check_experts(skeleton: Skeleton, index: int, names: list[str], scheme: SchemeConfig) -> None:
    """Refuse zero points of experts: transformers 5 drops them when it fuses what it has unpacked."""
    opened = [n for n, module in skeleton.blocks[index].named_modules() if isinstance(module, OpenedExperts)]
    inside = [name for name in names if any(name.startswith(f"{mixture}.") for mixture in opened)]
    if inside and not scheme.symmetric:
        raise UserError(
            f"scheme.symmetric is false, but block {index} holds experts ({inside[0]} and others), whose zero points "
            "transformers does not load: set scheme.symmetric to true, or add *.experts.* to scheme.skip"
        )


def check_mixture(config: RunConfig, skeleton: Skeleton) -> None:
    """Refuse experts in a group that holds every tensor in parts: its members would not reach the same ones."""
    if config.compute.partitions and config.optimizer.epochs and has_mixture(skeleton.model):
        raise UserError(
            f"compute.group is {config.compute.group} with compute.engine deepspeed, whose members put every linear together at the same time, "
            "and this model is a mixture of experts, of which each reaches its own: set compute.group to 1, or compute.engine to torch"
        )


def check_look_ahead(method: MethodConfig, skeleton: Skeleton) -> None:
    """Refuse a look-ahead past the last block."""
    blocks = len(skeleton)
    if method.look_ahead >= blocks:
        raise UserError(
            f"method.look_ahead {method.look_ahead} is past the last block of a model of {blocks}: set it to {blocks - 1}{' or less' if blocks > 1 else ''}"
        )


def check_equivalence(config: RunConfig, skeleton: Skeleton) -> None:
    """Refuse an equivalent transformation that a block cannot take."""
    method = config.method
    if not method.equivalence:
        return
    try:
        find_family(skeleton.model.config.model_type)
        for block in skeleton.blocks:
            family = family_of(block)
            find_pairs(block, family, method.equivalence_kinds(config.scheme), shifts=method.shifts)
            for kind in method.equivalence if method.equivalence != "auto" else ():
                find_pairs(block, family, [kind], shifts=False)
    except ValueError as error:
        if "shifts" in str(error):
            raise UserError(f"method.shifts: {error}") from error
        whose = f", as preset {config.preset} has it" if _from_preset(config) else ""
        raise UserError(f"method.equivalence{whose}: {error} (method.equivalence: [] leaves it out)") from error


def _from_preset(config: RunConfig) -> bool:
    """Whether the preset asks for the same equivalent transformation."""
    values = preset_values(config.preset, config.scheme.model_dump()) if config.preset else {}
    return bool(values.get("method", {}).get("equivalence") == config.method.equivalence)
