"""One block, several processes: real ones, over gloo on loopback."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from material import NAMES, make_layer
from member import GRID, METHODS, train
from safetensors.torch import load_file
from torch import nn

from lsi.group import GroupEngine, sharing
from lsi.linear import QuantizedLinear
from lsi.reconstruct import Reconstruction

HERE = Path(__file__).parent
# A sum over two halves rounds otherwise than a sum over the whole batch; measured 2e-7.
RELATIVE = 5e-6


def train_together(folder: Path, size: int, method: str) -> list[dict[str, torch.Tensor]]:
    """What every member of a group came to."""
    folder.mkdir()
    path = os.pathsep.join((str(HERE), str(HERE.parents[1])))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "member.py", str(rank), str(size), folder / "store", folder / f"{rank}", method],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [load_file(folder / f"{rank}") for rank in range(size)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("method", "size"), [("corner", 2), ("dense", 2), ("rounding", 3)])
def test_processes_have_the_losses_of_one_and_repeat_to_the_byte(tmp_path: Path, method: str, size: int) -> None:
    """Three share 64 rows as 22, 22 and 20."""
    losses, state = train(None, method)
    first, *others = train_together(tmp_path / "one", size, method)
    assert all(same(first, other) for other in others), "members that came to different states"
    assert first["losses"].tolist() == pytest.approx(losses, rel=RELATIVE)
    for name, tensor in state.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-6)
    again, *_ = train_together(tmp_path / "two", size, method)
    assert same(first, again)


def test_in_bfloat16_the_losses_agree_to_its_rounding(tmp_path: Path) -> None:
    losses, _ = train(None, "bfloat16")
    first, second = train_together(tmp_path / "one", 2, "bfloat16")
    assert same(first, second)
    assert first["losses"].tolist() == pytest.approx(losses, rel=2e-2)


@pytest.mark.parametrize(
    ("size", "shared"), [(2, {"wide", "narrow"}), (6, {"wide", "narrow"}), (10, {"wide"}), (12, {"narrow"})]
)
def test_rows_are_shared_where_all_members_have_some_and_come_by(size: int, shared: set[str]) -> None:
    """64 rows in shares of 6 leave none for the twelfth, 12 rows in shares of 2 none for the seventh."""
    block = nn.Module()
    rows = {"wide": 64, "narrow": 12, "gate": 1, "experts.0.up": 64}
    linears = {
        name: QuantizedLinear(nn.Linear(32, count), GRID, METHODS["rounding"].parts) for name, count in rows.items()
    }
    block.wide, block.narrow, block.gate = linears["wide"], linears["narrow"], linears["gate"]
    block.experts = nn.ModuleList([nn.ModuleDict({"up": linears["experts.0.up"]})])
    assert {name for name, _ in sharing(block, linears, size)} == shared


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    began = not dist.is_initialized()
    if began:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if began:
        dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_more_members_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="a group of 1 for batches of 0 samples leaves 1 of its members without any"):
        GroupEngine(batch_size=0)


@pytest.mark.usefixtures("group_of_one")
def test_what_is_equal_in_all_members_stays_in_memory_once() -> None:
    block = make_layer()
    held = {name: block.get_submodule(name).weight.data_ptr() for name in NAMES}
    trained = Reconstruction(block, NAMES, METHODS["corner"], engine=GroupEngine(batch_size=1))
    assert {name: linear.weight.data_ptr() for name, linear in trained.linears.items()} == held
