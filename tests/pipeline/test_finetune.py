"""Fine-tunes of packed checkpoints, whole runs in one process: what changes, what does not, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Silent, checkpoint_hashes, run, tiny_config, tiny_tree
from safetensors.torch import load_file, save_file

from pipeline.config import RunConfig, parse_config
from pipeline.errors import UserError
from pipeline.evaluate_checkpoint import evaluate_checkpoint
from pipeline.packed_source import open_packed
from pipeline.report import block_reports
from pipeline.run import Finished
from pipeline.store import open_store

TRAINED = ("model.layers.1.", "model.layers.2.")
GRIDS = {
    "asymmetric": {"symmetric": False},
    "symmetric": {"symmetric": True},
    "per-channel": {"symmetric": False, "group_size": None},
}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), blocks=3, dtype="bfloat16", max_shard_size="100KB")


@pytest.fixture(scope="module")
def rounded(model: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Round-to-nearest checkpoints of our own, by the scheme, in shards of a third of a megabyte."""
    made: dict[str, Path] = {}

    def make(grid: str) -> Path:
        if grid not in made:
            folder = tmp_path_factory.mktemp("rounded")
            scheme, outputs = GRIDS[grid], {"max_shard_mib": 1}
            run(tiny_config(model, short_text, folder, scheme=scheme, optimizer={"epochs": 0}, outputs=outputs))
            made[grid] = folder / "checkpoint"
        return made[grid]

    return make


def tune_config(checkpoint: Path, text: Path, folder: Path, **sections: Any) -> RunConfig:
    """The last two blocks, dense increments with steps that are large for so few of them."""
    tree = tiny_tree(checkpoint, text, folder)
    del tree["scheme"]
    tree |= {"finetune": {"blocks": 2}, "method": {"increment": "dense", "clipping": "none"}}
    tree["data"]["samples"] = 16
    tree["optimizer"] = {"epochs": 3, "increment_learning_rate": 0.1}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check_tuned(before: Path, finished: Finished, result: dict[str, Any], text: Path) -> None:
    """All that holds for any fine-tune that found something better."""
    after = Path(finished.prepared.checkpoint.url)
    old, new = tensors(before), tensors(after)
    assert {n: (t.dtype, t.shape) for n, t in old.items()} == {n: (t.dtype, t.shape) for n, t in new.items()}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed, "nothing was trained"
    assert all(name.startswith(TRAINED) and name.rpartition(".")[2].startswith("weight_") for name in changed)
    assert any(name.endswith("weight_packed") for name in changed)
    blocks = block_reports(finished)
    assert [block["block"] for block in blocks] == [1, 2]
    assert all(block["loss"] < block["initial_loss"] and block["kept"] != "initial" for block in blocks)
    table = result["perplexity"]
    assert table["tuned"]["news"] < table["checkpoint"]["news"]
    for folder, variant in ((before, "checkpoint"), (after, "tuned")):
        loaded = evaluate_checkpoint(str(folder), [str(text)], 2, 16, "cpu", show=False)
        assert loaded[str(text)] == pytest.approx(table[variant]["news"], rel=5e-3)


@pytest.mark.parametrize("grid", GRIDS)
def test_only_codes_and_scales_of_the_last_blocks_change_and_the_text_improves(
    rounded: Callable[..., Path], short_text: Path, tmp_path: Path, grid: str
) -> None:
    before = rounded(grid)
    finished, result = run(tune_config(before, short_text, tmp_path / "run"))
    check_tuned(before, finished, result, short_text)
    manifest = json.loads((tmp_path / "run/checkpoint/lsi_manifest.json").read_text())
    assert manifest["tuned_from"]["blocks"] == 2
    assert manifest["tuned_from"]["checkpoint"] == str(before)
    card = (tmp_path / "run/checkpoint/README.md").read_text()
    assert "Fine-tuned" in card
    assert manifest["tuned_from"]["digest"][:16] in card
