"""A short version of benchmarks/chaos.py and the command of benchmarks/scaling.py, as they are run by hand."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import Arena, planned, summary
from faults import FAULTS

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def arena(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    from arena import s3_server

    with s3_server(rate=0.05, seed=0) as ports:
        yield Arena(tmp_path_factory.mktemp("chaos"), 0, ports)


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.parametrize(("fault", "storage"), [("kill_actors", "disk"), ("kill_both", "s3"), ("bit_flip", "disk")])
def test_a_disturbed_run_ends_with_the_undisturbed_bytes(arena: Arena, fault: str, storage: str) -> None:
    outcome = arena.run(0, fault, storage)
    assert outcome.identical, outcome.reason
    assert outcome.lost == 0
    assert outcome.redone == 0 or FAULTS[fault].damages


def test_half_of_the_trials_are_on_s3_and_each_fault_is_on_both() -> None:
    plan = planned(2 * len(FAULTS), None)
    for name, fault in FAULTS.items():
        storages = {storage for _, planned_name, storage in plan if planned_name == name}
        assert storages == ({"s3"} if fault.faulty_door else {"s3", "disk"})


def test_a_failed_trial_is_counted_and_not_hidden() -> None:
    good = {"fault": "kill_both", "storage": "s3", "identical": True, "lost": 0, "redone": 0}
    bad = good | {"fault": "bit_flip", "identical": False, "lost": 2, "redone": 3, "reason": "differing files"}
    found = summary([good, bad], {})
    assert (found["trials"], found["identical"], found["units_lost"]) == (2, 1, 2)
    assert (found["committed_units_redone"], found["remade_after_damage"]) == (0, 3)
    assert found["failed"] == [bad]


def test_the_scaling_command_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "benchmarks" / "scaling.py", "--model", "llama-2-70b", "--workers", "80"]
    subprocess.run(
        [*command, "--schedule", "parallel", "--json", out], check=True, stdout=subprocess.DEVNULL, env=environment
    )
    found = json.loads(out.read_text())
    assert {"efficiency", "hours", "storage_gib", "bottleneck"} <= set(found)
    assert 0 < found["efficiency"] < 1
