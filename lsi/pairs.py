"""Where a block lets a channel's scale be moved between two of its tensors without changing its output.

    norm          norm → q, k, v and norm → gate, up (or fc1); in a mixture norm → router and every expert's gate, up
    value_output  v → o: the attention's average over tokens keeps channels apart, and its weights sum to 1
    query_key     q ↔ k, or their norms where a family has them: only their product counts
    up_down       up → down of a gated feed-forward part, whose product with the gate is per channel

A scale of rows alone changes no code of a weight, whose every row has its own grid: query_key serves quantized q and k, and
training it on weights alone only follows rounding errors.

(OmniQuant, arXiv 2308.13137, section 3.3, without up_down.) Query heads of a group share one key and value head, and so
their scales; so do the two channels that a rotation mixes, j and j + width / 2 of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lsi.families import Family, model_type_of

KINDS = ("norm", "value_output", "query_key", "up_down")
WEIGHT_ONLY = ("norm", "value_output", "up_down")
Index = Int[Tensor, " channels"]


@dataclass(frozen=True)
class Site:
    """A tensor that a scale meets, by name: in its columns (last dimension) or in rows `start` and on.

    index: the pair's channel of each of these columns or rows. power: 1 multiplies by the scale, −1 divides.
    one_plus: the tensor stands for 1 + itself.
    """

    tensor: str
    index: Index
    columns: bool
    power: int
    start: int = 0
    one_plus: bool = False


@dataclass(frozen=True)
class Pair:
    """Tensors that share one scale per channel. shift: whether their biases can also take up a shift per channel."""

    name: str
    channels: int
    sites: tuple[Site, ...]
    shift: bool = False

    def consumers(self) -> list[Site]:
        """The sites that read the pair's channels as input."""
        return [site for site in self.sites if site.columns]


@dataclass(frozen=True)
class Heads:
    """An attention's dimensions; `rotated` channels of a head take part in the rotation."""

    size: int
    query: int
    key: int
    rotated: int

    def grouped(self, channels: Index) -> Int[Tensor, " query_channels"]:
        """The index of all query heads' channels, from that of one key head; the key heads' own ones come one after another."""
        width = int(channels.max()) + 1
        head = torch.arange(self.query) // (self.query // self.key)
        return (head.unsqueeze(1) * width + channels).flatten()

    def of_keys(self, channels: Index) -> Int[Tensor, " key_channels"]:
        """The same for the key heads."""
        return ((int(channels.max()) + 1) * torch.arange(self.key).unsqueeze(1) + channels).flatten()

    def tied(self) -> Index:
        """The free channel of each channel of a head: those that a rotation mixes are one."""
        half = self.rotated // 2
        channel = torch.arange(self.size)
        return torch.where(channel < half, channel, channel - half)


def find_tensor(block: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of a block, None if it has none of this name."""
    owner, _, leaf = name.rpartition(".")
    try:
        found = getattr(block.get_submodule(owner), leaf, None)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def tensor_of(block: nn.Module, name: str) -> Tensor:
    """A parameter or buffer that is known to be there."""
    found = find_tensor(block, name)
    assert found is not None, name
    return found


def bias_name(tensor: str) -> str:
    """The name of the bias that belongs to a weight."""
    return tensor.removesuffix("weight") + "bias"


def heads_of(block: nn.Module, family: Family) -> Heads:
    """The attention's dimensions, from its weights' shapes."""
    attention = block.get_submodule(family.output.rpartition(".")[0])
    size = attention.head_dim
    assert isinstance(size, int)
    query = tensor_of(block, f"{family.output}.weight").shape[1] // size
    rows = tensor_of(block, f"{family.key}.weight").shape[0] // size
    key = (rows - query) // 2 if family.key == family.query else rows
    factor = {"whole": 1.0, None: 0.0}.get(family.rotary)
    if factor is None:
        config: Any = attention.config
        factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return Heads(size, query, key, int(size * factor))


def find_pairs(block: nn.Module, family: Family, kinds: Collection[str], *, shifts: bool) -> list[Pair]:
    """The pairs of the wanted kinds that the block has; its shapes are enough (meta device).

    Raises ValueError for an unknown kind, if there is no pair, and if shifts are wanted but no pair has a bias at every
    site: none can be introduced, a loader would not expect it.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"unknown kind of equivalent transformation {unknown[0]!r}; the kinds are {', '.join(KINDS)}")
    makers = {"norm": _norms, "value_output": _value_output, "query_key": _query_key, "up_down": _up_down}
    pairs = [pair for kind in KINDS if kind in kinds for pair in makers[kind](block, family, shifts)]
    model_type = model_type_of(block)
    if not pairs:
        has = [kind for kind in KINDS if any(makers[kind](block, family, False))]
        raise ValueError(
            f"this {model_type} block has no equivalent transformation of kind {', '.join(sorted(kinds))}; "
            f"it has {', '.join(has) or 'none'}"
        )
    if shifts and not any(pair.shift for pair in pairs):
        raise ValueError(
            f"shifts need biases in norms and linears, which this {model_type} block lacks; leave them out"
        )
    return pairs


def _all_biased(block: nn.Module, sites: Collection[Site]) -> bool:
    return all(find_tensor(block, bias_name(site.tensor)) is not None for site in sites)


def _norms(block: nn.Module, family: Family, shifts: bool) -> Iterator[Pair]:
    # A norm after the sum feeds the residual stream as well, which no linear can make up for (OPT-350m).
    if not getattr(block, "do_layer_norm_before", True):
        return
    projections = [f"{name}.weight" for name in (family.query, family.key, family.value)]
    feeds = {
        "attention_norm": (family.attention_norm, projections),
        "mlp_norm": (family.mlp_norm, list(_mlp_inputs(block, family))),
    }
    for name, (norm, consumers) in feeds.items():
        weight = find_tensor(block, f"{norm}.weight")
        if weight is None:
            continue
        index = torch.arange(len(weight))
        sites = [Site(f"{norm}.weight", index, False, -1, one_plus=family.one_plus)]
        sites += [Site(tensor, index, True, 1) for tensor in dict.fromkeys(consumers)]
        yield Pair(name, len(weight), tuple(sites), shifts and _all_biased(block, sites))


def _expert_names(block: nn.Module, family: Family) -> list[str]:
    """Experts that are modules of their own (`lsi.experts`), by name."""
    if (
        find_tensor(block, f"{family.router}.weight") is None
        or find_tensor(block, f"{family.experts}.gate_up_proj") is not None
    ):
        return []
    return [
        f"{family.experts}.{name}" for name, _ in block.get_submodule(family.experts).named_children() if name.isdigit()
    ]


def _mlp_inputs(block: nn.Module, family: Family) -> Iterator[str]:
    """The tensors that read the feed-forward part's input. The router comes first: it sees every token."""
    if find_tensor(block, f"{family.router}.weight") is None:
        yield from (f"{name}.weight" for name in (family.gate, family.up) if name)
        return
    yield f"{family.router}.weight"
    if find_tensor(block, f"{family.experts}.gate_up_proj") is not None:
        yield f"{family.experts}.gate_up_proj"
    for expert in _expert_names(block, family):
        yield from (f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight")


def _value_output(block: nn.Module, family: Family, shifts: bool) -> Iterator[Pair]:
    heads = heads_of(block, family)
    own = torch.arange(heads.size)
    start = (heads.query + heads.key) * heads.size if family.value == family.query else 0
    sites = (
        Site(f"{family.value}.weight", heads.of_keys(own), False, -1, start),
        Site(f"{family.output}.weight", heads.grouped(own), True, 1),
    )
    yield Pair("value_output", heads.key * heads.size, sites, shifts and _all_biased(block, sites))


def _query_key(block: nn.Module, family: Family, shifts: bool) -> Iterator[Pair]:
    heads = heads_of(block, family)
    tied = heads.tied()
    if family.query_norm and family.key_norm:
        # A norm in between takes out any scale of the projection; its own weight is one for all heads.
        norms = ((family.query_norm, 1), (family.key_norm, -1))
        sites = tuple(Site(f"{name}.weight", tied, False, power, one_plus=family.one_plus) for name, power in norms)
        yield Pair("query_key", int(tied.max()) + 1, sites)
        return
    start = heads.query * heads.size if family.key == family.query else 0
    sites = (
        Site(f"{family.query}.weight", heads.grouped(tied), False, 1),
        Site(f"{family.key}.weight", heads.of_keys(tied), False, -1, start),
    )
    yield Pair("query_key", heads.key * (int(tied.max()) + 1), sites)


def _up_down(block: nn.Module, family: Family, shifts: bool) -> Iterator[Pair]:
    experts = _expert_names(block, family)
    for number, expert in enumerate(experts):
        yield _gated(block, f"up_down_{number}", f"{expert}.up_proj", f"{expert}.down_proj", fused=False)
    if family.gate and find_tensor(block, f"{family.up}.weight") is not None:
        yield _gated(block, "up_down", family.up, family.down, fused=family.gate == family.up)


def _gated(block: nn.Module, name: str, up: str, down: str, *, fused: bool) -> Pair:
    channels = tensor_of(block, f"{down}.weight").shape[1]
    index = torch.arange(channels)
    sites = (
        Site(f"{up}.weight", index, False, -1, channels if fused else 0),
        Site(f"{down}.weight", index, True, 1),
    )
    return Pair(name, channels, sites)
