"""benchmarks/quality.py: its settings, its file of results, its costs, and round-to-nearest on a tiny model as run by hand."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from process_tree import measure
from quality import RECIPES, Bench, Job, jobs_of, parse, run
from quality_records import Setting, markdown, parse_setting, put_record, read_records, texts_of

from pipeline.config_file import parse_config

ROOT = Path(__file__).parent.parent.parent
FIELDS = {"tool", "setting", "seed", "wikipedia", "news", "cpu_seconds", "wall_seconds", "peak_rss_mib"}


def record(tool: str, seed: int = 0, wikipedia: float = 20.0, **more: Any) -> dict[str, Any]:
    costs = {"cpu_seconds": 10.0, "wall_seconds": 12.0, "peak_rss_mib": 500, "sum_rss_mib": 900}
    what = {"model": "m", "samples": 64, "tool": tool, "setting": "w3g64", "seed": seed}
    return what | {"wikipedia": wikipedia, "news": 30.0} | costs | more


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("w3g64", Setting(3, 64)),
        ("w4ch", Setting(4, None)),
        ("w4", Setting(4, None)),
        ("w2g32-sym", Setting(2, 32, True)),
        ("w3ch-sym", Setting(3, None, True)),
        ("w8a8ch-sym", Setting(8, None, True, 8)),
        ("w4a8g32", Setting(4, 32, False, 8)),
    ],
)
def test_a_setting_is_read_from_its_name(text: str, setting: Setting) -> None:
    assert parse_setting(text) == setting
    assert parse_setting(setting.name) == setting


@pytest.mark.parametrize("text", ["w5", "3g64", "w3g0", "w3g", "w3g64-asym", ""])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="as in w3g64, w4ch, w2g32-sym or w8a8ch-sym"):
        parse_setting(text)


def test_peers_are_not_run_with_quantized_activations(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--tools", "fast,gptq", "--settings", "w4,w8a8ch-sym", "--json", "x"])
    assert "gptq is run on weights alone, and w8a8ch-sym quantizes activations" in capsys.readouterr().err


def test_settings_without_a_checkpoint_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--tools", "fast", "--settings", "w6a6ch-sym", "--json", "x"])
    assert "w6a6ch-sym has no checkpoint to measure: W6A6 is served by no engine" in capsys.readouterr().err


def test_the_first_seed_of_everything_comes_first_and_tools_without_chance_run_once() -> None:
    options = parse(["--tools", "fast,gptq,full-precision", "--settings", "w3g64,w4", "--seeds", "2", "--json", "x"])
    fine, coarse = Setting(3, 64), Setting(4, None)
    first = [Job(tool, setting, 0) for setting in (fine, coarse) for tool in ("fast", "gptq")]
    full = Job("full-precision", None, 0)
    assert jobs_of(options) == [full, *first, Job("fast", fine, 1), Job("fast", coarse, 1)]


def test_unknown_tools_and_settings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--tools", "best,awk"], ["--settings", "w9"], []):
        with pytest.raises(SystemExit):
            parse([*given, *(["--json", "x"] if given else [])])
    assert "'awk' is no tool; there are full-precision, best, fast, paper" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--seeds", "0"], "'0' is no count: give 1 or more"),
        (["--windows", "few"], "'few' is no count"),
        (["--text", "news.txt"], "'news.txt' has no name: write NAME=FILE"),
    ],
)
def test_what_could_not_be_measured_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], given: list[str], words: str
) -> None:
    with pytest.raises(SystemExit):
        parse([*given, "--json", "x"])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "words"), [("nowhere.txt", "nowhere.txt is not there"), ("", "100032 windows of 16 tokens need")]
)
def test_a_text_that_is_missing_or_too_short_is_refused_before_anything_is_quantized(
    tiny_model: Callable[..., Path],
    short_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    words: str,
) -> None:
    model, text = str(tiny_model(tmp_path / "model")), file or str(short_text)
    where = ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "out.json")]
    sizes = ["--samples", "4", "--length", "16", "--windows", "100000"]
    asked = parse(
        ["--tools", "rtn", "--model", model, "--calibration", str(short_text), "--text", f"news={text}", *sizes, *where]
    )
    assert run(asked) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_a_result_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert read_records(path) == []
    for found in (record("best"), record("gptq"), record("best", seed=1), record("best", wikipedia=19.0)):
        put_record(path, found)
    assert read_records(path) == [record("gptq"), record("best", seed=1), record("best", wikipedia=19.0)]
    assert json.loads(path.read_text()) == read_records(path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_table_has_means_and_spreads_and_full_precision_in_every_setting() -> None:
    full = {"model": "m", "samples": 64, "tool": "full-precision", "setting": "", "seed": 0}
    records = [
        full | {"wikipedia": 17.0, "news": 27.0},
        record("gptq", wikipedia=40.0),
        record("best", wikipedia=20.0),
        record("best", seed=1, wikipedia=21.0),
        record("rtn", setting="w2g64", wikipedia=123456.0),
    ]
    assert texts_of(records) == ["wikipedia", "news"]
    lines = markdown(records).splitlines()
    assert [line for line in lines if line.startswith("#")] == ["### w3g64, m, 64 samples", "### w2g64, m, 64 samples"]
    rows = [line for line in lines if line.startswith("|") and "---" not in line and "| tool" not in line]
    assert rows[:3] == [
        "| full-precision | 1 | 17.00 | 27.00 |  |  |  |  |",
        "| best | 2 | 20.50 ± 0.50 | 30.00 ± 0.00 | 10 ± 0 | 12 ± 0 | 500 ± 0 | 900 ± 0 |",
        "| gptq | 1 | 40.00 | 30.00 | 10 | 12 | 500 | 900 |",
    ]
    assert rows[4].startswith("| rtn | 1 | 1.23e+05 |")


# A process whose parent is gone when it does its work, and for which nobody waits. Each step waits for the one before by a file.
ORPHAN = """
import subprocess, sys, time
from pathlib import Path

def wait(name):
    while not Path(name).exists():
        time.sleep(0.05)

def start(role):
    return subprocess.Popen([sys.executable, __file__, role])

role = sys.argv[1]
if role == "first":
    start("second").wait()
    Path("alone").touch()
    wait("done")
    time.sleep(1)
elif role == "second":
    start("orphan")
    wait("there")
    time.sleep(2)
else:
    Path("there").touch()
    wait("alone")
    while time.process_time() < 1:
        pass
    Path("done").touch()
    time.sleep(2)
"""


def test_the_cost_of_a_command_has_its_orphans_in_it(tmp_path: Path) -> None:
    (tmp_path / "orphan.py").write_text(ORPHAN)
    command = [sys.executable, str(tmp_path / "orphan.py"), "first"]
    status, cost = measure(command, dict(os.environ), tmp_path, tmp_path / "log")
    assert status == 0
    assert cost.cpu_seconds >= 1
    assert 1 <= cost.peak_rss_mib <= cost.sum_rss_mib


def test_the_exit_status_and_the_output_are_kept(tmp_path: Path) -> None:
    status, _ = measure([sys.executable, "-c", "print('no'); exit(7)"], dict(os.environ), tmp_path, tmp_path / "log")
    assert status == 7
    assert (tmp_path / "log").read_text() == "no\n"


@pytest.mark.ray
def test_round_to_nearest_on_a_tiny_model(tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), "--tools", "full-precision,rtn"]
    command += ["--settings", "w3g32,w3g64"]
    command += ["--model", str(tiny_model(tmp_path / "model")), "--calibration", str(short_text)]
    command += ["--text", f"wikipedia={short_text}", "--text", f"news={short_text}", "--samples", "4", "--length", "16"]
    command += ["--windows", "4", "--first-window", "2", "--work", str(tmp_path / "work"), "--json", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # A result that is there is not made again.
    kept = record("rtn", setting="w3g64", model="model", samples=4)
    put_record(out, kept)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    there, full, made = json.loads(out.read_text())
    assert there == kept
    assert set(made) >= FIELDS
    assert (full["tool"], made["tool"], made["setting"], made["seed"]) == ("full-precision", "rtn", "w3g32", 0)
    assert full["wikipedia"] == full["news"] != made["wikipedia"]
    assert made["cpu_seconds"] > 1 < made["peak_rss_mib"]
    assert not [path for path in (tmp_path / "work").glob("*rtn-w3g32-0") if path.is_dir()]


def test_a_checkpoint_that_is_kept_is_not_taken_for_one_of_another_model_or_of_other_tokens(tmp_path: Path) -> None:
    def folder(model: str, samples: int) -> Path:
        given = ["--json", "x", "--work", str(tmp_path), "--model", model, "--samples", str(samples)]
        return Bench(parse(given)).folder(Job("rtn", parse_setting("w3g64"), 0))

    assert len({folder("one", 4), folder("one", 8), folder("two", 4)}) == 3


@pytest.mark.parametrize("tool", RECIPES)
def test_every_recipe_is_a_configuration_for_every_setting(tool: str, tmp_path: Path) -> None:
    bench = Bench(parse(["--model", str(tmp_path), "--work", str(tmp_path), "--json", "x"]))
    for name in ("w4ch", "w2g32", "w8a8ch-sym"):
        setting = parse_setting(name)
        found = parse_config(bench.config(Job(tool, setting, 7), setting, tmp_path))
        assert (found.scheme.bits, found.scheme.activation_bits) == (setting.bits, setting.activation_bits)
        assert found.optimizer.seed == 7
