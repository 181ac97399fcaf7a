"""A text short enough that reading it takes no time."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def short_text(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 20 kB of the news."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(text_file.read_text()[:20_000])
    return path
