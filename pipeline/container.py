"""What a container leaves of its machine."""

from __future__ import annotations

from pathlib import Path

# Of the second and of the first version of control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def container_limit() -> float | None:
    """Bytes of memory that this process's container may have; None without a limit. It may be more than the machine has."""
    for file in _LIMITS:
        try:
            return float(Path(file).read_text())
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return None
