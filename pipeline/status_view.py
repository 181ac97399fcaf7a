"""`lsi status` for a person: tables on a terminal, the same as plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.report import divergence_words, end_flag

FAILURES = 5
Rows = list[tuple[str, ...]]
STAGE_HEADER = ("stage", "done", "left", "running", "a minute", "time left")
WORKER_HEADER = ("worker", "host", "runs", "for")


def duration(seconds: float | None) -> str:
    """Such as 40 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def headline(found: dict[str, Any]) -> str:
    """The run and how it stands."""
    flagged = found["flagged_blocks"]
    odd = f", {len(flagged)} block{'s' * (len(flagged) > 1)} flagged" if flagged else ""
    scheme = f"{found['scheme']}; " if found["scheme"] else ""
    return f"{found['run']}: {scheme}{found['state']}{odd}"


def driver_line(found: dict[str, Any]) -> str:
    """Who holds the run and whether that one lives, or what became of the last driver."""
    driver = found["driver"]
    if driver is None:
        return "no driver has left word"
    who = f"host {driver['host']}, process {driver['pid']}"
    lease = driver["lease"]
    if lease is None:
        how = f"ended: {driver['end']}" if driver["state"] == "ended" else "was lost without a word"
        return f"not driven now; the last driver, {who}, {how} ({_ago(driver)})"
    who = f"{who}, since {lease['since']}"
    match driver["state"]:
        case "alive":
            return f"driven by {who}: alive, beat {lease['beat']}"
        case "gone":
            return f"was held by {who}, a process that has ended without giving it back: the next `lsi quantize` here takes over at once"
        case "silent":
            return f"held by {who}, whose beat stands still at {lease['beat']}: dead or cut off; the next `lsi quantize` takes over"
    return f"held by {who}; last sign of life: beat {lease['beat']} (--watch tells whether it goes on)"


def _ago(driver: dict[str, Any]) -> str:
    return f"{duration(driver['last_word_seconds_ago'])} ago by this machine's clock"


def driven(found: dict[str, Any]) -> bool:
    return found["driver"] is not None and found["driver"]["state"] in ("alive", "held")


def stage_rows(found: dict[str, Any]) -> Rows:
    """A header and a row a stage; rates and times only while somebody drives."""
    rows: Rows = [STAGE_HEADER if driven(found) else STAGE_HEADER[:3]] if found["stages"] else []
    for stage, count in found["stages"].items():
        row = (stage, f"{count['total'] - count['left']} of {count['total']}", str(count["left"] or ""))
        rows.append(row + _pace(count) if driven(found) else row)
    return rows


def _pace(count: dict[str, Any]) -> tuple[str, ...]:
    if not count["left"]:
        return ("", "", "")
    rate = "" if count["per_minute"] is None else f"{count['per_minute']:.1f}"
    left = duration(count["seconds_left"])
    return (str(count["running"] or ""), rate, f"about {left}" if left else "")


def worker_rows(found: dict[str, Any]) -> Rows:
    now = time.time()
    workers = found["workers"] if driven(found) else []
    header: Rows = [WORKER_HEADER] if workers else []
    return header + [
        (w["name"], w["host"] or "", w["unit"] or "(idle)", duration(max(0.0, now - w["since"]))) for w in workers
    ]


def notes(found: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Further lines, each with its style: blocks done, flagged ones, failures."""
    if found["blocks_total"]:
        yield f"blocks done: {len(found['blocks'])} of {found['blocks_total']}", ""
    done = {block["block"]: block for block in found["blocks"] if block["status"] != "ok"}
    waiting = {q["block"]: q | {"status": "quarantined", "kept": "to be rounded"} for q in found["quarantined"]}
    for number, block in sorted((waiting | done).items()):
        kept = block["kept"].replace("_", "-")
        yield f"block {number}: {block['status'].replace('_', '-').upper()}, {kept}: {block['reason']}", "yellow"
    if found["end_to_end"]:
        yield f"divergence: {divergence_words(found['end_to_end'])}", ""
        yield from ((line, "yellow") for line in end_flag(found["end_to_end"]))
    failures = found["failures"][-FAILURES:]
    if failures:
        yield f"last failures ({len(found['failures'])} kept):", ""
    for failure in failures:
        ago = duration(max(0.0, time.time() - failure["time"]))
        yield f"  {ago} ago, {failure['unit'] or 'no unit'} on {failure['worker']}: {failure['reason']}", "red"


def status_lines(found: dict[str, Any]) -> list[str]:
    """Plain lines."""
    lines = [headline(found), f"  {driver_line(found)}"]
    for rows in (stage_rows(found), worker_rows(found)):
        lines += _columns(rows) if rows else []
    return lines + [f"  {text}" for text, _ in notes(found)]


def _columns(rows: Rows) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def status_view(found: dict[str, Any]) -> RenderableType:
    """The same for a terminal."""
    style = "green" if found["state"] == "finished" and not found["flagged_blocks"] else "yellow"
    parts: list[RenderableType] = [Text(headline(found), style=f"bold {style}"), Text(driver_line(found))]
    if rows := stage_rows(found):
        parts.append(_table(rows, numbers=True))
    if rows := worker_rows(found):
        parts.append(_table(rows, numbers=False))
    return Group(*parts, *(Text(text, style=style) for text, style in notes(found)))


def _table(rows: Rows, *, numbers: bool) -> Table:
    table = Table(header_style="bold")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if numbers and index else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table
