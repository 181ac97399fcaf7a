import pytest

from cluster.events import (
    Assign,
    End,
    Event,
    GaveUp,
    Instruction,
    StopRequested,
    UnitDone,
    UnitFailed,
    UnitReturned,
    WorkerJoined,
    WorkerLeaving,
    WorkerLost,
)
from cluster.scheduler import Scheduler, State
from cluster.units import Unit


def unit(
    name: str,
    *depends_on: str,
    priority: tuple[int, ...] = (),
    affinity: str | None = None,
    kind: str | None = None,
    memory: int = 0,
) -> Unit:
    return Unit(name, None, depends_on, priority, affinity, kind, memory)


def play(scheduler: Scheduler, *events: Event) -> list[Instruction]:
    """What the last event brings."""
    instructions: list[Instruction] = []
    for event in events:
        instructions = scheduler.handle(event)
        scheduler.validate()
    return instructions


def done(name: str, worker: str) -> UnitDone:
    return UnitDone(name, worker, {})


def failed(name: str, worker: str, kind: str = "retry", message: str = "broke") -> UnitFailed:
    return UnitFailed(name, worker, kind, message)  # type: ignore[arg-type]


def test_dependencies_hold_back_and_release() -> None:
    s = Scheduler([unit("c", "a", "b"), unit("a"), unit("b")], 1)
    assert play(s, WorkerJoined("w")) == [Assign("a", "w")]
    assert play(s, done("a", "w")) == [Assign("b", "w")]
    assert play(s, done("b", "w")) == [Assign("c", "w")]
    assert s.running == {"w": "c"}
    assert s.counts[State.DONE] == 2
    assert play(s, done("c", "w")) == [End("done", "All 3 units are done.")]
    assert play(s, WorkerLost("w", "late"), done("c", "w")) == []


def test_idle_workers_are_served_in_the_order_they_came() -> None:
    s = Scheduler([unit("root"), *(unit(n, "root") for n in "abc")], 1)
    assert play(s, WorkerJoined("w0"), WorkerJoined("w1"), WorkerJoined("w2")) == []
    assert play(s, done("root", "w0")) == [Assign("a", "w1"), Assign("b", "w2"), Assign("c", "w0")]


def test_smaller_priority_first_then_declaration() -> None:
    s = Scheduler([unit("late", priority=(1, 0)), unit("x", priority=(0, 1)), unit("y", priority=(0, 1))], 1)
    assert play(s, WorkerJoined("w")) == [Assign("x", "w")]
    assert play(s, done("x", "w")) == [Assign("y", "w")]
    assert play(s, done("y", "w")) == [Assign("late", "w")]


def test_no_units_end_done_on_the_first_event() -> None:
    assert play(Scheduler([], 1), WorkerJoined("w")) == [End("done", "All 0 units are done.")]


def test_a_worker_stays_with_its_affinity() -> None:
    s = Scheduler([unit("a0", affinity="a"), unit("b0", affinity="b"), unit("a1", affinity="a")], 1)
    assert play(s, WorkerJoined("w")) == [Assign("a0", "w")]
    assert play(s, done("a0", "w")) == [Assign("a1", "w")]


def test_a_strictly_better_free_unit_wins_over_the_own_affinity() -> None:
    units = [unit("a0", affinity="a"), unit("a1", priority=(2,), affinity="a"), unit("b", priority=(1,), affinity="b")]
    s = Scheduler(units, 1)
    assert play(s, WorkerJoined("w"), done("a0", "w")) == [Assign("b", "w")]
    assert play(s, done("b", "w")) == [Assign("a1", "w")]


def test_a_held_affinity_is_left_to_its_holder_while_there_is_other_work() -> None:
    s = Scheduler([unit("a0", affinity="a"), unit("a1", affinity="a"), unit("b0", affinity="b")], 1)
    assert play(s, WorkerJoined("w0")) == [Assign("a0", "w0")]
    assert play(s, WorkerJoined("w1")) == [Assign("b0", "w1")]
    assert play(s, done("b0", "w1")) == [Assign("a1", "w1")]  # rather than idle


def test_an_idle_holder_comes_before_a_worker_that_waits_longer() -> None:
    units = [
        unit("a0", affinity="a"),
        unit("b0", affinity="b"),
        unit("b1", "gate", affinity="b"),
        unit("gate", "a0", "b0"),
    ]
    s = Scheduler(units, 1)
    play(s, WorkerJoined("w0"), WorkerJoined("w1"), done("b0", "w1"))
    assert play(s, done("a0", "w0")) == [Assign("gate", "w1")]
    play(s, WorkerJoined("w2"))
    assert play(s, done("gate", "w1")) == [Assign("b1", "w1")]  # the gate, without affinity, displaced nothing


def test_a_lost_holder_frees_its_affinity() -> None:
    others = [unit("b0", priority=(1,), affinity="b"), unit("c0", priority=(2,), affinity="c")]
    s = Scheduler([unit("a0", affinity="a"), unit("a1", affinity="a"), *others], 2)
    play(s, WorkerJoined("w0"))
    assert play(s, WorkerJoined("w1")) == [Assign("b0", "w1")]
    assert play(s, WorkerLost("w0", "gone")) == []
    assert play(s, WorkerJoined("w2")) == [Assign("a0", "w2")]


def test_the_unit_of_a_lost_worker_is_redone_and_its_late_events_are_ignored() -> None:
    s = Scheduler([unit("a")], 2)
    play(s, WorkerJoined("w0"))
    assert play(s, WorkerLost("w0", "preempted")) == []
    assert s.attempts("a") == 0, "a preemption is no attempt that failed"
    assert play(s, WorkerJoined("w1")) == [Assign("a", "w1")]
    assert play(s, done("a", "w0")) == []
    assert play(s, failed("a", "w0", "fatal")) == []
    assert play(s, WorkerJoined("w0")) == []
    assert play(s, WorkerLost("w0", "again")) == []
    assert play(s, done("a", "w1")) == [End("done", "All 1 units are done.")]


def test_a_leaving_worker_ends_its_unit_and_gets_no_other() -> None:
    s = Scheduler([unit("a", affinity="x"), unit("b", affinity="x"), unit("c", priority=(1,))], 1)
    assert play(s, WorkerJoined("w0")) == [Assign("a", "w0")]
    assert play(s, WorkerLeaving("w0")) == []
    assert play(s, done("a", "w0")) == []
    assert play(s, WorkerJoined("w1")) == [Assign("b", "w1")]  # what it held is free
    assert play(s, WorkerLost("w0", "left")) == []
    assert play(s, done("b", "w1")) == [Assign("c", "w1")]


def test_an_idle_worker_that_leaves_is_offered_nothing() -> None:
    s = Scheduler([unit("gate"), unit("a", "gate"), unit("b", "gate")], 1)
    play(s, WorkerJoined("w0"), WorkerJoined("w1"))
    assert play(s, WorkerLeaving("w1"), WorkerLeaving("unknown")) == []
    assert play(s, done("gate", "w0")) == [Assign("a", "w0")]
    assert play(s, WorkerLost("w1", "left")) == []


def test_a_returned_unit_is_ready_again_at_once_and_costs_nothing() -> None:
    s = Scheduler([unit("a")], max_attempts=1, max_losses=1)
    for number in range(5):
        assert play(s, WorkerJoined(f"w{number}")) == [Assign("a", f"w{number}")]
        assert play(s, WorkerLeaving(f"w{number}"), UnitReturned("a", f"w{number}")) == []
        assert s.attempts("a") == 0
        assert play(s, WorkerLost(f"w{number}", "left")) == []
    assert play(s, WorkerJoined("w5")) == [Assign("a", "w5")]
    assert play(s, UnitReturned("a", "w4")) == []  # late
    assert play(s, done("a", "w5")) == [End("done", "All 1 units are done.")]


def test_a_returned_unit_goes_to_an_idle_worker() -> None:
    s = Scheduler([unit("a")], 1)
    play(s, WorkerJoined("w0"), WorkerJoined("w1"), WorkerLeaving("w0"))
    assert play(s, UnitReturned("a", "w0")) == [Assign("a", "w1")]


def test_a_unit_returned_after_a_stop_stays() -> None:
    s = Scheduler([unit("a")], 1)
    play(s, WorkerJoined("w0"), WorkerLeaving("w0"), StopRequested("Ctrl-C"))
    assert play(s, UnitReturned("a", "w0")) == [End("interrupted", "Ctrl-C")]


def test_kinds_keep_units_apart() -> None:
    s = Scheduler([unit("t0", kind="train"), unit("t1", kind="train"), unit("m0"), unit("m1")], 1)
    assert play(s, WorkerJoined("cpu", "cpu")) == [Assign("m0", "cpu")]
    assert play(s, WorkerJoined("gpu", "train")) == [Assign("t0", "gpu")]
    assert play(s, done("m0", "cpu")) == [Assign("m1", "cpu")]
    assert play(s, done("m1", "cpu")) == []
    assert play(s, done("t0", "gpu")) == [Assign("t1", "gpu")]


def test_those_that_can_do_less_choose_first() -> None:
    gated = [unit("any", "gate"), unit("t", "gate", kind="train"), unit("big", "gate", kind="train", memory=9)]
    s = Scheduler([unit("gate", kind="train"), *gated], 1)
    play(s, WorkerJoined("large", "train", 10), WorkerJoined("small", "train", 5), WorkerJoined("cpu", "cpu"))
    assert play(s, done("gate", "large")) == [Assign("any", "cpu"), Assign("t", "small"), Assign("big", "large")]


def test_memory_is_respected_and_unknown_memory_is_trusted() -> None:
    s = Scheduler([unit("big", memory=8), unit("small", memory=4)], 1)
    assert play(s, WorkerJoined("w4", memory=4)) == [Assign("small", "w4")]
    assert play(s, WorkerJoined("w7", memory=7)) == []
    assert play(s, WorkerJoined("w?")) == [Assign("big", "w?")]


def test_a_unit_that_nobody_can_run_is_told_until_somebody_can() -> None:
    s = Scheduler([unit("a", kind="train", memory=2**31), unit("b")], 1)
    assert s.stuck is not None
    assert play(s, WorkerJoined("w", "cpu")) == [Assign("b", "w")]
    assert s.stuck is None
    assert play(s, done("b", "w")) == []
    assert s.stuck == (
        "1 units are ready, but none of the 1 workers there can run one; the first, a, needs a worker of kind train with 2.0 GiB"
    )
    assert play(s, WorkerJoined("g", "train")) == [Assign("a", "g")]
    assert s.stuck is None


def test_giving_up_fails_the_run() -> None:
    s = Scheduler([unit("a", kind="train")], 1)
    play(s, WorkerJoined("w", "cpu"))
    assert play(s, GaveUp("nobody came")) == [End("failed", "nobody came")]
    assert s.stuck is None


def test_the_longest_chain_goes_first_among_equals() -> None:
    s = Scheduler(
        [unit("short"), unit("long0"), unit("long1", "long0"), unit("long2", "long1"), unit("mid", "short")], 1
    )
    assert play(s, WorkerJoined("w")) == [Assign("long0", "w")]
    assert play(s, done("long0", "w")) == [Assign("short", "w")]  # as long as long1, and declared before


def test_a_unit_that_loses_every_worker_fails_the_run_in_the_end() -> None:
    s = Scheduler([unit("a"), unit("b")], max_attempts=2, max_losses=3)
    play(s, WorkerJoined("w0"), WorkerJoined("w1"))
    assert play(s, failed("a", "w0", message="OSError: flaky")) == [Assign("a", "w0")]
    for name in ("w0", "w2"):
        assert play(s, WorkerLost(name, "killed")) == []
        assert not s.draining
        following = "w2" if name == "w0" else "w3"
        assert play(s, WorkerJoined(following)) == [Assign("a", following)]
    assert play(s, WorkerLost("w3", "killed")) == []
    assert s.draining
    reason = "Unit a lost its worker 3 times; the last time: w3: killed"
    assert play(s, done("b", "w1")) == [End("failed", reason)]


@pytest.mark.parametrize(("kind", "status"), [("replan", "replan"), ("fatal", "failed")])
def test_replan_and_fatal_let_the_running_units_end(kind: str, status: str) -> None:
    s = Scheduler([unit("a"), unit("b"), unit("c")], 3)
    play(s, WorkerJoined("w0"), WorkerJoined("w1"))
    assert play(s, failed("a", "w0", kind, "x is missing")) == []
    assert play(s, WorkerJoined("w2")) == []
    assert play(s, done("b", "w1")) == [End(status, "Unit a: x is missing")]  # type: ignore[arg-type]
    assert s.counts[State.DONE] == 1


def test_stop_drains() -> None:
    s = Scheduler([unit("a"), unit("b")], 3)
    play(s, WorkerJoined("w"))
    assert play(s, StopRequested("Ctrl-C")) == []
    assert play(s, failed("a", "w")) == [End("interrupted", "Ctrl-C")]


def test_stop_with_nothing_running_ends_at_once() -> None:
    assert play(Scheduler([unit("a")], 1), StopRequested("Ctrl-C")) == [End("interrupted", "Ctrl-C")]


def test_the_last_unit_done_after_a_stop_is_done() -> None:
    s = Scheduler([unit("a")], 1)
    assert play(s, WorkerJoined("w"), StopRequested("x"), done("a", "w")) == [End("done", "All 1 units are done.")]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([unit("a"), unit("a")], "given more than once: a"),
        ([unit("a", "b")], "a depends on b, which is not among"),
        ([unit("x"), unit("a", "x", "c"), unit("b", "a"), unit("c", "b")], "a waits for c waits for b waits for a"),
        ([unit("a", "a")], "a waits for a"),
    ],
)
def test_impossible_plans_are_refused(units: list[Unit], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheduler(units, 1)


def test_attempts_must_be_possible() -> None:
    with pytest.raises(ValueError, match="max_attempts is 0"):
        Scheduler([], 0)


def test_after_a_failure_another_worker_is_tried_though_the_first_held_the_affinity() -> None:
    s = Scheduler([unit("a", affinity="x")], 3)
    play(s, WorkerJoined("bad"), WorkerJoined("good"))
    assert s.running == {"bad": "a"}
    assert play(s, failed("a", "bad")) == [Assign("a", "good")]


def test_an_outage_is_tried_again_and_blames_no_unit_in_the_end() -> None:
    s = Scheduler([unit("a")], 2)
    assert play(s, WorkerJoined("w"), failed("a", "w", "outage")) == [Assign("a", "w")]
    (end,) = play(s, failed("a", "w", "outage", "no route"))
    assert isinstance(end, End)
    assert (end.status, end.reason, end.unit) == ("failed", "Unit a failed 2 times; the last time: no route", None)
    (end,) = play(Scheduler([unit("a")], 1), WorkerJoined("w"), failed("a", "w"))
    assert isinstance(end, End)
    assert end.unit == "a"
