"""A configuration from a YAML file: every key overridable on the command line, and one sentence for whatever is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pipeline.config import RunConfig
from pipeline.config_sections import FINETUNE_BLOCKS, SchemeConfig, Section
from pipeline.errors import UserError
from pipeline.presets import expand

QUOTED = re.compile(r"'[^']*'")


def read_yaml(text: str) -> Any:
    """What a YAML text says. Raises yaml.YAMLError, for a key that stands twice too: of two sections of one name YAML loses the
    first without a word."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(node, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_keys(node: yaml.Node, seen: set[int]) -> None:
    if id(node) in seen or not isinstance(node, yaml.MappingNode | yaml.SequenceNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _check_keys(one, seen)
        return
    names: set[str] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands there twice", problem_mark=key.start_mark)
            names.add(key.value)
        _check_keys(value, seen)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a key holds; None for one with a value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def fields_of(section: type[BaseModel] = RunConfig, above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key, sections and leaves, and what is said of it."""
    for name, field in section.model_fields.items():
        yield f"{above}{name}", field
        if inner := section_of(field):
            yield from fields_of(inner, f"{above}{name}.")


def valid_keys() -> list[str]:
    """Every dotted key, sections and leaves."""
    return [key for key, _ in fields_of()]


def parse_override(text: str) -> tuple[list[str], Any]:
    """`section.key=value`, the value read as YAML."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"override {text!r}: write it as section.key=value, for example scheme.bits=3")
    try:
        return path.strip().split("."), read_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"override of {path.strip()}: the value is not valid YAML; put quotes around it") from error


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The tree with every override in place."""
    for text in overrides:
        path, value = parse_override(text)
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"override of {'.'.join(path)}: {part} is a value, not a section")
        node[path[-1]] = value
    return tree


def _nearest(path: str) -> str:
    """The valid key that an unknown one may have meant: of its own section, or of any; else what the section holds."""
    section, _, leaf = path.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in valid_keys() if key.rpartition(".")[0] == section}
    anywhere = {key.rpartition(".")[2]: key for key in reversed(valid_keys())}
    for candidates in (siblings, anywhere):
        if near := difflib.get_close_matches(leaf, candidates, n=1):
            return f"did you mean {candidates[near[0]]}?"
    return f"valid here: {', '.join(siblings)}"


def _explain(errors: list[Any], where: str) -> str:
    lines = []
    for error in errors:
        path = ".".join(str(part) for part in error["loc"])
        if error["loc"][:2] == ("storage", "options"):
            error = {**error, "input": "(not shown)"}
        if error["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key {path}; {_nearest(path)}")
        elif error["type"] == "missing":
            lines.append(f"{where}: {path} is required")
        elif error["type"] == "value_error":
            # A rule across a section's keys names those that it is about.
            value = "" if not path or isinstance(error["input"], dict) else f"{path} = {error['input']!r}: "
            lines.append(f"{where}: {value}{error['ctx']['error']}")
        else:
            lines.append(f"{where}: {path} = {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}")
    return "\n".join(lines)


def _expanded(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """The tree with its preset's values; as it is where the scheme that they depend on is refused anyway."""
    try:
        scheme = SchemeConfig.model_validate(tree.get("scheme", {}))
    except ValidationError:
        return tree
    try:
        return expand(tree, scheme.model_dump())
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def parse_config(tree: object, where: str = "config") -> RunConfig:
    """A checked configuration. Raises UserError with one sentence a problem."""
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected sections such as model:, data: and storage:, found {type(tree).__name__}")
    try:
        return RunConfig.model_validate(_expanded(tree, where))
    except ValidationError as error:
        raise UserError(_explain(error.errors(), where)) from error


def load_config(path: str, overrides: list[str]) -> RunConfig:
    """Read a YAML file and apply `section.key=value` overrides."""
    return parse_config(read_tree(path, overrides), path)


def load_finetune(checkpoint: str, path: str, overrides: list[str]) -> RunConfig:
    """The same for a fine-tune of a checkpoint, which is its model. Raises UserError if the file names another one."""
    tree = read_tree(path, overrides)
    if isinstance(tree, dict) and isinstance(model := tree.setdefault("model", {}), dict):
        if model.setdefault("source", checkpoint) != checkpoint:
            raise UserError(
                f"{path}: model.source is {model['source']}, but a fine-tune's model is its checkpoint, {checkpoint}: leave it out"
            )
        if isinstance(section := tree.setdefault("finetune", {}), dict):
            section.setdefault("blocks", FINETUNE_BLOCKS)
    return parse_config(tree, path)


def read_tree(path: str, overrides: list[str]) -> object:
    """What a YAML file holds, with overrides. Raises UserError if it cannot be read."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such config file; see configs/ for examples")
    try:
        tree = read_yaml(file.read_text())
    except yaml.MarkedYAMLError as error:  # without the line itself, which may hold a secret
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = QUOTED.sub("…", error.problem or "")
        raise UserError(f"{path}: not valid YAML{line}: {problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    tree = {} if tree is None else tree
    return apply_overrides(tree, overrides) if isinstance(tree, dict) else tree


def differing_keys(ours: object, theirs: object, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, as `key: theirs → ours`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(set(ours) | set(theirs))
        return [d for k in keys for d in differing_keys(ours.get(k), theirs.get(k), f"{prefix}{k}.")]
    return [] if ours == theirs else [f"{prefix[:-1]}: {theirs!r} there, {ours!r} here"]
