"""`lsi doctor` for a person."""

from __future__ import annotations

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table

from pipeline.doctor import Check

MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "failed": "[bold red]failed[/]"}


def doctor_view(checks: Iterable[Check]) -> Table:
    """What was checked, what was found, what to do."""
    table = Table("check", "")
    for name in ("finding", "remedy"):
        table.add_column(name, overflow="fold")  # a path is of no use without its end
    for check in checks:
        table.add_row(check.name, MARKS[check.state], escape(check.finding), escape(check.remedy))
    return table
