import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cluster.events import End, Event, Instruction, UnitDone, UnitFailed, WorkerJoined, WorkerLost
from cluster.group import Handler
from cluster.inline import InlineGroup
from cluster.loop import run_units
from cluster.retry import exponential, immediate
from cluster.scheduler import State
from cluster.units import Unit, UnitError


def group_of(handler: Handler, workers: int = 1) -> InlineGroup:
    return InlineGroup(lambda worker, should_yield, membership: handler, workers)


def test_units_run_in_dependency_order_and_the_group_serves_again() -> None:
    order: list[str] = []

    def handle(payload: str) -> dict:
        order.append(payload)
        return {"n": len(order)}

    group = group_of(handle, workers=3)
    plan = [Unit("c", "c", ("b",)), Unit("b", "b", ("a",)), Unit("a", "a")]
    outcome = run_units(group, plan)
    assert (outcome.status, order) == ("done", ["a", "b", "c"])
    assert outcome.results == {"a": {"n": 1}, "b": {"n": 2}, "c": {"n": 3}}
    assert run_units(group, [Unit("d", "d")]).results == {"d": {"n": 4}}
    assert run_units(group, []).status == "done"


def flaky(failures: int, error: Exception) -> Callable[[Any], dict]:
    left = [error] * failures

    def handle(payload: Any) -> dict:
        if left:
            raise left.pop()
        return {}

    return handle


def test_unknown_exceptions_are_tried_again_and_told() -> None:
    events: list[Event | Instruction] = []
    group = group_of(flaky(2, KeyError("x")))
    assert run_units(group, [Unit("a", 0)], backoff=immediate, on_event=events.append).status == "done"
    failures = [event for event in events if isinstance(event, UnitFailed)]
    assert [(f.kind, f.message) for f in failures] == [("retry", "KeyError: 'x'")] * 2
    assert "flaky" not in failures[0].message
    assert "in handle" in failures[0].traceback
    assert isinstance(events[-1], End)


def test_attempts_run_out() -> None:
    outcome = run_units(group_of(flaky(9, OSError("net"))), [Unit("a", 0)], max_attempts=2, backoff=immediate)
    assert (outcome.status, outcome.reason) == ("failed", "Unit a failed 2 times; the last time: OSError: net")


def test_backoff_delays_by_the_count_of_failures() -> None:
    asked: list[tuple[str, int]] = []

    def backoff(unit: str, failures: int) -> float:
        asked.append((unit, failures))
        return 0.05

    assert run_units(group_of(flaky(2, OSError())), [Unit("a", 0)], backoff=backoff).status == "done"
    assert asked == [("a", 1), ("a", 2)]


def test_waiting_doubles_up_to_a_minute_and_units_do_not_come_back_together() -> None:
    for failures, seconds in ((1, 1), (2, 2), (3, 4), (10, 60)):
        waits = [exponential(f"u{i}", failures) for i in range(100)]
        assert all(0.5 * seconds <= wait < 1.5 * seconds for wait in waits)
        assert len(set(waits)) == 100
    assert exponential("a", 2) == exponential("a", 2)


@pytest.mark.parametrize(("kind", "status"), [("replan", "replan"), ("fatal", "failed")])
def test_kinds_that_stop(kind: Any, status: str) -> None:
    group = group_of(flaky(1, UnitError(kind, "gone")))
    outcome = run_units(group, [Unit("a", 0), Unit("b", 0)])
    assert (outcome.status, outcome.reason, outcome.results) == (status, "Unit a: gone", {})


def test_stop_is_seen_between_units() -> None:
    ran: list[int] = []

    def handle(payload: int) -> dict:
        ran.append(payload)
        return {}

    plan = [Unit(str(i), i) for i in range(9)]
    outcome = run_units(group_of(handle), plan, should_stop=lambda: len(ran) == 3)
    assert outcome.status == "interrupted"
    assert len(outcome.results) == len(ran) < 9


class ScriptedGroup:
    """Loses its first worker while that one runs a unit, then hears of it after all."""

    def __init__(self) -> None:
        self.given: list[tuple[str, str]] = []

    patience = 60.0

    def workers(self) -> list[WorkerJoined]:
        return [WorkerJoined("w0")]

    def show(self, counts: Mapping[State, int]) -> None: ...

    def submit(self, worker: str, unit: Unit) -> None:
        self.given.append((worker, unit.name))

    def poll(self, timeout: float) -> list[Event]:
        if len(self.given) == 1:
            return [WorkerLost("w0", "gone"), WorkerJoined("w1")]
        return [UnitDone("a", "w0", {"from": "the dead"}), UnitDone("a", "w1", {"from": "w1"})]

    def close(self) -> None: ...


def test_results_of_lost_workers_do_not_count() -> None:
    group = ScriptedGroup()
    assert run_units(group, [Unit("a", 0)]).results == {"a": {"from": "w1"}}
    assert group.given == [("w0", "a"), ("w1", "a")]


def test_unit_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnitError("replan", "gone")))
    assert (error.kind, error.message, str(error)) == ("replan", "gone", "gone")


def test_what_nobody_can_run_ends_the_run_with_a_sentence() -> None:
    class Small(InlineGroup):
        def workers(self) -> list[WorkerJoined]:
            return [WorkerJoined(worker.worker, "cpu", 2**30) for worker in super().workers()]

    plan = [Unit("a", 0), Unit("b", 0, ("a",), kind="train"), Unit("c", 0, memory=3 * 2**30)]
    outcome = run_units(Small(lambda worker, should_yield, membership: lambda payload: {}), plan)
    assert (outcome.status, list(outcome.results)) == ("failed", ["a"])
    assert outcome.reason == (
        "Nothing could run: 2 units are ready, but none of the 1 workers there can run one; the first, b, needs a worker of "
        "kind train. Add machines for such workers, or ask for smaller ones."
    )
