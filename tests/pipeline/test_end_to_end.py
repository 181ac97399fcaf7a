"""The end-to-end stage in whole runs: it improves, it is the same however it is cut, and only scales change."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Silent, checkpoint_hashes, run, run_in_pieces, tiny_config
from test_equivalence_run import MIXTURE, family

from pipeline import student
from pipeline.artifacts import Artifact, Writer, read_record, read_tensors
from pipeline.block_state import WEIGHTS_FILE, BlockResult
from pipeline.cli import only_merge
from pipeline.config import RunConfig
from pipeline.config_file import parse_config
from pipeline.driver import StoppedError
from pipeline.end_to_end import compared_of, steps_of
from pipeline.errors import UserError
from pipeline.faults import StorageError
from pipeline.identity import recorded_config
from pipeline.report import artifacts_of, end_flag
from pipeline.run import Finished
from pipeline.status import read_status
from pipeline.status_view import notes
from pipeline.store import open_store

END = {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2}


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model", blocks=3)


def config(model: Path, text: Path, folder: Path, **sections: Any) -> RunConfig:
    plain = {"scheme": {"bits": 2}, "method": {"increment": "none"}, "end_to_end": END}
    return tiny_config(model, text, folder, **{**plain, **sections})


def blocks(finished: Finished, kind: str) -> list[BlockResult]:
    store = finished.prepared.store
    return [BlockResult.unpack(read_tensors(store, a, WEIGHTS_FILE)) for a in artifacts_of(finished, kind)]


def metas(finished: Finished) -> list[dict[str, Any]]:
    records = [read_record(finished.prepared.store, a) for a in artifacts_of(finished, "scaled")]
    return [record.meta for record in records if record]


def test_every_epoch_takes_every_sample_once() -> None:
    tree = {
        "model": {"source": "m"},
        "data": {"source": "t", "samples": 22},
        "storage": {"run": "r", "chunk_samples": 8},
        "end_to_end": {"epochs": 2, "batch_size": 9},
    }
    steps = steps_of(parse_config(tree))
    assert [sum(len(share.samples) for share in step) for step in steps] == [9, 9, 4] * 2
    assert max(len(share.samples) for step in steps for share in step) == 4
    taken = Counter((share.chunk, place) for step in steps for share in step for place in share.samples)
    assert set(taken.values()) == {2}
    assert len(taken) == 22


@pytest.mark.parametrize(("samples", "taken"), [(12, 12), (8, 8), (30, 22)])
def test_an_epoch_may_take_the_first_samples_only(samples: int, taken: int) -> None:
    tree = {
        "model": {"source": "m"},
        "data": {"source": "t", "samples": 22},
        "storage": {"run": "r", "chunk_samples": 8},
        "end_to_end": {"epochs": 1, "batch_size": 4, "samples": samples},
    }
    steps = steps_of(parse_config(tree))
    found = sorted(8 * share.chunk + place for step in steps for share in step for place in share.samples)
    assert found == list(range(taken))


@pytest.mark.parametrize(("samples", "compared"), [(3, 3), (20, 4)])
def test_scales_are_compared_by_the_first_samples_whatever_the_batches(samples: int, compared: int) -> None:
    tree = {
        "model": {"source": "m"},
        "data": {"source": "t", "samples": 22},
        "storage": {"run": "r", "chunk_samples": 6},
        "end_to_end": {"epochs": 1, "batch_size": 1, "unit_samples": 3, "samples": samples},
    }
    shares = compared_of(parse_config(tree))
    assert [6 * share.chunk + place for share in shares for place in share.samples] == list(range(compared))
    assert max(len(share.samples) for share in shares) == 3


def test_it_lowers_the_divergence_and_changes_nothing_but_scales(model: Path, short_text: Path, tmp_path: Path) -> None:
    finished, result = run(config(model, short_text, tmp_path / "run"))
    before, after = blocks(finished, "quantized"), blocks(finished, "scaled")
    for old, new in zip(before, after, strict=True):
        assert old.weights.keys() == new.weights.keys()
        for name, weight in old.weights.items():
            assert torch.equal(weight.codes, new.weights[name].codes)
            assert torch.equal(weight.zero_point, new.weights[name].zero_point)
            assert not torch.equal(weight.scale, new.weights[name].scale)
    assert all(meta["kept"] == "trained" and meta["loss"] < meta["initial_loss"] for meta in metas(finished))
    assert result["end_to_end"]["kept"] == "trained"
    assert result["end_to_end"]["loss"] < result["end_to_end"]["initial_loss"]


def test_experts_that_saw_few_tokens_keep_their_scales(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path
) -> None:
    folder = family(tiny_model, tmp_path / "model", "qwen3_moe", **MIXTURE)
    sections = {"scheme": {"bits": 2, "symmetric": True}, "method": {"increment": "none", "expert_tokens": 1000}}
    finished, result = run(config(folder, short_text, tmp_path / "run", **sections))
    everyone = [f"mlp.experts.{number}" for number in range(4)]
    assert result["untrained_experts"] == {"0": everyone, "1": everyone}
    assert result["end_to_end"]["kept"] == "trained"
    for old, new in zip(blocks(finished, "quantized"), blocks(finished, "scaled"), strict=True):
        for name, weight in old.weights.items():
            assert torch.equal(weight.scale, new.weights[name].scale) == ("experts" in name)


def test_the_checkpoint_holds_the_trained_scales(model: Path, short_text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    finished, _ = run(config(model, short_text, tmp_path / "run"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")
    weight = blocks(finished, "scaled")[1].weights["mlp.down_proj"]
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.weight, weight.dequantize(weight.scale.dtype))


@pytest.mark.parametrize("units", [3, 7])
def test_pieces_give_the_same_bytes(model: Path, short_text: Path, tmp_path: Path, units: int) -> None:
    whole, _ = run(config(model, short_text, tmp_path / "whole"))
    pieces, _, done = run_in_pieces(config(model, short_text, tmp_path / "pieces"), units)
    hashes = checkpoint_hashes(pieces.prepared.checkpoint)
    assert checkpoint_hashes(whole.prepared.checkpoint) == hashes
    assert len(done) == len(set(done))


def test_a_block_at_a_time_gives_the_same_bytes(model: Path, short_text: Path, tmp_path: Path) -> None:
    kept, _ = run(config(model, short_text, tmp_path / "kept"))
    hashes = checkpoint_hashes(kept.prepared.checkpoint)
    for name, sections in {
        "again": {"end_to_end": {**END, "resident": False}},
        "checkpoint": {"compute": {"dtype": "float32", "checkpoint": True}},
    }.items():
        other, _ = run(config(model, short_text, tmp_path / name, **sections))
        assert checkpoint_hashes(other.prepared.checkpoint) == hashes


def test_round_to_nearest_alone_can_be_trained_too(model: Path, short_text: Path, tmp_path: Path) -> None:
    nothing = {"clipping": "none", "increment": "none"}
    finished, _ = run(config(model, short_text, tmp_path / "run", method=nothing, optimizer={"epochs": 0}))
    assert all(meta["kept"] == "trained" for meta in metas(finished))


def test_folded_norms_and_quantized_activations_are_trained_with(model: Path, short_text: Path, tmp_path: Path) -> None:
    scheme = {"bits": 4, "group_size": None, "symmetric": True, "activation_bits": 8}
    method = {"increment": "none", "equivalence": "auto"}
    finished, _ = run(config(model, short_text, tmp_path / "run", scheme=scheme, method=method))
    assert all(meta["kept"] == "trained" for meta in metas(finished))
    assert [r.folded.keys() for r in blocks(finished, "scaled")] == [
        r.folded.keys() for r in blocks(finished, "quantized")
    ]


def test_worse_scales_are_not_kept(model: Path, short_text: Path, tmp_path: Path) -> None:
    finished, result = run(config(model, short_text, tmp_path / "run", end_to_end={**END, "learning_rate": 100.0}))
    assert result["end_to_end"] == {**result["end_to_end"], "kept": "initial", "status": "ok"}
    for old, new in zip(blocks(finished, "quantized"), blocks(finished, "scaled"), strict=True):
        assert all(torch.equal(w.scale, new.weights[name].scale) for name, w in old.weights.items())


def test_a_loss_that_is_not_finite_stops_the_steps_and_says_so(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = student.head_pass
    calls = [0]

    def broken(*arguments: Any, **more: Any) -> Any:
        calls[0] += more["backward"]
        total, gradient = plain(*arguments, **more)
        return (float("nan") if calls[0] == 8 else total), gradient  # in the second step

    monkeypatch.setattr(student, "head_pass", broken)
    report = Silent()
    _, result = run(config(model, short_text, tmp_path / "run"), report)
    assert result["end_to_end"]["status"] == "non_finite"
    assert result["end_to_end"]["steps"] == 1
    assert result["end_to_end"]["loss"] <= result["end_to_end"]["initial_loss"]
    sentence = "end to end: a loss or gradient was not finite after 1 steps; its scales are those after these"
    assert end_flag(result["end_to_end"]) == [sentence]
    assert sentence in (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    said = [line for line, _ in notes(read_status(open_store(str(tmp_path / "run"))))]
    assert sentence in said
    assert any(line.startswith("divergence: ") and line.endswith("tokens of the calibration text") for line in said)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("where", ["write", "read"])
def test_a_unit_that_fails_half_way_leaves_nothing_behind(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: bool, where: str
) -> None:
    sections: dict[str, Any] = {"end_to_end": {**END, "resident": resident}, "evaluation": {"texts": {}}}
    undisturbed, _ = run(config(model, short_text, tmp_path / "plain", **sections))
    plain_write, plain_read, failed = Writer.write_tensors, student.read_tensors, []

    def fail(kind: str, file: str) -> None:
        if kind == {"write": "gradient", "read": "scales"}[where] and file == "block-001.safetensors" and not failed:
            failed.append(file)
            raise StorageError("the disk was pulled out")

    def write(writer: Writer, name: str, tensors: Any) -> None:
        fail(writer.artifact.kind, name)
        plain_write(writer, name, tensors)

    def read(store: Any, artifact: Artifact, name: str) -> Any:
        fail(artifact.kind, name)
        return plain_read(store, artifact, name)

    monkeypatch.setattr(Writer, "write_tensors", write)
    monkeypatch.setattr(student, "read_tensors", read)
    disturbed, _ = run(config(model, short_text, tmp_path / "run", **sections))
    assert failed
    hashes = checkpoint_hashes(undisturbed.prepared.checkpoint)
    assert checkpoint_hashes(disturbed.prepared.checkpoint) == hashes


def test_a_block_without_quantized_linears_has_no_scales(model: Path, short_text: Path, tmp_path: Path) -> None:
    finished, _ = run(
        config(model, short_text, tmp_path / "run", scheme={"bits": 2, "skip": ["lm_head", "model.layers.1.*"]})
    )
    assert [len(result.weights) for result in blocks(finished, "scaled")] == [7, 0, 7]
    assert all(meta["kept"] == "trained" for meta in metas(finished))


def test_activations_and_gradients_are_deleted(model: Path, short_text: Path, tmp_path: Path) -> None:
    run(config(model, short_text, tmp_path / "run"))
    left = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir() and any(path.rglob("commit.json"))}
    assert not left & {"hidden", "gradient", "scales", "stream", "state"}


def test_a_merge_before_the_scales_are_trained_is_refused(model: Path, short_text: Path, tmp_path: Path) -> None:
    report = Silent()
    given = config(model, short_text, tmp_path / "run", evaluation={"texts": {}})
    with pytest.raises(StoppedError):
        run(given, report, should_stop=lambda: any(unit.startswith("end_to_end") for unit in report.units))
    assert sum(unit.startswith("optimize") for unit in report.units) == 6
    with pytest.raises(UserError, match="the scales are not trained to the end yet: give the command that began"):
        run(given, restrict=only_merge)


def test_a_fine_tune_refuses_it(tmp_path: Path) -> None:
    from pipeline.finetune_plan import check_settings

    tree = {
        "model": {"source": "m"},
        "data": {"source": "t"},
        "storage": {"run": "r"},
        "finetune": {"blocks": 2},
        "end_to_end": {"epochs": 1},
    }
    with pytest.raises(UserError, match=r"end_to_end\.epochs 1 means nothing for a fine-tune"):
        check_settings(parse_config(tree))


def test_another_last_stage_begins_from_the_same_blocks(model: Path, short_text: Path, tmp_path: Path) -> None:
    """In the same directory, to another checkpoint; and back again."""
    longer = {**END, "epochs": 3}
    fresh, _ = run(config(model, short_text, tmp_path / "fresh", end_to_end=longer))
    first, _ = run(config(model, short_text, tmp_path / "run"))
    hashes = checkpoint_hashes(first.prepared.checkpoint)
    with pytest.raises(
        UserError, match=r"holds another checkpoint already \(config\.json\); choose another outputs\.checkpoint"
    ):
        run(config(model, short_text, tmp_path / "run", end_to_end=longer))
    elsewhere = {"checkpoint": str(tmp_path / "longer")}
    report = Silent()
    second, _ = run(config(model, short_text, tmp_path / "run", end_to_end=longer, outputs=elsewhere), report)
    assert not [unit for unit in report.units if unit.startswith("optimize")]
    assert sum(unit.endswith("update") for unit in report.units) == 3
    made = checkpoint_hashes(second.prepared.checkpoint)
    assert {name for name, hash in made.items() if hash != hashes.get(name)}
    assert made == checkpoint_hashes(fresh.prepared.checkpoint)
    assert checkpoint_hashes(first.prepared.checkpoint) == hashes
    store = open_store(str(tmp_path / "run"))
    assert recorded_config(store, {}).end_to_end.epochs == 3
    assert read_status(store)["end_to_end"]["steps"] == 3
    again, _ = run(config(model, short_text, tmp_path / "run"))
    assert checkpoint_hashes(again.prepared.checkpoint) == hashes
    assert recorded_config(store, {}).end_to_end.epochs == 2


def test_another_recipe_of_blocks_is_another_run(model: Path, short_text: Path, tmp_path: Path) -> None:
    run(config(model, short_text, tmp_path / "run", evaluation={"texts": {}}))
    with pytest.raises(UserError, match=r"belongs to another run: optimizer\.seed: 0 there, 1 here"):
        run(config(model, short_text, tmp_path / "run", optimizer={"seed": 1}))
