"""One block in parts on two processes: DeepSpeed's ZeRO-3 over gloo on loopback."""

import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from zero_member import METHODS, begin, steps

from cluster.group import Membership
from lsi.engine import Later
from pipeline.artifacts import Artifact, Writer, read_tensors
from pipeline.block_state import own_part
from pipeline.config_sections import ComputeConfig
from pipeline.members import Members
from pipeline.store import open_store

HERE = Path(__file__).parent
# Sums of two parts, and fused AdamW; measured 2e-7.
RELATIVE = 5e-6


@dataclass(frozen=True)
class Came:
    """What a member came to."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor]

    def under(self, name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}/"): t for key, t in self.tensors.items() if key.startswith(f"{name}/")}


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Came]:
    folder = tmp_path_factory.mktemp("members")
    path = os.pathsep.join((str(HERE), str(HERE.parents[1])))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    environment["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "zero_member.py", str(rank), "2", folder / "store", folder / f"{rank}"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    assert not (folder / "extensions").exists(), "something was compiled"
    return [
        Came(json.loads((folder / f"{rank}.json").read_text()), load_file(folder / f"{rank}.safetensors"))
        for rank in range(2)
    ]


def test_all_members_come_to_the_same(members: list[Came]) -> None:
    first, second = members
    # As text: a loss that is not a number equals itself there.
    assert json.dumps(first.numbers) == json.dumps(second.numbers)
    assert same(first.tensors, second.tensors)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_codes_are_those_of_one_process(members: list[Came], name: str) -> None:
    alone = begin(METHODS[name], None)
    losses = steps(alone)
    assert members[0].numbers[f"{name}/losses"] == pytest.approx(losses, rel=RELATIVE)
    assert losses[4] != losses[0], "the same batch again, and nothing was trained"
    expected, found = alone.export_state(), members[0].under(name)
    assert {key for key in found if not key.startswith("codes/")} == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].shape == tensor.shape
        assert found[key].allclose(tensor, rtol=1e-3, atol=1e-5)
    for linear, quantized in alone.quantized().items():
        differing = (found[f"codes/{linear}"] != quantized.codes).float().mean()
        assert differing < 1e-3, f"{linear}: more than single weights at a rounding boundary"


@pytest.mark.parametrize(("name", "stop"), [("dense", 3), ("warm", 2), ("warm", 5)])
def test_a_state_read_in_mid_epoch_goes_on_bit_for_bit(members: list[Came], name: str, stop: int) -> None:
    first = members[0]
    assert first.numbers[f"{name}-from-{stop}/losses"] == first.numbers[f"{name}/losses"]
    whole = {key: tensor for key, tensor in first.under(name).items() if not key.startswith("codes/")}
    assert same(first.under(f"{name}-from-{stop}"), whole)


def test_each_member_holds_half(members: list[Came]) -> None:
    """Of weights, values, masters and moments; a part is filled up by less than a number a tensor."""
    for member in members:
        found = member.numbers
        tensors = found["tensors"]
        assert found["outside of parts"] == 0
        assert 0 <= 2 * found["parts"] - found["whole"] <= tensors
        assert 0 <= 2 * found["masters"] - found["trained"] <= tensors
        assert found["moments"] == 2 * found["masters"]
    assert 2 * members[0].numbers["parts"] > members[0].numbers["whole"], "nothing was filled up"


def test_a_number_that_is_not_finite_at_one_member_stops_all(members: list[Came]) -> None:
    for member in members:
        status, done, later = member.numbers["nan"]
        assert (status, done) == ("non_finite", 2)
        assert later != later
        assert member.numbers["changed by nan"] == []
        assert member.numbers["after nan/losses"] == member.numbers["micro-batches/losses"]


@pytest.mark.parametrize("name", ["new", "taken in"])
def test_all_begin_with_what_the_first_has(members: list[Came], name: str) -> None:
    """Other factors elsewhere, an engine that the first alone has let go of."""
    for member in members:
        assert member.numbers[f"{name}/losses"] == member.numbers["micro-batches/losses"]


def test_a_stored_state_is_whole_and_each_member_reads_its_part() -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    artifact = Artifact("state", "block-000", "0" * 64)
    values, steps = torch.arange(15.0).view(3, 5), torch.tensor([2, 0])
    made: list[int] = []

    def make() -> Tensor:
        made.append(len(made))
        return values

    writer = Writer(store, artifact)
    later = Later(torch.float32, (3, 5), make)
    writer.write_tensors("state.safetensors", {"state/steps": steps, "state/value/a": later, "grid/a/scale": values})
    writer.commit({})
    assert len(made) == 1, "put together more than once"
    whole = read_tensors(store, artifact, "state.safetensors")
    assert same(whole, {"state/steps": steps, "state/value/a": values, "grid/a/scale": values})
    parts = []
    for rank in range(2):
        worker: Any = SimpleNamespace(
            config=SimpleNamespace(compute=ComputeConfig(engine="deepspeed", group=2)),
            members=Members(Membership(rank, 2, "127.0.0.1:1")),
        )
        found = read_tensors(store, artifact, "state.safetensors", own_part(worker))
        parts.append(found.pop("state/value/a"))
        assert same(found, {"state/steps": steps, "grid/a/scale": values})
    assert [len(part) for part in parts] == [8, 7]
    assert torch.cat(parts).equal(values.flatten())


def test_nothing_offloaded_is_the_same(members: list[Came]) -> None:
    assert members[0].numbers["kept/losses"] == pytest.approx(members[0].numbers["warm/losses"], rel=RELATIVE)
