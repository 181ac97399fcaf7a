"""Every signature of lsi is checked while its tests run: dtypes and shapes by jaxtyping, the rest by beartype."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# The hook looks for lsi on sys.path alone, where an editable install does not put it and `tests/` may (this folder
# is called lsi too). It must be there before anything imports lsi: test_shapes.py fails if it was too late.
sys.path.insert(0, str(Path(__file__).parents[2]))
install_import_hook("lsi", "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
