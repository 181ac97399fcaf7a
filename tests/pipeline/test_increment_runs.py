"""Every kind of increment, whole or of the leading singular values, from text to a checkpoint that loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import checkpoint_hashes, run, run_in_pieces, tiny_config
from test_equivalence_run import assert_loader_agrees

from pipeline.report import block_reports

KINDS: list[dict[str, Any]] = [
    {"increment": "diagonal", "rank": 8},
    {"increment": "corner", "corner": 16},
    {"increment": "corner", "corner": 8, "rank": 16},
    {"increment": "band", "band": 2},
    {"increment": "band", "band": 2, "rank": 16},
    {"increment": "dense", "rank": 16},
]


@pytest.mark.parametrize("method", KINDS, ids=lambda method: "-".join(map(str, method.values())))
def test_it_improves_every_block_and_repeats_to_the_byte(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Clipping stays where the search puts it, so that what is gained is the increment's."""
    folder = tiny_model(tmp_path / "model")
    sections: dict[str, Any] = {
        "method": method | {"clipping": "none"},
        "data": {"samples": 16},
        "optimizer": {"epochs": 4},
        "evaluation": {"windows": 4, "length": 64},
    }
    finished, result = run(tiny_config(folder, short_text, tmp_path / "one", **sections))
    for block in block_reports(finished):
        assert block["status"] == "ok"
        assert block["loss"] < block["initial_loss"]
    assert_loader_agrees(finished, result, short_text)
    again, *_ = run_in_pieces(tiny_config(folder, short_text, tmp_path / "two", **sections), 7)
    assert checkpoint_hashes(again.prepared.checkpoint) == checkpoint_hashes(finished.prepared.checkpoint)
