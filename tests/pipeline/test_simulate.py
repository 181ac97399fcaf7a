"""The simulated run against times and sizes reckoned by hand, and the costs against the files that a real run writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import Silent, run, tiny_config

from pipeline.artifacts import RECORD, Artifact, committed
from pipeline.config import RunConfig
from pipeline.costs import Cost, Costs, Device, Read, Shape, placeholder_inputs
from pipeline.estimate import estimate, estimate_lines, open_skeleton, shape_of
from pipeline.graph import KINDS, TRANSIENT, Graph, Node, build_graph
from pipeline.run import inline_workers
from pipeline.simulate import USES, Network, Simulated, simulate
from pipeline.store import open_store

PLAIN = Network(link=10.0, store=10.0, handling=0.0, cache=0.0)


def nothing(worker: object) -> dict[str, Any]:
    return {}


def node(name: str, *reads: str, affinity: str | None = None) -> Node:
    """A unit that makes one activation of its own name."""
    files = tuple(Artifact("hidden", read, "0" * 16) for read in reads)
    return Node(name, "capture", 0, nothing, files, (Artifact("hidden", name, "0" * 16),), (), affinity)


def path(name: str) -> str:
    return Artifact("hidden", name, "0" * 16).path


def play(nodes: list[Node], costs: dict[str, Cost], workers: int, network: Network = PLAIN) -> Simulated:
    return simulate(Graph(nodes, [n.makes[0] for n in nodes]), costs, workers, network, with_timeline=True)


def test_a_chain_takes_its_sum_and_a_second_worker_idles() -> None:
    found = play([node("a"), node("b", "a")], {"a": Cost(compute=2.0), "b": Cost(compute=3.0)}, workers=2)
    assert found.makespan == 5.0
    assert found.efficiency == 0.5
    assert found.shares["dependencies"] == 0.5


def test_reading_hides_behind_computing_but_for_the_first_chunk() -> None:
    cost = {"a": Cost(compute=10.0, reads=(Read("x", 40.0),), chunks=4)}
    assert play([node("a")], cost, 1).makespan == 11.0
    assert play([node("a")], cost, 1, Network(10.0, 10.0, 0.0, 0.0, reads_ahead=False)).makespan == 14.0


def test_writing_comes_after_computing() -> None:
    cost = {"a": Cost(compute=1.0, writes=((path("a"), 20.0),))}
    assert play([node("a")], cost, 1).makespan == 3.0
    assert play([node("a")], cost, 1, Network(10.0, 10.0, 0.0, 0.0, writes_behind=True)).makespan == 2.0


def test_a_stream_is_written_beside_the_last_pass_but_for_its_last_chunk() -> None:
    """40 bytes in 4 chunks: 30 beside the last 4 seconds, 10 and the state's 5 after them."""
    stream = {"writes": ((path("a"), 40.0), ("state", 5.0)), "chunks": 4}
    assert play([node("a")], {"a": Cost(compute=10.0, behind=40.0, last_pass=4.0, **stream)}, 1).makespan == 11.5
    assert play([node("a")], {"a": Cost(compute=10.0, behind=40.0, last_pass=2.0, **stream)}, 1).makespan == 12.5
    assert play([node("a")], {"a": Cost(compute=10.0, **stream)}, 1).makespan == 14.5


def test_transfers_share_the_store_and_a_shorter_one_leaves_its_part() -> None:
    """10 and 30 bytes at 10 a second together: both get 5 until the short one ends at 2, the rest takes 2 more."""
    costs = {"a": Cost(reads=(Read("x", 10.0),)), "b": Cost(reads=(Read("y", 30.0),))}
    found = play([node("a"), node("b")], costs, 2)
    assert [(span.unit, span.end) for span in found.timeline] == [("a", 2.0), ("b", 4.0)]
    assert found.shares["store"] == pytest.approx(2 / 8)
    assert found.shares["link"] == pytest.approx(4 / 8)


def test_a_link_is_the_limit_where_the_store_is_not() -> None:
    costs = {name: Cost(reads=(Read(name, 10.0),)) for name in ("a", "b")}
    found = play([node("a"), node("b")], costs, 2, Network(link=10.0, store=1000.0, handling=0.0, cache=0.0))
    assert found.makespan == 1.0
    assert found.bottleneck == "link"


def test_weights_are_read_once_by_the_worker_that_holds_their_block() -> None:
    costs = {name: Cost(block=1, weights=10.0) for name in ("a", "b")} | {"c": Cost(block=2, weights=10.0)}
    assert play([node("a"), node("b", "a"), node("c", "b")], costs, 1).read == 20.0


def test_the_cache_keeps_the_first_bytes_from_one_pass_to_the_next() -> None:
    cost = {"a": Cost(reads=(Read("x", 40.0, again=(40.0, 40.0)),), chunks=4)}
    network = Network(link=10.0, store=10.0, handling=0.0, cache=10.0)
    assert play([node("a")], cost, 1, network).read == 40.0 + 30.0 + 30.0


def test_activations_count_from_their_commit_to_their_last_readers() -> None:
    costs = {name: Cost(writes=((path(name), size),)) for name, size in (("a", 5.0), ("b", 7.0), ("c", 1.0))}
    found = play([node("a"), node("b", "a"), node("c", "b")], costs, 1)
    assert found.high_water == 12.0


def config(**sections: Any) -> RunConfig:
    return tiny_config("model", "text", "run", **sections)


def simulated(given: RunConfig, workers: int, blocks: int = 6) -> Simulated:
    shape = Shape(blocks, 64, ((64, 64), (128, 64)), 64, 1000)
    inputs = placeholder_inputs(given, blocks, [("model.safetensors", (), tuple(range(blocks)))])
    graph, costs = build_graph(inputs), Costs(inputs, shape, Device(1e9), 1e6)
    return simulate(graph, {n.name: costs.of(n) for n in graph.nodes}, workers, Network(), with_timeline=True)


@pytest.mark.parametrize("kind", ["sequential", "parallel", "wave"])
def test_every_schedule_plays_to_its_end_the_same_way_each_time(kind: str) -> None:
    given = config(schedule={"kind": kind}, optimizer={"epochs": 3})
    first = simulated(given, 3)
    assert first == simulated(given, 3)
    assert len(first.timeline) == first.units
    assert sum(first.shares.values()) == pytest.approx(1.0)
    assert set(first.shares) == set(USES)
    assert first.efficiency == pytest.approx(first.shares["compute"])


def test_parallel_gains_by_workers_where_sequential_does_not() -> None:
    heavy = {"data": {"samples": 6, "sequence_length": 512}, "optimizer": {"epochs": 8}}
    spans = {
        (kind, workers): simulated(config(schedule={"kind": kind}, **heavy), workers).makespan
        for kind in ("parallel", "sequential")
        for workers in (1, 3)
    }
    assert spans["parallel", 3] < 0.6 * spans["parallel", 1]
    assert spans["sequential", 3] > 0.6 * spans["sequential", 1]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("simulate") / "model", blocks=3)


class Watching(Silent):
    """The most that the run's storage held when a unit had been committed, by its records' own sizes."""

    def __init__(self, given: RunConfig) -> None:
        super().__init__()
        self.given, self.most = given, 0

    def finished(self, node: Any, result: dict[str, Any]) -> None:
        store = open_store(self.given.storage.run)
        sizes = {key: size for kind in (*KINDS, "checkpoint") for key, size in store.list(kind).items()}
        self.most = max(self.most, sum(size for key, size in sizes.items() if not key.endswith(RECORD)))


@pytest.mark.parametrize(("ahead", "parts"), [(0, 1), (2, 1), (0, 3)])
def test_the_high_water_mark_is_that_of_a_real_run(
    model: Path, short_text: Path, tmp_path: Path, ahead: int, parts: int
) -> None:
    """Up to what safetensors headers take: the tiny files are hardly larger than their headers."""
    sizes = {
        "data": {"samples": 24, "sequence_length": 64},
        "schedule": {"kind": "wave", "lead": 1, "parts": parts},
    }
    given = tiny_config(model, short_text, tmp_path / "run", method={"look_ahead": ahead}, **sizes)
    watch = Watching(given)
    finished, _ = run(given, watch, inline_workers)
    assert set(committed(finished.prepared.store, TRANSIENT)) == set()
    assert estimate(given)["bytes"]["high_water"] == pytest.approx(watch.most, rel=0.15)


def test_the_costs_of_a_model_follow_its_shapes(model: Path, short_text: Path, tmp_path: Path) -> None:
    given = tiny_config(model, short_text, tmp_path / "run")
    skeleton, dtype = open_skeleton(given)
    shape = shape_of(skeleton, given, dtype)
    assert shape.blocks == 3
    assert shape.weights == 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    assert shape.itemsize == 4


def test_the_plan_states_the_storage_for_a_number_of_workers(model: Path, short_text: Path, tmp_path: Path) -> None:
    given = tiny_config(model, short_text, tmp_path / "run")
    found = estimate(given, workers=3)
    assert "at most at one time, on 3 workers" in "\n".join(estimate_lines(found))
    keeps = estimate(tiny_config(model, short_text, tmp_path / "run", storage={"keep_activations": True}), workers=3)
    assert keeps["bytes"]["high_water"] > found["bytes"]["high_water"]


def test_the_plan_says_what_cache_spares_storage(model: Path, short_text: Path, tmp_path: Path) -> None:
    sizes = {"samples": 100, "sequence_length": 64}  # 1.6 MiB a boundary
    given = tiny_config(model, short_text, tmp_path / "run", data=sizes, storage={"cache_mib": 3})
    assert "storage.cache_mib 3 holds a part of" in estimate_lines(estimate(given))[-1]
    assert "again; 4 MiB of each worker's memory hold all" in estimate_lines(estimate(given))[-1]
    enough = tiny_config(model, short_text, tmp_path / "run", data=sizes, storage={"cache_mib": 4})
    assert not any("cache_mib" in line for line in estimate_lines(estimate(enough)))
