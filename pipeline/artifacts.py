"""The commit protocol: data first, then a small record with sizes and checksums.

An artifact is a folder `kind/name-key` of a store. It is there if and only if its record is whole and agrees with the data.
The key is a content address: a hash of everything that the artifact is made from, so equal keys mean equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeline.store import Buffer, Store, iter_pieces
from pipeline.tensors import deserialize, serialize

RECORD = "commit.json"


class CorruptArtifactError(Exception):
    """A committed artifact is missing, or does not agree with its record."""

    def __init__(self, artifact: Artifact, reason: str) -> None:
        super().__init__(f"{artifact.path}: {reason}")
        self.artifact = artifact
        self.reason = reason


@dataclass(frozen=True)
class Artifact:
    """A committed result: `kind` is the stage that makes it, `name` says which one, `key` is its content address (hex).

    The path holds the key's first 16 digits; the record holds all of it.
    """

    kind: str
    name: str
    key: str

    @property
    def path(self) -> str:
        return f"{self.kind}/{self.name}-{self.key[:16]}"


def artifact_of(path: str) -> Artifact:
    """An artifact from its path; the key is shortened as the path has it."""
    kind, _, rest = path.partition("/")
    name, _, key = rest.rpartition("-")
    return Artifact(kind, name, key)


@dataclass(frozen=True)
class Record:
    """What was committed: `files` maps a file's name to (bytes, sha256); `meta` is JSON for people and reports."""

    key: str
    files: dict[str, tuple[int, str]]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(size for size, _ in self.files.values())


def digest(value: object) -> str:
    """Content address of a JSON value: sha256 of its canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def put_hashed(store: Store, key: str, pieces: Iterable[Buffer]) -> tuple[int, str]:
    """Write an object, hashing it on the way. Returns (bytes, sha256)."""
    hasher, size = hashlib.sha256(), 0

    def hashed() -> Iterable[Buffer]:
        nonlocal size
        for piece in pieces:
            for part in iter_pieces(memoryview(piece)):
                hasher.update(part)
                size += len(part)
                yield part

    store.put(key, hashed())
    return size, hasher.hexdigest()


class Writer:
    """Collects an artifact's files; nothing counts before `commit`."""

    def __init__(self, store: Store, artifact: Artifact) -> None:
        self.store = store
        self.artifact = artifact
        self.files: dict[str, tuple[int, str]] = {}

    def write(self, name: str, pieces: Iterable[Buffer]) -> None:
        """Write one file."""
        self.files[name] = put_hashed(self.store, f"{self.artifact.path}/{name}", pieces)

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.write(name, serialize(tensors))

    def commit(self, meta: dict[str, Any]) -> Record:
        """Publish. The record carries a checksum of itself, so a torn one is recognised."""
        record = Record(self.artifact.key, self.files, meta)
        body = {"key": record.key, "files": {n: list(f) for n, f in self.files.items()}, "meta": meta}
        self.store.put(
            f"{self.artifact.path}/{RECORD}", json.dumps({"body": body, "checksum": digest(body)}, indent=1).encode()
        )
        return record


def parse_record(text: bytes) -> Record:
    """A record from its bytes. Raises ValueError for a torn or altered one."""
    try:
        whole = json.loads(text)
        body = whole["body"]
        if digest(body) != whole["checksum"]:
            raise ValueError("its checksum does not match")
        return Record(body["key"], {n: (int(s), str(h)) for n, (s, h) in body["files"].items()}, body["meta"])
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"it is not a whole commit record ({error})") from error


def read_record(store: Store, artifact: Artifact) -> Record | None:
    """The record if the artifact is committed, None if not. Raises CorruptArtifactError for a damaged record."""
    try:
        text = store.get(f"{artifact.path}/{RECORD}")
    except FileNotFoundError:
        return None
    try:
        record = parse_record(text)
    except ValueError as error:
        raise CorruptArtifactError(artifact, f"damaged commit record: {error}") from error
    if not record.key.startswith(artifact.key):
        raise CorruptArtifactError(artifact, f"its commit record belongs to {record.key[:16]}…")
    return record


def read_file(store: Store, artifact: Artifact, name: str, record: Record | None = None) -> bytes:
    """One file, verified. Raises CorruptArtifactError if it is not there or not what was committed."""
    record = record or read_record(store, artifact)
    if record is None or name not in record.files:
        raise CorruptArtifactError(artifact, f"{name} is not committed")
    try:
        data = store.get(f"{artifact.path}/{name}")
    except FileNotFoundError as error:
        raise CorruptArtifactError(artifact, f"{name} is missing though it was committed") from error
    size, checksum = record.files[name]
    if len(data) != size or hashlib.sha256(data).hexdigest() != checksum:
        raise CorruptArtifactError(artifact, f"{name} has {len(data)} bytes that differ from the {size} committed ones")
    return data


def read_tensors(store: Store, artifact: Artifact, name: str) -> dict[str, Tensor]:
    """One safetensors file, verified."""
    return deserialize(read_file(store, artifact, name))


def intact(store: Store, artifact: Artifact, say: Callable[[str], None] = lambda text: None) -> Record | None:
    """The record of a committed artifact whose files have their sizes; None otherwise, what is damaged being cleared away."""
    try:
        record = read_record(store, artifact)
        if record is None:
            return None
        sizes = store.list(artifact.path)
        for name, (size, _) in record.files.items():
            if sizes.get(f"{artifact.path}/{name}") != size:
                raise CorruptArtifactError(artifact, f"{name} is missing or has another size than was committed")
    except CorruptArtifactError as error:
        say(f"damaged, will be redone: {error}")
        discard(store, artifact)
        return None
    return record


def discard(store: Store, artifact: Artifact) -> None:
    """Remove an artifact, record first, so that no moment shows a record without its data."""
    store.delete(f"{artifact.path}/{RECORD}")
    store.delete_all(artifact.path)


def committed(store: Store, kinds: Iterable[str]) -> dict[str, int]:
    """Paths of the artifacts that have a record, of the given kinds, with the bytes each takes. Sizes are checked elsewhere."""
    found: dict[str, int] = {}
    for kind in kinds:
        sizes: dict[str, int] = {}
        done = set()
        for key, size in store.list(kind).items():
            folder, _, name = key.rpartition("/")
            sizes[folder] = sizes.get(folder, 0) + size
            if name == RECORD:
                done.add(folder)
        found |= {folder: sizes[folder] for folder in done}
    return found
