"""Where workers go, without Ray."""

from dataclasses import replace

import pytest

from cluster.pools import Machine, Pool, Seated, check_pools, check_room, places
from cluster.starts import Shortage, Starts
from cluster.units import ClusterError, ClusterLostError
from cluster.versions import differing, here

TRAIN, CPU = Pool("train", cpus=1, gpus=0.5), Pool("cpu", cpus=2, most=2)


def machine(node: str, cpus: float, gpus: float = 0) -> Machine:
    there = {"CPU": cpus, "GPU": gpus}
    return Machine(node, there, there)


def test_every_machine_is_filled_evenly_and_pools_keep_to_their_limits() -> None:
    machines = [machine("a", 8, 1), machine("b", 4, 1), machine("c", 1)]
    assert places([TRAIN, CPU], machines, []) == [
        (TRAIN, ("a",)),
        (TRAIN, ("b",)),
        (TRAIN, ("a",)),
        (TRAIN, ("b",)),
        (CPU, ("a",)),
        (CPU, ("a",)),
    ]


def test_what_is_there_and_what_is_on_its_way_takes_its_room() -> None:
    whole = {"CPU": 4.0, "GPU": 1.0}
    used = Machine("a", whole, {"CPU": 3.0, "GPU": 0.5})
    assert places([TRAIN], [used], [Seated(TRAIN, "a", pending=False)]) == [(TRAIN, ("a",))]
    assert places([TRAIN], [used], [Seated(TRAIN, "a", pending=False), Seated(TRAIN, "a", pending=True)]) == []
    late = Machine("a", whole, whole)  # Ray has not counted the worker that is there
    assert places([TRAIN], [late], [Seated(TRAIN, "a", pending=False)] * 2) == []
    others = Machine("a", whole, {"CPU": 4.0, "GPU": 0.25})
    assert places([TRAIN], [others], []) == []


def test_parts_of_a_gpu_make_a_whole_and_barred_machines_get_none() -> None:
    third = Pool("train", cpus=0, gpus=1 / 3)
    assert len(places([third], [machine("a", 1, 1), machine("b", 1, 1)], [], barred={"b"})) == 3


def test_a_group_takes_as_few_machines_as_can_be_or_none() -> None:
    trio = Pool("train", cpus=1, members=3)
    machines = [machine("a", 4), machine("b", 2), machine("c", 1)]
    found = places([trio, Pool("cpu", cpus=1)], machines, [])
    assert found == [
        (trio, ("a", "a", "a")),
        (trio, ("b", "b", "a")),
        (Pool("cpu", cpus=1), ("c",)),
    ]
    seated = [Seated(trio, node, pending=True) for node in "aaa"]
    assert places([replace(trio, most=1)], machines, [Seated(replace(trio, most=1), "a", pending=True)] * 3) == []
    assert places([trio], machines, seated) == [(trio, ("b", "b", "a"))]
    assert places([trio], [machine("a", 2)], []) == []
    with pytest.raises(ClusterError, match=r"3 processes of 1 CPUs and 0 GPUs each .* the cluster has no room for one"):
        check_room(trio, [machine("a", 2)])


def test_a_thousand_machines_are_no_work() -> None:
    machines = [machine(f"n{i:04}", 8, 8) for i in range(1000)]
    assert len(places([Pool("train", cpus=1, gpus=1)], machines, [])) == 8000


def test_refusals_name_what_there_is() -> None:
    with pytest.raises(
        ClusterError, match=r"^Cpu workers of 2 CPUs .* \(1 machines, 1 CPUs, 0 GPUs\): ask for smaller"
    ):
        check_room(Pool("Cpu", cpus=2), [machine("a", 1)])
    roomy = Machine("a", total={"CPU": 8, "memory": 16 << 30})
    with pytest.raises(
        ClusterError, match=r"0 GPUs and 64 GiB each .* 0 GPUs, at most 16\.0 GiB of memory for workers"
    ):
        check_room(Pool("train", memory=64 << 30), [roomy])
    with pytest.raises(ClusterError, match="start Ray with --num-gpus"):
        check_room(TRAIN, [machine("a", 8)])
    for impossible in (Pool(cpus=0), Pool(most=0), Pool(cpus=-1), Pool(most=-1)):
        with pytest.raises(ClusterError, match="at least one worker is needed"):
            check_pools([impossible])


def test_a_node_on_which_workers_fail_is_barred_and_the_last_hope_ends_the_run() -> None:
    said: list[str] = []
    starts = Starts(said.append)
    starts.failed("a", "OSError: disk", fatal=False)
    starts.succeeded("a")
    for _ in range(3):
        assert starts.barred() == set()
        starts.failed("a", "OSError: disk", fatal=False)
    assert starts.barred() == {"a"}
    starts.check_hope(["a", "b"])
    starts.failed("b", "other versions", fatal=True)
    assert [text.split(".")[0] for text in said] == ["node a gets no more workers", "node b gets no more workers"]
    with pytest.raises(ClusterLostError, match="A worker cannot start: other versions"):
        starts.check_hope(["a", "b"])


def test_where_no_worker_ever_started_nothing_is_lost() -> None:
    starts = Starts(lambda text: None)
    starts.failed("a", "other versions", fatal=True)
    with pytest.raises(ClusterError) as raised:
        starts.check_hope(["a"])
    assert not isinstance(raised.value, ClusterLostError)


def test_a_shortage_is_said_once() -> None:
    said: list[str] = []
    shortage = Shortage(said.append)
    for _ in range(3):
        shortage.note(CPU, 1)
    shortage.note(CPU, 2)
    shortage.note(CPU, 1)  # lost a moment ago: its replacement is on the way
    assert said == [
        "the cluster has room for 1 of 2 cpu workers of 2 CPUs and 0 GPUs each; more are added when it has more"
    ]


def test_versions() -> None:
    assert differing({"torch": "2.1", "ray": "2.60.0"}, {"torch": "2.2"}) == [
        "torch 2.1 here, 2.2 there",
        "ray 2.60.0 here, missing there",
    ]
    assert here(["pytest", "no-such-package"]).keys() == {"python", "pytest", "no-such-package"}
    assert here(["no-such-package"])["no-such-package"] == "missing"
