"""The same runs on a CUDA device."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import checkpoint_hashes, run, run_in_pieces, tiny_config

from pipeline.report import block_reports

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]


@pytest.mark.parametrize("increment", ["diagonal", "dense"])
def test_a_run_on_the_gpu_improves_and_repeats_to_the_byte(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path, increment: str
) -> None:
    model = tiny_model(tmp_path / "model", dtype="bfloat16")
    hashes = []
    for name in ("one", "two"):
        sections = {"compute": {"device": "cuda", "dtype": "auto"}, "method": {"increment": increment}}
        sections["cluster"] = {"gpus_per_worker": 1}
        finished, _ = run(tiny_config(model, short_text, tmp_path / name, **sections))
        for block in block_reports(finished):
            assert block["status"] == "ok"
            assert block["loss"] <= block["initial_loss"]
        hashes.append(checkpoint_hashes(finished.prepared.checkpoint))
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("increment", ["diagonal", "dense"])
def test_deepspeed_on_the_gpu_agrees_with_torch_and_repeats_to_the_byte(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path, increment: str
) -> None:
    model = tiny_model(tmp_path / "model")
    hashes, losses = {}, {}
    for name, engine in {"torch": "torch", "one": "deepspeed", "two": "deepspeed"}.items():
        sections = {"compute": {"device": "cuda", "engine": engine}, "method": {"increment": increment}}
        sections["cluster"] = {"gpus_per_worker": 1}
        finished, _ = run(tiny_config(model, short_text, tmp_path / name, **sections))
        hashes[name] = checkpoint_hashes(finished.prepared.checkpoint)
        losses[name] = [block["loss"] for block in block_reports(finished)]
    assert hashes["one"] == hashes["two"]
    assert losses["one"] == pytest.approx(losses["torch"], rel=1e-2)


def test_the_gpu_agrees_with_the_cpu(tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    losses = {}
    for device in ("cpu", "cuda"):
        sections = {"compute": {"device": device}, "cluster": {"gpus_per_worker": 1}}
        finished, _ = run(tiny_config(model, short_text, tmp_path / device, **sections))
        losses[device] = [block["loss"] for block in block_reports(finished)]
    # Rounding to the grid turns last-bit differences into whole steps of single weights.
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_run_in_pieces_on_the_gpu_is_the_whole_one_to_the_byte(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path, engine: str
) -> None:
    """AdamW's state is taken up from storage between any two units."""
    model = tiny_model(tmp_path / "model")
    sections = {"compute": {"device": "cuda", "engine": engine}, "cluster": {"gpus_per_worker": 1}}
    whole, _ = run(tiny_config(model, short_text, tmp_path / "whole", **sections))
    pieces, result, _ = run_in_pieces(tiny_config(model, short_text, tmp_path / "pieces", **sections), 1)
    assert not result["flagged_blocks"]
    assert checkpoint_hashes(pieces.prepared.checkpoint) == checkpoint_hashes(whole.prepared.checkpoint)
