"""Whole runs with a look-ahead, a loss on the quantized stream and a staged start: cut anywhere, they come to the same bytes."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Silent, checkpoint_hashes, run, run_in_pieces, tiny_config

from cluster.group import ShouldYield, stay
from cluster.units import YieldUnit
from lsi.block import run_block
from lsi.objective import token_losses
from pipeline import optimize
from pipeline.artifacts import read_record, read_tensors
from pipeline.block_state import WEIGHTS_FILE, BlockResult
from pipeline.capture import CHUNK_FILE
from pipeline.config import RunConfig
from pipeline.costs import Costs, Device, Shape, placeholder_inputs
from pipeline.errors import UserError
from pipeline.estimate import estimate
from pipeline.graph import Node, build_graph
from pipeline.optimize import STATE_FILE
from pipeline.prepare import prepare
from pipeline.report import artifacts_of, block_reports
from pipeline.run import Finished
from pipeline.store import Store
from pipeline.worker import Worker

SCHEDULES: dict[str, dict[str, Any]] = {
    "sequential": {"kind": "sequential"},
    "parallel": {"kind": "parallel"},
    "wave": {"kind": "wave", "lead": 1},
}
ADAMW = {
    "method": {"increment": "diagonal", "look_ahead": 2, "quantized_stream_loss": 0.5},
    "optimizer": {"epochs": 3, "warm_epochs": 1},
}
SIGNED = {
    "method": {"clipping": "direct", "rounding": "learned", "increment": "diagonal", "look_ahead": 1},
    "optimizer": {"steps": "signed", "epochs": 3, "warm_epochs": 2},
}
WAYS = {"adamw": ADAMW, "signed": SIGNED}
Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def config(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunConfig]:
    folder = tmp_path_factory.mktemp("losses")
    model = tiny_model(folder / "model", blocks=4)
    names = itertools.count()
    nothing = {"evaluation": {"texts": {}}}
    return lambda **sections: tiny_config(model, short_text, folder / f"run-{next(names)}", **nothing | sections)


@pytest.fixture(scope="module")
def plain(config: Callable[..., RunConfig]) -> Finished:
    return run(config(schedule={"kind": "sequential"}))[0]


@pytest.mark.parametrize(("way", "schedule"), [("signed", "parallel"), ("adamw", "wave")])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes_and_leaves_no_activations(
    config: Make, way: str, schedule: str
) -> None:
    undisturbed, _ = run(config(schedule=SCHEDULES[schedule], **WAYS[way]))
    stopped = config(schedule=SCHEDULES[schedule], cluster={"commit_every_seconds": 0}, **WAYS[way])
    finished, _, done = run_in_pieces(stopped, 25)
    assert len(done) == len(set(done)), "a committed unit was run again"
    assert checkpoint_hashes(finished.prepared.checkpoint) == checkpoint_hashes(undisturbed.prepared.checkpoint)
    for kind in ("hidden", "stream", "state", "partial"):
        assert finished.prepared.store.list(kind) == {}, kind


def weights(finished: Finished) -> list[dict[str, torch.Tensor]]:
    return [read_tensors(finished.prepared.store, a, WEIGHTS_FILE) for a in artifacts_of(finished, "quantized")]


@pytest.mark.parametrize(
    "method", [{"look_ahead": 1}, {"look_ahead": 2}, {"quantized_stream_loss": 1.0}], ids=["one", "two", "stream"]
)
def test_a_loss_that_is_asked_for_is_taken(config: Make, plain: Finished, method: dict[str, Any]) -> None:
    finished, _ = run(config(schedule={"kind": "sequential"}, method={"increment": "dense"} | method))

    pairs = zip(weights(plain)[1].values(), weights(finished)[1].values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    for block in block_reports(finished):
        assert block["loss"] < block["initial_loss"]


@pytest.mark.parametrize("compared", [4, 16])
def test_the_losses_reported_are_those_of_the_objective_and_the_stream_is_the_blocks_own(
    config: Make, monkeypatch: pytest.MonkeyPatch, compared: int
) -> None:
    """Block 0 of a run that keeps its activations, run again from its artifacts. Losses are of the first chunk's 4 samples, or of all 6."""
    monkeypatch.setattr(optimize, "COMPARED_SAMPLES", compared)
    method = {"increment": "dense", "look_ahead": 1, "quantized_stream_loss": 0.5, "loss": "mse", "first_token": 0}
    finished, _ = run(config(schedule={"kind": "sequential"}, method=method, storage={"keep_activations": True}))
    worker = Worker(finished.prepared.context, "w", stay)
    node = next(n for n in finished.graph.nodes if n.name == "optimize/000/001")
    plain, following = worker.block(0), worker.new_block(1)
    quantized = copy.deepcopy(plain)
    BlockResult.unpack(weights(finished)[0]).load(quantized)
    losses = []
    task: Any = node.task
    with torch.no_grad():
        for place, piece in enumerate(task.trains):
            inputs = read_tensors(worker.store, piece.inputs.artifact, CHUNK_FILE)["hidden"]
            output = run_block(quantized, inputs, worker.arguments(0, 16))
            ahead = run_block(following, output, worker.arguments(1, 16))
            own = run_block(plain, inputs, worker.arguments(0, 16))
            further = read_tensors(worker.store, piece.targets.artifact, CHUNK_FILE)["hidden"]
            if 4 * place < compared:
                losses.append(token_losses(ahead, further, "mse") + 0.5 * token_losses(output, own, "mse"))
            stream = read_tensors(worker.store, task.stream, f"chunk-{place:05d}.safetensors")["hidden"]
            assert torch.equal(stream, output)
    record = read_record(worker.store, artifacts_of(finished, "quantized")[0])
    assert record is not None
    assert record.meta["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_a_stream_that_is_not_finite_is_no_better_state(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not among the samples that states are compared by."""
    monkeypatch.setattr(optimize, "COMPARED_SAMPLES", 4)
    plain = Worker.outputs

    def outputs(worker: Worker, block: torch.nn.Module, hidden: torch.Tensor, arguments: Any) -> torch.Tensor:
        """Of the quantized block, not of the one that capture runs, on the second chunk, which has 2 samples."""
        found = plain(worker, block, hidden, arguments)
        captured = worker._block is not None and block is worker._block[1]
        return found if captured or len(hidden) == 4 else found * math.nan

    monkeypatch.setattr(Worker, "outputs", outputs)
    finished, _ = run(config(schedule={"kind": "sequential"}, method={"increment": "dense"}))
    record = read_record(finished.prepared.store, artifacts_of(finished, "quantized")[0])
    assert record is not None
    assert [epoch["loss"] is None for epoch in record.meta["history"]] == [False, True]
    assert record.meta["kept"] == "epoch 0"


def leave_at(question: int) -> ShouldYield:
    """Told to leave from the n-th time on that the unit asks."""
    asked = itertools.count()
    return lambda: next(asked) >= question


def made_by(store: Store, node: Node) -> dict[str, torch.Tensor]:
    records = {a: read_record(store, a) for a in node.makes}
    files = [(a, file) for a, record in records.items() if record for file in record.files]
    return {f"{a.kind}/{file}/{n}": t for a, file in files for n, t in read_tensors(store, a, file).items()}


@pytest.fixture(scope="module")
def kept(config: Callable[..., RunConfig]) -> Finished:
    """A run that keeps its activations."""
    return run(config(schedule={"kind": "parallel"}, storage={"keep_activations": True}, **ADAMW))[0]


@pytest.mark.parametrize("unit", ["optimize/001/000", "optimize/001/001", "optimize/002/002"])
def test_a_unit_that_is_cut_goes_on_elsewhere_to_the_same_bytes(kept: Finished, unit: str) -> None:
    """In the warm stage, at the first step after it, and with a look-ahead that the model's end cuts short."""
    store = kept.prepared.store
    node = next(n for n in kept.graph.nodes if n.name == unit)
    expected = made_by(store, node)
    for question in range(0, 40, 3):
        for artifact in node.makes:
            store.delete_all(artifact.path)
        try:
            node.task(Worker(kept.prepared.context, "w", leave_at(question)))
        except YieldUnit:
            node.task(Worker(kept.prepared.context, "w", stay))
        else:
            break
        found = made_by(store, node)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), f"cut at question {question}"
    assert question > 3


def test_in_the_warm_epochs_only_clipping_moves(config: Make) -> None:
    finished, _ = run(config(schedule={"kind": "parallel"}, storage={"keep_activations": True}, **SIGNED))

    def values(epoch: int, part: str) -> list[torch.Tensor]:
        node = next(n for n in finished.graph.nodes if n.name == f"optimize/001/{epoch:03d}")
        state = next(a for a in node.makes if a.kind == "state")
        tensors = read_tensors(finished.prepared.store, state, STATE_FILE)
        return [t for name, t in tensors.items() if f".{part}." in name]

    for epoch in (0, 1):
        assert all((t < 1).any() for t in values(epoch, "clipping"))
        assert not any(t.any() for part in ("rounding", "increment") for t in values(epoch, part))


def test_a_look_ahead_past_the_last_block_is_refused(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path
) -> None:
    given = tiny_config(tiny_model(tmp_path / "m"), short_text, tmp_path / "run", method={"look_ahead": 2})
    for check in (lambda: prepare(given, Silent()), lambda: estimate(given)):
        with pytest.raises(
            UserError, match=r"look_ahead 2 is past the last block of a model of 2: set it to 1 or less"
        ):
            check()
    assert not list((tmp_path / "run").glob("run.json")), "a refused config claims no directory"


def test_costs_count_the_blocks_that_a_loss_passes() -> None:
    """An epoch and a measuring pass, in forward passes of one block: 3 + 2 a block ahead + 1, and 1 + 1 a block ahead + 1."""

    def compute(**method: Any) -> dict[str, tuple[float, float]]:
        given = tiny_config("m", "t", "r", schedule={"kind": "sequential"}, method={"increment": "none"} | method)
        inputs = placeholder_inputs(given, 4, [("model.safetensors", (), tuple(range(4)))])
        costs = Costs(inputs, Shape(4, 64, ((64, 64),), 64, 1000), Device(1.0), 0.0)
        found = {node.name: costs.of(node) for node in build_graph(inputs).nodes}
        unit = 6 * 16 * 2.0 * (64 * 64 + 16 * 64)
        return {name: (cost.compute / unit, cost.weights / (64 * 64 * 4 / 2)) for name, cost in found.items()}

    plain = compute()
    assert [plain[f"optimize/{block:03d}/000"] for block in (1, 3)] == [(5.0, 1.0), (5.0, 1.0)]
    further = compute(look_ahead=2)
    assert [further[f"optimize/{block:03d}/000"] for block in (1, 2, 3)] == [(13.0, 3.0), (9.0, 2.0), (5.0, 1.0)]
    assert compute(quantized_stream_loss=1.0)["optimize/001/000"] == (8.0, 1.0)


def test_costs_count_what_states_are_compared_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 of 6 samples, in chunks of 4: in the first epoch two states on these, in the second one on all as its stream is written."""
    monkeypatch.setattr("pipeline.costs.COMPARED_SAMPLES", 4)
    given = tiny_config("m", "t", "r", schedule={"kind": "sequential"}, method={"increment": "none", "look_ahead": 1})
    inputs = placeholder_inputs(given, 4, [("model.safetensors", (), tuple(range(4)))])
    costs = Costs(inputs, Shape(4, 64, ((64, 64),), 64, 1000), Device(1.0), 0.0)
    found = {node.name: costs.of(node) for node in build_graph(inputs).nodes}
    first, last = (found[f"optimize/001/00{epoch}"] for epoch in range(2))
    unit = 6 * 16 * 2.0 * (64 * 64 + 16 * 64)
    assert first.compute / unit == pytest.approx(5 + 2 * 2 * 4 / 6)
    assert last.compute / unit == pytest.approx(5 + 2 * 4 / 6 + 2 / 6)
    sample = 16 * 64 * 4 / 2
    stream, *targets = first.reads
    assert [size / sample for size in stream.passes] == [6, 4, 4]
    assert [[size / sample for size in read.passes] for read in targets] == [[4, 4, 4], [2, 0, 0]]
    stream, *targets = last.reads
    assert [size / sample for size in stream.passes] == [6, 6]
    assert [[size / sample for size in read.passes] for read in targets] == [[4, 4], [2, 0]]
