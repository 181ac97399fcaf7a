"""Prints what an event costs the scheduler. Run by hand: python tests/cluster/scale.py [units]"""

import sys
import time
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cluster.events import Assign, Event, UnitDone, WorkerJoined
from cluster.scheduler import Scheduler
from cluster.units import Unit

WORKERS = 1000


def wave(blocks: int, epochs: int) -> list[Unit]:
    def before(block: int, epoch: int) -> tuple[str, ...]:
        return tuple(f"{b}.{e}" for b, e in ((block, epoch - 1), (block - 1, epoch)) if b >= 0 and e >= 0)

    places = ((block, epoch) for epoch in range(epochs) for block in range(blocks))
    return [Unit(f"{b}.{e}", None, before(b, e), (e, b), f"block {b}") for b, e in places]


def chain(units: int) -> list[Unit]:
    return [Unit(str(i), None, (str(i - 1),) if i else (), affinity=str(i % 50)) for i in range(units)]


def loose(units: int) -> list[Unit]:
    return [Unit(str(i), None, priority=(i % 7,)) for i in range(units)]


def drive(title: str, units: list[Unit]) -> None:
    begun = time.perf_counter()
    scheduler = Scheduler(units, 3)
    built = time.perf_counter()
    events: deque[Event] = deque(WorkerJoined(str(number)) for number in range(WORKERS))
    count = 0
    while events:
        count += 1
        for instruction in scheduler.handle(events.popleft()):
            if isinstance(instruction, Assign):
                events.append(UnitDone(instruction.unit, instruction.worker, {}))
    seconds = time.perf_counter() - built
    print(f"{title}: {len(units)} units, built in {built - begun:.1f} s, {seconds / count * 1e6:.1f} µs an event")


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    drive("wave", wave(1000, size // 1000))
    drive("chain", chain(size))
    drive("loose", loose(size))
