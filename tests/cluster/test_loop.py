import pickle
from collections.abc import Callable
from typing import Any

import pytest

from cluster.group import Handler
from cluster.inline import InlineGroup
from cluster.loop import run_units
from cluster.retry import exponential, immediate
from cluster.scheduler import End, Event, Instruction, UnitDone, UnitFailed, WorkerJoined, WorkerLost
from cluster.units import Unit, UnitError


def group_of(handler: Handler, workers: int = 1) -> InlineGroup:
    return InlineGroup(lambda worker, should_yield: handler, workers)


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
    asked: list[int] = []

    def backoff(failures: int) -> float:
        asked.append(failures)
        return 0.05

    assert run_units(group_of(flaky(2, OSError())), [Unit("a", 0)], backoff=backoff).status == "done"
    assert asked == [1, 2]
    assert [exponential(n) for n in (1, 2, 3, 10)] == [1, 2, 4, 60]


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

    def workers(self) -> list[str]:
        return ["w0"]

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
