"""Settings, results and tables of benchmarks/quality.py: what can be told without running anything."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COSTS = ("cpu_seconds", "wall_seconds", "peak_rss_mib", "sum_rss_mib")
# What makes a result the same one when a command is given again.
KEY = ("model", "samples", "tool", "setting", "seed")
FULL_PRECISION = "full-precision"


@dataclass(frozen=True)
class Setting:
    """A grid: bits, input channels that share a scale (None: all), zero point fixed or not; bits of activations, a scale a token."""

    bits: int
    group_size: int | None
    symmetric: bool = False
    activation_bits: int | None = None

    @property
    def name(self) -> str:
        """Such as w3g64, w4ch, w3ch-sym, w8a8ch-sym."""
        activations = f"a{self.activation_bits}" if self.activation_bits else ""
        group = f"g{self.group_size}" if self.group_size else "ch"
        return f"w{self.bits}{activations}{group}{'-sym' * self.symmetric}"


def parse_setting(text: str) -> Setting:
    """The setting of a name; w4 means w4ch. Raises ValueError."""
    found = re.fullmatch(r"w([23468])(?:a([468]))?(?:g([1-9]\d*)|ch)?(-sym)?", text)
    if not found:
        raise ValueError(
            f"setting {text!r}: write bits (2, 3, 4, 6, 8), those of activations (4, 6, 8) if any, and group as in w3g64, w4ch, "
            "w2g32-sym or w8a8ch-sym"
        )
    bits, activations, group, symmetric = found.groups()
    wanted = int(group) if group else None
    return Setting(int(bits), wanted, bool(symmetric), int(activations) if activations else None)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The results of a file; none if it is not there."""
    return json.loads(path.read_text()) if path.exists() else []


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """The whole list or what was there before: a command that is stopped must leave a readable file."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    os.replace(partial, path)


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in KEY)


def put_record(path: Path, record: dict[str, Any]) -> None:
    """Add a result in the place of an older one of the same key."""
    others = [other for other in read_records(path) if key_of(other) != key_of(record)]
    write_records(path, [*others, record])


def texts_of(records: Iterable[dict[str, Any]]) -> list[str]:
    """The names of the texts that were measured, in the order in which they came."""
    names = {name: None for record in records for name in record if name not in (*KEY, *COSTS)}
    return list(names)


def _mean(values: list[float], write: Callable[[float], str]) -> str:
    """The mean; of several, with half the distance of the outermost two."""
    spread = f" ± {write((max(values) - min(values)) / 2)}" if len(values) > 1 else ""
    return write(statistics.fmean(values)) + spread


def write_perplexity(value: float) -> str:
    return f"{value:.3g}" if value >= 1e5 else f"{value:.0f}" if value >= 1e3 else f"{value:.2f}"


def _row(tool: str, records: list[dict[str, Any]], texts: list[str]) -> str:
    cells = [tool, str(len(records))]
    cells += [_mean([r[text] for r in records if text in r], write_perplexity) for text in texts]
    cells += [_mean([r[cost] for r in records], "{:.0f}".format) if records[0].get(cost) else "" for cost in COSTS]
    return f"| {' | '.join(cells)} |"


def markdown(records: list[dict[str, Any]]) -> str:
    """A table for each model, number of samples and setting; tools from the best on the first text to the worst."""
    texts = texts_of(records)
    costs = ["CPU s", "wall s", "largest process MiB", "all processes MiB"]
    header = ["tool", "seeds", *texts, *costs]
    lines: list[str] = []
    groups = dict.fromkeys((r["model"], r["samples"], r["setting"]) for r in records if r["tool"] != FULL_PRECISION)
    for model, samples, setting in groups:
        here = [
            r
            for r in records
            if r["model"] == model
            and ((r["setting"] == setting and r["samples"] == samples) or r["tool"] == FULL_PRECISION)
        ]
        tools = {tool: [r for r in here if r["tool"] == tool] for tool in dict.fromkeys(r["tool"] for r in here)}
        ranked = sorted(tools, key=lambda tool: statistics.fmean(r[texts[0]] for r in tools[tool]))
        lines += [f"### {setting}, {model}, {samples} samples", ""]
        lines += [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
        lines += [*(_row(tool, tools[tool], texts) for tool in ranked), ""]
    return "\n".join(lines)
