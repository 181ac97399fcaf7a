"""Presets: one word in a configuration that stands for a method, an optimizer, a schedule and an end, by bits and grouping.

A preset is a YAML file of configs/presets:

    set: {method: ..., optimizer: ..., schedule: ...}
    rules:
      - when: {bits: [2, 3], grouped: false}
        set: {optimizer: {epochs: 20}}

Values of `set` hold always; of the rules whose every condition is met, each one's values replace those before it; the values in
the user's own file and on the command line replace all, and a schedule of another kind the preset's whole one. Conditions:
bits (one, or a list), grouped (whether inputs are in groups), symmetric, activations (whether they are quantized, too).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

SECTIONS = ("method", "optimizer", "schedule", "end_to_end")


def preset_folder() -> Path:
    """Beside the package where it was installed, configs/presets in a clone (see pyproject.toml)."""
    installed = Path(__file__).parent / "preset_files"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs" / "presets"


def preset_names() -> list[str]:
    """Every preset there is."""
    return sorted(file.stem for file in preset_folder().glob("*.yaml"))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both trees; where both have a value, the one above."""
    both = dict(below)
    for key, value in above.items():
        inner = both.get(key)
        both[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both


def met(condition: dict[str, Any], scheme: dict[str, Any]) -> bool:
    """Whether a scheme, with all its values, is one that a rule is for."""
    facts = {
        "bits": scheme["bits"],
        "grouped": scheme["group_size"] is not None,
        "symmetric": scheme["symmetric"],
        "activations": scheme["activation_bits"] is not None,
    }
    return all(facts[name] in (wanted if isinstance(wanted, list) else [wanted]) for name, wanted in condition.items())


def preset_values(name: str, scheme: dict[str, Any]) -> dict[str, Any]:
    """A preset's sections for a scheme. Raises UserError if there is no such preset."""
    names = preset_names()
    if name not in names:
        raise UserError(f"preset {name!r} does not exist; there are {', '.join(names)}")
    preset = yaml.safe_load((preset_folder() / f"{name}.yaml").read_text())
    values: dict[str, Any] = preset["set"]
    for rule in preset.get("rules", []):
        if met(rule["when"], scheme):
            values = merged(values, rule["set"])
    return values


def expand(tree: dict[str, Any], scheme: dict[str, Any]) -> dict[str, Any]:
    """A configuration's tree with the preset's values under its own; `scheme` has its values with their defaults."""
    if tree.get("preset") is None:
        return tree
    values, own = preset_values(str(tree["preset"]), scheme), tree.get("schedule")
    kind = values.get("schedule", {}).get("kind")
    if isinstance(own, dict) and own.get("kind", kind) != kind:
        # A lead means nothing to another kind of schedule, and would be refused without having been typed.
        values = {name: section for name, section in values.items() if name != "schedule"}
    return merged(values, tree)
