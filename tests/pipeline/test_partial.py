"""Commits inside a training unit: wherever it is cut, and on whichever worker it goes on, the bytes are the same."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Silent, checkpoint_hashes, run, tiny_config

from cluster.group import ShouldYield, stay
from cluster.units import YieldUnit
from pipeline.artifacts import RECORD, discard, read_record, read_tensors
from pipeline.config import RunConfig
from pipeline.graph import Graph, Node
from pipeline.optimize import TrainTask
from pipeline.prepare import prepare
from pipeline.run import Finished
from pipeline.store import Store
from pipeline.worker import Worker, handle_unit

STEPS = 3  # an epoch of 6 samples in chunks of 4, batches of 2


@pytest.fixture(scope="module")
def config(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunConfig]:
    folder = tmp_path_factory.mktemp("partial")
    model = tiny_model(folder / "model", blocks=2)
    names = itertools.count()

    def make(**sections: Any) -> RunConfig:
        more = {
            "storage": {"keep_activations": True},
            "schedule": {"kind": "parallel"},
            "method": {"equivalence": "auto"},
        } | sections
        return tiny_config(model, short_text, folder / f"run-{next(names)}", **more)

    return make


@pytest.fixture(scope="module")
def undisturbed(config: Callable[..., RunConfig]) -> Finished:
    return run(config())[0]


def stopped_before(config: RunConfig, unit: str) -> tuple[Graph, Store, Callable[[ShouldYield], Worker]]:
    """A run of everything but one training unit and what depends on it, and workers for that one."""
    prepared = prepare(config, Silent())
    graphs: list[Graph] = []

    def only_what_comes_before(graph: Graph, driver: object) -> None:
        graphs.append(Graph(list(graph.nodes), list(graph.goals)))
        graph.goals[:] = node_of(graph, unit).reads

    from pipeline.run import inline_workers, run_to_goals

    run_to_goals(prepared, Silent(), inline_workers, restrict=only_what_comes_before)
    return graphs[0], prepared.store, lambda leave: Worker(prepared.context, "w", leave)


def node_of(graph: Graph, name: str) -> Node:
    return next(node for node in graph.nodes if node.name == name)


def tensors_of(store: Store, node: Node) -> dict[str, torch.Tensor]:
    """Every tensor that a unit has made, bit by bit."""
    records = {a: read_record(store, a) for a in node.makes}
    files = [(a, file) for a, record in records.items() if record for file in record.files]
    assert files
    return {f"{a.path}/{file}:{n}": t for a, file in files for n, t in read_tensors(store, a, file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def leave_at(question: int) -> ShouldYield:
    """Told to leave from the n-th time on that the unit asks."""
    asked = itertools.count()
    return lambda: next(asked) >= question


UNITS = ["optimize/000/000", "optimize/001/001"]


@pytest.mark.parametrize("unit", UNITS)
def test_cut_at_any_point_and_gone_on_elsewhere_it_makes_the_same_bytes(
    config: Callable[..., RunConfig], undisturbed: Finished, unit: str
) -> None:
    expected = tensors_of(undisturbed.prepared.store, node_of(undisturbed.graph, unit))
    graph, store, worker = stopped_before(config(), unit)
    node = node_of(graph, unit)
    places = []
    for question in range(40):
        cut = worker(leave_at(question))
        try:
            node.task(cut)
        except YieldUnit:
            assert not any(store.exists(f"{a.path}/{RECORD}") for a in node.makes if a.kind != "stream")
            result = node.task(worker(stay))
            places.append(result["taken_up_at_step"])
            assert same(tensors_of(store, node), expected), f"cut at question {question}"
            assert store.list("partial") == {}
            for artifact in node.makes:
                store.delete_all(artifact.path)
            continue
        break
    assert set(places) == set(range(STEPS + 1)), "no cut between some two steps"


def test_cut_after_every_single_step(config: Callable[..., RunConfig], undisturbed: Finished) -> None:
    """One step on each worker, each going on from the one before."""
    graph, store, worker = stopped_before(config(), UNITS[0])
    node = node_of(graph, UNITS[0])
    for _ in range(20):
        try:
            node.task(worker(leave_at(1)))
            break
        except YieldUnit:
            assert len({key.split("/")[1] for key in store.list("partial")}) <= 1
    else:
        node.task(worker(stay))
    assert same(tensors_of(store, node), tensors_of(undisturbed.prepared.store, node_of(undisturbed.graph, UNITS[0])))


def test_how_often_it_commits_changes_no_byte_of_the_run(
    config: Callable[..., RunConfig], undisturbed: Finished
) -> None:
    finished, _ = run(config(cluster={"commit_every_seconds": 0}))
    assert checkpoint_hashes(finished.prepared.checkpoint) == checkpoint_hashes(undisturbed.prepared.checkpoint)
    assert finished.prepared.store.list("partial") == {}


def cut_after_a_step(config: RunConfig) -> tuple[Node, Store, Callable[[ShouldYield], Worker]]:
    graph, store, worker = stopped_before(config, UNITS[1])
    node = node_of(graph, UNITS[1])
    with pytest.raises(YieldUnit):
        node.task(worker(leave_at(3)))  # asked twice while it measures the untrained block, once before the first step
    assert store.list("partial")
    return node, store, worker


@pytest.mark.parametrize("file", ["partial.safetensors", RECORD])
@pytest.mark.parametrize("damage", ["torn", "flipped", "missing"])
def test_a_damaged_commit_is_passed_over_and_said(
    config: Callable[..., RunConfig], undisturbed: Finished, file: str, damage: str
) -> None:
    node, store, worker = cut_after_a_step(config())
    hurt(store, next(key for key in store.list("partial") if key.endswith(file)), damage)
    other = worker(stay)
    result = handle_unit(node.task, other)
    assert result["taken_up_at_step"] == 0
    if (file, damage) != (RECORD, "missing"):  # without a record it was never there
        assert "damaged, its unit goes on" in result["notes"][0]
    assert same(tensors_of(store, node), tensors_of(undisturbed.prepared.store, node_of(undisturbed.graph, UNITS[1])))
    assert store.list("partial") == {}


def hurt(store: Store, key: str, damage: str) -> None:
    data = bytearray(store.get(key))
    if damage == "missing":
        store.delete(key)
    elif damage == "torn":
        store.put(key, bytes(data[:-5]))
    else:
        data[len(data) // 2] ^= 1
        store.put(key, bytes(data))


def test_an_earlier_commit_serves_where_the_newest_is_damaged(config: Callable[..., RunConfig]) -> None:
    node, store, worker = cut_after_a_step(config())
    (first,) = {key.split("/")[1] for key in store.list("partial")}
    saved = {key: store.get(key) for key in store.list("partial")}
    with pytest.raises(YieldUnit):
        node.task(worker(leave_at(1)))
    (second,) = {key.split("/")[1] for key in store.list("partial")}
    assert second > first
    hurt(store, next(key for key in store.list(f"partial/{second}") if not key.endswith(RECORD)), "torn")
    for key, data in saved.items():
        store.put(key, data)
    result = node.task(worker(stay))
    assert result["taken_up_at_step"] == int(first.split("-")[5])


def test_a_driver_sweeps_the_commits_of_units_that_are_done(config: Callable[..., RunConfig]) -> None:
    made = config()
    node, store, worker = cut_after_a_step(made)
    saved = {key: store.get(key) for key in store.list("partial")}
    node.task(worker(stay))
    for key, data in saved.items():  # as a driver leaves it that dies between the unit's commit and its tidying
        store.put(key, data)
    run(made)
    assert store.list("partial") == {}


def test_a_unit_that_only_measures_leaves_without_a_commit(undisturbed: Finished) -> None:
    worker = Worker(undisturbed.prepared.context, "w", leave_at(0))
    for node in undisturbed.graph.nodes:
        if node.stage in ("evaluate", "merge"):
            discard(worker.store, node.makes[0])  # a shard that is there would not be made again
            with pytest.raises(YieldUnit):
                handle_unit(node.task, worker)


def test_a_unit_that_is_committed_is_not_trained_again(undisturbed: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker may be lost between the commit and the answer."""

    def fail(*arguments: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(TrainTask, "_train", fail)
    worker = Worker(undisturbed.prepared.context, "w", stay)
    result = handle_unit(node_of(undisturbed.graph, "optimize/000/000").task, worker)
    assert result["taken_up_at_step"] == 0
