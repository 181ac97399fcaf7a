"""A run in simulated time: the real graph and the real scheduler, driven by a clock instead of workers.

A unit's time goes into phases, one after another: its fixed cost (hand-out, commit), what must be read before it can compute,
computing beside the reading of the chunks that follow, a last pass that also writes its chunks behind it, the rest of writing. All transfers share the store: each gets an equal part of its
bandwidth, and never more than its worker's own link. That is what `pipeline.worker` does today: one chunk is read ahead
and a stream's chunks are written behind within a unit, nothing across units. A worker's memory (its block, its state, its cache of chunks)
is followed unit by unit.

The same arguments give the same result: no randomness, ties in the order of their origin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal

from cluster.scheduler import Assign, End, Event, Scheduler, UnitDone, WorkerJoined
from pipeline.costs import Cost
from pipeline.graph import TRANSIENT, Graph, Node

Use = Literal["compute", "dependencies", "link", "store", "handling"]
USES: tuple[Use, ...] = ("compute", "dependencies", "link", "store", "handling")


@dataclass(frozen=True)
class Network:
    """Speeds in bytes a second: `link` of each worker, `store` of all transfers together. `handling`: seconds that every unit
    costs whatever it does (hand-out, small objects). `cache`: bytes of activations that a worker keeps.

    `reads_ahead`: chunks of a unit are read while it computes. `writes_behind`, `weights_ahead`: what today's workers do not
    do, to see what it would bring: writing all that a unit writes while it computes; a block's weights being there when its unit begins.
    """

    link: float = 25e9 / 8
    store: float = 40e9
    handling: float = 0.1
    cache: float = float(512 << 20)
    reads_ahead: bool = True
    writes_behind: bool = False
    weights_ahead: bool = False


@dataclass(frozen=True)
class Span:
    """One unit on one worker, seconds from the start."""

    worker: str
    unit: str
    start: float
    end: float


@dataclass(frozen=True)
class Simulated:
    """What a run comes to.

    `efficiency` is the computing of all units, as one worker with everything in memory would do it, over workers × makespan.
    `shares` are parts of workers × makespan and add up to 1: computing; idle for want of a ready unit; waiting for a transfer,
    as far as its own link accounts for it (`link`) and as far as others use the store (`store`); fixed cost of units.
    `bottleneck` is the largest of them. `high_water` is the most that storage holds: activations, streams and states from their
    commit to their last reader's, results and the checkpoint for good.
    """

    workers: int
    units: int
    makespan: float
    compute: float
    efficiency: float
    shares: dict[Use, float]
    bottleneck: Use
    read: float
    written: float
    high_water: float
    timeline: list[Span] = field(default_factory=list)


@dataclass
class _Phase:
    transfer: float = 0.0
    seconds: float = 0.0
    use: Use = "compute"


@dataclass
class _Seat:
    """A worker: what it holds, and the phases left of its unit, the next one last."""

    name: str
    block: int | None = None
    state: str | None = None
    kept: dict[str, float] = field(default_factory=dict)
    unit: str | None = None
    began: float = 0.0
    phases: list[_Phase] = field(default_factory=list)
    parts: int = 0  # of the present phase: its timer, its transfer
    use: Use | None = None

    def stream(self, cost: Cost, cache: float) -> list[float]:
        """Bytes that each pass over the unit's chunks must read. The first chunks stay in the cache, as far as it goes."""
        if len(cost.reads) > 1 or cost.chunks > 1:
            wanted = {read.path for read in cost.reads}
            self.kept = {path: size for path, size in self.kept.items() if path in wanted}
        room = cache - sum(self.kept.values())
        passes = [0.0] * max((len(read.passes) for read in cost.reads), default=0)
        for number in range(len(passes)):
            for read in cost.reads:
                if number >= len(read.passes):
                    continue
                if (missing := read.passes[number] - self.kept.get(read.path, 0.0)) > 0:
                    passes[number] += missing
                    kept = min(missing, room)
                    self.kept[read.path] = self.kept.get(read.path, 0.0) + kept
                    room -= kept
        return passes

    def load(self, cost: Cost) -> tuple[float, float]:
        """Bytes of weights and of state that are not here yet."""
        weights = cost.weights if cost.block is None or cost.block != self.block else 0.0
        state = cost.state.size if cost.state and cost.state.path != self.state else 0.0
        return weights, state

    def remember(self, cost: Cost) -> None:
        self.block = cost.block if cost.block is not None else self.block
        self.state = cost.new_state
        if cost.releases:
            self.block, self.state, self.kept = None, None, {}


class _Transfers:
    """Equal shares of one bandwidth. `served` counts what each transfer under way has been given since the beginning."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.served = 0.0
        self.heap: list[tuple[float, int, _Seat]] = []
        self.count = 0

    def rate(self) -> float:
        return min(self.network.link, self.network.store / len(self.heap)) if self.heap else self.network.link

    def add(self, size: float, seat: _Seat) -> None:
        self.count += 1
        heappush(self.heap, (self.served + size, self.count, seat))

    def next_end(self, now: float) -> float:
        return now + max(0.0, self.heap[0][0] - self.served) / self.rate()


class _Simulation:
    def __init__(self, graph: Graph, costs: Mapping[str, Cost], workers: int, network: Network) -> None:
        self.nodes = {node.name: node for node in graph.nodes}
        self.costs, self.network = costs, network
        self.scheduler = Scheduler(graph.units(graph.nodes), max_attempts=1)
        self.seats = {name: _Seat(name) for name in (f"worker-{i}" for i in range(workers))}
        self.transfers = _Transfers(network)
        self.timers: list[tuple[float, int, _Seat]] = []
        self.now = 0.0
        self.begun = 0  # orders timers that end together
        self.counts: dict[Use | None, int] = {None: workers} | dict.fromkeys(USES, 0)
        self.spent: dict[Use, float] = dict.fromkeys(USES, 0.0)
        self.left = {path: len(names) for path, names in graph.readers().items()}
        self.sizes: dict[str, float] = {}
        self.stored = self.high_water = self.read = self.written = 0.0
        self.timeline: list[Span] = []
        self.transient: tuple[str, ...] = TRANSIENT

    def run(self) -> None:
        ended = False
        for name in self.seats:
            ended = self._feed(WorkerJoined(name)) or ended
        while not ended:
            ended = self._step()

    def _feed(self, event: Event) -> bool:
        for instruction in self.scheduler.handle(event):
            if isinstance(instruction, End):
                return True
            self._begin(instruction)
        return False

    def _begin(self, assign: Assign) -> None:
        seat, cost, network = self.seats[assign.worker], self.costs[assign.unit], self.network
        weights, state = seat.load(cost)
        passes = seat.stream(cost, network.cache)
        first = 1 / cost.chunks if network.reads_ahead else 1.0  # the part of a pass that its computing waits for
        written = sum(size for _, size in cost.writes)
        self.read += weights + state + sum(passes)
        self.written += written
        ahead = network.weights_ahead and cost.block is not None
        before = state + first * sum(passes) + (0.0 if ahead else weights)
        # The last pass writes its chunks; its own last one is waited for.
        last = passes.pop() if cost.last_pass and passes else 0.0
        beside = written if network.writes_behind else 0.0
        behind = 0.0 if network.writes_behind else cost.behind * (1 - 1 / cost.chunks)
        phases = [
            _Phase(seconds=network.handling, use="handling"),
            _Phase(transfer=before),
            _Phase(transfer=(1 - first) * sum(passes) + beside, seconds=cost.compute - cost.last_pass),
            _Phase(transfer=(1 - first) * last + behind, seconds=cost.last_pass),
            _Phase(transfer=written - beside - behind),
        ]
        seat.unit, seat.began, seat.phases = assign.unit, self.now, phases[::-1]
        self._advance(seat)

    def _advance(self, seat: _Seat) -> bool:
        """The next phase of a worker's unit; True if the run has ended with this unit."""
        while seat.phases:
            phase = seat.phases.pop()
            if phase.seconds > 0:
                self.begun += 1
                heappush(self.timers, (self.now + phase.seconds, self.begun, seat))
            if phase.transfer > 0:
                self.transfers.add(phase.transfer, seat)
            seat.parts = (phase.seconds > 0) + (phase.transfer > 0)
            if seat.parts:
                self._use(seat, phase.use if phase.seconds > 0 else "link")
                return False
        return self._finish(seat)

    def _finish(self, seat: _Seat) -> bool:
        unit = seat.unit
        assert unit is not None
        self.timeline.append(Span(seat.name, unit, seat.began, self.now))
        seat.remember(self.costs[unit])
        seat.unit = None
        self._use(seat, None)
        self._store(self.nodes[unit], self.costs[unit])
        return self._feed(UnitDone(unit, seat.name, {}))

    def _store(self, node: Node, cost: Cost) -> None:
        self.sizes |= dict(cost.writes)
        self.stored += sum(size for _, size in cost.writes)
        self.high_water = max(self.high_water, self.stored)
        for artifact in node.reads:
            self.left[artifact.path] -= 1
            if not self.left[artifact.path] and artifact.kind in self.transient:
                self.stored -= self.sizes.get(artifact.path, 0.0)

    def _use(self, seat: _Seat, use: Use | None) -> None:
        self.counts[seat.use] -= 1
        self.counts[use] += 1
        seat.use = use

    def _step(self) -> bool:
        """To the next moment at which a timer or a transfer ends."""
        timer = self.timers[0][0] if self.timers else float("inf")
        transfer = self.transfers.next_end(self.now) if self.transfers.heap else float("inf")
        self._pass_time(min(timer, transfer) - self.now)
        if timer <= transfer:
            seat = heappop(self.timers)[2]
            if seat.parts == 2:
                self._use(seat, "link")
        else:
            end, _, seat = heappop(self.transfers.heap)
            self.transfers.served = end  # exactly, so that rounding leaves nothing over
        seat.parts -= 1
        return self._advance(seat) if not seat.parts else False

    def _pass_time(self, seconds: float) -> None:
        rate = self.transfers.rate()
        own = rate / self.network.link  # the part of the waiting that would be there without the others
        self.spent["compute"] += self.counts["compute"] * seconds
        self.spent["handling"] += self.counts["handling"] * seconds
        self.spent["dependencies"] += self.counts[None] * seconds
        self.spent["link"] += self.counts["link"] * seconds * own
        self.spent["store"] += self.counts["link"] * seconds * (1 - own)
        self.transfers.served += rate * seconds
        self.now += seconds


def simulate(
    graph: Graph,
    costs: Mapping[str, Cost],
    workers: int,
    network: Network,
    *,
    keeps_activations: bool = False,
    with_timeline: bool = False,
) -> Simulated:
    """Play a whole run. `costs` by unit name."""
    simulation = _Simulation(graph, costs, workers, network)
    simulation.transient = () if keeps_activations else TRANSIENT
    simulation.run()
    whole = workers * simulation.now or 1.0
    compute = sum(cost.compute for cost in costs.values())
    shares: dict[Use, float] = {use: simulation.spent[use] / whole for use in USES}
    return Simulated(
        workers=workers,
        units=len(graph.nodes),
        makespan=simulation.now,
        compute=compute,
        efficiency=compute / whole,
        shares=shares,
        bottleneck=max(USES, key=lambda use: shares[use]),
        read=simulation.read,
        written=simulation.written,
        high_water=simulation.high_water,
        timeline=simulation.timeline if with_timeline else [],
    )
