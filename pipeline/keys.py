"""The keys of a configuration: what each takes, its default, what it means (`lsi keys`)."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pipeline.config import RunConfig
from pipeline.config_file import fields_of, section_of
from pipeline.errors import UserError

WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", NoneType: "null"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤"}


@dataclass(frozen=True)
class Key:
    """One line of the reference. `default`: as it is written in a file; "" for a key that must be given."""

    name: str
    takes: str
    default: str
    meaning: str


def keys_of(section: str | None = None) -> list[Key]:
    """All keys in the file's order, or a section's. Raises UserError if there is no such section."""
    every = [_key(name, field) for name, field in fields_of() if not section_of(field)]
    if section is None:
        return every
    if found := [key for key in every if section in (key.name, key.name.split(".")[0])]:
        return found
    heads = list(RunConfig.model_fields)
    near = difflib.get_close_matches(section, heads, n=1)
    raise UserError(
        f"a configuration has no section {section!r}; {f'did you mean {near[0]}?' if near else 'there are ' + ', '.join(heads)}"
    )


def _key(name: str, field: FieldInfo) -> Key:
    default = "" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
    return Key(name, _takes(field), default, field.description or "")


def _takes(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in SIGNS.items()
        if hasattr(bound, name)
    ]
    return ", ".join([_words(field.annotation), *limits])


def _words(kind: Any) -> str:
    """Of a type, such as "none, diagonal" or "integer or null"."""
    if kind in WORDS:
        return WORDS[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(str(value) for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_words(one) for one in inner)
    if origin is list:
        return f"list of {_words(inner[0])}"
    assert origin is dict
    return "mapping"
