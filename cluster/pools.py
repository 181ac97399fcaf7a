"""Where another worker can go. Pure: nodes and workers in, places out."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heapreplace

from cluster.units import ClusterError

_ROUNDING = 1e-6  # resources are fractions: three thirds must make a whole


@dataclass(frozen=True)
class Pool:
    """Workers of one kind. Each needs `cpus`, `gpus` (a part of one counts) and `memory` bytes of host memory, 0 for any.

    `most`: how many there may be, None for as many as the cluster has room for. `members`: a worker is so many processes,
    each with what is said here, which do every unit together.
    """

    kind: str | None = None
    cpus: float = 1
    gpus: float = 0
    memory: int = 0
    most: int | None = None
    members: int = 1

    @property
    def needs(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory)}

    def __str__(self) -> str:
        together = f"{self.members} processes of " if self.members > 1 else ""
        each = f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"
        if self.memory:
            each = f"{self.cpus:g} CPUs, {self.gpus:g} GPUs and {self.memory / 2**30:g} GiB"
        return f"{self.kind or 'any'} workers of {together}{each} each"


@dataclass(frozen=True)
class Machine:
    """A node that takes work: all that it has, and what Ray says is not in use."""

    node: str
    total: Mapping[str, float] = field(default_factory=dict)
    free: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Seated:
    """A process of a worker that is there, or, if `pending`, on its way: Ray does not count what it takes yet."""

    pool: Pool
    node: str
    pending: bool


def room(there: Mapping[str, float], pool: Pool) -> int:
    """How many processes fit. Machine by machine: one cannot use the rests of two."""
    needs = {name: each for name, each in pool.needs.items() if each > 0}
    return max(0, min(int(there.get(name, 0.0) / each + _ROUNDING) for name, each in needs.items()))


def places(
    pools: Sequence[Pool], machines: Sequence[Machine], seated: Collection[Seated], barred: Collection[str] = ()
) -> list[tuple[Pool, tuple[str, ...]]]:
    """Every worker that can be added: its pool, and the node of each of its processes, on as few as can be.

    Pools come in their order; nodes fill up evenly.
    """
    left = {m.node: _rests(m, [s for s in seated if s.node == m.node]) for m in machines if m.node not in barred}
    found: list[tuple[Pool, tuple[str, ...]]] = []
    for pool in pools:
        count = sum(s.pool == pool for s in seated) // pool.members
        rooms = [(-min(room(rest, pool) for rest in rests), node) for node, rests in left.items()]
        heapify(rooms)
        while (pool.most is None or count < pool.most) and (nodes := _nodes(rooms, pool.members)):
            for rest in (rest for node in nodes for rest in left[node]):
                _take(rest, pool)
            found.append((pool, nodes))
            count += 1
    return found


def _nodes(rooms: list[tuple[int, str]], members: int) -> tuple[str, ...]:
    """Takes the rooms of one worker's processes from a heap of (less the room, node); none where they do not suffice."""
    nodes: list[str] = []
    while rooms and rooms[0][0] and len(nodes) < members:
        less, node = rooms[0]
        taken = min(-less, members - len(nodes))
        heapreplace(rooms, (less + taken, node))
        nodes += [node] * taken
    return tuple(nodes) if len(nodes) == members else ()


def _rests(machine: Machine, seated: Collection[Seated]) -> tuple[dict[str, float], dict[str, float]]:
    """What ours leave of the whole, and what is left of what nobody uses: others may be there, and Ray's word is late."""
    whole, free = dict(machine.total), dict(machine.free)
    for seat in seated:
        _take(whole, seat.pool)
        if seat.pending:
            _take(free, seat.pool)
    return whole, free


def _take(rest: dict[str, float], pool: Pool) -> None:
    for name, each in pool.needs.items():
        rest[name] = rest.get(name, 0.0) - each


def check_pools(pools: Sequence[Pool]) -> None:
    """Raises ClusterError for what no cluster could give."""
    for pool in pools:
        if (
            pool.members < 1
            or pool.most == 0
            or (pool.most or 1) < 0
            or min(pool.needs.values()) < 0
            or not (pool.cpus or pool.gpus)
        ):
            raise ClusterError(
                f"{'Some' if pool.most is None else pool.most} {pool} were asked for; "
                "at least one worker is needed, and each needs a CPU, a GPU or a part of one."
            )


def check_room(pool: Pool, machines: Sequence[Machine]) -> None:
    """Raises ClusterError where not one worker fits: Ray would wait for it silently and for ever."""
    if sum(room(machine.total, pool) for machine in machines) >= pool.members:
        return
    there = {name: sum(m.total.get(name, 0.0) for m in machines) for name in ("CPU", "GPU")}
    memory = max((m.total.get("memory", 0.0) for m in machines), default=0.0)
    most = f", at most {memory / 2**30:.1f} GiB of memory for workers on one" if pool.memory else ""
    remedy = "ask for smaller workers, or add machines"
    if pool.gpus and not there["GPU"]:
        remedy = "add machines with GPUs, start Ray with --num-gpus where it has not found them, or ask for no GPU"
    raise ClusterError(
        f"{str(pool)[:1].upper()}{str(pool)[1:]} were asked for, but {'the cluster has no' if pool.members > 1 else 'no machine of the cluster has'} room for one "
        f"({len(machines)} machines, {there['CPU']:g} CPUs, {there['GPU']:g} GPUs{most}): {remedy}."
    )
