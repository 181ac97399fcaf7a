"""Whole runs with equivalent transformations: better where channels differ, folded into what a loader reads, refused in time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Silent, checkpoint_hashes, run, run_in_pieces, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lsi.grid import Grid, clip_to_weights
from pipeline.artifacts import read_tensors
from pipeline.block_state import WEIGHTS_FILE, BlockResult
from pipeline.config import RunConfig
from pipeline.config_file import parse_config
from pipeline.config_sections import SchemeConfig
from pipeline.costs import placeholder_inputs
from pipeline.errors import UserError
from pipeline.estimate import estimate
from pipeline.evaluate_checkpoint import evaluate_checkpoint
from pipeline.graph import build_graph
from pipeline.merge import checkpoint_layout, plan_shards, shards_with_blocks
from pipeline.prepare import prepare
from pipeline.report import artifacts_of, block_reports
from pipeline.run import Finished
from pipeline.tensors import deserialize

TinyModel = Callable[..., Path]
SCHEDULES: list[dict[str, Any]] = [{"kind": "sequential"}, {"kind": "wave", "lead": 1}]
TRAINED = {
    "data": {"samples": 16},
    "optimizer": {"epochs": 4},
    "evaluation": {"windows": 4, "length": 64},
}
COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
}
MIXTURE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.fixture
def model(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A Llama in whose norms a few channels are twenty times the others, as massive channels of real models are."""
    folder = tiny_model(tmp_path / "model", blocks=3)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[[3, 17, 40]] *= 20
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def family(tiny_model: TinyModel, folder: Path, model_type: str, **more: Any) -> Path:
    return tiny_model(folder, config=AutoConfig.for_model(model_type, **COMMON | FAMILIES.get(model_type, {}) | more))


def result_of_block(finished: Finished, block: int) -> BlockResult:
    artifact = artifacts_of(finished, "quantized")[block]
    return BlockResult.unpack(read_tensors(finished.prepared.store, artifact, WEIGHTS_FILE))


def checkpoint(finished: Finished) -> dict[str, torch.Tensor]:
    store = finished.prepared.checkpoint
    return {n: t for k in store.list() if k.endswith(".safetensors") for n, t in deserialize(store.get(k)).items()}


def assert_loader_agrees(finished: Finished, result: dict[str, Any], text: Path, tolerance: float = 1e-4) -> None:
    loaded = evaluate_checkpoint(finished.prepared.checkpoint.url, [str(text)], 4, 64, "cpu", show=False)
    assert loaded[str(text)] == pytest.approx(result["perplexity"]["quantized"]["news"], rel=tolerance)


@pytest.mark.parametrize(("steps", "clipping"), [("adamw", "learned"), ("signed", "direct")])
def test_it_lowers_every_loss_where_channels_differ(
    model: Path, short_text: Path, tmp_path: Path, steps: str, clipping: str
) -> None:
    """On full-precision inputs, which are the same with and without it."""
    losses = {}
    for equivalence in ([], "auto"):
        schedule = {"kind": "parallel", "refresh_every": 0}
        sections: dict[str, Any] = TRAINED | {"optimizer": {"epochs": 4, "steps": steps}, "schedule": schedule}
        method = {"increment": "none", "clipping": clipping, "clipping_start": "range", "equivalence": equivalence}
        where = tmp_path / ("with" if equivalence else "without")
        finished, result = run(tiny_config(model, short_text, where, method=method, **sections))
        losses[bool(equivalence)] = [block["loss"] for block in block_reports(finished)]
    assert all(with_it < without for with_it, without in zip(losses[True], losses[False], strict=True))
    assert sum(losses[True]) < 0.9 * sum(losses[False])
    assert_loader_agrees(finished, result, short_text)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s["kind"])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    model: Path, short_text: Path, tmp_path: Path, schedule: dict[str, Any]
) -> None:
    sections: dict[str, Any] = {"schedule": schedule, "method": {"equivalence": "auto"}}
    sections["evaluation"] = TRAINED["evaluation"]
    undisturbed, _ = run(tiny_config(model, short_text, tmp_path / "one", **sections))
    assert any(result_of_block(undisturbed, block).folded for block in range(3))
    config = tiny_config(model, short_text, tmp_path / "two", **sections)
    finished, result, _ = run_in_pieces(config, 3)
    assert checkpoint_hashes(finished.prepared.checkpoint) == checkpoint_hashes(undisturbed.prepared.checkpoint)
    assert_loader_agrees(finished, result, short_text)


CASES = [*((name, "float32") for name in FAMILIES), ("gemma3_text", "bfloat16"), ("opt", "bfloat16")]


@pytest.mark.parametrize(("model_type", "dtype"), CASES)
def test_every_family_from_text_to_a_checkpoint_that_loads(
    tiny_model: TinyModel, short_text: Path, tmp_path: Path, model_type: str, dtype: str
) -> None:
    folder = family(tiny_model, tmp_path / "model", model_type)
    method = {"equivalence": "auto", "shifts": model_type == "opt"}
    model = {"source": str(folder), "dtype": dtype}
    finished, result = run(tiny_config(folder, short_text, tmp_path / "run", method=method, model=model, **TRAINED))
    stored, prefix = checkpoint(finished), finished.prepared.skeleton.blocks_name
    changed = 0
    for block, report in enumerate(block_reports(finished)):
        assert report["status"] == "ok"
        for name, tensor in result_of_block(finished, block).folded.items():
            assert tensor.dtype == finished.prepared.context.dtype
            assert torch.equal(stored[f"{prefix}.{block}.{name}"], tensor)
            changed += 1
    assert changed >= 4, "norms of two blocks"
    # In bfloat16 the loader multiplies in another order than one block at a time.
    assert_loader_agrees(finished, result, short_text, 1e-4 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("equivalence", [[], "auto"], ids=["plain", "let"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_are_quantized_one_by_one_and_saved_as_their_family_does(
    tiny_model: TinyModel, short_text: Path, tmp_path: Path, model_type: str, equivalence: Any
) -> None:
    folder = family(tiny_model, tmp_path / "model", model_type, **MIXTURE)
    method = {"equivalence": equivalence, "expert_tokens": 1}
    sections: dict[str, Any] = {"scheme": {"symmetric": True}, "method": method}
    finished, result = run(tiny_config(folder, short_text, tmp_path / "run", **TRAINED | sections))
    kept = {name.replace("weight_packed", "weight") for name in checkpoint(finished)} - {"lm_head.weight"}
    assert set(load_file(folder / "model.safetensors")) - {"lm_head.weight"} <= kept
    assert result["untrained_experts"] == {}
    assert sum("experts" in name and name.endswith("weight_packed") for name in checkpoint(finished)) == 2 * 4 * 3
    assert_loader_agrees(finished, result, short_text)


@pytest.mark.parametrize(
    ("rate", "equivalence", "kept"),
    [(None, [], "epoch 3"), (1e3, [], "initial, few-token experts clipped"), (None, "auto", "epoch 3")],
)
def test_experts_with_few_tokens_are_reported(
    tiny_model: TinyModel, short_text: Path, tmp_path: Path, rate: float | None, equivalence: Any, kept: str
) -> None:
    """Whatever state of their block is kept."""
    folder = family(tiny_model, tmp_path / "model", "qwen3_moe", **MIXTURE)
    optimizer = TRAINED["optimizer"] | {"increment_learning_rate": rate}
    method = {"expert_tokens": 1000, "increment": "diagonal", "equivalence": equivalence}
    sections: dict[str, Any] = {"scheme": {"symmetric": True}, "method": method, "optimizer": optimizer}
    finished, result = run(tiny_config(folder, short_text, tmp_path / "run", **TRAINED | sections))
    everyone = [f"mlp.experts.{number}" for number in range(4)]
    assert {report["kept"] for report in block_reports(finished)} == {kept}
    assert result["untrained_experts"] == {"0": everyone, "1": everyone}
    weight = result_of_block(finished, 0).weights["mlp.experts.2.down_proj"]
    plain = finished.prepared.source.read("model.layers.0.mlp.experts.2.down_proj.weight")
    assert torch.equal(weight.codes, clip_to_weights(plain, Grid(3, 32, True), torch.float32).codes)
    card = finished.prepared.checkpoint.get("README.md").decode()
    assert "Experts that saw fewer than 1000 tokens, clipped without data" in card
    assert_loader_agrees(finished, result, short_text)


def test_a_linear_that_is_left_alone_is_folded_into_all_the_same(model: Path, short_text: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"method": {"equivalence": "auto"}, "scheme": {"skip": ["lm_head", "o_proj"]}}
    finished, result = run(tiny_config(model, short_text, tmp_path / "run", **TRAINED | sections))
    folded = result_of_block(finished, 0).folded
    assert "self_attn.o_proj.weight" in folded
    plain = finished.prepared.source.read("model.layers.0.self_attn.o_proj.weight")
    assert not torch.equal(folded["self_attn.o_proj.weight"], plain)
    assert torch.equal(
        checkpoint(finished)["model.layers.0.self_attn.o_proj.weight"], folded["self_attn.o_proj.weight"]
    )
    assert_loader_agrees(finished, result, short_text)


def test_a_shard_with_nothing_but_norms_of_a_block_reads_its_result(
    model: Path, short_text: Path, tmp_path: Path
) -> None:
    prepared = prepare(tiny_config(model, short_text, tmp_path / "run"), Silent())
    layout = checkpoint_layout(prepared.skeleton, prepared.config.scheme.grid, ["lm_head"], torch.float32)
    files = shards_with_blocks(plan_shards(layout, 1), prepared.skeleton)
    blocks = {names: found for _, names, found in files}
    assert blocks[("model.layers.1.input_layernorm.weight",)] == (1,)
    assert blocks[("model.layers.2.mlp.up_proj.weight",)] == (2,)
    assert blocks[("model.embed_tokens.weight",)] == blocks[("model.norm.weight",)] == ()


def test_steps_that_do_harm_leave_the_untrained_block(model: Path, short_text: Path, tmp_path: Path) -> None:
    """And its norms as they were."""
    method = {"equivalence": "auto", "clipping_start": "range"}
    # Here the outputs that are handed on are not finite either, so every block becomes round-to-nearest.
    schedule = {"kind": "parallel"}
    optimizer = {"equivalence_learning_rate": 1e3}
    sections: dict[str, Any] = {"method": method, "optimizer": optimizer, "schedule": schedule}
    finished, result = run(tiny_config(model, short_text, tmp_path / "run", **sections))
    for block, report in enumerate(block_reports(finished)):
        assert report["kept"] in ("initial", "round_to_nearest")
        assert result_of_block(finished, block).folded == {}
        name = f"model.layers.{block}.input_layernorm.weight"
        assert torch.equal(checkpoint(finished)[name], finished.prepared.source.read(name))
    table = result["perplexity"]
    assert table["quantized"]["news"] == pytest.approx(table["round_to_nearest"]["news"], rel=1e-6)


def test_what_was_done_is_told(model: Path, short_text: Path, tmp_path: Path) -> None:
    finished, _ = run(tiny_config(model, short_text, tmp_path / "run", method={"equivalence": ["up_down", "norm"]}))
    card = finished.prepared.checkpoint.get("README.md").decode()
    assert "folded into norms and weights (LET, arXiv 2308.13137)" in card
    assert "equivalence norm up_down" in card
    assert block_reports(finished)[0]["folded"] == ["input_layernorm.weight", "post_attention_layernorm.weight"]


def trained_keys(config: RunConfig) -> set[str]:
    """Addresses of what training makes."""
    graph = build_graph(placeholder_inputs(config, 2, []))
    return {a.key for node in graph.nodes for a in node.makes if a.kind == "quantized"}


def test_every_setting_is_part_of_the_address() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"method": {"equivalence": "auto"}},
        {"method": {"equivalence": ["norm"]}},
        {"method": {"equivalence": ["norm"], "equivalence_start": "identity"}},
        {"method": {"equivalence": ["norm"], "shifts": True}},
        {"method": {"equivalence": ["norm"]}, "optimizer": {"equivalence_learning_rate": 1e-3}},
    ]
    found = [trained_keys(tiny_config("m", "t", "r", **each)) for each in settings]
    assert len(set.union(*found)) == sum(len(keys) for keys in found)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "undeclared": (
        "stablelm",
        {"equivalence": "auto"},
        r"method\.equivalence: model type 'stablelm' declares no .*take one of: ",
    ),
    "kind": (
        "opt",
        {"equivalence": ["norm", "up_down"]},
        r"method\.equivalence: this opt block has no .* of kind up_down",
    ),
    "shifts": ("llama", {"equivalence": "auto", "shifts": True}, r"method\.shifts: .* which this llama block lacks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_family_cannot_have_is_refused_before_any_work(
    tiny_model: TinyModel, short_text: Path, tmp_path: Path, case: str
) -> None:
    model_type, method, message = REFUSED[case]
    config = tiny_config(family(tiny_model, tmp_path / "m", model_type), short_text, tmp_path / "run", method=method)
    for check in (lambda: prepare(config, Silent()), lambda: estimate(config)):
        with pytest.raises(UserError, match=message):
            check()
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_zero_points_of_experts_are_refused(tiny_model: TinyModel, short_text: Path, tmp_path: Path) -> None:
    folder = family(tiny_model, tmp_path / "m", "mixtral", **MIXTURE)
    with pytest.raises(UserError, match=r"scheme\.symmetric is false, but block 0 holds experts .* to scheme\.skip"):
        prepare(tiny_config(folder, short_text, tmp_path / "run"), Silent())
    skip = {"skip": ["lm_head", "*.experts.*"]}
    prepare(tiny_config(folder, short_text, tmp_path / "run", scheme=skip), Silent())


@pytest.mark.parametrize(
    ("model_type", "named"),
    [("gpt_oss", r"mlp\.experts\.gate_up_proj"), ("granitemoe", r"block_sparse_moe\.experts\.gate_up_proj")],
)
def test_experts_that_would_stay_in_full_precision_are_refused(
    tiny_model: TinyModel, short_text: Path, tmp_path: Path, model_type: str, named: str
) -> None:
    folder = family(tiny_model, tmp_path / "m", model_type, **MIXTURE)
    with pytest.raises(UserError, match=rf"block 0 holds experts in one tensor, {named} \(4, .* to scheme\.skip"):
        prepare(tiny_config(folder, short_text, tmp_path / "run", scheme={"symmetric": True}), Silent())
    skip = {"symmetric": True, "skip": ["lm_head", "experts"]}
    finished, result = run(tiny_config(folder, short_text, tmp_path / "run", **TRAINED | {"scheme": skip}))
    assert_loader_agrees(finished, result, short_text)


def test_shifts_alone_and_unknown_kinds_are_refused() -> None:
    tree = {"model": {"source": "m"}, "data": {"source": "t"}, "storage": {"run": "r"}}
    with pytest.raises(UserError, match=r"method\.shifts means nothing without method\.equivalence: set that to auto"):
        parse_config(tree | {"method": {"shifts": True}})
    for wrong in (["rotation"], "norm", 3):
        with pytest.raises(UserError) as error:
            parse_config(tree | {"method": {"equivalence": wrong}})
        assert str(error.value) == (
            f"config: method.equivalence = {wrong!r}: input should be auto, or a list of some of norm, value_output, query_key, up_down "
            "([] for none)"
        )
    only = {"increment": "none", "clipping": "none", "equivalence": "auto"}
    method = parse_config(tree | {"method": only}).method
    assert method.equivalence_kinds(SchemeConfig()) == ("norm", "value_output", "up_down")
    attention = SchemeConfig(activation_bits=4, quantize_qkv=True)
    assert method.equivalence_kinds(attention) == ("norm", "value_output", "query_key", "up_down")


def test_experts_in_a_group_that_holds_blocks_in_parts_are_refused(
    tiny_model: TinyModel, short_text: Path, tmp_path: Path
) -> None:
    folder = family(tiny_model, tmp_path / "m", "mixtral", **MIXTURE)
    settings: dict[str, Any] = {"scheme": {"symmetric": True}, "optimizer": {"batch_size": 2}}
    config = tiny_config(folder, short_text, tmp_path / "run", compute={"engine": "deepspeed", "group": 2}, **settings)
    for check in (lambda: prepare(config, Silent()), lambda: estimate(config)):
        with pytest.raises(
            UserError, match=r"compute\.group is 2 .* is a mixture of experts, .* set compute\.group to 1"
        ):
            check()
    prepare(tiny_config(folder, short_text, tmp_path / "run", compute={"group": 2}, **settings), Silent())
