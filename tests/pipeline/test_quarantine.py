"""Blocks whose training fails: what they become, that everything after them goes on, and that it is said everywhere."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import Silent, checkpoint_hashes, run, tiny_config, tiny_tree
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cluster.inline import InlineGroup
from cluster.loop import run_units
from cluster.units import Unit
from lsi.grid import Grid, round_to_nearest
from pipeline.artifacts import read_tensors
from pipeline.block_state import WEIGHTS_FILE, BlockResult
from pipeline.cli import app
from pipeline.data_free import StreamTask
from pipeline.driver import StoppedError
from pipeline.optimize import TrainTask
from pipeline.report import artifacts_of, block_reports
from pipeline.run import Finished, inline_workers
from pipeline.worker import Worker

ONCE = {"max_attempts": 1}  # attempts wait for each other


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model", blocks=3)


def poison(monkeypatch: pytest.MonkeyPatch, *blocks: int, epoch: int = 0) -> None:
    """Training of the blocks raises, every time, from an epoch on."""
    plain = TrainTask.__call__

    def call(task: TrainTask, worker: Worker) -> dict[str, Any]:
        if task.block in blocks and task.epoch >= epoch:
            raise RuntimeError("singular matrix")
        return plain(task, worker)

    monkeypatch.setattr(TrainTask, "__call__", call)


def scale(model: Path, factors: dict[str, float]) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    for name, factor in factors.items():
        tensors[name] = tensors[name] * factor
    save_file(tensors, file, {"format": "pt"})


def assert_loads(finished: Finished) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(finished.prepared.checkpoint.url)
    assert loaded(torch.arange(8)[None]).logits.shape[1] == 8


def assert_rounded(finished: Finished, block: int) -> None:
    artifact = artifacts_of(finished, "quantized")[block]
    weights = BlockResult.unpack(read_tensors(finished.prepared.store, artifact, WEIGHTS_FILE)).weights
    assert weights
    for name, weight in weights.items():
        plain = finished.prepared.source.read(f"model.layers.{block}.{name}.weight")
        assert torch.equal(weight.codes, round_to_nearest(plain, Grid(3, 32, False), torch.float32).codes)


def assert_said(finished: Finished, result: dict[str, Any], block: int, status: str) -> None:
    """In the result, both manifests, the model card and `lsi status`."""
    assert [(f["block"], f["status"]) for f in result["flagged"]] == [(block, status)]
    assert result["flagged_blocks"] == [block]
    checkpoint, store = finished.prepared.checkpoint, finished.prepared.store
    assert json.loads(checkpoint.get("lsi_manifest.json"))["flagged"] == result["flagged"]
    assert json.loads(store.get("manifest.json"))["blocks"][block]["status"] == status
    assert f"**block {block}**" in checkpoint.get("README.md").decode()
    shown = CliRunner().invoke(app, ["status", store.url])
    assert shown.exit_code == 0
    assert f"block {block}: {status.replace('_', '-').upper()}" in shown.stdout
    assert "finished, 1 block flagged" in shown.stdout


SCHEDULES: dict[str, dict[str, Any]] = {
    "sequential": {"kind": "sequential"},
    "parallel": {"kind": "parallel"},
    "wave": {"kind": "wave", "lead": 1},
    "wave-in-parts": {"kind": "wave", "parts": 2, "lead": 1},
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_block_that_always_fails_is_rounded_and_the_rest_is_trained(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: dict[str, Any]
) -> None:
    method = {"equivalence": "auto"}
    config = tiny_config(model, short_text, tmp_path / "run", schedule=schedule, cluster=ONCE, method=method)
    with monkeypatch.context() as patch:
        poison(patch, 1, epoch=1)
        report = Silent()
        finished, result = run(config, report)
    assert_said(finished, result, 1, "quarantined")
    assert "singular matrix" in result["flagged"][0]["reason"]
    assert any("block 1 is quantized without data" in message for message in report.messages)
    assert_rounded(finished, 1)
    assert_loads(finished)
    others = [block for block in block_reports(finished) if block["block"] != 1]
    assert [block["status"] for block in others] == ["ok", "ok"]
    assert all(block["loss"] <= block["initial_loss"] for block in others)
    assert any(block.get("folded") for block in others)
    assert_the_decision_alone_gives_these_bytes(finished, tmp_path)
    for kind in ("hidden", "stream", "state", "partial"):
        assert finished.prepared.store.list(kind) == {}, f"{kind} of the plan before was left behind"


def assert_the_decision_alone_gives_these_bytes(finished: Finished, tmp_path: Path) -> None:
    """The same directory with nothing to do, and a new one that holds the decision and nothing else."""
    config = finished.prepared.config
    again = Silent()
    run(config, again)
    assert again.units == []
    shutil.copytree(tmp_path / "run" / "quarantine", tmp_path / "other" / "quarantine")
    storage = config.storage.model_copy(update={"run": str(tmp_path / "other")})
    other, _ = run(config.model_copy(update={"storage": storage}))
    assert checkpoint_hashes(other.prepared.checkpoint) == checkpoint_hashes(finished.prepared.checkpoint)


def test_the_next_block_trains_on_the_rounded_ones_outputs(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1)
    storage = {"keep_activations": True}
    schedule = {"kind": "parallel"}  # of which two epochs have one refresh
    finished, _ = run(
        tiny_config(model, short_text, tmp_path / "run", storage=storage, schedule=schedule, cluster=ONCE)
    )
    from lsi.block import outputs_of

    (node,) = [node for node in finished.graph.nodes if isinstance(node.task, StreamTask)]
    assert isinstance(node.task, StreamTask)
    worker = Worker(finished.prepared.context, "w")
    block = worker.new_block(1)
    artifact = artifacts_of(finished, "quantized")[1]
    BlockResult.unpack(read_tensors(finished.prepared.store, artifact, WEIGHTS_FILE)).load(block)
    hidden = worker.chunks.get(node.task.inputs[0])
    with torch.no_grad():
        expected = outputs_of(block, hidden, worker.arguments(1, hidden.shape[1]))
    written = read_tensors(finished.prepared.store, node.task.stream, "chunk-00000.safetensors")["hidden"]
    assert torch.equal(written, expected)


def test_a_quarantined_block_is_tried_again_on_demand(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(model, short_text, tmp_path / "run", cluster=ONCE)
    undisturbed, _ = run(tiny_config(model, short_text, tmp_path / "plain", cluster=ONCE))
    with monkeypatch.context() as patch:
        poison(patch, 2)
        _, result = run(config)
    assert result["flagged_blocks"] == [2]
    _, result = run(config, retry_quarantined=True)
    assert result["flagged_blocks"] == []
    store = undisturbed.prepared.store
    finished, _ = run(config)
    assert checkpoint_hashes(finished.prepared.checkpoint) == checkpoint_hashes(undisturbed.prepared.checkpoint)
    assert store.list("quarantine") == finished.prepared.store.list("quarantine") == {}


def test_a_damaged_decision_is_none_and_is_said(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(model, short_text, tmp_path / "run", cluster=ONCE)
    with monkeypatch.context() as patch:
        poison(patch, 2)
        finished, _ = run(config)
    (key,) = finished.prepared.store.list("quarantine")
    finished.prepared.store.put(key, finished.prepared.store.get(key)[:-9])
    report = Silent()
    _, result = run(config, report)
    assert result["flagged_blocks"] == []
    assert any("damaged, will be redone: quarantine/block-002" in message for message in report.messages)


def test_what_fails_outside_training_stops_the_run(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(task: object, worker: object) -> dict[str, Any]:
        raise RuntimeError("singular matrix")

    monkeypatch.setattr("pipeline.capture.CaptureTask.__call__", call)
    with pytest.raises(StoppedError, match="capture/000/00000 failed 1 times"):
        run(tiny_config(model, short_text, tmp_path / "run", cluster=ONCE))


def test_so_many_failures_are_not_the_blocks_fault(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 0, 1, 2)
    with pytest.raises(StoppedError, match=r"blocks 0, 1 of 3 failed for good, more than half.*singular matrix"):
        run(tiny_config(model, short_text, tmp_path / "run", cluster=ONCE))


def command(model: Path, text: Path, tmp_path: Path, *options: str) -> Any:
    """The whole command, without Ray."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_tree(model, text, tmp_path / "run", cluster=ONCE)))
    return CliRunner().invoke(app, ["quantize", str(config), *options])


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.run.ray_workers", inline_workers)


@pytest.mark.usefixtures("no_ray")
def test_exit_codes_of_a_block_that_always_fails(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, 1)
        strict = command(model, short_text, tmp_path, "--strict")
        assert strict.exit_code == 1
        assert "--strict takes no flagged block, and block 1 would be flagged" in " ".join(strict.output.split())
        assert not (tmp_path / "run" / "quarantine").exists()
        usable = command(model, short_text, tmp_path)
    assert usable.exit_code == 3
    assert "block 1: training failed for good; it holds round-to-nearest" in " ".join(usable.output.split())
    assert command(model, short_text, tmp_path, "--strict").exit_code == 1
    log = tmp_path / "log.jsonl"
    assert command(model, short_text, tmp_path, "--retry-quarantined", "--log", str(log)).exit_code == 0
    assert_log(log)


def assert_log(log: Path) -> None:
    """One line an event, each with its fields."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    by_event = {line["event"]: line for line in lines}
    assert {"message", "progress", "worker_joined", "unit_started", "unit_done", "end"} <= by_event.keys()
    assert all(line["time"] > 0 for line in lines)
    started = [line["unit"] for line in lines if line["event"] == "unit_started"]
    done = [line for line in lines if line["event"] == "unit_done"]
    assert started == [line["unit"] for line in done]
    assert all({"worker", "host", "seconds", "peak_rss_mib"} <= line.keys() for line in done)


@pytest.mark.usefixtures("no_ray")
def test_weights_that_are_not_finite_are_refused_with_two(model: Path, short_text: Path, tmp_path: Path) -> None:
    scale(model, {"model.layers.1.mlp.up_proj.weight": float("inf")})
    result = command(model, short_text, tmp_path)
    assert result.exit_code == 2
    assert "NaN or infinite" in result.output


UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.mark.usefixtures("no_ray")
def test_gradients_that_overflow_flag_their_block_alone(model: Path, short_text: Path, tmp_path: Path) -> None:
    """What the block adds is 1e17 times as large: its squared error still fits float32, the square of its gradient does not."""
    scale(model, {DOWN: 1e17})
    method = {"increment": "diagonal", "loss": "mse"}
    finished, result = run(tiny_config(model, short_text, tmp_path / "run", method=method, cluster=ONCE))
    (flag,) = result["flagged"]
    assert flag["status"] in ("non_finite", "fallback")
    assert_said(finished, result, 1, flag["status"])
    if flag["status"] == "fallback":
        assert_rounded(finished, 1)
    assert_loads(finished)
    assert all(text["news"] < 1e6 for text in result["perplexity"].values())
    override = ("--set", "method.increment=diagonal", "--set", "method.loss=mse")
    assert command(model, short_text, tmp_path, *override).exit_code == 3
    strict = command(model, short_text, tmp_path, *override, "--strict")
    assert strict.exit_code == 1
    assert "block 1 would be flagged" in " ".join(strict.output.split())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_whose_products_overflow_still_ends_in_a_checkpoint_that_loads(
    model: Path, short_text: Path, tmp_path: Path, dtype: str
) -> None:
    """Nothing after it is finite either: every block from there on has no better state than round-to-nearest."""
    scale(model, {UP: 1e30, DOWN: 1e30})
    finished, result = run(tiny_config(model, short_text, tmp_path / "run", compute={"dtype": dtype}))
    assert [(f["block"], f["status"]) for f in result["flagged"]] == [(1, "fallback"), (2, "fallback")]
    for block in (1, 2):
        assert_rounded(finished, block)
    assert_loads(finished)


def test_the_loop_names_the_unit_that_ran_out_of_attempts() -> None:
    def fail(payload: object) -> dict[str, Any]:
        raise OSError("net")

    group = InlineGroup(lambda worker, should_yield, membership: fail)
    outcome = run_units(group, [Unit("a", 0)], max_attempts=2, backoff=lambda unit, failures: 0.0)
    assert (outcome.status, outcome.unit, outcome.failures) == ("failed", "a", 2)
