"""Units and their exact dependencies, schedule by schedule."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline.artifacts import Artifact
from pipeline.config import RunConfig
from pipeline.config_file import parse_config
from pipeline.data_free import StreamTask
from pipeline.graph import Graph, Inputs, build_graph
from pipeline.optimize import TrainTask

TOKENS = Artifact("tokens", "calibration", "t" * 64)


def config(**sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "model": {"source": "m"},
        "data": {"source": "d.txt", "samples": 6, "sequence_length": 8},
        "storage": {"run": "r", "chunk_samples": 4},
        "optimizer": {"epochs": 3},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree)


def graph(blocks: int = 3, **sections: Any) -> Graph:
    return build_graph(inputs(blocks, **sections))


def inputs(blocks: int = 3, **sections: Any) -> Inputs:
    return Inputs(
        config=config(**sections),
        blocks=blocks,
        tokens=TOKENS,
        texts={"news": Artifact("tokens", "text-news", "n" * 64)},
        block_digests=[f"b{i}" for i in range(blocks)],
        outer_digest="outer",
        model_config_digest="config",
        compute={"threads": 1},
        shards=[("model.safetensors", ("a", "b"), tuple(range(blocks)))],
    )


def dependencies(built: Graph) -> dict[str, set[str]]:
    return {unit.name: set(unit.depends_on) for unit in built.units(built.nodes)}


def test_capture_is_a_wave_over_chunks() -> None:
    found = dependencies(graph())
    assert found["embed/00001"] == set()
    assert found["capture/000/00001"] == {"embed/00001"}
    assert found["capture/002/00000"] == {"capture/001/00000"}


def test_a_block_starts_when_its_own_inputs_and_targets_are_there() -> None:
    found = dependencies(graph(schedule={"kind": "parallel"}))
    assert found["optimize/001/000"] == {f"capture/{b:03d}/{c:05d}" for b in (0, 1) for c in (0, 1)}


def test_parallel_waits_for_the_block_before_one_epoch_ago() -> None:
    found = dependencies(graph(schedule={"kind": "parallel"}))
    targets = {"capture/001/00000", "capture/001/00001"}
    assert found["optimize/001/002"] == targets | {"optimize/001/001", "optimize/000/001"}


def test_sequential_waits_for_the_finished_block_before() -> None:
    found = dependencies(graph(schedule={"kind": "sequential"}))
    assert "optimize/000/002" in found["optimize/001/000"]


def test_wave_waits_for_the_same_epoch_of_the_block_before() -> None:
    found = dependencies(graph(schedule={"kind": "wave"}))
    assert {"optimize/000/001", "optimize/001/000"} <= found["optimize/001/001"]


def test_wave_with_a_lead_waits_for_a_later_epoch_of_the_block_before() -> None:
    found = dependencies(graph(schedule={"kind": "wave", "lead": 1}))
    assert "optimize/000/001" in found["optimize/001/000"]
    assert "optimize/000/002" in found["optimize/001/001"]
    assert "optimize/000/002" in found["optimize/001/002"]


def test_never_refreshed_blocks_do_not_wait_for_each_other() -> None:
    found = dependencies(graph(schedule={"kind": "parallel", "refresh_every": 0}))
    assert not any(name.startswith("optimize/000") for name in found["optimize/001/002"])


def test_only_streams_that_somebody_reads_are_written() -> None:
    for kind, every, epochs in [
        ("sequential", 1, {2}),
        ("parallel", 1, {0, 1}),
        ("parallel", 2, {1}),
        ("wave", 1, {0, 1, 2}),
    ]:
        built = graph(schedule={"kind": kind, "refresh_every": every})
        tasks = [node.task for node in built.nodes if isinstance(node.task, TrainTask)]
        assert {t.epoch for t in tasks if t.block == 0 and t.stream} == epochs, kind
        assert not any(t.stream for t in tasks if t.block == 2), "nobody reads the last block's outputs"


def test_every_artifact_has_one_producer_and_its_own_path() -> None:
    built = graph()
    paths = [artifact.path for node in built.nodes for artifact in node.makes]
    assert len(paths) == len(set(paths))
    produced = set(paths)
    assert all(artifact.path in produced for node in built.nodes for artifact in node.reads)


def test_needed_walks_back_from_the_goals_and_stops_at_commits() -> None:
    built = graph()
    everything = {node.name for node in built.nodes}
    assert {n.name for n in built.needed(lambda artifact: False)} == everything
    assert built.needed(lambda artifact: True) == []
    results = {a.path for n in built.nodes for a in n.makes if a.kind == "quantized"}
    left = {n.name for n in built.needed(lambda artifact: artifact.path in results)}
    assert left == {
        "merge/model.safetensors",
        "evaluate/full_precision/news",
        "evaluate/round_to_nearest/news",
        "evaluate/quantized/news",
    }


def test_needed_redoes_deleted_activations_only_where_they_are_read() -> None:
    """Block 0 is done and its activations are gone; block 1 lost its result."""
    built = graph(schedule={"kind": "parallel", "refresh_every": 0})
    done = {a.path for n in built.nodes for a in n.makes if a.kind in ("quantized", "evaluation")}
    left = built.needed(lambda a: a.path in done and not a.path.startswith("quantized/block-001"))
    names = {n.name for n in left}
    assert "optimize/001/000" in names
    assert "optimize/000/000" not in names
    assert "capture/001/00000" in names
    assert "capture/002/00000" not in names


KEYS = {
    "scheme": {"bits": 2},
    "method": {"increment": "dense"},
    "optimizer": {"epochs": 3, "seed": 1},
    "storage": {"chunk_samples": 3},
}


@pytest.mark.parametrize("section", sorted(KEYS))
def test_what_changes_the_result_changes_the_results_address(section: str) -> None:
    assert results(inputs()).isdisjoint(results(inputs(**{section: KEYS[section]})))


def test_where_it_runs_does_not_change_the_addresses() -> None:
    assert results(inputs()) == results(inputs(cluster={"workers": 7}, storage={"run": "elsewhere", "cache_mib": 1}))


def test_another_scheme_keeps_the_captured_activations() -> None:
    def hidden(given: Inputs) -> set[str]:
        return {a.path for n in build_graph(given).nodes for a in n.makes if a.kind == "hidden"}

    assert hidden(inputs()) == hidden(inputs(scheme={"bits": 2}))


def test_a_blocks_weights_change_it_and_what_follows_but_not_what_comes_before() -> None:
    changed = inputs(schedule={"kind": "sequential"})
    changed.block_digests[1] = "other"
    before = sorted(results(inputs(schedule={"kind": "sequential"})))
    after = sorted(results(changed))
    assert before[0] == after[0]
    assert before[1] != after[1]
    assert before[2] != after[2]


@pytest.mark.parametrize(
    ("blocks", "ahead", "boundaries"), [(4, 1, [2, 3, 4, 4]), (4, 2, [3, 4, 4, 4]), (3, 2, [3, 3, 3])]
)
def test_a_look_ahead_is_cut_to_the_blocks_that_there_are(blocks: int, ahead: int, boundaries: list[int]) -> None:
    built = graph(blocks, method={"look_ahead": ahead})
    tasks = [node.task for node in built.nodes if isinstance(node.task, TrainTask) and node.task.epoch == 0]
    assert [task.ahead for task in tasks] == [min(ahead, blocks - 1 - block) for block in range(blocks)]
    for task, boundary in zip(tasks, boundaries, strict=True):
        names = [piece.targets.artifact.name for piece in task.trains]
        assert names == [f"boundary-{boundary:03d}-chunk-{chunk:05d}" for chunk in range(2)]


def test_a_look_ahead_waits_for_the_boundary_further_on_and_reads_no_other() -> None:
    built = graph(4, method={"look_ahead": 2}, schedule={"kind": "sequential"})
    targets = {f"capture/002/{chunk:05d}" for chunk in range(2)}
    assert dependencies(built)["optimize/000/000"] == targets | {"embed/00000", "embed/00001"}
    readers = built.readers()
    found = {
        artifact.name: {name for name in readers[artifact.path] if name.startswith("optimize")}
        for node in built.nodes
        for artifact in node.makes
        if artifact.kind == "hidden" and artifact.name.endswith("chunk-00001")
    }
    epochs = [f"{epoch:03d}" for epoch in range(3)]
    assert found == {
        "boundary-000-chunk-00001": {f"optimize/000/{epoch}" for epoch in epochs},
        "boundary-001-chunk-00001": set(),
        "boundary-002-chunk-00001": set(),
        "boundary-003-chunk-00001": {f"optimize/000/{epoch}" for epoch in epochs},
        "boundary-004-chunk-00001": {
            f"optimize/{block}/{epoch}" for block in ("001", "002", "003") for epoch in epochs
        },
    }


def test_the_weights_of_the_blocks_that_a_loss_passes_change_the_result() -> None:
    def second_changed(ahead: int) -> tuple[list[str], list[str]]:
        given, changed = (inputs(4, method={"look_ahead": ahead}, schedule={"kind": "sequential"}) for _ in range(2))
        changed.block_digests[2] = "other"
        return sorted(results(given)), sorted(results(changed))

    for ahead, same in [(0, 2), (1, 1), (2, 0)]:
        before, after = second_changed(ahead)
        assert [a == b for a, b in zip(before, after, strict=True)] == [True] * same + [False] * (4 - same)


@pytest.mark.parametrize(
    "sections",
    [
        {"method": {"look_ahead": 1}},
        {"method": {"quantized_stream_loss": 0.5}},
        {"optimizer": {"epochs": 3, "warm_epochs": 1}},
    ],
)
def test_losses_and_stages_change_the_results_address_but_no_activations(sections: dict[str, Any]) -> None:
    def hidden(given: Inputs) -> set[str]:
        return {a.path for n in build_graph(given).nodes for a in n.makes if a.kind == "hidden"}

    assert results(inputs()).isdisjoint(results(inputs(**sections)))
    assert hidden(inputs()) == hidden(inputs(**sections))


def results(given: Inputs) -> set[str]:
    return {a.path for n in build_graph(given).nodes for a in n.makes if a.kind == "quantized"}


@pytest.mark.parametrize("kind", ["sequential", "parallel", "wave"])
def test_a_quarantined_block_changes_it_and_what_follows_but_not_what_comes_before(kind: str) -> None:
    def by_block(given: Inputs) -> list[str]:
        return sorted(results(given))

    plain = inputs(schedule={"kind": kind})
    one = replace(plain, quarantined={1: "a reason"})
    before, after = by_block(plain), by_block(one)
    assert before[0] == after[0]
    assert before[1] != after[1]
    assert before[2] != after[2]
    assert by_block(replace(plain, quarantined={1: "another"})) == after, "what is said of it decides no bytes"


@pytest.mark.parametrize(("block", "streams"), [(0, 1), (1, 2), (2, 0)])
def test_a_quarantined_block_has_one_stream_for_each_of_its_inputs(block: int, streams: int) -> None:
    built = build_graph(replace(inputs(schedule={"kind": "parallel"}), quarantined={block: "a reason"}))
    assert sum(isinstance(node.task, StreamTask) for node in built.nodes) == streams
    assert not [n for n in built.nodes if isinstance(n.task, TrainTask) and n.block == block]


def test_the_quantized_model_is_evaluated_in_parts_of_which_one_waits_for_the_last_block() -> None:
    built = graph(25)
    waits = {n: d for n, d in dependencies(built).items() if n.startswith("evaluate/")}

    def last(blocks: range) -> set[str]:
        return {f"optimize/{block:03d}/002" for block in blocks}

    assert waits == {
        "evaluate/full_precision/news": set(),
        "evaluate/round_to_nearest/news": set(),
        "evaluate/quantized/news/010": last(range(10)),
        "evaluate/quantized/news/020": last(range(10, 20)) | {"evaluate/quantized/news/010"},
        "evaluate/quantized/news": last(range(20, 25)) | {"evaluate/quantized/news/020"},
    }
    assert [n.split("/")[-1] for n in dependencies(graph(10)) if n.startswith("evaluate/quantized")] == ["news"]


def test_without_training_only_what_the_last_stage_takes_is_captured() -> None:
    nothing = {"clipping": "none", "increment": "none"}
    tree = {"method": nothing, "optimizer": {"epochs": 0}, "end_to_end": {"epochs": 1, "samples": 3}}
    captured = [node.name for node in graph(**tree).nodes if node.stage == "capture"]
    assert captured == ["embed/00000", *(f"capture/{block:03d}/00000" for block in range(3))]
