"""Whole runs on real Ray actors: the bytes do not depend on how many there are, nor on what was killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from running import checkpoint_hashes, run, tiny_config, tiny_tree

from pipeline.artifacts import RECORD
from pipeline.run import ray_workers
from pipeline.store import open_store

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("ray") / "model", blocks=4)


@pytest.fixture(scope="module")
def undisturbed(model: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The checkpoint's hashes of a run in one process."""
    finished, _ = run(tiny_config(model, short_text, tmp_path_factory.mktemp("plain") / "run", **SIZE))
    return checkpoint_hashes(finished.prepared.checkpoint)


# Large enough that there is time to kill something in the middle.
SIZE: dict[str, Any] = {
    "data": {"samples": 24, "sequence_length": 64},
    "optimizer": {"epochs": 3},
    "schedule": {"kind": "parallel", "refresh_every": 1},
    "end_to_end": {"epochs": 1, "batch_size": 8},
}


def command(config: Path) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-m", "pipeline.cli", "quantize", str(config)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def commits(run_folder: Path) -> dict[str, float]:
    """Commit records with the time each was written."""
    return {str(p.parent.relative_to(run_folder)): p.stat().st_mtime_ns for p in run_folder.rglob(RECORD)}


def test_two_actors_give_the_bytes_of_one_process_and_train_two_blocks_at_once(
    model: Path, short_text: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    config = tiny_config(model, short_text, tmp_path / "run", cluster={"workers": 2}, **SIZE)
    finished, result = run(config, workers=ray_workers)
    assert checkpoint_hashes(finished.prepared.checkpoint) == undisturbed
    manifest = json.loads(finished.prepared.store.get("manifest.json"))
    assert manifest["most_blocks_at_once"] == 2
    assert len({entry["pid"] for entry in manifest["timeline"]}) == 2
    assert {"driver", "worker-0", "worker-1"} <= set(result["peak_rss_mib"])


@pytest.fixture
def killed_run(model: Path, short_text: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Config and run directory of a run that tests kill."""
    tree = tiny_tree(model, short_text, tmp_path / "run", cluster={"workers": 2, "commit_every_seconds": 0}, **SIZE)
    return write_config(tmp_path / "config.yaml", tree), tmp_path / "run"


def wait_for_commits(run_folder: Path, pattern: str, count: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if len(list(run_folder.glob(pattern))) >= count:
            return
        assert process.poll() is None, f"the run ended before it could be killed: {process.communicate()}"
        time.sleep(0.05)
    raise AssertionError(f"no {count} commits of {pattern} within a minute")


def kill_driver_and_actors(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the driver and everything below it, at one moment."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("hidden/*/" + RECORD, 5), ("state/*/" + RECORD, 1), ("quantized/*/" + RECORD, 2), ("scales/*/" + RECORD, 1)],
    ids=["in-capture", "in-training", "towards-the-end", "end-to-end"],
)
def test_sigkill_of_driver_and_actors_costs_nothing_that_was_committed(
    killed_run: tuple[Path, Path], undisturbed: dict[str, str], pattern: str, count: int
) -> None:
    config, run_folder = killed_run
    first = command(config)
    wait_for_commits(run_folder, pattern, count, first)
    kill_driver_and_actors(first)
    before = commits(run_folder)
    assert before
    assert not (run_folder / "checkpoint" / "config.json").exists()
    second = command(config)
    out, err = second.communicate(timeout=240)
    assert second.returncode == 0, err.decode()
    assert checkpoint_hashes(open_store(str(run_folder / "checkpoint"))) == undisturbed
    after = commits(run_folder)
    redone = [path for path, written in before.items() if path in after and after[path] != written]
    assert not redone, "committed units were run again"
    assert json.loads(out)["units"]["committed_before"] > 0


def test_ctrl_c_leaves_a_resumable_run_and_says_how(killed_run: tuple[Path, Path]) -> None:
    config, run_folder = killed_run
    process = command(config)
    wait_for_commits(run_folder, "hidden/*/" + RECORD, 3, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    text = err.decode()
    assert "stopping after the units that run now" in text
    assert f"lsi quantize {config}" in text


def test_sigterm_stops_at_once_and_says_how_to_go_on(killed_run: tuple[Path, Path]) -> None:
    """A machine that is taken away sends it; Ray's own handler would end the process with a dump of addresses."""
    config, run_folder = killed_run
    process = command(config)
    wait_for_commits(run_folder, "hidden/*/" + RECORD, 3, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"lsi quantize {config}" in err.decode()
    assert "SIGTERM received" not in err.decode()


def test_no_cluster_at_the_address_is_one_sentence(model: Path, short_text: Path, tmp_path: Path) -> None:
    tree = tiny_tree(model, short_text, tmp_path / "run", cluster={"address": "127.0.0.1:1"})
    process = command(write_config(tmp_path / "config.yaml", tree))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "No Ray cluster answers at 127.0.0.1:1" in err.decode()
    assert "Traceback" not in err.decode()


def test_sigkill_under_a_look_ahead_and_a_staged_start(model: Path, short_text: Path, tmp_path: Path) -> None:
    sections = SIZE | {
        "data": {"samples": 8, "sequence_length": 64},
        "evaluation": {"texts": {}},
        "method": {"increment": "diagonal", "look_ahead": 2, "quantized_stream_loss": 0.5},
        "optimizer": {"epochs": 3, "warm_epochs": 1},
    }
    undisturbed, _ = run(tiny_config(model, short_text, tmp_path / "plain", **sections))
    tree = tiny_tree(model, short_text, tmp_path / "run", cluster={"workers": 2, "commit_every_seconds": 0}, **sections)
    config = write_config(tmp_path / "config.yaml", tree)
    first = command(config)
    wait_for_commits(tmp_path / "run", "partial/block-*-unit-001-*/" + RECORD, 1, first)
    kill_driver_and_actors(first)
    second = command(config)
    _, err = second.communicate(timeout=240)
    assert second.returncode == 0, err.decode()
    found = checkpoint_hashes(open_store(str(tmp_path / "run" / "checkpoint")))
    assert found == checkpoint_hashes(undisturbed.prepared.checkpoint)
