"""What a run shows while it runs: bars on a terminal, one JSON line an event elsewhere."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

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

from cluster.scheduler import Assign, Event, Instruction, UnitFailed, WorkerJoined, WorkerLost
from pipeline.graph import Node

STAGES = {
    "inspect": "read weights",
    "capture": "capture",
    "optimize": "optimize",
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

    def __enter__(self) -> TerminalReporter:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

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
    """JSON lines on standard error: messages and troubles at once, progress at most every `every` seconds."""

    def __init__(self, every: float = 5.0) -> None:
        self.every = every
        self.totals: dict[str, list[int]] = {}
        self.last = 0.0

    def __enter__(self) -> LineReporter:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def line(self, event: str, **fields: Any) -> None:
        print(json.dumps({"time": round(time.time(), 3), "event": event} | fields), file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        self.line("message", text=text)

    def begin(self, stage_totals: dict[str, tuple[int, int]]) -> None:
        self.totals = {stage: [done, total] for stage, (total, done) in stage_totals.items()}
        self.line("progress", done=self.totals)

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        self.totals[node.stage][0] += 1
        if time.monotonic() - self.last >= self.every or all(done == total for done, total in self.totals.values()):
            self.last = time.monotonic()
            self.line("progress", done=self.totals, unit=node.name, loss=result.get("loss"))

    def event(self, event: Event | Instruction) -> None:
        if text := trouble(event):
            self.line("trouble", text=text)


def make_reporter() -> TerminalReporter | LineReporter:
    """Bars if a person watches, lines if not."""
    return TerminalReporter() if sys.stderr.isatty() else LineReporter()


def stage_of(unit: str) -> str:
    stage = unit.partition("/")[0]
    return "capture" if stage == "embed" else stage


def note_of(node: Node, result: dict[str, Any]) -> str:
    """A few words on what the unit found."""
    if result.get("loss") is not None:
        return f"block {node.block}  loss {result['loss']:.3e}"
    if "perplexity" in result:
        _, variant, text = node.name.split("/")
        return f"{variant.replace('_', ' ')}, {text}: {result['perplexity']:.2f}"
    return ""


def trouble(event: Event | Instruction) -> str | None:
    """One line for what a person should know of; joins are silent, losses are not."""
    match event:
        case WorkerLost(worker, reason):
            return f"{worker} was lost ({reason}); its unit goes to another"
        case UnitFailed(unit, worker, "retry", message):
            return f"{unit} failed on {worker} and is tried again: {message}"
        case WorkerJoined():
            return None
        case _:
            return None
