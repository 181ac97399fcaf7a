"""The reference of keys: `lsi keys`."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import REFUSED, app
from pipeline.config_file import parse_config, valid_keys
from pipeline.keys import keys_of


def test_every_key_is_there_with_a_meaning() -> None:
    keys = keys_of()
    sections = {key.split(".")[0] for key in valid_keys() if "." in key}
    assert {key.name for key in keys} == set(valid_keys()) - sections
    assert all(key.takes and key.meaning for key in keys)


def test_what_is_printed_as_default_is_the_default() -> None:
    needed = {"model.source": "m", "data.source": "d", "storage.run": "r"}
    assert {key.name for key in keys_of() if not key.default} == set(needed)
    written: dict[str, dict[str, object]] = {}
    for key in keys_of():
        section, _, name = key.name.rpartition(".")
        place = written.setdefault(section, {}) if section else written
        place[name] = needed.get(key.name) or yaml.safe_load(key.default)  # type: ignore[assignment]
    bare = {name.split(".")[0]: {name.split(".")[1]: value} for name, value in needed.items()}
    assert parse_config(written) == parse_config(bare)


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("method.increment", "none, diagonal, corner, band, dense"),
        ("method.rank", "integer or null, ≥ 1"),
        ("scheme.activation_bits", "4, 6, 8 or null"),
        ("storage.lease_seconds", "number, > 0, ≤ 600"),
        ("evaluation.texts", "mapping"),
    ],
)
def test_what_a_key_takes(name: str, takes: str) -> None:
    [key] = [key for key in keys_of(name.split(".")[0]) if key.name == name]
    assert key.takes == takes


def test_the_command_shows_a_section_and_refuses_an_unknown_one() -> None:
    run = CliRunner().invoke
    shown = run(app, ["keys", "schedule"])
    assert shown.exit_code == 0
    assert "schedule.lead: 0" in shown.output
    assert "data.samples" not in shown.output
    assert [key["name"] for key in json.loads(run(app, ["keys", "preset", "--json"]).output)] == ["preset"]
    refused = run(app, ["keys", "metod"])
    assert refused.exit_code == REFUSED
    assert "did you mean method?" in refused.output
