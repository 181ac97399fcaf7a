"""One word for a method, an optimizer and a schedule: what it becomes, and who wins."""

import math
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import presets
from pipeline.block_state import learning_rates
from pipeline.config import RunConfig
from pipeline.config_file import load_config, parse_config
from pipeline.errors import UserError
from pipeline.estimate import estimate, estimate_lines
from pipeline.identity import Resolved, claim, recorded_config
from pipeline.store import open_store

ROOT = Path(__file__).parent.parent.parent
SCHEMES = [{"bits": bits, "group_size": group} for bits in (2, 3, 4) for group in (None, 64)]

RULED = """
set:
  method: {increment: dense, rank: 8}
  optimizer: {epochs: 5}
rules:
  - when: {bits: [2, 3]}
    set: {optimizer: {epochs: 7}}
  - when: {bits: 2, grouped: false}
    set: {optimizer: {epochs: 9}, method: {clipping: none}}
  - when: {symmetric: true}
    set: {schedule: {kind: sequential}}
"""


def tree(**sections: Any) -> dict[str, Any]:
    return {"model": {"source": "m"}, "data": {"source": "d"}, "storage": {"run": "r"}} | sections


@pytest.fixture
def ruled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of presets with the one above."""
    (tmp_path / "ruled.yaml").write_text(RULED)
    monkeypatch.setattr(presets, "preset_folder", lambda: tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", presets.preset_names())
def test_every_shipped_preset_gives_a_valid_run_for_every_scheme(name: str, scheme: dict[str, Any]) -> None:
    config = parse_config(tree(preset=name, scheme=scheme))
    assert config.preset == name
    assert config.optimizer.epochs > 0


def test_the_three_presets_are_there() -> None:
    assert set(presets.preset_names()) >= {"best", "fast", "paper"}


@pytest.mark.parametrize("start", ["search", "range"])
def test_signed_steps_reach_their_bounds_from_where_they_begin(start: str) -> None:
    """Rates fall linearly to nothing: 32 steps from the full range add up to half of it, from where the search begins to an eighth."""
    config = parse_config(tree(preset="fast", data={"source": "d", "samples": 64}, method={"clipping_start": start}))
    rate = learning_rates(config)["clipping"]
    assert sum(rate * left / 32 for left in range(32)) == pytest.approx(0.5 if start == "range" else 0.125, rel=0.04)


@pytest.mark.parametrize(
    ("samples", "warm", "rate"), [(8, 0, 1 / 16), (32, 0, 1 / 32), (128, 0, 1 / 64), (128, 1, 1 / math.sqrt(2048))]
)
def test_rounding_goes_further_in_more_steps_by_their_root(samples: int, warm: int, rate: float) -> None:
    """Two epochs in batches of 2; what joins late has the steps that are left."""
    optimizer = {"epochs": 2, "batch_size": 2, "warm_epochs": warm}
    config = parse_config(tree(preset="fast", data={"source": "d", "samples": samples}, optimizer=optimizer))
    assert learning_rates(config)["rounding"] == pytest.approx(rate)


@pytest.mark.parametrize(("group_size", "kind"), [(None, "diagonal"), (64, "corner")])
def test_the_published_increment_has_its_corner_in_groups(group_size: int | None, kind: str) -> None:
    assert parse_config(tree(preset="paper", scheme={"group_size": group_size})).method.increment == kind


@pytest.mark.parametrize("name", ["best", "fast"])
def test_channels_are_scaled_where_activations_are_quantized(name: str) -> None:
    for scheme, equivalence in (({"bits": 8, "activation_bits": 8}, "auto"), ({"bits": 4}, [])):
        assert parse_config(tree(preset=name, scheme=scheme)).method.equivalence == equivalence


@pytest.mark.usefixtures("ruled")
@pytest.mark.parametrize(
    ("scheme", "epochs", "clipping", "schedule"),
    [
        ({"bits": 4}, 5, "learned", "wave"),
        ({"bits": 3}, 7, "learned", "wave"),
        ({"bits": 2}, 7, "learned", "wave"),
        ({"bits": 2, "group_size": None}, 9, "none", "wave"),
        ({"bits": 3, "group_size": None, "symmetric": True}, 7, "learned", "sequential"),
        ({}, 5, "learned", "wave"),
    ],
)
def test_rules_apply_to_their_schemes_and_the_later_one_wins(
    scheme: dict[str, Any], epochs: int, clipping: str, schedule: str
) -> None:
    config = parse_config(tree(preset="ruled", scheme=scheme))
    assert (config.optimizer.epochs, config.method.clipping, config.schedule.kind) == (epochs, clipping, schedule)
    assert (config.method.increment, config.method.rank) == ("dense", 8)


def test_a_schedule_of_another_kind_takes_nothing_of_a_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leading.yaml").write_text("set: {schedule: {kind: wave, lead: 1}, optimizer: {epochs: 4}}")
    monkeypatch.setattr(presets, "preset_folder", lambda: tmp_path)
    for kind in ("sequential", "parallel"):
        schedule = parse_config(tree(preset="leading", schedule={"kind": kind})).schedule
        assert (schedule.kind, schedule.lead) == (kind, 0)
    assert parse_config(tree(preset="leading", schedule={"kind": "wave"})).schedule.lead == 1


@pytest.mark.usefixtures("ruled")
def test_what_the_file_and_the_command_line_say_wins(tmp_path: Path) -> None:
    path = tmp_path / "x.yml"
    path.write_text(yaml.safe_dump(tree(preset="ruled", scheme={"bits": 3}, method={"rank": None})))
    config = load_config(str(path), ["optimizer.epochs=1"])
    assert (config.method.increment, config.method.rank, config.optimizer.epochs) == ("dense", None, 1)
    # The scheme on the command line decides which rules hold.
    assert load_config(str(path), ["scheme.bits=2", "scheme.group_size=null"]).optimizer.epochs == 9
    assert load_config(str(path), ["preset=null"]).method.increment == "diagonal"


@pytest.mark.usefixtures("ruled")
def test_a_presets_rank_is_held_against_the_users_corner() -> None:
    with pytest.raises(UserError, match=r"method\.corner 100 is larger than method\.rank 8"):
        parse_config(tree(preset="ruled", method={"increment": "corner"}))


@pytest.mark.usefixtures("ruled")
def test_the_recipe_is_that_of_the_values_written_out() -> None:
    short = parse_config(tree(preset="ruled", scheme={"bits": 3}))
    whole = parse_config(tree(scheme={"bits": 3}, method={"increment": "dense", "rank": 8}, optimizer={"epochs": 7}))
    assert short.recipe() == whole.recipe()
    assert "preset" not in short.recipe()


@pytest.mark.usefixtures("ruled")
def test_a_run_keeps_its_values_when_the_preset_changes(tmp_path: Path) -> None:
    config = parse_config(tree(preset="ruled", storage={"run": str(tmp_path / "run")}))
    store = open_store(config.storage.run)
    claim(store, config, Resolved(None, "torch"))
    (tmp_path / "ruled.yaml").write_text(RULED.replace("epochs: 5", "epochs: 6"))
    assert parse_config(tree(preset="ruled")).optimizer.epochs == 6
    assert recorded_config(store, {}) == config


def test_an_unknown_preset_is_one_sentence_with_the_names() -> None:
    with pytest.raises(UserError, match=r"^config: preset 'bset' does not exist; there are best, fast, paper"):
        parse_config(tree(preset="bset"))


def test_a_bad_scheme_is_still_named_by_its_key() -> None:
    with pytest.raises(UserError, match=r"scheme\.bits = 5"):
        parse_config(tree(preset="best", scheme={"bits": 5}))
    with pytest.raises(UserError, match="method"):
        parse_config(tree(preset="best", method="all"))


def test_the_plan_shows_the_values(tiny_model: Any, short_text: Path, tmp_path: Path) -> None:
    sections = {
        "model": {"source": str(tiny_model(tmp_path / "model"))},
        "data": {"source": str(short_text), "samples": 8, "sequence_length": 16},
        "scheme": {"bits": 2, "group_size": None},
    }
    config: RunConfig = parse_config(tree(preset="paper", **sections))
    found = estimate(config)
    assert found["preset"] == "paper"
    assert found["optimizer"]["epochs"] == config.optimizer.epochs
    lines = estimate_lines(found)
    assert lines[1].split() == ["preset", "paper"]
    assert any(line.startswith("optimizer ") and f"epochs {config.optimizer.epochs}" in line for line in lines)


def test_the_wheel_carries_the_presets(tmp_path: Path) -> None:
    """As pip builds it; setuptools copies configs/presets into the package."""
    script = f"import os; from setuptools.build_meta import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "lsi", "cluster", "pipeline", "configs"):
        (source / name).symlink_to(ROOT / name)
    done = subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        shipped = {Path(name).stem for name in wheel.namelist() if name.startswith("pipeline/preset_files/")}
    assert shipped == set(presets.preset_names())
