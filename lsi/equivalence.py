"""LET: learnable equivalent transformations, folded away afterwards (OmniQuant, arXiv 2308.13137, section 3.3).

Every pair of a block (`lsi.pairs`) has a scale s per channel, and a shift δ where biases allow. With x what its consumers
read and y = x · Wᵀ + b:

    producer  (w / s, (b − δ) / s)        x' = (x − δ) / s
    consumer  (W · diag(s), b + W · δ)    y' = y

What is trained is log s and δ, zero at first: the block starts as it is. To start as SmoothQuant does (arXiv 2211.10438),
set the scales from the inputs' ranges, then train from there:

    equivalence.start(block, collect_ranges(block, equivalence.pairs, batches))
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lsi.block import Hidden, run_block, watched_inputs
from lsi.families import family_of
from lsi.grid import straight_through
from lsi.linear import Side
from lsi.pairs import Pair, Site, bias_name, find_pairs, find_tensor, tensor_of

Result = TypeVar("Result")
Ranges = dict[str, Float[Tensor, "2 channels"]]
# Factors beyond these leave float16 no room for a norm's weight or bias.
SMALLEST_SCALE, LARGEST_SCALE = 1e-4, 1e4


class Equivalence(nn.Module):
    """The trained scales and shifts of one block. Holds no weights of it: every method is handed the block.

    kinds: of `lsi.pairs.KINDS`. dtype: the one that norms are stored in; their scales are chosen so that rounding to it
    changes nothing. Raises ValueError for a family that is not declared, and as `find_pairs` does.
    """

    def __init__(
        self, block: nn.Module, kinds: Collection[str], *, shifts: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.dtype = dtype
        device = next(block.parameters()).device
        with device:
            self.pairs = find_pairs(block, family_of(block), kinds, shifts=shifts)
        self.log_scale = nn.ParameterDict(
            {pair.name: nn.Parameter(torch.zeros(pair.channels, device=device)) for pair in self.pairs}
        )
        self.shift = nn.ParameterDict(
            {pair.name: nn.Parameter(torch.zeros(pair.channels, device=device)) for pair in self.pairs if pair.shift}
        )

    def scaled(self) -> Iterator[tuple[str, Side]]:
        """What is multiplied: names of modules, and whether rows or columns of their weights."""
        for pair in self.pairs:
            for site in pair.sites:
                yield site.tensor.removesuffix(".weight"), "columns" if site.columns else "rows"

    def transformed(self, block: nn.Module, without: Collection[str] = ()) -> dict[str, Tensor]:
        """The tensors of the block that change, by name, in float32 and differentiable in scales and shifts.

        Pairs named in `without` are left out. A linear that expects it (`QuantizedLinear.expect_scaling`) is told by what: LINEAR.rows, LINEAR.columns.
        """
        tensors: dict[str, Tensor] = {}
        # Columns first: W · δ is of the weight before its own rows are scaled, and they scale the bias with it.
        order = sorted(
            ((pair, site) for pair in self.pairs if pair.name not in without for site in pair.sites),
            key=lambda entry: not entry[1].columns,
        )
        with torch.autocast(next(iter(self.log_scale.values())).device.type, enabled=False):
            scales = {pair.name: self._scale(block, pair) for pair in self.pairs}
            for pair, site in order:
                scale = scales[pair.name][site.index]
                shift = self.shift[pair.name][site.index] if pair.shift else None
                if site.columns:
                    _change_columns(tensors, block, site, scale, shift)
                else:
                    _change_rows(tensors, block, site, scale if site.power > 0 else 1 / scale, shift)
        return tensors

    def _scale(self, block: nn.Module, pair: Pair) -> Float[Tensor, " channels"]:
        """exp(log s); for a norm's pair the nearest one that leaves the norm's weight in its dtype."""
        scale = self.log_scale[pair.name].exp()
        norm = pair.sites[0]
        weight = tensor_of(block, norm.tensor).float()
        if weight.ndim > 1 or not pair.consumers():
            return scale
        offset = float(norm.one_plus)
        factor = weight + offset
        stored = ((factor / scale - offset).to(self.dtype).float() + offset).detach()
        # Next to -1, where the stored weight would take the channel away, it stays on its side.
        least = offset * torch.finfo(self.dtype).eps * factor.sign()
        exact = factor / torch.where(stored == 0, least, stored)
        return straight_through(scale, torch.where(torch.isfinite(exact) & (exact > 0), exact, scale))

    def within(self, block: nn.Module, function: Callable[[], Result], without: Collection[str] = ()) -> Result:
        """What `function` returns while the block holds the transformed tensors; gradients reach scales and shifts."""
        tensors = {f"block.{name}": tensor for name, tensor in self.transformed(block, without).items()}
        result: Result = torch.func.functional_call(_Holder(block), tensors, (function,))
        return result

    @torch.no_grad()
    def start(self, block: nn.Module, ranges: Ranges, alpha: float = 0.5) -> None:
        """s = max|x − δ|^α / max|W|^(1 − α) per channel with δ the middle of x's range (0 without shifts).

        q ↔ k stays at the identity, as OmniQuant's does: its two sides are activations.
        """
        for pair in self.pairs:
            if not pair.consumers():
                continue
            low, high = ranges[pair.name]
            if pair.shift:
                self.shift[pair.name].copy_(torch.nan_to_num((low + high) / 2, nan=0.0))
            reach = (high - low) / 2 if pair.shift else torch.maximum(-low, high)
            scale = reach.clamp(min=0) ** alpha / _largest_weights(block, pair) ** (1 - alpha)
            # A channel that is never on, or that nobody reads, stays as it is.
            usable = torch.isfinite(scale) & (scale > 0)
            log_scale = torch.where(usable, scale, 1.0).clamp(SMALLEST_SCALE, LARGEST_SCALE).log()
            self.log_scale[pair.name].copy_(log_scale)


class _Holder(nn.Module):
    """`functional_call` replaces a module's tensors while it runs: this one runs whatever it is handed."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def _current(tensors: Mapping[str, Tensor], block: nn.Module, name: str) -> Tensor:
    return tensors[name] if name in tensors else tensor_of(block, name).float()


def _change_columns(
    tensors: dict[str, Tensor], block: nn.Module, site: Site, scale: Tensor, shift: Tensor | None
) -> None:
    weight = tensor_of(block, site.tensor).float()
    tensors[site.tensor] = weight * scale
    _tell(tensors, block, site, "columns", scale)
    if shift is not None:
        name = bias_name(site.tensor)
        tensors[name] = tensor_of(block, name).float() + weight @ shift


def _change_rows(
    tensors: dict[str, Tensor], block: nn.Module, site: Site, factor: Tensor, shift: Tensor | None
) -> None:
    weight = _current(tensors, block, site.tensor)
    rest = (site.start, len(weight) - site.start - len(factor))
    factor = functional.pad(factor, rest, value=1.0)
    scaled = weight * factor.view(-1, *[1] * (weight.ndim - 1))
    tensors[site.tensor] = scaled + (factor - 1) if site.one_plus else scaled
    _tell(tensors, block, site, "rows", factor)
    name = bias_name(site.tensor)
    if find_tensor(block, name) is not None:
        bias = _current(tensors, block, name)
        tensors[name] = (bias if shift is None else bias - functional.pad(shift, rest)) * factor


def _tell(tensors: dict[str, Tensor], block: nn.Module, site: Site, side: Side, factor: Tensor) -> None:
    """Tell a linear what its rows or columns are multiplied by, beside what they are already."""
    name = f"{site.tensor.rpartition('.')[0]}.{side}"
    if find_tensor(block, name) is not None:
        tensors[name] = _current(tensors, block, name) * factor


def _extreme(values: Tensor, site: Site, channels: int, kind: str) -> Float[Tensor, " channels"]:
    """The smallest (amin) or largest (amax) of the values at the columns that share a channel."""
    return torch.zeros(channels, device=values.device).scatter_reduce(0, site.index, values, kind, include_self=False)


def _largest_weights(block: nn.Module, pair: Pair) -> Float[Tensor, " channels"]:
    largest = []
    for site in pair.consumers():
        columns = tensor_of(block, site.tensor).float().abs().flatten(0, -2).amax(0)
        largest.append(_extreme(columns, site, pair.channels, "amax"))
    return torch.stack(largest).amax(0)


@torch.no_grad()
def load_tensors(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of the block's of the same names, rounded to their dtype. The former ones are not written
    over: others may hold them."""
    for name, tensor in tensors.items():
        former = tensor_of(block, name)
        former.data = tensor.detach().to(former.device, former.dtype)


@torch.no_grad()
def collect_ranges(
    block: nn.Module, pairs: Iterable[Pair], batches: Iterable[tuple[Hidden, Mapping[str, Any]]]
) -> Ranges:
    """Lowest and highest value that each pair's channels take at its consumers' entrance, over all batches of (inputs,
    further arguments). A channel that no token reached has the range (∞, −∞)."""
    ranges: Ranges = {}
    watchers = []
    for pair in pairs:
        if pair.consumers():
            site = pair.consumers()[0]
            device = tensor_of(block, site.tensor).device
            ranges[pair.name] = torch.tensor([[torch.inf], [-torch.inf]], device=device).repeat(1, pair.channels)
            owner = block.get_submodule(site.tensor.rpartition(".")[0])
            watchers.append((owner, partial(_widen, pair, site, ranges[pair.name])))
    with watched_inputs(watchers):
        for inputs, arguments in batches:
            run_block(block, inputs, arguments)
    return ranges


def _widen(pair: Pair, site: Site, into: Float[Tensor, "2 channels"], seen: Float[Tensor, "tokens columns"]) -> None:
    """Take tokens into a pair's ranges."""
    if len(seen):
        low = _extreme(seen.amin(0), site, pair.channels, "amin")
        high = _extreme(seen.amax(0), site, pair.channels, "amax")
        into.copy_(torch.stack([torch.minimum(into[0], low), torch.maximum(into[1], high)]))
