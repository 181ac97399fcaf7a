"""`lsi doctor`: what it finds, what it says to do, and what it never says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import tiny_tree
from typer.testing import CliRunner

from pipeline import deepspeed_ops, doctor
from pipeline.cli import app
from pipeline.config import RunConfig
from pipeline.config_file import parse_config
from pipeline.deepspeed_ops import LOCK, STAMP
from pipeline.doctor import Check, examine, usable
from pipeline.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An extensions cache of the test's own."""
    folder = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return folder


def left_lock(cache: Path) -> Path:
    """What a killed compilation leaves."""
    lock = cache / "cpu_adam" / LOCK
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def found(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def silent(text: str) -> None:
    pass


def test_this_machine_is_usable_and_nothing_is_compiled(cache: Path) -> None:
    checks = examine(None, build=False, say=silent)
    assert usable(checks)
    for name in (*doctor.PACKAGES, "python", "memory", "scratch", "bfloat16", "compiler", "shm_comm"):
        assert found(checks, name).finding
    assert found(checks, "cpu_adam").state == "note"
    assert "lsi doctor --build" in found(checks, "cpu_adam").remedy
    assert not cache.exists()


def test_a_stale_lock_is_found_and_where_and_removed_when_building(cache: Path) -> None:
    lock = left_lock(cache)
    told = found(doctor.locks(build=False), "extension lock")
    assert told.state == "note"
    assert str(lock) in told.finding
    assert "lsi doctor --build" in told.remedy
    assert lock.exists()
    assert "removed" in found(doctor.locks(build=True), "extension lock").finding
    assert not lock.exists()


@pytest.fixture
def held_lock(cache: Path) -> Iterator[tuple[Path, int]]:
    """A lock that another process holds, as a compilation does."""
    lock = left_lock(cache)
    hold = f"import sys; kept = open({str(lock)!r}); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield lock, process.pid
    process.communicate()


def test_a_lock_that_a_process_holds_is_left_and_nothing_is_built_beside_it(held_lock: tuple[Path, int]) -> None:
    lock, pid = held_lock
    told = found(doctor.locks(build=True), "extension lock")
    assert f"held by process {pid}" in told.finding
    assert lock.exists()
    with pytest.raises(UserError, match=f"process {pid}.*wait for it"):
        deepspeed_ops.build("cpu_adam")


def test_without_a_compiler_building_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert deepspeed_ops.missing_tools() == ["g++", "ninja"]
    checks = [*doctor.tools(), doctor.cpu_adam(None, True, silent)]
    assert found(checks, "compiler").state == "note"
    failed = found(checks, "cpu_adam")
    assert failed.state == "failed"
    assert "needs g++ and ninja" in failed.finding
    assert not cache.exists()


def test_what_other_versions_or_another_processor_were_built_for_does_not_count(cache: Path) -> None:
    (cache / "cpu_adam").mkdir(parents=True)
    (cache / "cpu_adam" / "cpu_adam.so").touch()
    assert not deepspeed_ops.is_built("cpu_adam")
    stamp = cache / "cpu_adam" / STAMP
    stamp.write_text(json.dumps(deepspeed_ops.stamp() | {"torch": "1.0"}))
    assert not deepspeed_ops.is_built("cpu_adam")
    stamp.write_text(json.dumps(deepspeed_ops.stamp()))
    assert deepspeed_ops.is_built("cpu_adam")


@pytest.mark.parametrize("kind", ["missing", "too small"])
def test_scratch_that_is_missing_or_too_small(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "nowhere" if kind == "missing" else tmp_path
    check = doctor.scratch(folder, 1 if kind == "missing" else 2**60)
    assert check.state == "failed"
    assert str(folder) in check.finding
    assert "TMPDIR" in check.remedy


@pytest.fixture(scope="module")
def tree(tiny_model: Callable[..., Path], short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("doctor")
    return tiny_tree(tiny_model(folder / "model"), short_text, folder / "run")


def changed(tree: dict[str, Any], **sections: Any) -> RunConfig:
    return parse_config({**tree, **{name: {**tree.get(name, {}), **keys} for name, keys in sections.items()}})


def test_what_a_configuration_names_is_tried(tree: dict[str, Any]) -> None:
    checks = examine(parse_config(tree), build=False, say=silent)
    assert usable(checks)
    for name in ("storage.run", "model.source", "data.source", "evaluation.texts.news"):
        assert found(checks, name).state == "ok"
    assert list(Path(tree["storage"]["run"]).iterdir()) == []


BROKEN: dict[str, dict[str, Any]] = {
    "storage.run": {"storage": {"run": "/proc/nowhere"}},
    "model.source": {"model": {"source": "./nowhere"}},
    "data.source": {"data": {"source": "nowhere.txt"}},
    "evaluation.texts.bad": {"evaluation": {"texts": {"bad": "nowhere.jsonl"}}},
    "cluster.address": {"cluster": {"address": "127.0.0.1:1"}},
    "device": {"compute": {"device": "cuda"}, "cluster": {"gpus_per_worker": 1}},
    "cpu_adam": {"compute": {"engine": "deepspeed", "adam": "cpu_adam"}},
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_fails_is_named_with_a_remedy(tree: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    checks = examine(changed(tree, **BROKEN[name]), build=False, say=silent)
    assert [check.name for check in checks if check.state == "failed"] == [name]
    assert found(checks, name).remedy
    assert not usable(checks)


def test_what_the_model_cannot_give_is_told(tree: dict[str, Any]) -> None:
    check = doctor.model(changed(tree, scheme={"group_size": 48}))
    assert check.state == "failed"
    assert "group_size 48 does not divide" in check.finding


def test_no_secret_is_shown(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET_KEY", "swordfish-1")
    url = "ftp://user:swordfish-2@127.0.0.1:1/run/swordfish-1/"
    config = changed(tree, storage={"run": url, "options": {"timeout": 1, "acct": "swordfish-3"}})
    checks = [doctor.without_secrets(check, config) for check in (doctor.storage(config), Check("x", "swordfish-3"))]
    assert "swordfish" not in doctor.as_json(checks)
    assert "ftp://***@127.0.0.1" in doctor.as_json(checks)


def test_the_command_prints_json_and_ends_with_1_where_it_is_unusable(tree: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    fine = CliRunner().invoke(app, ["doctor", str(path), "--json"])
    assert fine.exit_code == 0
    assert json.loads(fine.stdout)["usable"] is True
    broken = CliRunner().invoke(app, ["doctor", str(path), "--set", "model.source=./nowhere"])
    assert broken.exit_code == 1
    assert "failed" in broken.stdout
    assert "no such folder" in " ".join(broken.stdout.split())


def test_a_worker_compiles_nothing(cache: Path) -> None:
    """In a process of its own: whatever DeepSpeed would compile raises, and says what to do."""
    program = """
from pipeline.deepspeed_ops import start_deepspeed
from pipeline.errors import UserError
deepspeed = start_deepspeed("cpu")
try:
    deepspeed.ops.adam.DeepSpeedCPUAdam([__import__("torch").nn.Parameter(__import__("torch").zeros(2))])
except RuntimeError as error:
    assert isinstance(error.__cause__, UserError), error
    print(error.__cause__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ.copy())
    assert "a worker compiles nothing: run `lsi doctor --build`" in done.stdout, done.stderr
    assert not cache.exists()
