"""Ends whatever a private Ray leaves behind, however its driver ended. A script for a process of its own.

When the driver is killed, Ray's servers die with it and the workers within seconds, but its two agents per machine stay
for another minute, trying to report the death to a server that is gone; and what a worker had started itself stays for
good. All of them hold a log in Ray's private directory open. (A mark in the environment would not do: a process that
sets its title, as Ray's do, overwrites what /proc shows of it.)
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path


def holders(directory: str) -> set[int]:
    """Processes with an open file in the directory. Empty where there is no /proc: Ray's own ways must do there."""
    processes = Path("/proc").glob("[0-9]*")
    return {int(path.name) for path in processes if any(f.startswith(f"{directory}/") for f in _open_files(path))}


def _open_files(process: Path) -> list[str]:
    files = []
    with suppress(OSError):  # ended meanwhile, or another user's
        for descriptor in (process / "fd").iterdir():
            with suppress(OSError):
                files.append(os.readlink(descriptor))
    return files


def end_all(directory: str, spare: int, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while (pids := holders(directory) - {spare}) and time.monotonic() < deadline:  # one may have started another
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def main(directory: str) -> None:
    driver = os.getppid()  # where it lives on after its session, its own log may still be open
    sys.stdin.buffer.read()  # the driver holds the other end, and the kernel closes it whatever happens to the driver
    end_all(directory, spare=driver)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
