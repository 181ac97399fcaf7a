"""The result of `lsi quantize` and `lsi finetune` for a person."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.report import divergence_words, perplexity_rows


def result_view(result: dict[str, Any]) -> Group:
    """Perplexities, where asked for, and what else there is to know at the end of a run (`pipeline.report.write_result`)."""
    return Group(*_parts(result))


def _parts(result: dict[str, Any]) -> Iterator[RenderableType]:
    if result["perplexity"]:
        yield Text(f"Perplexity, {result['scheme']}")  # as a title it would be broken to the table's width
        header, rows = perplexity_rows(result["perplexity"])
        table = Table()
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        yield table
    if result["end_to_end"]:
        words = divergence_words(result["end_to_end"])
        yield Text(f"Divergence from full precision, by scales trained end to end: {words}")
    peaks = ", ".join(f"{name} {mib:.0f}" for name, mib in result["peak_rss_mib"].items())
    yield Text(f"Peak memory (MiB): {peaks}")
    place = result["checkpoint"] or f"none is published: {result['unpublished']}"
    yield Text(f"Checkpoint: {place}")
