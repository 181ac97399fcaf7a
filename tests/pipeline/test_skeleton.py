"""A model run block by block is the model that transformers runs whole, to the last bit, in every family that is supported."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
)

from pipeline.checks import check_calls, check_readable
from pipeline.config_sections import SchemeConfig
from pipeline.errors import UserError
from pipeline.mixture import original_names
from pipeline.model_source import SINGLE, ModelSource, open_model
from pipeline.skeleton import (
    Skeleton,
    block_list_name,
    check_groups,
    empty_model,
    load_block,
    load_surroundings,
    longest_sequence,
    make_skeleton,
    tensor_names,
)
from pipeline.store import Store, open_store

TinyModel = Callable[..., Path]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2, "intermediate_size": 128}
# Windows of 8 are shorter than the sequences below, so that the masks differ.
SLIDING: dict[str, Any] = GROUPED | {"head_dim": 16, "sliding_window": 8}
LLAMA3_ROTARY = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama tied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama untied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama 3 rotary": lambda: LlamaConfig(**GROUPED, rope_parameters=LLAMA3_ROTARY),
    "mistral sliding": lambda: MistralConfig(**SLIDING),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen2 sliding": lambda: Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "gemma2": lambda: Gemma2Config(**SLIDING, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(
        **SLIDING,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3 sliding": lambda: Phi3Config(**GROUPED, sliding_window=8),
    "opt": lambda: OPTConfig(**SIZES | {"pad_token_id": 1}, ffn_dim=128, word_embed_proj_dim=64),
    "opt projected": lambda: OPTConfig(
        **SIZES | {"pad_token_id": 1}, ffn_dim=128, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=128),
    "falcon": lambda: FalconConfig(**SIZES),
    "granite": lambda: GraniteConfig(**GROUPED, embedding_multiplier=12.0, residual_multiplier=0.3),
    "cohere": lambda: CohereConfig(**GROUPED),
}

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MIXTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=64),
    "qwen3_moe": lambda: Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=16, mlp_only_layers=[1]),
    "olmoe": lambda: OlmoeConfig(**GROUPED, **EXPERTS),
}


def open_folder(folder: Path) -> tuple[ModelSource, Skeleton]:
    source = open_model(open_store(str(folder)))
    return source, make_skeleton(source.config)


def some_tokens(samples: int, length: int) -> Tensor:
    return torch.randint(2, 320, (samples, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def block_by_block(source: ModelSource, skeleton: Skeleton, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    surroundings = load_surroundings(skeleton, source, dtype)
    arguments = surroundings.arguments(tokens.shape[1])
    hidden = surroundings.embed(tokens)
    for index in range(len(skeleton)):
        result = load_block(skeleton, source, index, dtype)(hidden, **arguments[index])
        hidden = result[0] if isinstance(result, tuple) else result
    return surroundings.logits(tokens, hidden)


@torch.no_grad()
def whole(folder: Path, tokens: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_is_the_whole_model(tiny_model: TinyModel, tmp_path: Path, family: str, dtype: str) -> None:
    folder = tiny_model(tmp_path, config=FAMILIES[family](), dtype=dtype)
    source, skeleton = open_folder(folder)
    tokens = some_tokens(3, 24)
    expected = whole(folder, tokens)
    assert expected.std() > 0.05
    assert torch.equal(block_by_block(source, skeleton, tokens, getattr(torch, dtype)), expected)


@pytest.mark.parametrize("family", MIXTURES)
def test_opened_experts_are_the_whole_model_too(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    """They add up in another order than the fused ones."""
    folder = tiny_model(tmp_path, config=MIXTURES[family]())
    source, skeleton = open_folder(folder)
    tokens = some_tokens(3, 24)
    torch.testing.assert_close(block_by_block(source, skeleton, tokens, torch.float32), whole(folder, tokens))
    names = original_names(list(tensor_names(skeleton.model)), skeleton.model)
    assert set(names.values()) == set(source.index)


def test_a_model_without_the_base_prefix(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Some checkpoints hold the base model's names: layers.0… for model.layers.0…"""
    folder = tiny_model(tmp_path)
    expected = whole(folder, some_tokens(2, 8))
    stored = load_file(folder / SINGLE)
    save_file({name.removeprefix("model."): tensor for name, tensor in stored.items()}, folder / SINGLE)
    source, skeleton = open_folder(folder)
    assert "layers.0.self_attn.q_proj.weight" in source.index
    assert torch.equal(block_by_block(source, skeleton, some_tokens(2, 8), torch.float32), expected)


# --- what is not supported says so -----------------------------------------------------------------------------------


def test_families_that_are_not_supported(tiny_model: TinyModel, tmp_path: Path) -> None:
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320)
    source, skeleton = open_folder(tiny_model(tmp_path, config=config, dtype="bfloat16"))
    with pytest.raises(UserError, match="take positional arguments"):
        block_by_block(source, skeleton, some_tokens(1, 4), torch.bfloat16)


def test_no_causal_language_model() -> None:
    with pytest.raises(UserError, match="architecture 't5' is no causal language model"):
        make_skeleton(T5Config())


def test_a_language_model_beside_other_parts() -> None:
    with pytest.raises(
        UserError, match=r"Gemma3ForConditionalGeneration is a language model \(gemma3_text\) with other"
    ):
        make_skeleton(Gemma3Config(text_config=GROUPED))


def test_no_list_of_decoder_blocks() -> None:
    config = BertConfig(**GROUPED | {"num_key_value_heads": None}, is_decoder=True)
    model = empty_model(config)
    config.num_hidden_layers = 7
    with pytest.raises(UserError, match="found no list of 7 decoder blocks; this architecture is not supported"):
        block_list_name(model)


# --- the skeleton ----------------------------------------------------------------------------------------------------


def test_skeleton_holds_no_weights() -> None:
    model = empty_model(LlamaConfig(**GROUPED | {"hidden_size": 8192, "num_hidden_layers": 4}))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_loading_leaves_the_skeleton_empty(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, skeleton = open_folder(tiny_model(tmp_path))
    load_block(skeleton, source, 0, torch.float32)
    load_surroundings(skeleton, source, torch.float32)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert type(skeleton.blocks[0]).__name__ == "LlamaDecoderLayer"


def test_tied_embeddings_are_named_and_held_once(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, skeleton = open_folder(tiny_model(tmp_path / "tied", tied=True))
    assert "lm_head.weight" not in tensor_names(skeleton.model)
    assert set(tensor_names(skeleton.model)) == set(source.index)
    model = load_surroundings(skeleton, source, torch.float32).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    source, skeleton = open_folder(tiny_model(tmp_path / "untied", tied=False))
    assert set(tensor_names(skeleton.model)) == set(source.index) > {"lm_head.weight"}
    model = load_surroundings(skeleton, source, torch.float32).model
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


class CountingStore(Store):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.bytes_read = 0

    def get(self, key: str) -> bytes:
        assert not key.endswith(".safetensors"), "a shard was read whole"
        return super().get(key)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        self.bytes_read += end - start
        return super().read_range(key, start, end)


@pytest.mark.parametrize("shards", ["1GB", "100KB"], ids=["single", "sharded"])
def test_only_what_is_loaded_is_read(tiny_model: TinyModel, tmp_path: Path, shards: str) -> None:
    store = CountingStore(str(tiny_model(tmp_path, blocks=3, dtype="bfloat16", max_shard_size=shards)))
    source = open_model(store)
    skeleton = make_skeleton(source.config)
    for index in range(3):
        before = store.bytes_read
        block = load_block(skeleton, source, index, torch.bfloat16)
        assert store.bytes_read - before == sum(t.nbytes for t in block.state_dict().values())
    before = store.bytes_read
    load_surroundings(skeleton, source, torch.bfloat16)
    assert store.bytes_read - before == 2 * (320 * 64 + 64)


def test_blocks_are_loaded_in_the_asked_dtype(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, skeleton = open_folder(tiny_model(tmp_path))
    block = load_block(skeleton, source, 1, torch.bfloat16)
    stored = source.read("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(block.mlp.up_proj.weight, stored.to(torch.bfloat16))
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert not block.training


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama tied", "gemma3", "gpt_neox", "falcon"])
def test_arguments_serve_any_batch_size_and_length(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    folder = tiny_model(tmp_path, config=FAMILIES[family]())
    source, skeleton = open_folder(folder)
    for samples, length in [(1, 24), (4, 24), (2, 5)]:
        tokens = some_tokens(samples, length)
        assert torch.equal(block_by_block(source, skeleton, tokens, torch.float32), whole(folder, tokens))


def test_arguments_follow_the_attention_type(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, skeleton = open_folder(tiny_model(tmp_path, config=FAMILIES["gemma3"]()))
    sliding, full, again = load_surroundings(skeleton, source, torch.float32).arguments(24)
    assert sliding["attention_mask"].sum() < 24 * 25 / 2
    assert full["attention_mask"] is None or full["attention_mask"].sum() == 24 * 25 / 2
    assert torch.equal(sliding["attention_mask"], again["attention_mask"])
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])


def test_no_cache_is_handed_to_blocks(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, skeleton = open_folder(tiny_model(tmp_path))
    for arguments in load_surroundings(skeleton, source, torch.float32).arguments(4):
        assert {"past_key_values", "use_cache"}.isdisjoint(arguments)


# --- weights that do not fit -----------------------------------------------------------------------------------------


def test_wrong_shape_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(load_file(folder / SINGLE) | {name: torch.ones(128, 60)}, folder / SINGLE)
    source, skeleton = open_folder(folder)
    load_block(skeleton, source, 0, torch.float32)
    message = re.escape(f"{name} has shape [128, 60], its configuration asks for [128, 64]")
    with pytest.raises(UserError, match=message):
        load_block(skeleton, source, 1, torch.float32)


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("model.layers.1.self_attn.k_proj.weight", lambda s, m: load_block(s, m, 1, torch.float32)),
        ("model.norm.weight", lambda s, m: load_surroundings(s, m, torch.float32)),
        ("lm_head.weight", lambda s, m: load_surroundings(s, m, torch.float32)),
    ],
)
def test_missing_tensor_is_named(
    tiny_model: TinyModel, tmp_path: Path, name: str, load: Callable[[Skeleton, ModelSource], object]
) -> None:
    folder = tiny_model(tmp_path, tied=False)
    stored = load_file(folder / SINGLE)
    del stored[name]
    save_file(stored, folder / SINGLE)
    source, skeleton = open_folder(folder)
    with pytest.raises(UserError, match=f"no shard holds {re.escape(name)}, which LlamaForCausalLM needs"):
        load(skeleton, source)


# --- group sizes -----------------------------------------------------------------------------------------------------


def smollm_skeleton() -> Skeleton:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return make_skeleton(LlamaConfig(**GROUPED | sizes))


def test_zero_points_that_the_library_cannot_load_are_refused() -> None:
    skeleton = make_skeleton(LlamaConfig(**GROUPED | {"num_key_value_heads": 1, "head_dim": 8}))
    names = ["self_attn.q_proj", "self_attn.k_proj"]
    scheme = SchemeConfig(bits=4, group_size=32)
    with pytest.raises(UserError, match=r"with 8 outputs or less, in groups: self_attn\.k_proj \(8\); set scheme"):
        check_readable(skeleton, 0, names, scheme)
    for other in ({"symmetric": True}, {"group_size": None}, {"bits": 3}, {"activation_bits": 8}):
        check_readable(skeleton, 0, names, scheme.model_copy(update=other))


def test_group_size_that_does_not_divide_names_linears_and_sizes() -> None:
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
    with pytest.raises(UserError) as caught:
        check_groups(smollm_skeleton(), 0, names, 128)
    assert str(caught.value) == (
        "scheme.group_size 128 does not divide the input channels of self_attn.q_proj (576), self_attn.o_proj (576); "
        "sizes that would do: 192, 96, 64, 48, 32, 16, or null for one scale per output channel"
    )


@pytest.mark.parametrize("size", [64, 192, 1, None])
def test_group_size_that_fits(size: int | None) -> None:
    check_groups(smollm_skeleton(), 0, ["self_attn.q_proj", "mlp.down_proj"], size)


def test_linears_that_the_caller_writes_are_not_read(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model(open_store(str(tiny_model(tmp_path / "m"))))
    skeleton = make_skeleton(source.config)
    read: list[str] = []
    plain = ModelSource.read
    monkeypatch.setattr(ModelSource, "read", lambda self, name: (read.append(name), plain(self, name))[1])
    whole = load_block(skeleton, source, 1, torch.float32)
    read.clear()
    partly = load_block(skeleton, source, 1, torch.float32, without={"mlp.up_proj"})
    assert not any("up_proj" in name for name in read)
    assert read
    assert not partly.get_submodule("mlp.up_proj").weight.any()
    torch.testing.assert_close(
        partly.get_submodule("mlp.down_proj").weight, whole.get_submodule("mlp.down_proj").weight
    )


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64), SIZES["max_position_embeddings"]),
        (GPT2Config(n_layer=2, n_head=4, n_embd=64, n_positions=48), 48),
        (LlamaConfig(**GROUPED), None),
    ],
    ids=["opt", "gpt2", "llama"],
)
def test_only_learned_positions_are_limited(config: PretrainedConfig, limit: int | None) -> None:
    with torch.device("meta"):
        assert longest_sequence(AutoModelForCausalLM.from_config(config)) == limit


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BloomConfig(**SIZES, n_layer=3, n_head=4), "BloomForCausalLM: its blocks cannot be run one by one"),
        (BertConfig(**SIZES, intermediate_size=128), "blocks of this architecture take positional arguments"),
    ],
    ids=["bloom", "bert"],
)
def test_blocks_that_cannot_be_run_one_by_one_are_refused_without_weights(config: PretrainedConfig, words: str) -> None:
    """BLOOM's position biases are made for so many sequences."""
    with pytest.raises(UserError, match=words):
        check_calls(make_skeleton(config))
