"""What `lsi plan` says of memory, engine, time and money, for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.estimate import human_bytes


def plan_lines(found: Mapping[str, Any]) -> list[str]:
    """Memory, engine, time and money for a person."""
    memory, time = found["memory"], found["time"]
    lines = ["", *_table(memory, found["traffic"]), "", *_why(memory), *_engine_lines(memory)]
    low, high = (human_seconds(value) for value in time["seconds"])
    source = "by the calibration" if time["calibrated"] else "for an assumed speed; --calibrate measures this machine's"
    count = f"{time['workers']} {'worker' if time['workers'] == 1 else 'workers'}"
    lines.append(f"time          {low} to {high} on {count} ({source})")
    if time["money"] is not None:
        lines.append(f"money         {time['money'][0]:.2f} to {time['money'][1]:.2f}")
    return lines


def _table(memory: Mapping[str, Any], traffic_of: Mapping[str, Any]) -> list[str]:
    header = ("a unit of", "host", "device", "reads", "writes", "scratch", "fullest while")
    rows = [header]
    for stage, unit in memory["units"].items():
        moved, device = traffic_of.get(stage, {}), unit["device"]
        sizes = (moved.get(name, 0.0) for name in ("read", "written", "scratch"))
        shown = [human_bytes(size) if size else "-" for size in sizes]
        on_device = human_bytes(device["bytes"]) if device else "-"
        rows.append((stage, human_bytes(unit["host"]["bytes"]), on_device, *shown, (device or unit["host"])["moment"]))
    rows.append(("(driver)", human_bytes(memory["driver"]), "-", "-", "-", "-", "planning"))
    widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _why(memory: Mapping[str, Any]) -> list[str]:
    """The terms of the fullest units."""
    lines = []
    for place in ("host", "device"):
        peaks = {stage: unit[place] for stage, unit in memory["units"].items() if unit[place]}
        if peaks:
            stage = max(peaks, key=lambda name: peaks[name]["bytes"])
            terms = sorted(peaks[stage]["terms"].items(), key=lambda term: -term[1])
            shown = ", ".join(f"{name} {human_bytes(size)}" for name, size in terms if size >= 2**20)
            lines.append(f"{place:<13} {human_bytes(peaks[stage]['bytes'])} a worker, in {stage}: {shown}")
    return lines


def _engine_lines(memory: Mapping[str, Any]) -> list[str]:
    said = f"engine        {memory['engine']} on {memory['device']}, {memory['micro_batch']} "
    lines = [said + ("sequence at once" if memory["micro_batch"] == 1 else "sequences at once")]
    lines += [f"set           {line}  ({why})" for line, why in memory["proposal"]]
    return lines


def human_seconds(value: float) -> str:
    """Such as 3.4 h."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} s"
