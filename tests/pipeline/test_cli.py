"""The command as a user meets it: help, errors, exit codes, output for machines."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import checkpoint_hashes, run, tiny_config, tiny_tree
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import UserError
from pipeline.run import Finished
from pipeline.store import open_store

COMMANDS = ["quantize", "status", "merge", "eval", "plan", "sample-material"]


def lsi(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("cli") / "model", blocks=2)


@pytest.fixture(scope="module")
def finished(model: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run(tiny_config(model, short_text, tmp_path_factory.mktemp("done") / "run"))[0]


def config_file(folder: Path, model_folder: Path, text: Path, **sections: Any) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(model_folder, text, folder / "run", **sections)))
    return str(path)


def test_help_names_every_command() -> None:
    text = lsi("--help").output
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str) -> None:
    result = lsi(command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 8


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"scheme": {"group_size": 48}}, "group_size 48 does not divide the input channels of self_attn.q_proj (64)"),
        ({"scheme": {"group_sise": 64}}, "unknown key scheme.group_sise; did you mean scheme.group_size?"),
        ({"scheme": {"bits": 5}}, "bits must be 2, 3, 4, 6 or 8"),
        ({"data": {"samples": 20000}}, "need 320000 tokens"),
        ({"model": {"source": "/no/such/model"}}, "there is no such folder"),
        ({"storage": {"run": "/sys/lsi"}}, "cannot write there"),
        ({"scheme": {"skip": ["*"]}}, "nothing to quantize"),
        ({"scheme": {"skip": ["mlp.dwon_proj"]}}, "scheme.skip 'mlp.dwon_proj' is the name of no part"),
        ({"storage": {"run": ""}}, "storage.run = ''"),
        ({"optimizer": {"clipping_learning_rate": float("inf")}}, "clipping_learning_rate = inf"),
        ({"evaluation": {"windows": 1000000}}, "ask for at most"),
    ],
    ids=[
        "group",
        "unknown-key",
        "bits",
        "corpus",
        "model",
        "unwritable",
        "skip-all",
        "skip-none",
        "no-run",
        "infinite",
        "windows",
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(
    model: Path, short_text: Path, tmp_path: Path, sections: dict[str, Any], sentence: str
) -> None:
    result = lsi("quantize", config_file(tmp_path, model, short_text, **sections))
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_config_that_is_not_there_points_to_the_examples() -> None:
    result = lsi("quantize", "nowhere.yaml")
    assert result.exit_code == 2
    assert "configs/" in result.output


def test_status_of_a_finished_run(finished: Finished) -> None:
    result = lsi("status", finished.prepared.store.url, "--json")
    found = json.loads(result.stdout)
    assert found["state"] == "finished"
    assert found["stages"]["optimize"]["total"] == 4
    assert found["stages"]["optimize"]["left"] == 0
    assert [block["block"] for block in found["blocks"]] == [0, 1]
    assert "finished" in lsi("status", finished.prepared.store.url).stdout


def test_status_counts_what_is_left(finished: Finished, tmp_path: Path) -> None:
    from fsspec.implementations.local import LocalFileSystem

    copy = tmp_path / "copy"
    LocalFileSystem().copy(finished.prepared.store.url, str(copy), recursive=True)
    store = open_store(str(copy))
    for kind in ("shard", "evaluation"):
        store.delete_all(kind)
    store.delete_all(next("/".join(key.split("/")[:2]) for key in store.list("quantized") if "block-001" in key))
    found = json.loads(lsi("status", str(copy), "--json").stdout)
    assert found["state"] == "unfinished"
    assert found["stages"]["merge"]["left"] == 1
    # Block 1's activations were deleted with its end, so both its epochs and what they read are due again.
    assert found["stages"]["optimize"]["left"] >= 2


def test_status_of_no_run(tmp_path: Path) -> None:
    result = lsi("status", str(tmp_path))
    assert result.exit_code == 2
    assert "no run here" in result.output


def test_merge_writes_the_same_checkpoint_somewhere_else(finished: Finished, tmp_path: Path) -> None:
    result = lsi("merge", finished.prepared.store.url, "--checkpoint", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    ours, theirs = checkpoint_hashes(finished.prepared.checkpoint), checkpoint_hashes(open_store(str(tmp_path / "out")))
    for name in ("model.safetensors", "config.json"):
        assert ours[name] == theirs[name]


def test_merge_of_a_run_with_relative_paths(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "text.txt").symlink_to(short_text)
    monkeypatch.chdir(tmp_path)
    run(tiny_config("model", "text.txt", "run", optimizer={"epochs": 0}))
    result = lsi("merge", "run", "--checkpoint", "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "config.json").exists()


def test_merge_of_a_run_that_is_not_done(model: Path, short_text: Path, tmp_path: Path) -> None:
    config = tiny_config(model, short_text, tmp_path / "run")
    finished = run(config)[0]
    store = finished.prepared.store
    for kind in ("quantized", "shard"):
        store.delete_all(kind)
    result = lsi("merge", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert "2 blocks are not done (0 to 1)" in " ".join(result.output.split())


def test_eval_prints_json_for_machines(finished: Finished, short_text: Path) -> None:
    text = str(short_text)
    arguments = ["--text", text, "--windows", "2", "--length", "16", "--json"]
    found = json.loads(lsi("eval", finished.prepared.checkpoint.url, *arguments).stdout)
    expected = json.loads(finished.prepared.store.get("result.json"))["perplexity"]["quantized"]["news"]
    assert found["perplexity"][text] == pytest.approx(expected, rel=5e-3)


def test_eval_takes_several_texts(finished: Finished, short_text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(short_text.read_text()[1000:])
    arguments = ["--text", str(short_text), str(other), "--windows", "2", "--length", "16", "--json"]
    found = json.loads(lsi("eval", finished.prepared.checkpoint.url, *arguments).stdout)["perplexity"]
    assert list(found) == [str(short_text), str(other)]


def test_eval_of_an_unquantized_model(model: Path, finished: Finished, short_text: Path) -> None:
    text = str(short_text)
    found = json.loads(lsi("eval", str(model), "--text", text, "--windows", "2", "--length", "16", "--json").stdout)
    expected = json.loads(finished.prepared.store.get("result.json"))["perplexity"]["full_precision"]["news"]
    assert found["perplexity"][text] == pytest.approx(expected, rel=1e-5)


def test_eval_of_nothing(tmp_path: Path, short_text: Path) -> None:
    result = lsi("eval", str(tmp_path), "--text", str(short_text))
    assert result.exit_code == 2
    assert "no transformers checkpoint" in result.output


def test_plan_counts_before_any_work(model: Path, short_text: Path, tmp_path: Path) -> None:
    found = json.loads(lsi("plan", config_file(tmp_path, model, short_text), "--json").stdout)
    assert found["units"] == {"inspect": 3, "capture": 6, "optimize": 4, "evaluate": 3, "merge": 1}
    # 6 samples in chunks of 4, batches of 2: 3 steps an epoch.
    assert found["steps_per_block"] == 6
    assert found["bytes"]["one_boundary"] == 6 * 16 * 64 * 4
    assert not (tmp_path / "run").exists()
    assert "6 a block" in lsi("plan", config_file(tmp_path, model, short_text)).stdout


def test_plans_checkpoint_size_is_the_real_one(finished: Finished, tmp_path: Path) -> None:
    from pipeline.estimate import estimate

    size = finished.prepared.checkpoint.size("model.safetensors")
    planned = estimate(finished.prepared.config)["bytes"]["checkpoint"]
    header = size - planned
    assert 0 < header < 8192


def test_overrides_on_the_command_line(model: Path, short_text: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, model, short_text)
    found = json.loads(
        lsi("plan", config, "--json", "--set", "optimizer.epochs=5", "-s", "method.increment=none").stdout
    )
    assert found["steps_per_block"] == 15
    result = lsi("plan", config, "--set", "optimizer.epoch=5")
    assert result.exit_code == 2
    assert "optimizer.epochs" in result.output


def test_the_resume_line_shows_no_secret() -> None:
    from pipeline.cli import without_secret

    assert without_secret("storage.options.secret=hunter2") == "storage.options.secret=***"
    assert without_secret("storage.options={secret: hunter2}") == "storage.options=***"
    assert without_secret("scheme.bits=2") == "scheme.bits=2"


def test_eval_of_a_checkpoint_that_lacks_a_weight(model: Path, short_text: Path, tmp_path: Path) -> None:
    """transformers would fill it at random."""
    folder = shutil.copytree(model, tmp_path / "lacking")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = lsi("eval", str(folder), "--text", str(short_text), "--windows", "2", "--length", "16")
    assert result.exit_code == 2
    assert "1 tensors that its configuration asks for are missing" in " ".join(result.output.split())
    assert "model.layers.1.mlp.up_proj.weight" in result.output


def test_eval_of_a_file_that_is_no_weights(model: Path, short_text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "torn")
    (folder / "model.safetensors").write_bytes(b"torn")
    result = lsi("eval", str(folder), "--text", str(short_text))
    assert result.exit_code == 2
    assert "transformers cannot load it: SafetensorError" in " ".join(result.output.split())


@pytest.mark.parametrize("override", ["storage.options.secret=@hunter2", "storage.options.a=b hunter2: : c"])
def test_a_refused_override_shows_no_secret(model: Path, short_text: Path, tmp_path: Path, override: str) -> None:
    result = lsi("quantize", config_file(tmp_path, model, short_text), "--set", override)
    assert result.exit_code == 2
    assert "the value is not valid YAML" in " ".join(result.output.split())
    assert "hunter2" not in result.output


def test_what_others_keep_in_the_folders_stays(model: Path, short_text: Path, tmp_path: Path) -> None:
    """In the run directory and where the checkpoint goes, below these too."""
    kept = [
        tmp_path / "run/evaluation/mine/scores.json",
        tmp_path / "run/tokens/notes.txt",
        tmp_path / "out/another/model.safetensors",
        tmp_path / "out/adapter.safetensors",
    ]
    for file in kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    sections = {"outputs": {"checkpoint": str(tmp_path / "out")}, "storage": {"run": str(tmp_path / "run")}}
    run(tiny_config(model, short_text, tmp_path / "run", optimizer={"epochs": 0}, **sections))
    assert (tmp_path / "out/config.json").exists()
    assert [file for file in kept if not file.exists()] == []


def test_a_checkpoint_in_a_folder_with_weights_is_refused(model: Path, short_text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model-00001-of-00002.safetensors").write_bytes(b"x")
    for place, words in {
        "out": r"another checkpoint already \(model-00001-of-00002.safetensors\)",
        "run": "is storage.run",
    }.items():
        outputs = {"checkpoint": str(tmp_path / place)}
        with pytest.raises(UserError, match=words):
            run(tiny_config(model, short_text, tmp_path / "run", outputs=outputs))
    assert not (tmp_path / "run/run.json").exists()


def test_a_finished_run_is_merged_into_no_folder_with_weights(finished: Finished, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign/model.safetensors"
    foreign.parent.mkdir()
    foreign.write_bytes(b"x")
    result = lsi("merge", finished.prepared.store.url, "--checkpoint", str(foreign.parent))
    assert result.exit_code == 2
    assert "holds another checkpoint already (model.safetensors)" in " ".join(result.output.split())
    assert foreign.read_bytes() == b"x"


def test_a_place_whose_manifest_was_torn_goes_on(model: Path, short_text: Path, tmp_path: Path) -> None:
    config = tiny_config(model, short_text, tmp_path / "run", optimizer={"epochs": 0})
    first, _ = run(config)
    hashes = checkpoint_hashes(first.prepared.checkpoint)
    (tmp_path / "run/checkpoint/config.json").unlink()
    (tmp_path / "run/checkpoint/lsi_manifest.json").write_text('{"identity": {"rec')
    again, _ = run(config)
    assert checkpoint_hashes(again.prepared.checkpoint) == hashes


def test_a_size_needs_its_unit(model: Path, short_text: Path, tmp_path: Path) -> None:
    result = lsi("plan", config_file(tmp_path, model, short_text), "--memory", "64")
    assert result.exit_code == 2
    assert "write a size above zero with its unit" in " ".join(result.output.split())
