"""`lsi keys` for a person."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from pipeline.keys import Key


def keys_view(keys: Iterable[Key]) -> Group:
    """A line of each key's name, default and values, and what it means under it."""
    lines: list[Text | Padding] = []
    for key in keys:
        default = f": {key.default}" if key.default else " (required)"
        lines.append(Text.from_markup(f"[bold]{escape(key.name)}[/]{escape(default)}  [dim]{escape(key.takes)}[/]"))
        lines.append(Padding(escape(key.meaning), (0, 0, 0, 4), expand=False))
    return Group(*lines)
