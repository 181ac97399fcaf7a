"""Whatever happens, in whatever order: no invariant breaks and the run ends."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.events import (
    Assign,
    End,
    Event,
    StopRequested,
    UnitDone,
    UnitFailed,
    WorkerJoined,
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
            assert set(self.units[instruction.unit].depends_on) <= self.done
            self.busy[instruction.worker] = instruction.unit
            self.past.append((instruction.unit, instruction.worker))
        if self.ends:
            assert not self.busy
            assert (self.ends[0].status == "done") == (self.done == set(self.units))

    @rule()
    def join(self) -> None:
        worker = f"w{self.joined}"
        self.joined += 1
        self.live.append(worker)
        self.feed(WorkerJoined(worker))

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
    @rule(data=st.data(), kind=st.sampled_from(["done", "fatal", "joined"]))
    def zombie(self, data: Any, kind: Any) -> None:
        unit, worker = data.draw(st.sampled_from(self.past))
        if worker in self.live:
            return
        late = {"done": UnitDone(unit, worker, {}), "joined": WorkerJoined(worker)}
        before = self.scheduler.running
        self.feed(late.get(kind, UnitFailed(unit, worker, "fatal", "late")))
        assert self.scheduler.running == before

    @precondition(lambda self: len(self.past) > 4)
    @rule()
    def stop(self) -> None:
        self.feed(StopRequested("asked"))

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.validate()
            assert self.scheduler.running == self.busy
            assert len(self.ends) <= 1

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.join()
        while self.busy:
            worker, unit = self.busy.popitem()
            self.done.add(unit)
            self.feed(UnitDone(unit, worker, {}))
            self.scheduler.validate()
        assert len(self.ends) == 1


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
