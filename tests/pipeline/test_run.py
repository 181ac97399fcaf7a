"""Whole runs in one process: what comes out, that it is the same every time, and that nothing committed is done again."""

import itertools
import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Silent, break_steps, checkpoint_hashes, run, run_in_pieces, tiny_config
from safetensors.torch import load_file, save_file
from transformers import OPTConfig

from lsi.grid import Grid, round_to_nearest
from pipeline import optimize
from pipeline.artifacts import read_tensors
from pipeline.block_state import WEIGHTS_FILE, BlockResult
from pipeline.driver import StoppedError
from pipeline.errors import UserError
from pipeline.evaluate_checkpoint import evaluate_checkpoint
from pipeline.graph import Node
from pipeline.packed_format import unpack_linear
from pipeline.prepare import prepare
from pipeline.report import artifacts_of, as_json, perplexity_rows
from pipeline.run import Finished
from pipeline.store import Store, open_store
from pipeline.tensors import deserialize


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model", blocks=3)


def results(finished: Finished) -> dict[str, Any]:
    """Every quantized weight of a run by its full name."""
    found = {}
    for index, artifact in enumerate(artifacts_of(finished, "quantized")):
        weights = BlockResult.unpack(read_tensors(finished.prepared.store, artifact, WEIGHTS_FILE)).weights
        found |= {f"model.layers.{index}.{name}": weight for name, weight in weights.items()}
    return found


def checkpoint_tensors(store: Store) -> dict[str, torch.Tensor]:
    return {
        n: t for key in store.list() if key.endswith(".safetensors") for n, t in deserialize(store.get(key)).items()
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, None], ids=["grouped", "per-channel"])
def test_no_training_is_round_to_nearest_and_the_file_holds_the_artifacts(
    model: Path, short_text: Path, tmp_path: Path, bits: int, symmetric: bool, group_size: int | None
) -> None:
    scheme = {"bits": bits, "symmetric": symmetric, "group_size": group_size}
    finished, _ = run(tiny_config(model, short_text, tmp_path / "run", scheme=scheme, optimizer={"epochs": 0}))
    stored = checkpoint_tensors(finished.prepared.checkpoint)
    source = finished.prepared.source
    found = results(finished)
    assert len(found) == 3 * 7
    for name, weight in found.items():
        expected = round_to_nearest(source.read(f"{name}.weight"), Grid(bits, group_size, symmetric), torch.float32)
        codes, scale, zero = unpack_linear(name, stored, bits, symmetric)
        assert torch.equal(codes, weight.codes)
        assert torch.equal(weight.codes, expected.codes)
        assert torch.equal(scale, weight.scale)
        assert torch.equal(weight.scale, expected.scale)
        assert torch.equal(weight.zero_point, expected.zero_point)
        assert zero is None if symmetric else torch.equal(zero, weight.zero_point)


SCHEDULES: dict[str, dict[str, Any]] = {
    "sequential": {"kind": "sequential"},
    "parallel": {"kind": "parallel"},
    "never-refreshed": {"kind": "parallel", "refresh_every": 0},
    "wave": {"kind": "wave"},
    "wave-with-lead": {"kind": "wave", "lead": 1},
    "wave-in-parts": {"kind": "wave", "parts": 2},
    "wave-in-parts-with-lead": {"kind": "wave", "parts": 2, "lead": 1},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_beats_round_to_nearest_and_the_loader_agrees(
    model: Path, short_text: Path, tmp_path: Path, schedule: str
) -> None:
    config = tiny_config(
        model,
        short_text,
        tmp_path / "run",
        schedule=SCHEDULES[schedule],
        data={"samples": 16},
        optimizer={"epochs": 6},
        evaluation={"texts": {"news": str(short_text)}, "windows": 4, "length": 64},
    )
    finished, result = run(config)
    table = {variant: texts["news"] for variant, texts in result["perplexity"].items()}
    assert set(table) == {"full_precision", "round_to_nearest", "quantized"}
    for block in result_blocks(finished):
        assert block["kept"] != "initial", "training found nothing better than its start"
    loaded = evaluate_checkpoint(finished.prepared.checkpoint.url, [str(short_text)], 4, 64, "cpu", show=False)
    assert loaded[str(short_text)] == pytest.approx(table["quantized"], rel=5e-3)


def result_blocks(finished: Finished) -> list[dict[str, Any]]:
    from pipeline.report import block_reports

    return block_reports(finished)


@pytest.mark.parametrize("increment", ["none", "diagonal", "dense"])
def test_each_block_ends_no_worse_than_it_began(model: Path, short_text: Path, tmp_path: Path, increment: str) -> None:
    """Steps so large that training does harm: what comes out is at worst the initial state, on the same inputs."""
    optimizer = {"epochs": 2, "increment_learning_rate": 1e4, "clipping_learning_rate": 1e-9}
    finished, _ = run(
        tiny_config(model, short_text, tmp_path / "run", method={"increment": increment}, optimizer=optimizer)
    )
    for block in result_blocks(finished):
        assert block["loss"] <= block["initial_loss"]
        if increment != "none":
            # Steps of this size may overflow, and then round-to-nearest is a candidate too.
            assert block["kept"] in (["initial"] if block["status"] == "ok" else ["initial", "round_to_nearest"])
            last = block["history"][-1]["loss"]
            assert last is None or block["loss"] < last


def test_the_same_run_again_gives_the_same_bytes(model: Path, short_text: Path, tmp_path: Path) -> None:
    first, _ = run(tiny_config(model, short_text, tmp_path / "one"))
    second, _ = run(tiny_config(model, short_text, tmp_path / "two"))
    assert checkpoint_hashes(first.prepared.checkpoint) == checkpoint_hashes(second.prepared.checkpoint)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stopped_anywhere_it_goes_on_to_the_same_bytes_and_redoes_nothing(
    model: Path, short_text: Path, tmp_path: Path, schedule: str
) -> None:
    """A new driver every few units: each takes up what the last one left."""
    undisturbed, _ = run(tiny_config(model, short_text, tmp_path / "one", schedule=SCHEDULES[schedule]))
    config = tiny_config(model, short_text, tmp_path / "two", schedule=SCHEDULES[schedule])
    finished, _, done = run_in_pieces(config, 4)
    assert len(done) == len(set(done)), "a committed unit was run again"
    assert checkpoint_hashes(finished.prepared.checkpoint) == checkpoint_hashes(undisturbed.prepared.checkpoint)


def test_a_finished_run_is_confirmed_without_work(model: Path, short_text: Path, tmp_path: Path) -> None:
    config = tiny_config(model, short_text, tmp_path / "run")
    run(config)
    report = Silent()
    _, result = run(config, report)
    assert report.units == []
    assert result["units"]["run"] == 0


def test_activations_are_gone_when_the_run_ends(model: Path, short_text: Path, tmp_path: Path) -> None:
    finished, _ = run(tiny_config(model, short_text, tmp_path / "run"))
    for kind in ("hidden", "stream", "state"):
        assert finished.prepared.store.list(kind) == {}, kind


@pytest.mark.parametrize("damage", ["data", "record", "missing"])
@pytest.mark.parametrize("kind", ["quantized", "shard-file", "evaluation"])
def test_a_damaged_artifact_is_redone_and_said(
    model: Path, short_text: Path, tmp_path: Path, kind: str, damage: str
) -> None:
    config = tiny_config(model, short_text, tmp_path / "run")
    finished, _ = run(config)
    before = checkpoint_hashes(finished.prepared.checkpoint)
    store = finished.prepared.store
    victim = victim_of(store, kind, damage)
    if kind == "quantized":
        # Read again only by a merge that has not happened.
        for key in store.list("shard"):
            store.delete(key)
    hurt(store, victim, damage)
    report = Silent()
    finished, _ = run(config, report)
    assert report.units, "nothing was redone"
    if damage != "missing" or kind != "evaluation":
        assert any("damaged, will be redone" in message for message in report.messages)
    assert checkpoint_hashes(finished.prepared.checkpoint) == before


def victim_of(store: Store, kind: str, damage: str) -> str:
    if kind == "shard-file":
        return "checkpoint/model.safetensors" if damage != "record" else commit_of(store, "shard")
    if kind == "evaluation" or damage == "record":
        return commit_of(store, kind)
    return next(key for key in store.list(kind) if key.endswith(WEIGHTS_FILE))


def commit_of(store: Store, kind: str) -> str:
    return next(key for key in store.list(kind) if key.endswith("commit.json"))


def hurt(store: Store, key: str, damage: str) -> None:
    data = bytearray(store.get(key))
    if damage == "missing":
        store.delete(key)
        return
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data))


def test_a_run_directory_of_another_config_is_refused_by_key(model: Path, short_text: Path, tmp_path: Path) -> None:
    run(tiny_config(model, short_text, tmp_path / "run", optimizer={"epochs": 0}))
    other = tiny_config(model, short_text, tmp_path / "run", optimizer={"epochs": 0}, scheme={"bits": 4})
    with pytest.raises(UserError, match=r"belongs to another run: scheme\.bits: 3 there, 4 here"):
        prepare(other, Silent())


def test_a_refused_config_claims_no_directory(model: Path, short_text: Path, tmp_path: Path) -> None:
    bad = tiny_config(model, short_text, tmp_path / "run", scheme={"group_size": 48})
    with pytest.raises(UserError, match=r"group_size 48 does not divide .*q_proj \(64\).*64, 32, 16"):
        prepare(bad, Silent())
    run(tiny_config(model, short_text, tmp_path / "run", optimizer={"epochs": 0}))


def test_a_run_directory_of_another_model_is_refused(
    model: Path, short_text: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    config = tiny_config(model, short_text, tmp_path / "run", optimizer={"epochs": 0})
    run(config)
    tiny_model(model, blocks=3, seed=1)
    with pytest.raises(UserError, match="belongs to another model: the weights of block 0"):
        run(config)


def test_another_runs_checkpoint_is_not_overwritten(model: Path, short_text: Path, tmp_path: Path) -> None:
    place = {"checkpoint": str(tmp_path / "out")}
    run(tiny_config(model, short_text, tmp_path / "one", optimizer={"epochs": 0}, outputs=place))
    other = tiny_config(model, short_text, tmp_path / "two", optimizer={"epochs": 0}, scheme={"bits": 4}, outputs=place)
    with pytest.raises(UserError, match="holds another checkpoint already"):
        prepare(other, Silent())


def put_into_up_proj(model: Path, value: float) -> None:
    """One value of block 1's weight."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, file, {"format": "pt"})


def test_weights_that_are_not_finite_are_refused_before_anything_else(
    model: Path, short_text: Path, tmp_path: Path
) -> None:
    put_into_up_proj(model, float("nan"))
    report = Silent()
    for _ in range(2):  # the finding is committed, and refuses the next start too
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 values that are NaN"):
            run(tiny_config(model, short_text, tmp_path / "run"), report)
    assert not [unit for unit in report.units if not unit.startswith("inspect/")]


def test_weights_beyond_the_dtype_of_the_run_are_refused(model: Path, short_text: Path, tmp_path: Path) -> None:
    put_into_up_proj(model, 1e5)
    config = tiny_config(model, short_text, tmp_path / "run", model={"dtype": "float16"}, optimizer={"epochs": 0})
    with pytest.raises(UserError, match=r"holds 1 values beyond the range of torch\.float16: set model\.dtype to"):
        run(config)
    run(tiny_config(model, short_text, tmp_path / "run2", model={"dtype": "float32"}, optimizer={"epochs": 0}))


def test_a_block_may_be_left_alone_whole(model: Path, short_text: Path, tmp_path: Path) -> None:
    scheme = {"skip": ["lm_head", "model.layers.0.*"]}
    finished, result = run(tiny_config(model, short_text, tmp_path / "run", scheme=scheme))
    assert result["perplexity"]["quantized"]
    names = checkpoint_tensors(finished.prepared.checkpoint)
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert "model.layers.1.mlp.up_proj.weight_packed" in names


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"sequence_length": 16}}, "data.sequence_length 16 is beyond the 12 positions"),
        ({"data": {"sequence_length": 12}, "evaluation": {"length": 13}}, "evaluation.length 13 is beyond the 12"),
    ],
)
def test_sequences_beyond_learned_positions_are_refused(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    config = OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        word_embed_proj_dim=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=1000,
        max_position_embeddings=12,
    )
    folder = tiny_model(tmp_path / "m", config=config)
    with pytest.raises(UserError, match=words):
        prepare(tiny_config(folder, short_text, tmp_path / "run", **sections), Silent())


def test_tokens_without_an_embedding_are_refused(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path
) -> None:
    config = OPTConfig(
        hidden_size=64, word_embed_proj_dim=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=40
    )
    folder = tiny_model(tmp_path / "m", config=config)
    with pytest.raises(UserError, match=r"its tokenizer makes token \d+ of these texts, and the model has .* 0 to 39"):
        prepare(tiny_config(folder, short_text, tmp_path / "run"), Silent())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tied_embeddings_stay_tied(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path, tied: bool
) -> None:
    folder = tiny_model(tmp_path / "m", blocks=1, tied=tied)
    finished, _ = run(tiny_config(folder, short_text, tmp_path / "run", optimizer={"epochs": 0}))
    assert ("lm_head.weight" in checkpoint_tensors(finished.prepared.checkpoint)) is not tied
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(finished.prepared.checkpoint.url)
    same = loaded.get_input_embeddings().weight.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()
    assert same is tied


def test_many_shards_load_like_one(model: Path, short_text: Path, tmp_path: Path) -> None:
    one, _ = run(tiny_config(model, short_text, tmp_path / "one", optimizer={"epochs": 0}))
    many = tiny_config(model, short_text, tmp_path / "two", optimizer={"epochs": 0}, outputs={"max_shard_mib": 1})
    # Below one MiB everything fits in one file; the planner itself is given bytes.
    from pipeline.merge import checkpoint_layout, plan_shards

    prepared = prepare(many, Silent())
    layout = checkpoint_layout(prepared.skeleton, Grid(3, 32, False), ["lm_head"], torch.float32)
    shards = plan_shards(layout, 50_000)
    assert len(shards) > 2
    assert [name for shard in shards for name in shard] == [name for name, _ in layout]
    assert one.graph.goals


class DiesAfterMerge(Silent):
    def finished(self, node: Any, result: dict[str, Any]) -> None:
        super().finished(node, result)
        if node.stage == "merge":
            raise KeyboardInterrupt


def test_a_driver_that_dies_in_the_merge_leaves_no_checkpoint_to_see(
    model: Path, short_text: Path, tmp_path: Path
) -> None:
    config = tiny_config(model, short_text, tmp_path / "run")
    store = open_store(str(tmp_path / "run"))
    run(config)
    before = checkpoint_hashes(store.child("checkpoint"))
    for key in store.list("shard"):
        store.delete(key)
    with pytest.raises(KeyboardInterrupt):
        run(config, DiesAfterMerge())
    assert store.exists("checkpoint/model.safetensors")
    assert not store.exists("checkpoint/config.json")
    run(config)
    assert checkpoint_hashes(store.child("checkpoint")) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes, really full when it is full."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Filling(Silent):
    """After some units somebody else takes the rest of the disk."""

    def __init__(self, disk: Path) -> None:
        super().__init__()
        self.disk = disk

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        super().finished(node, result)
        if len(self.units) == 3:
            left = shutil.disk_usage(self.disk).free
            (self.disk / "other").write_bytes(bytes(left - (64 << 10)))


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(model: Path, short_text: Path, small_disk: Path) -> None:
    config = tiny_config(model, short_text, small_disk / "run", data={"samples": 64, "sequence_length": 32})
    report = Filling(small_disk)
    with pytest.raises(StoppedError, match="no room left"):
        run(config, report)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = Silent()
    finished, _ = run(config, again)
    assert report.units
    assert not set(report.units) & set(again.units)
    assert finished.prepared.checkpoint.exists("config.json")


def test_a_loss_that_is_not_finite_is_recorded_and_the_block_keeps_its_start(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step of every block meets a NaN, as an overflow in the backward pass would make it."""
    break_steps(monkeypatch, lambda step: step % 3 == 0)
    finished, result = run(tiny_config(model, short_text, tmp_path / "run"))
    assert result["flagged_blocks"] == [0, 1, 2]
    for block in result_blocks(finished):
        assert block["status"] == "non_finite"
        assert block["loss"] is not None
        assert block["loss"] <= block["initial_loss"]
    card = finished.prepared.checkpoint.get("README.md").decode()
    for block in range(3):
        assert (
            f"- **block {block}**: training or measuring met a number that is not finite; it keeps its best state"
            in card
        )


def test_a_quantized_block_whose_outputs_are_not_finite_is_flagged(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is in float32, and the model's dtype may not hold what the quantized block computes."""
    plain = optimize.as_loaded

    def as_loaded(worker: Any, block: int, result: Any) -> torch.nn.Module:
        loaded = plain(worker, block, result)
        if block == 2:
            loaded.mlp.down_proj.weight.data = loaded.mlp.down_proj.weight * torch.inf
        return loaded

    monkeypatch.setattr(optimize, "as_loaded", as_loaded)
    finished, result = run(tiny_config(model, short_text, tmp_path / "run"))
    assert result["flagged_blocks"] == [2]
    block = result_blocks(finished)[2]
    assert (block["status"], block["kept"], block["loss"]) == ("fallback", "round_to_nearest", None)
    assert block["reason"] == "outputs of the quantized block are not finite"


def test_outputs_that_are_not_finite_flag_the_block_that_makes_them(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of samples that no state is compared by, when what is kept passes on its outputs."""
    plain = optimize.as_loaded

    def as_loaded(worker: Any, block: int, result: Any) -> torch.nn.Module:
        loaded, calls = plain(worker, block, result), itertools.count(1)
        if block == 1:
            loaded.register_forward_hook(lambda *call: call[2] * (torch.inf if next(calls) > 16 else 1))
        return loaded

    monkeypatch.setattr(optimize, "as_loaded", as_loaded)
    sections: dict[str, Any] = {"data": {"samples": 20}, "optimizer": {"epochs": 1, "increment_learning_rate": 10.0}}
    finished, _ = run(tiny_config(model, short_text, tmp_path / "run", **sections))
    first, second = result_blocks(finished)[:2]
    assert (first["status"], second["status"], second["kept"]) == ("ok", "non_finite", "initial")
    assert second["reason"] == "outputs of the quantized block are not finite"


def test_a_perplexity_that_is_not_finite_is_null_in_json_and_said() -> None:
    table = {"full_precision": {"news": 12.345, "wikipedia": math.inf}, "quantized": {"news": math.inf}}
    found = json.loads(json.dumps(as_json(table), allow_nan=False))
    assert found == {"full_precision": {"news": 12.345, "wikipedia": None}, "quantized": {"news": None}}
    for rows in (perplexity_rows(table)[1], perplexity_rows(found)[1]):
        assert [row[1:] for row in rows] == [["12.35", "not finite"], ["not finite", "–"]]


@pytest.mark.parametrize("part", [1, 2])
def test_an_evaluation_in_parts_finds_the_same_perplexity(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    sections: dict[str, Any] = {"optimizer": {"epochs": 1}, "storage": {"cache_mib": 0}}
    _, whole = run(tiny_config(model, short_text, tmp_path / "whole", **sections))
    monkeypatch.setattr("pipeline.graph.EVALUATION_PART", part)
    finished, found = run(tiny_config(model, short_text, tmp_path / "parts", **sections))
    assert found["perplexity"] == whole["perplexity"]
    assert sum(node.stage == "evaluate" for node in finished.graph.nodes) == 2 + -(-3 // part)
    assert not any("/hidden" in key for key in finished.prepared.store.list("hidden")), "states outlive their reader"
