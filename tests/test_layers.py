"""The import directions of ARCHITECTURE.md, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "lsi": {"cluster", "pipeline", "ray", "fsspec", "deepspeed", "transformers"},
    "cluster": {"lsi", "pipeline", "transformers", "fsspec"},
}


def imported(file: Path) -> set[str]:
    """Top-level packages that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_package_imports_nothing_above_it(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {file.name: found for file in files if (found := imported(file) & FORBIDDEN[package])}
    assert not wrong


def test_the_check_sees_an_import() -> None:
    assert {"lsi", "cluster"} <= imported(ROOT / "pipeline" / "worker.py")


def test_nothing_reads_pickles() -> None:
    """Only safetensors and JSON come back from storage."""
    for package in ("lsi", "cluster", "pipeline"):
        for file in (ROOT / package).rglob("*.py"):
            assert not imported(file) & {"pickle", "dill", "joblib"}, file
            assert "torch.load" not in file.read_text(), file
