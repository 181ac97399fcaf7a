"""What a run shows while it runs: bars on a terminal, and one JSON line an event elsewhere or in a file.

Every line has `time` (seconds since 1970) and `event`. Events of the cluster are named after their class and carry its fields:
`unit_started` (unit, worker), `unit_done` (unit, worker, host, seconds, peak_rss_mib and what the unit found, such as loss,
perplexity, taken_up_at_step), `unit_failed` (unit, worker, kind, reason, traceback), `unit_returned` (unit, worker: handed back
with what it had committed, since its worker was told to leave), `worker_joined` (worker, kind, memory), `worker_leaving` (worker),
`worker_lost` (worker, reason, on_request), `stop_requested` (reason), `gave_up` (reason), `end` (status, reason, unit, failures).
The driver's own are `message` (text) and, every few
seconds, `progress` (done: by stage how many units are done, of how many).
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cluster.scheduler import Assign, Event, Instruction, UnitFailed, UnitReturned, WorkerLost
from pipeline.errors import UserError
from pipeline.graph import Node
from pipeline.reporter import Reporter, Together

STAGES = {
    "inspect": "read weights",
    "capture": "capture",
    "optimize": "optimize",
    "end_to_end": "end to end",
    "evaluate": "evaluate",
    "merge": "merge",
}


class TerminalReporter:
    """A bar a stage, with the last loss; messages above them."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description:<13}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self.bars: dict[str, TaskID] = {}

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def begin(self, stage_totals: dict[str, tuple[int, int]]) -> None:
        for stage, (total, done) in stage_totals.items():
            if stage not in self.bars:
                self.bars[stage] = self.progress.add_task(STAGES[stage], start=False, total=total, note="")
            self.progress.update(self.bars[stage], total=total, completed=done)

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        self.progress.update(self.bars[node.stage], advance=1, note=note_of(node, result))

    def event(self, event: Event | Instruction) -> None:
        if isinstance(event, Assign):
            # Time left is reckoned from the first unit of a stage on, not from the start of the run.
            self.progress.start_task(self.bars[stage_of(event.unit)])
        elif text := trouble(event):
            self.message(text)


class LineReporter:
    """JSON lines to a stream: everything at once, counts at most every `every` seconds."""

    def __init__(self, stream: TextIO, every: float = 5.0) -> None:
        self.stream = stream
        self.every = every
        self.totals: dict[str, list[int]] = {}
        self.last = 0.0

    def line(self, event: str, **fields: Any) -> None:
        line = {"time": round(time.time(), 3), "event": event} | fields
        print(json.dumps(line, default=str), file=self.stream, flush=True)

    def message(self, text: str) -> None:
        self.line("message", text=text)

    def begin(self, stage_totals: dict[str, tuple[int, int]]) -> None:
        self.totals = {stage: [done, total] for stage, (total, done) in stage_totals.items()}
        self.line("progress", done=self.totals)

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        self.totals[node.stage][0] += 1
        if time.monotonic() - self.last >= self.every or all(done == total for done, total in self.totals.values()):
            self.last = time.monotonic()
            self.line("progress", done=self.totals)

    def event(self, event: Event | Instruction) -> None:
        self.line(event_name(event), **event_fields(event))


@contextmanager
def reporting(log: str | None) -> Iterator[Reporter]:
    """Bars if a person watches, lines on standard error if not; lines to the file `log` besides. Raises UserError."""
    with ExitStack() as stack:
        shown: Reporter
        if sys.stderr.isatty():
            shown = TerminalReporter()
            stack.enter_context(shown.progress)
        else:
            shown = LineReporter(sys.stderr)
        yield shown if log is None else Together(shown, LineReporter(stack.enter_context(open_log(log))))


def open_log(path: str) -> TextIO:
    """A file that is added to. Raises UserError."""
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--log {path}: cannot write there ({error.strerror}); choose another file") from error


def event_name(event: Event | Instruction) -> str:
    """Its class in words, so that a new kind of event is logged without being named here."""
    if isinstance(event, Assign):
        return "unit_started"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()


def event_fields(event: Event | Instruction) -> dict[str, Any]:
    """Flat: a unit's result among the others, with the seconds it took in the place of two times and what is empty left out."""
    found = {field.name: getattr(event, field.name) for field in fields(event)}
    result = found.pop("result", {})
    if "started" in result:
        result = result | {"seconds": round(result["ended"] - result["started"], 3)}
    found |= {name: value for name, value in result.items() if name not in ("started", "ended")}
    if "message" in found:
        found["reason"] = found.pop("message")
    return {name: value for name, value in found.items() if value not in (None, "", [])}


def stage_of(unit: str) -> str:
    stage = unit.partition("/")[0]
    return "capture" if stage == "embed" else stage


def note_of(node: Node, result: dict[str, Any]) -> str:
    """A few words on what the unit found."""
    if result.get("loss") is not None:
        where = f"block {node.block}" if node.block >= 0 else node.name.split("/")[1].replace("-", " ")
        return f"{where}  loss {result['loss']:.3e}"
    if "perplexity" in result:
        _, variant, text = node.name.split("/")
        return f"{variant.replace('_', ' ')}, {text}: {result['perplexity']:.2f}"
    return ""


def trouble(event: Event | Instruction) -> str | None:
    """One line for what a person should know of; joins are silent, losses are not."""
    match event:
        case WorkerLost(worker, on_request=True):
            return f"{worker} left, as it was asked to"
        case WorkerLost(worker, reason):
            return f"{worker} was lost ({reason}); what it ran goes to another"
        case UnitReturned(unit, worker):
            return f"{unit} was handed back by {worker}, which leaves; another goes on with it"
        case UnitFailed(unit, worker, "retry", message):
            return f"{unit} failed on {worker} and is tried again: {message}"
        case _:
            return None
