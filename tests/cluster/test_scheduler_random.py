"""Whatever happens, in whatever order: no invariant breaks and the run ends.

RANDOM_SEQUENCES says how many sequences of events are tried: RANDOM_SEQUENCES=10000 pytest tests/cluster/test_scheduler_random.py
"""

import os
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.events import (
    Assign,
    End,
    Event,
    GaveUp,
    StopRequested,
    UnitDone,
    UnitFailed,
    UnitReturned,
    WorkerJoined,
    WorkerLeaving,
    WorkerLost,
)
from cluster.scheduler import Scheduler
from cluster.units import Unit


@st.composite
def plans(draw: st.DrawFn) -> list[Unit]:
    count = draw(st.integers(0, 12))
    return [
        Unit(
            name=f"u{i}",
            payload=None,
            depends_on=tuple(f"u{j}" for j in draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else (),
            priority=(draw(st.integers(0, 2)),),
            affinity=draw(st.sampled_from([None, "a", "b", "c"])),
            kind=draw(st.sampled_from([None, None, "train", "cpu"])),
            memory=draw(st.sampled_from([0, 0, 4, 8])),
        )
        for i in range(count)
    ]


class Cluster(RuleBasedStateMachine):
    @initialize(units=plans(), max_attempts=st.integers(1, 3))
    def begin(self, units: list[Unit], max_attempts: int) -> None:
        self.units = {unit.name: unit for unit in units}
        self.scheduler = Scheduler(units, max_attempts, max_losses=max_attempts + 1)
        self.joined = 0
        self.live: list[str] = []
        self.shapes: dict[str, tuple[str | None, int]] = {}
        self.leaving: set[str] = set()
        self.past: list[tuple[str, str]] = []  # (unit, worker) of everything ever handed out
        self.busy: dict[str, str] = {}
        self.done: set[str] = set()
        self.ends: list[End] = []

    def feed(self, event: Event) -> None:
        over = bool(self.ends)
        instructions = self.scheduler.handle(event)
        assert not (over and instructions)
        for instruction in instructions:
            if isinstance(instruction, End):
                self.ends.append(instruction)
                continue
            assert isinstance(instruction, Assign)
            assert instruction.worker in self.live
            assert instruction.worker not in self.busy
            assert instruction.worker not in self.leaving
            assert self.fits(self.units[instruction.unit], instruction.worker)
            assert set(self.units[instruction.unit].depends_on) <= self.done
            self.busy[instruction.worker] = instruction.unit
            self.past.append((instruction.unit, instruction.worker))
        if self.ends:
            assert not self.busy
            assert (self.ends[0].status == "done") == (self.done == set(self.units))

    def fits(self, unit: Unit, worker: str) -> bool:
        kind, memory = self.shapes[worker]
        return (unit.kind is None or kind in (None, unit.kind)) and (not memory or unit.memory <= memory)

    @rule(kind=st.sampled_from([None, "train", "cpu", "other"]), memory=st.sampled_from([0, 2, 4, 6, 8]))
    def join(self, kind: str | None, memory: int) -> None:
        worker = f"w{self.joined}"
        self.joined += 1
        self.live.append(worker)
        self.shapes[worker] = kind, memory
        self.feed(WorkerJoined(worker, kind, memory))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        worker = data.draw(st.sampled_from(self.live))
        self.leaving.add(worker)
        self.feed(WorkerLeaving(worker))

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def give_back(self, data: Any) -> None:
        worker = data.draw(st.sampled_from(sorted(self.busy)))
        unit = self.busy.pop(worker)
        before = self.scheduler.attempts(unit)
        self.feed(UnitReturned(unit, worker))
        assert self.scheduler.attempts(unit) == before

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def lose(self, data: Any) -> None:
        worker = data.draw(st.sampled_from(self.live))
        self.live.remove(worker)
        self.busy.pop(worker, None)
        self.feed(WorkerLost(worker, "gone"))

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def finish(self, data: Any) -> None:
        worker = data.draw(st.sampled_from(sorted(self.busy)))
        unit = self.busy.pop(worker)
        self.done.add(unit)
        self.feed(UnitDone(unit, worker, {}))

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), kind=st.sampled_from(["retry", "retry", "retry", "replan", "fatal"]))
    def fail(self, data: Any, kind: Any) -> None:
        worker = data.draw(st.sampled_from(sorted(self.busy)))
        self.feed(UnitFailed(self.busy.pop(worker), worker, kind, "broke"))

    @precondition(lambda self: self.past)
    @rule(data=st.data(), kind=st.sampled_from(["done", "fatal", "joined", "returned", "leaving"]))
    def zombie(self, data: Any, kind: Any) -> None:
        unit, worker = data.draw(st.sampled_from(self.past))
        if worker in self.live:
            return
        late: dict[str, Event] = {
            "done": UnitDone(unit, worker, {}),
            "fatal": UnitFailed(unit, worker, "fatal", "late"),
            "joined": WorkerJoined(worker),
            "returned": UnitReturned(unit, worker),
            "leaving": WorkerLeaving(worker),
        }
        before = self.scheduler.running
        self.feed(late[kind])
        assert self.scheduler.running == before

    @precondition(lambda self: len(self.past) > 4)
    @rule()
    def stop(self) -> None:
        self.feed(StopRequested("asked"))

    @precondition(lambda self: self.joined > 4 and self.scheduler.stuck)
    @rule()
    def give_up(self) -> None:
        self.feed(GaveUp(self.scheduler.stuck or ""))
        assert self.ends

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.validate()
            assert self.scheduler.running == self.busy
            assert len(self.ends) <= 1
            assert self.scheduler.workers == len(self.live) or self.ends
            self.stuck_is_told()

    def stuck_is_told(self) -> None:
        if self.scheduler.stuck is None:
            assert self.busy or self.ends or self.scheduler.draining or self.done == set(self.units)
            return
        able = [worker for worker in self.live if worker not in self.leaving]
        ready = [
            unit for unit in self.units.values() if unit.name not in self.done and set(unit.depends_on) <= self.done
        ]
        assert not self.busy
        assert not any(self.fits(unit, worker) for unit in ready for worker in able)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.join(kind=None, memory=0)
        while self.busy:
            worker, unit = self.busy.popitem()
            self.done.add(unit)
            self.feed(UnitDone(unit, worker, {}))
            self.scheduler.validate()
        assert len(self.ends) == 1


TestCluster = Cluster.TestCase
TestCluster.settings = settings(
    max_examples=int(os.environ.get("RANDOM_SEQUENCES", "200")), stateful_step_count=40, deadline=None
)
