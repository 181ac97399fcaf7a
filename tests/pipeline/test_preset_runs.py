"""The shipped presets, from text to a checkpoint that loads; and what refuses one names it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import Silent, run, tiny_tree
from transformers import GPTNeoXConfig

from pipeline.config import RunConfig
from pipeline.config_file import parse_config
from pipeline.errors import UserError
from pipeline.evaluate_checkpoint import evaluate_checkpoint
from pipeline.prepare import prepare
from pipeline.presets import SECTIONS
from pipeline.report import block_reports, end_report

TinyModel = Callable[..., Path]
GROUPED = {"bits": 3, "group_size": 32}


def preset_run(name: str, model: Path, text: Path, folder: Path, **sections: Any) -> RunConfig:
    """A run of seconds with the preset's method, optimizer, schedule and end."""
    tree = tiny_tree(model, text, folder)
    plain = {key: value for key, value in tree.items() if key not in SECTIONS}
    return parse_config({**plain, "preset": name, **sections})


@pytest.mark.parametrize(
    ("name", "scheme", "method"),
    [
        ("fast", GROUPED, {}),
        ("fast", {"bits": 2, "group_size": 32, "symmetric": True}, {}),
        ("fast", {"bits": 4, "group_size": None, "symmetric": True, "activation_bits": 8}, {}),
        ("best", GROUPED, {}),
        ("best", {"bits": 4, "group_size": None}, {}),
        ("paper", {"bits": 4, "group_size": None}, {}),
        ("paper", GROUPED, {"corner": 16}),
    ],
    ids=str,
)
def test_a_preset_from_text_to_a_checkpoint_that_loads(
    tiny_model: TinyModel, short_text: Path, tmp_path: Path, name: str, scheme: dict[str, Any], method: dict[str, Any]
) -> None:
    evaluation = {"texts": {"news": str(short_text)}, "windows": 4, "length": 64}
    # One pass over six samples is four steps, which need not lead anywhere.
    data = {"source": str(short_text), "samples": 24 if name == "fast" else 6, "sequence_length": 16}
    sections = {"scheme": scheme, "method": method, "evaluation": evaluation, "data": data}
    folder = tiny_model(tmp_path / "model")
    finished, result = run(preset_run(name, folder, short_text, tmp_path / "run", **sections))
    for block in block_reports(finished):
        assert block["status"] == "ok"
        assert block["kept"] != "initial"
        assert block["loss"] < block["initial_loss"]
    end = end_report(finished)
    assert (end is None) == (name == "paper")
    assert end is None or end["loss"] <= end["initial_loss"]
    loaded = evaluate_checkpoint(finished.prepared.checkpoint.url, [str(short_text)], 4, 64, "cpu", show=False)
    assert loaded[str(short_text)] == pytest.approx(result["perplexity"]["quantized"]["news"], rel=1e-4)


@pytest.mark.parametrize(("name", "scheme"), [("paper", GROUPED), ("fast", GROUPED | {"activation_bits": 8})])
def test_a_preset_that_a_family_cannot_take_is_named_with_the_key_to_set(
    tiny_model: TinyModel, short_text: Path, tmp_path: Path, name: str, scheme: dict[str, Any]
) -> None:
    config = GPTNeoXConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    folder = tiny_model(tmp_path / "model", config=config)
    sections = {"scheme": scheme, "method": {"corner": 16}}
    with pytest.raises(
        UserError, match=rf"^method\.equivalence, as preset {name} has it: .*gpt_neox.*equivalence: \[\] leaves it out"
    ):
        prepare(preset_run(name, folder, short_text, tmp_path / "run", **sections), Silent())
    typed = sections | {"method": {"corner": 16, "equivalence": ["value_output"]}}
    with pytest.raises(UserError, match=r"^method\.equivalence: .*gpt_neox"):
        prepare(preset_run(name, folder, short_text, tmp_path / "run", **typed), Silent())


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ({"increment": "diagonal", "rank": 50}, r"method\.rank 50 is above the rank of .*k_proj \(32\).*to 32 or less"),
        (
            {"increment": "corner", "corner": 50},
            r"method\.corner 50 is above the rank of .*k_proj \(32\).*to 32 or less",
        ),
        ({"increment": "band", "band": 32}, r"method\.band 32 is above the rank of .*k_proj \(32\).*to 31 or less"),
    ],
)
def test_a_rank_above_a_linears_is_refused_before_any_work(
    tiny_model: TinyModel, short_text: Path, tmp_path: Path, method: dict[str, Any], sentence: str
) -> None:
    config = parse_config(tiny_tree(tiny_model(tmp_path / "model"), short_text, tmp_path / "run", method=method))
    with pytest.raises(UserError, match=sentence):
        prepare(config, Silent())
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
