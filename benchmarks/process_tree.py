"""What a command costs: seconds of processor time and of the clock, and memory, of all its processes (Linux).

The kernel adds up children's processor time only where the parents wait for them, and Ray's daemon does not wait for its
workers. So the tree is read from /proc every quarter of a second; what is missed is the last quarter of each process.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.25
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
# A process is its number and its start: numbers are used again.
Process = tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """Of a whole command; memory in MiB, that of the largest process, and the largest sum at one moment."""

    cpu_seconds: float
    wall_seconds: float
    peak_rss_mib: float
    sum_rss_mib: float


@dataclass(frozen=True)
class Seen:
    process: Process
    parent: int
    seconds: float
    resident: int


def read_process(number: str) -> Seen | None:
    """None if the process is gone."""
    try:
        fields = Path("/proc", number, "stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    parent, user, system, start, pages = (int(fields[place]) for place in (1, 11, 12, 19, 21))
    return Seen((int(number), start), parent, (user + system) / TICK, pages * PAGE)


def peak_resident(process: Process) -> int:
    """The most that a process ever held, bytes; 0 if it is gone."""
    try:
        lines = Path("/proc", str(process[0]), "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


@dataclass
class Tree:
    """A process and all that descend from it, those whose parents are gone too."""

    seconds: dict[Process, float]
    peak: int = 0
    most: int = 0

    def look(self) -> None:
        """One reading."""
        found = [seen for name in os.listdir("/proc") if name.isdigit() and (seen := read_process(name))]
        by_number = {seen.process[0]: seen for seen in found}
        mine = [seen for seen in found if self.is_mine(seen, by_number)]
        for seen in mine:
            self.seconds[seen.process] = seen.seconds
            self.peak = max(self.peak, peak_resident(seen.process))
        self.most = max(self.most, sum(seen.resident for seen in mine))

    def is_mine(self, seen: Seen, by_number: dict[int, Seen]) -> bool:
        """Whether it was seen before, or its parent, or its parent's parent is one of the tree."""
        walked: Seen | None = seen
        while walked is not None and walked.process not in self.seconds:
            walked = by_number.get(walked.parent)
        return walked is not None


def measure(command: list[str], environment: dict[str, str], folder: Path, log: Path) -> tuple[int, Cost]:
    """Run a command to its end with its output in a log. Returns its exit status and what it cost."""
    began = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        first = read_process(str(child.pid))
        tree = Tree({first.process: 0.0} if first else {})
        while True:
            tree.look()
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
            if ended:
                break
            time.sleep(EVERY)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    # Both miss something: the readings each process's end, the kernel's sum what nobody waited for.
    cpu = max(sum(tree.seconds.values()), usage.ru_utime + usage.ru_stime)
    return child.returncode, Cost(round(cpu, 1), round(seconds, 1), tree.peak >> 20, tree.most >> 20)
