"""The model without its weights: transformers' own classes on the meta device, filled one block at a time.

Everything around the blocks (embeddings, final norm, head, whatever scaling a family does) runs as the family wrote it: the
blocks are replaced by stand-ins that record what they are called with, or hand in hidden states from elsewhere.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from lsi.block import get_linear
from pipeline.errors import UserError
from pipeline.mixture import open_mixtures, original_names
from pipeline.model_source import ModelSource

Arguments = dict[str, Any]


def empty_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model with parameters on the meta device; buffers (rotary frequencies) are real."""
    with init_empty_weights(include_buffers=False):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError) as error:
            if type(config) in AutoModelForCausalLM._model_mapping:  # its values, then
                raise UserError(
                    f"config.json: transformers makes no {config.model_type} of it: {type(error).__name__}: {error}"
                ) from error
            raise UserError(
                f"architecture {config.model_type!r} is no causal language model that transformers knows"
            ) from error
    text = config.get_text_config()
    if text is not config:
        raise UserError(
            f"{type(model).__name__} is a language model ({text.model_type}) with other parts beside it, which is not supported: "
            "save the language model alone, with its own config.json, and quantize that"
        )
    model.tie_weights()
    return model.eval()


def block_list_name(model: nn.Module) -> str:
    """The name of the decoder's block list: as many modules of one class as the model has layers. Raises UserError."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    }
    depth = getattr(model.config, "num_hidden_layers", None)
    fitting = [name for name, module in lists.items() if len(module) == depth]
    if not fitting:
        raise UserError(
            f"{type(model).__name__}: found no list of {depth} decoder blocks; this architecture is not supported"
        )
    return min(fitting, key=lambda name: name.count("."))


@dataclass
class Skeleton:
    """A model whose weights are elsewhere. `blocks_name` is the prefix of the blocks' names, such as model.layers."""

    model: PreTrainedModel
    blocks_name: str

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self.blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def block_prefix(self, index: int) -> str:
        return f"{self.blocks_name}.{index}"

    def place(self, name: str) -> tuple[int, str] | None:
        """The block that a tensor of the model belongs to and its name there; None for one outside the blocks."""
        within = name.removeprefix(f"{self.blocks_name}.")
        index, _, local = within.partition(".")
        return None if within == name else (int(index), local)


def make_skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Skeleton:
    model = empty_model(config, trust_remote_code=trust_remote_code)
    skeleton = Skeleton(model, block_list_name(model))
    open_mixtures(model, skeleton.blocks)
    return skeleton


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Tokens that a model with a table of learned positions takes at once; None without such a table."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    named = re.compile(r"(.*\.)?(wpe|\w*position\w*)")
    tables = (
        m.num_embeddings for name, m in model.named_modules() if isinstance(m, nn.Embedding) and named.fullmatch(name)
    )
    # OPT's begins with two rows of no position; images' have sizes of their own.
    return int(limit) if any(0 <= size - limit <= 2 for size in tables) else None


def check_length(key: str, length: int, limit: int | None) -> None:
    """Refuse sequences beyond a `longest_sequence`; `key`: what sets their length."""
    if limit is not None and length > limit:
        raise UserError(
            f"{key} {length} is beyond the {limit} positions that the model has learned: set it to {limit} or less"
        )


def check_known(tokens: Tensor, model: PreTrainedModel, where: str) -> None:
    """Refuse tokens that the model has no embedding for."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    if (largest := int(tokens.max())) >= len(table):
        raise UserError(
            f"{where}: its tokenizer makes token {largest} of these texts, and the model has embeddings for 0 to {len(table) - 1}: "
            "tokenizer and model are not of one another"
        )


def tensor_names(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and persistent buffers by full name; a tied one once, under the name it is stored by."""
    seen: set[int] = set()
    names = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            names[f"{prefix}.{name}" if prefix else name] = tensor
    return names


def stored_name(name: str, source: ModelSource, model: PreTrainedModel) -> str:
    """The checkpoint's own name of a tensor: some leave out the base model's prefix, some keep names that transformers has
    changed since. Raises UserError if it is not there."""
    base = model.base_model_prefix + "."
    for candidate in (name, name.removeprefix(base), base + name, *_former_names(name, model)):
        if candidate in source.index:
            return candidate
    raise UserError(
        f"{source.store.url}: no shard holds {name}, which {type(model).__name__} needs; is a shard missing from the index?"
    )


def _former_names(name: str, model: PreTrainedModel) -> Iterator[str]:
    """By transformers' own table of renamings, backwards."""
    yield original_names([name], model)[name]
    for change in get_model_conversion_mapping(model):
        if isinstance(change, WeightRenaming):
            yield change.reverse_transform().rename_source_key(name)[0]


def checked_name(name: str, expected: Tensor, source: ModelSource, model: PreTrainedModel) -> str:
    """The stored name of a tensor that has the shape its configuration asks for. Raises UserError."""
    stored = stored_name(name, source, model)
    shape = source.index[stored][1].shape
    if shape != tuple(expected.shape):
        raise UserError(
            f"{source.store.url}: {name} has shape {list(shape)}, its configuration asks for {list(expected.shape)}; "
            "config.json and the shards are of different models"
        )
    return stored


def check_tensors(skeleton: Skeleton, source: ModelSource) -> None:
    """Refuse a checkpoint that lacks a tensor or has one of another shape, from the headers alone."""
    for name, expected in tensor_names(skeleton.model).items():
        checked_name(name, expected, source, skeleton.model)


def _fill(
    module: nn.Module,
    prefix: str,
    source: ModelSource,
    model: PreTrainedModel,
    dtype: torch.dtype,
    without: Collection[str] = (),
) -> None:
    """Read every tensor of a meta module and put it in place; of the linears in `without` the weights are left zero."""
    for name, expected in tensor_names(module, prefix).items():
        local = name.removeprefix(prefix + ".") if prefix else name
        if local.removesuffix(".weight") in without:
            tensor = torch.zeros(expected.shape, dtype=dtype)
        else:
            tensor = source.read(checked_name(name, expected, source, model))
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        owner = module.get_submodule(local.rpartition(".")[0])
        leaf = local.rpartition(".")[2]
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor


def load_block(
    skeleton: Skeleton,
    source: ModelSource,
    index: int,
    dtype: torch.dtype,
    device: str = "cpu",
    without: Collection[str] = (),
) -> nn.Module:
    """Block `index` with its weights, a module of its own. The weights of the linears in `without` are not read: they are for
    the caller to write."""
    block = copy.deepcopy(skeleton.blocks[index])
    _fill(block, skeleton.block_prefix(index), source, skeleton.model, dtype, without)
    return block.to(device).eval()


class _SeenEnough(Exception):  # noqa: N818  (not an error)
    """Ends a pass that is only after what blocks are called with: norm and head are left out."""


class _StandIn(nn.Module):
    """Takes a block's place: records the call and returns the hidden states it is told to, or those it got."""

    def __init__(self, replaced: nn.Module, hand_in: Callable[[], Tensor | None]) -> None:
        super().__init__()
        # Some models ask a block for its attention type before they call it.
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(replaced, name):
                setattr(self, name, getattr(replaced, name))
        self.returns_tuple = False
        self.ends_pass = False
        self.hand_in = hand_in
        self.seen: Tensor | None = None
        self.arguments: Arguments = {}

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise UserError(f"blocks of this architecture take positional arguments ({len(args)}); it is not supported")
        self.seen = hidden
        self.arguments = {
            k: v for k, v in kwargs.items() if k not in ("past_key_values", "past_key_value", "use_cache")
        }
        if self.ends_pass:
            raise _SeenEnough
        given = self.hand_in()
        result = hidden if given is None else given
        return (result,) if self.returns_tuple else result


@dataclass
class Surroundings:
    """All of the model but its blocks, with real weights: embeddings, final norm, head."""

    model: PreTrainedModel
    stand_ins: list[_StandIn]
    handed_in: list[Tensor | None]

    @torch.no_grad()
    def embed(self, tokens: Int[Tensor, "batch sequence"]) -> Float[Tensor, "batch sequence hidden"]:
        """The hidden states that enter block 0."""
        self._look(tokens, self.stand_ins[0])
        seen = self.stand_ins[0].seen
        assert seen is not None
        return seen

    @torch.no_grad()
    def arguments(self, sequence_length: int) -> list[Arguments]:
        """What each block is called with besides the hidden states, for any batch of whole sequences of this length."""
        self._look(self._any_tokens(sequence_length), self.stand_ins[-1])
        return [stand_in.arguments for stand_in in self.stand_ins]

    @torch.no_grad()
    def logits(
        self, tokens: Int[Tensor, "batch sequence"], hidden: Tensor
    ) -> Float[Tensor, "batch sequence vocabulary"]:
        """The logits of hidden states that leave the last block."""
        self.handed_in[0] = hidden
        return self.model(input_ids=tokens, use_cache=False).logits

    def head(self, hidden: Tensor) -> Float[Tensor, "batch sequence vocabulary"]:
        """The logits of hidden states that leave the last block, differentiable in these."""
        self.handed_in[0] = hidden.to(self.model.dtype)
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.model.device)
        return self.model(input_ids=tokens, use_cache=False).logits

    def first_arguments(self) -> Arguments:
        """What block 0 is called with, for two tokens; asked before it is known what blocks return."""
        self._look(self._any_tokens(2), self.stand_ins[0])
        return self.stand_ins[0].arguments

    def _any_tokens(self, length: int) -> Tensor:
        return torch.zeros(1, length, dtype=torch.long, device=self.model.device)

    def _look(self, tokens: Tensor, last: _StandIn) -> None:
        """Run the model up to a stand-in."""
        self.handed_in[0] = None
        last.ends_pass = True
        try:
            with suppress(_SeenEnough):
                self.model(input_ids=tokens, use_cache=False)
        finally:
            last.ends_pass = False


def _returns_tuple(skeleton: Skeleton, arguments: Arguments) -> bool:
    """Whether the family's blocks return a tuple: asked of a block on the meta device, where running costs nothing.

    Raises UserError where it does not run, or not on more sequences than the arguments were made for (BLOOM).
    """
    block = copy.deepcopy(skeleton.blocks[0]).to("meta")
    for module in block.modules():
        if isinstance(config := getattr(module, "config", None), PretrainedConfig):
            # Of what computes fused experts, this alone takes any dtype without data.
            config._experts_implementation = "batched_mm"
    hidden = torch.empty(2, 2, skeleton.model.config.hidden_size, device="meta")
    on_meta = {name: _to_meta(value) for name, value in arguments.items()}
    try:
        return isinstance(block(hidden, **on_meta), tuple)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UserError(
            f"{type(skeleton.model).__name__}: its blocks cannot be run one by one ({str(error).splitlines()[0]}); "
            "this architecture is not supported"
        ) from error


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple):
        return tuple(_to_meta(v) for v in value)
    return value


def load_surroundings(skeleton: Skeleton, source: ModelSource, dtype: torch.dtype, device: str = "cpu") -> Surroundings:
    """Read everything outside the blocks; the blocks themselves are replaced by stand-ins."""
    return surround(skeleton, lambda model: _fill(model, "", source, skeleton.model, dtype), device)


def surround(skeleton: Skeleton, fill: Callable[[PreTrainedModel], None], device: str = "cpu") -> Surroundings:
    """The model with stand-ins for its blocks; `fill` gives values to everything else."""
    handed_in: list[Tensor | None] = [None]
    model = copy.deepcopy(skeleton.model)
    stand_ins = [_StandIn(block, lambda: handed_in[0]) for block in skeleton.blocks]
    model.set_submodule(skeleton.blocks_name, nn.ModuleList(stand_ins))
    fill(model)
    # A tied head is the same tensor as the embedding; filling replaced one of the two.
    model.tie_weights()
    model.to(device)  # type: ignore[arg-type]
    surroundings = Surroundings(model, stand_ins, handed_in)
    with torch.no_grad():
        tuples = _returns_tuple(skeleton, surroundings.first_arguments())
    for stand_in in stand_ins:
        stand_in.returns_tuple = tuples
    return surroundings


def check_groups(skeleton: Skeleton, index: int, names: list[str], group_size: int | None) -> None:
    """Refuse a group size that does not divide some linear's inputs, naming the linears and the sizes that would do."""
    if group_size is None:
        return
    widths = {name: get_linear(skeleton.blocks[index], name).in_features for name in names}
    wrong = {name: width for name, width in widths.items() if width % group_size}
    if wrong:
        listed = ", ".join(f"{name} ({width})" for name, width in wrong.items())
        fits = [s for s in (256, 192, 128, 96, 64, 48, 32, 16) if all(w % s == 0 for w in widths.values())]
        raise UserError(
            f"scheme.group_size {group_size} does not divide the input channels of {listed}; "
            f"sizes that would do: {', '.join(map(str, fits)) or 'none of the usual ones'}, or null for one scale per output channel"
        )
