"""Ends whatever a private Ray leaves behind, however its driver ended. A script for a process of its own.

When the driver is killed, Ray's servers die with it and the workers within seconds, but its two agents per machine stay
for another minute, trying to report the death to a server that is gone; and what a worker had started itself stays for
good. All of them carry the variable below in the environment that they were started with.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

VARIABLE = "CLUSTER_PRIVATE_RAY"


def marked(value: str) -> list[int]:
    """Processes that were started under the mark. Empty where there is no /proc: Ray's own ways must do there."""
    wanted = f"{VARIABLE}={value}".encode()
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if wanted in _environment(path)]


def _environment(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:  # ended meanwhile, or another user's
        return []


def end_all(value: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while (pids := marked(value)) and time.monotonic() < deadline:  # again: one may have started another meanwhile
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def main(directory: str) -> None:
    sys.stdin.buffer.read()  # the driver holds the other end, and the kernel closes it whatever happens to the driver
    end_all(directory)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
