"""Tests here share `running.py`, and a text short enough that reading it takes no time."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def short_text(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 20 kB of the news."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(text_file.read_text()[:20_000])
    return path
