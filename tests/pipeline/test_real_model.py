"""A real model's first blocks, real text, real Ray actors, and a loader that knows nothing of ours."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import run, tiny_tree

from pipeline.config_file import parse_config
from pipeline.gguf_import import import_gguf
from pipeline.report import block_reports
from pipeline.run import ray_workers
from pipeline.sample_material import MODEL_FILE
from pipeline.store import open_store

pytestmark = pytest.mark.ray

BLOCKS = 2

# What a user of the checkpoint writes: transformers, and nothing else.
LOADER = """
import json, math, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, windows, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = AutoTokenizer.from_pretrained(folder)(open(text).read(), return_tensors="pt").input_ids[0]
total = 0.0
with torch.no_grad():
    for start in range(0, windows * length, length):
        window = tokens[start : start + length][None]
        total += model(input_ids=window, labels=window).loss.item()
print(json.dumps(math.exp(total / windows)))
"""


@pytest.fixture(scope="module")
def smollm(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M with its first two blocks; its head reads what they leave, so its perplexity is high and still telling."""
    import torch

    folder = tmp_path_factory.mktemp("smollm") / "model"
    import_gguf(str(assets / MODEL_FILE), {}, open_store(str(folder)), torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = BLOCKS
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def real_tree(model: Path, assets: Path, run_folder: Path, **sections: Any) -> dict[str, Any]:
    data = {"source": str(assets / "wikipedia-calibration.txt"), "samples": 16, "sequence_length": 128}
    evaluation = {"texts": {"news": str(assets / "news.txt")}, "windows": 4, "length": 128}
    whole = {
        "scheme": {"group_size": 64},
        "optimizer": {"epochs": 3},
        "cluster": {"workers": 2},
        "compute": {"dtype": "auto"},
    }
    tree = tiny_tree(model, assets / "news.txt", run_folder, **whole, data=data, evaluation=evaluation)
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return tree


@pytest.mark.parametrize(
    ("scheme", "increment"),
    [
        ({"bits": 3, "group_size": 64, "symmetric": False}, "dense"),
        ({"bits": 4, "group_size": None, "symmetric": True}, "diagonal"),
    ],
    ids=["W3-g64-asymmetric-dense", "W4-channel-symmetric-diagonal"],
)
def test_the_loader_computes_what_the_pipeline_does(
    smollm: Path, assets: Path, tmp_path: Path, scheme: dict[str, Any], increment: str
) -> None:
    tree = real_tree(smollm, assets, tmp_path / "run", scheme=scheme, method={"increment": increment})
    finished, result = run(parse_config(tree), workers=ray_workers)
    for block in block_reports(finished):
        assert block["status"] == "ok"
        assert block["loss"] < block["initial_loss"], "training brought nothing"
    program = [sys.executable, "-c", LOADER, finished.prepared.checkpoint.url, str(assets / "news.txt"), "4", "128"]
    loaded = json.loads(subprocess.run(program, capture_output=True, check=True, text=True).stdout)
    assert loaded == pytest.approx(result["perplexity"]["quantized"]["news"], rel=5e-3)
    assert loaded != pytest.approx(result["perplexity"]["full_precision"]["news"], rel=1e-3)
