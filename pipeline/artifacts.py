"""The commit protocol: data first, then a small record with sizes and checksums.

An artifact is a folder `kind/name-key` of a store. It is there if and only if its record is whole and agrees with the data.
The key is a content address: a hash of everything that the artifact is made from, so equal keys mean equal bytes.

A unit may be done twice at the same time, by a worker that was given up and wakes again. So every attempt writes into a
folder of its own, which the record names, and the first whole record stays.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from lsi.engine import Later
from pipeline.store import Buffer, DamagedObjectError, Data, Store, iter_pieces
from pipeline.tensors import Part, TensorFileError, all_of, deserialize, gather, read_pieces, serialize

T = TypeVar("T")
RECORD = "commit.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TOKEN = re.compile(r"[0-9a-f]{16}")
_PATH = re.compile(r"([a-z]+)/([A-Za-z0-9][A-Za-z0-9_.-]*)-([0-9a-f]{16})")


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

    @staticmethod
    def parse(path: str) -> Artifact:
        """An artifact from its path; the key is shortened as the path has it. Raises ValueError for anything else."""
        match = _PATH.fullmatch(path)
        if match is None:
            raise ValueError(f"{path!r} is not the path of an artifact")
        return Artifact(*match.groups())


class StoredFile(NamedTuple):
    """One committed file: its size, its content, and the folder of the attempt that wrote it."""

    size: int
    sha256: str
    token: str


@dataclass(frozen=True)
class Record:
    """What was committed: `files` by name; `meta` is JSON for people and reports."""

    key: str
    files: dict[str, StoredFile]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())


def digest(value: object) -> str:
    """Content address of a JSON value: sha256 of its canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def put_hashed(store: Store, key: str, data: Data) -> tuple[int, str]:
    """Write an object, hashing it on the way. Returns (bytes, sha256)."""
    hasher, size = hashlib.sha256(), 0

    def hashed() -> Iterable[Buffer]:
        nonlocal hasher, size
        hasher, size = hashlib.sha256(), 0  # a write that failed begins again
        for piece in [data] if isinstance(data, bytes | memoryview) else data() if callable(data) else data:
            for part in iter_pieces(memoryview(piece)):
                hasher.update(part)
                size += len(part)
                yield part

    store.put(key, hashed)
    return size, hasher.hexdigest()


class Writer:
    """Collects one attempt's files of an artifact; nothing counts before `commit`."""

    def __init__(self, store: Store, artifact: Artifact) -> None:
        self.store = store
        self.artifact = artifact
        self.token = secrets.token_hex(8)
        self.files: dict[str, StoredFile] = {}

    @property
    def folder(self) -> str:
        """Where this attempt's files are, a folder that no other attempt uses."""
        return f"{self.artifact.path}/{self.token}"

    def write(self, name: str, data: Data) -> None:
        """Write one file. What there is of this attempt goes if that fails: on a full disk it would be in the way."""
        try:
            self.files[name] = StoredFile(*put_hashed(self.store, f"{self.folder}/{name}", data), self.token)
        except Exception:
            with suppress(Exception):
                self.drop()
            raise

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor | Later]) -> None:
        self.write(name, partial(serialize, tensors))

    def commit(self, meta: dict[str, Any]) -> Record:
        """Publish, unless another attempt has: its record is returned then, and this attempt's files go.

        The record carries a checksum of itself, so a torn one is recognised; it makes room. Raises LeaseLostError.
        """
        record = Record(self.artifact.key, self.files, meta)
        body = {"key": record.key, "files": {n: list(f) for n, f in self.files.items()}, "meta": meta}
        text = json.dumps({"body": body, "checksum": digest(body)}, indent=1).encode()
        key = f"{self.artifact.path}/{RECORD}"
        self.store.check_fence()
        while not self.store.create(key, text):
            if (found := self._earlier()) is not None:
                self.drop()
                return found
            self.store.delete(key)
        _remember(self.store, self.artifact, record)
        return record

    def _earlier(self) -> Record | None:
        """The record that is there already; None if it is damaged, or its data is."""
        try:
            found = read_record(self.store, self.artifact)
            if found is not None:
                check_sizes(self.store, self.artifact, found)
        except CorruptArtifactError:
            return None
        return found

    def drop(self) -> None:
        """Remove this attempt's files."""
        self.store.delete_all(self.folder)


class Standby(Writer):
    """Of a group's others, who compute what its first one writes: writes nothing."""

    def write(self, name: str, data: Data) -> None:
        """Nothing."""

    def commit(self, meta: dict[str, Any]) -> Record:
        """What the first one's record will say, but for its files."""
        return Record(self.artifact.key, {}, meta)


# Records are immutable while they are there, and every chunk of a stream is read through the same one.
_known: dict[tuple[str, str], Record] = {}
_MOST_KNOWN = 4096


def _remember(store: Store, artifact: Artifact, record: Record) -> None:
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[store.url, artifact.path] = record


def parse_record(text: bytes) -> Record:
    """A record from its bytes. Raises ValueError for a torn or altered one, and for one that names files outside its folder."""
    try:
        whole = json.loads(text)
        body = whole["body"]
        if digest(body) != whole["checksum"]:
            raise ValueError("its checksum does not match")
        files = {name: _parse_file(name, *entry) for name, entry in body["files"].items()}
        return Record(str(body["key"]), files, dict(body["meta"]))
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"it is not a whole commit record ({error})") from error


def _parse_file(name: str, size: int, sha256: str, token: str) -> StoredFile:
    if not _NAME.fullmatch(name) or not _TOKEN.fullmatch(token):
        raise ValueError(f"it names the file {name!r} in {token!r}, which no run writes")
    return StoredFile(int(size), str(sha256), token)


def read_record(store: Store, artifact: Artifact) -> Record | None:
    """The record if the artifact is committed, None if not. Raises CorruptArtifactError for a damaged record."""
    try:
        record = parse_record(store.get(f"{artifact.path}/{RECORD}"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptArtifactError(artifact, f"damaged commit record: {error}") from error
    if not record.key.startswith(artifact.key):
        raise CorruptArtifactError(artifact, f"its commit record belongs to {record.key[:16]}…")
    _remember(store, artifact, record)
    return record


def read_meta(store: Store, artifact: Artifact) -> dict[str, Any]:
    """What the record of a committed artifact says beside its files. Raises CorruptArtifactError."""
    record = read_record(store, artifact)
    if record is None:
        raise CorruptArtifactError(artifact, "its record is missing")
    return record.meta


def read_file(store: Store, artifact: Artifact, name: str, record: Record | None = None) -> bytes:
    """One file, verified. Raises CorruptArtifactError if it is not there or not what was committed."""
    return _committed(store, artifact, name, record, _whole)


def read_tensors(store: Store, artifact: Artifact, name: str, part: Part = all_of) -> dict[str, Tensor]:
    """One safetensors file, verified, in memory once, or as much of it as is wanted. Raises CorruptArtifactError."""
    return _committed(store, artifact, name, None, partial(_tensors, part=part))


# Reads an object that should have a size: what it holds (None if it is no such thing), its bytes, and their sha256.
Reader = Callable[[Store, str, int], tuple[T | None, int, str]]
# A state or a result is gigabytes; so much of it at once is read beside its tensors.
PIECE = 1 << 26


def _whole(store: Store, key: str, size: int) -> tuple[bytes, int, str]:
    data = store.get(key)
    return data, len(data), hashlib.sha256(data).hexdigest()


def _tensors(store: Store, key: str, size: int, part: Part) -> tuple[dict[str, Tensor] | None, int, str]:
    try:
        return _in_pieces(store, key, part) if size > PIECE or part is not all_of else _at_once(store, key, size)
    except (EOFError, TensorFileError):
        return None, store.size(key), ""


def _at_once(store: Store, key: str, size: int) -> tuple[dict[str, Tensor], int, str]:
    data, found, checksum = _whole(store, key, size)
    return deserialize(data), found, checksum


def _in_pieces(store: Store, key: str, part: Part) -> tuple[dict[str, Tensor], int, str]:
    size = store.size(key)
    hasher = hashlib.sha256()

    def hashed() -> Iterator[tuple[int, bytes]]:
        for start, data in read_pieces(store, key, size, PIECE):
            hasher.update(data)
            yield start, data

    return gather(hashed(), size, part), size, hasher.hexdigest()


def _committed(store: Store, artifact: Artifact, name: str, record: Record | None, read: Reader[T]) -> T:
    if record is not None:
        return _read_committed(store, artifact, name, record, read)
    known = _known.get((store.url, artifact.path))
    if known is not None and known.key.startswith(artifact.key):
        # What is not as it was remembered may have been redone since.
        with suppress(CorruptArtifactError):
            return _read_committed(store, artifact, name, known, read)
        _known.pop((store.url, artifact.path), None)
    record = read_record(store, artifact)
    if record is None:
        raise CorruptArtifactError(artifact, f"{name} is not committed")
    return _read_committed(store, artifact, name, record, read)


def _read_committed(store: Store, artifact: Artifact, name: str, record: Record, read: Reader[T]) -> T:
    if name not in record.files:
        raise CorruptArtifactError(artifact, f"{name} is not committed")
    size, checksum, token = record.files[name]
    try:
        found, length, now = read(store, f"{artifact.path}/{token}/{name}", size)
    except FileNotFoundError as error:
        raise CorruptArtifactError(artifact, f"{name} is missing though it was committed") from error
    except DamagedObjectError as error:
        raise CorruptArtifactError(artifact, str(error)) from error
    if found is None or length != size or now != checksum:
        raise CorruptArtifactError(artifact, f"{name} has {length} bytes that differ from the {size} committed ones")
    return found


def check_sizes(store: Store, artifact: Artifact, record: Record) -> None:
    """Raises CorruptArtifactError if a committed file is not there or has another size."""
    sizes = store.list(artifact.path) if record.files else {}
    for name, file in record.files.items():
        if sizes.get(f"{artifact.path}/{file.token}/{name}") != file.size:
            raise CorruptArtifactError(artifact, f"{name} is missing or has another size than was committed")


def intact(store: Store, artifact: Artifact, say: Callable[[str], None] = lambda text: None) -> Record | None:
    """The record of a committed artifact whose files have their sizes; None otherwise, what is damaged being cleared away."""
    try:
        record = read_record(store, artifact)
        if record is not None:
            check_sizes(store, artifact, record)
    except CorruptArtifactError as error:
        say(f"damaged, will be redone: {error}")
        discard(store, artifact)
        return None
    return record


def discard(store: Store, artifact: Artifact) -> None:
    """Remove an artifact, record first, so that no moment shows a record without its data. Raises LeaseLostError."""
    store.check_fence()
    _known.pop((store.url, artifact.path), None)
    store.delete(f"{artifact.path}/{RECORD}")
    store.delete_all(artifact.path)


def _folder(key: str) -> str:
    """The artifact's folder that a key lies in."""
    return "/".join(key.split("/")[:2])


def _of_artifacts(store: Store, kind: str) -> dict[str, int]:
    """Keys and sizes of all that lies in artifacts' folders; other folders and files there are somebody else's."""
    return {key: size for key, size in store.list(kind).items() if key.count("/") > 1 and _PATH.fullmatch(_folder(key))}


def committed(store: Store, kinds: Iterable[str]) -> dict[str, int]:
    """Paths of the artifacts that have a record, of the given kinds, with the bytes each takes. Sizes are checked elsewhere."""
    found: dict[str, int] = {}
    for kind in kinds:
        sizes: dict[str, int] = {}
        done = set()
        for key, size in _of_artifacts(store, kind).items():
            folder = _folder(key)
            sizes[folder] = sizes.get(folder, 0) + size
            if key == f"{folder}/{RECORD}":
                done.add(folder)
        found |= {folder: sizes[folder] for folder in done}
    return found


def collect_garbage(store: Store, kinds: Iterable[str]) -> int:
    """Remove what attempts left that never committed, of the given kinds. Returns bytes. Raises LeaseLostError.

    Only for a driver that holds the lease and whose workers are idle: what is being written looks the same.
    """
    freed = 0
    for kind in kinds:
        attempts: dict[str, dict[str, int]] = {}
        recorded = set()
        for key, size in _of_artifacts(store, kind).items():
            folder, token = _folder(key), key.split("/")[2] if key.count("/") > 2 else ""
            sizes = attempts.setdefault(folder, {})
            if key == f"{folder}/{RECORD}":
                recorded.add(folder)
            else:
                sizes[token] = sizes.get(token, 0) + size
        for folder, sizes in attempts.items():
            freed += _collect(store, folder, sizes, folder in recorded)
    return freed


def _collect(store: Store, folder: str, attempts: dict[str, int], recorded: bool) -> int:
    # One attempt and a record: that attempt's, or the next check of the sizes finds out.
    if not attempts or (recorded and len(attempts) == 1):
        return 0
    store.check_fence()
    if not recorded:
        store.delete_all(folder)
        return sum(attempts.values())
    try:
        record = parse_record(store.get(f"{folder}/{RECORD}"))
    except (FileNotFoundError, ValueError):
        return 0  # damaged: told and cleared away when it is looked for
    used = {file.token for file in record.files.values()}
    dead = [token for token in attempts if token and token not in used]
    for token in dead:
        store.delete_all(f"{folder}/{token}")
    return sum(attempts[token] for token in dead)
