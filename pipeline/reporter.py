"""What the driver tells of a run; `pipeline.progress` has the two that people and machines see."""

from __future__ import annotations

from typing import Any, Protocol

from cluster.scheduler import Event, Instruction
from pipeline.graph import Node


class Reporter(Protocol):
    """Told what happens; decides what a person or a machine sees of it."""

    def message(self, text: str) -> None:
        """Something to know, in one line."""

    def begin(self, stage_totals: dict[str, tuple[int, int]]) -> None:
        """Units start: by stage, how many there are and how many are done already."""

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        """One unit is committed."""

    def event(self, event: Event | Instruction) -> None:
        """Anything of the cluster."""


class Together:
    """Several reporters as one."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters

    def message(self, text: str) -> None:
        for reporter in self.reporters:
            reporter.message(text)

    def begin(self, stage_totals: dict[str, tuple[int, int]]) -> None:
        for reporter in self.reporters:
            reporter.begin(stage_totals)

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        for reporter in self.reporters:
            reporter.finished(node, result)

    def event(self, event: Event | Instruction) -> None:
        for reporter in self.reporters:
            reporter.event(event)
