"""One small contract over fsspec: whole objects by key, on a local disk, in memory or in an object store.

Nothing here relies on rename or on atomic overwrites: an object may be torn by a crash, and the commit records in
`pipeline.artifacts` are what makes an object count.
"""

from __future__ import annotations

import errno
import os
import posixpath
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from pipeline.errors import UserError
from pipeline.faults import http_answer, persist

T = TypeVar("T")
Buffer = bytes | memoryview
# What can be written: a failed write is tried again, so that pieces must be there, or be made, a second time.
Data = Buffer | Sequence[Buffer] | Callable[[], Iterable[Buffer]]
# Options that say where something is, and not with which secret.
_SHOWN = {"endpoint_url", "region_name", "host", "protocol"}


def nothing() -> None:
    pass


class StorageFullError(OSError):
    """The medium under a store has no room left."""


class DamagedObjectError(ValueError):
    """The backend itself found that an object is not what was once written."""


@dataclass
class Store:
    """Objects under one root URL.

    Keys are relative POSIX paths without `..`. `options` go to fsspec (an S3 endpoint, say) and are never written anywhere.
    Pickles into actors: the file system is opened anew where it arrives. `check_fence` raises LeaseLostError once another
    driver has taken the run over; who writes what others rely on asks it first.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.check_fence: Callable[[], None] = nothing
        try:
            self.fs, self.root = url_to_fs(self.url, **self.options)
        except ImportError as error:
            raise UserError(
                f"{self.url}: this kind of storage needs a package that is not installed: {error}"
            ) from error
        except ValueError as error:
            raise UserError(
                f"{self.url}: not a storage address that fsspec knows ({self.clean(str(error))})"
            ) from error
        self.root = self.root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def __reduce__(self) -> tuple[type[Store], tuple[str, dict[str, Any]]]:
        return Store, (absolute(self.url), self.options)

    def path(self, key: str) -> str:
        """The file system's own path of a key; keys that would leave the root are refused."""
        if key.startswith("/") or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
            raise ValueError(f"unsafe storage key {key!r}: keys are relative paths without '..'")
        return f"{self.root}/{key}"

    def describe(self, key: str = "") -> str:
        """The address to show a person."""
        return posixpath.join(self.url, key) if key else self.url

    def child(self, key: str) -> Store:
        """The store rooted one folder down."""
        self.path(key)
        return Store(posixpath.join(self.url, key), self.options)

    def clean(self, text: str) -> str:
        """A text without the values of `options`, which may be secrets that a backend repeats in its errors."""
        return clean_options(text, self.options)

    def _persist(self, verb: str, key: str, action: Callable[[], T]) -> T:
        return persist(f"{verb} {self.describe(key)}", action, self.clean)

    def get(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError, and DamagedObjectError."""
        path = self.path(key)
        try:
            return self._persist("reading", key, lambda: self.fs.cat_file(path))
        except Exception as error:
            if type(error).__name__ != "FlexibleChecksumError":  # botocore's, which a local disk does not need
                raise
            raise DamagedObjectError(
                f"{self.describe(key)}: not what was written, as its checksum there says"
            ) from error

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes start … end − 1. Raises FileNotFoundError, and EOFError if the object is shorter."""
        if start == end:  # s3fs would read the whole object
            self.size(key)
            return b""
        path = self.path(key)
        try:
            data = self._persist("reading", key, lambda: self.fs.cat_file(path, start=start, end=end))
        except OSError as error:
            # S3's answer to a range that lies wholly past the end; the code stands for other refusals too.
            if error.errno == errno.EINVAL and start >= self.size(key):
                raise EOFError(
                    f"{self.describe(key)}: bytes {start} to {end} asked for, the object is shorter"
                ) from error
            raise
        if len(data) != end - start:
            raise EOFError(
                f"{self.describe(key)}: bytes {start} to {end} asked for, the object ends at {start + len(data)}"
            )
        return data

    def put(self, key: str, data: Data) -> None:
        """Write a whole object, replacing what was there; `data` may come in pieces, so that it need not be in one buffer."""
        produce = _producer(data)
        self._persist("writing", key, lambda: self._roomy(key, lambda: self._write(key, produce())))

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object unless there is one. Returns whether the object is there with these bytes.

        Two writers of different bytes never both hear True where the backend can create exclusively: local disks, memory, S3
        and those that fsspec lets say `mode="create"`. Elsewhere both may, and the last one's bytes stay.
        """
        self.path(key)
        if self._persist("creating", key, lambda: self._roomy(key, lambda: self._create(key, data))):
            return True
        # It may be our own, written by a try whose answer was lost.
        try:
            return self.get(key) == data
        except (FileNotFoundError, DamagedObjectError):
            return False

    def _create(self, key: str, data: bytes) -> bool:
        try:
            if self.local:
                with open(self.path(key), "xb", buffering=0) as file:
                    file.write(data)
            else:
                self.fs.pipe_file(self.path(key), data, mode="create")
        except FileExistsError:
            return False
        except (TypeError, NotImplementedError):
            return self._create_by_looking(key, data)
        except OSError as error:
            status = (http_answer(error) or (0, ""))[0]
            if status == 412:
                return False
            if status == 501:
                return self._create_by_looking(key, data)
            raise
        return True

    def _create_by_looking(self, key: str, data: bytes) -> bool:
        if self.exists(key):
            return False
        self._write(key, [data])
        return True

    def _roomy(self, key: str, write: Callable[[], T]) -> T:
        """A write into a folder that is there; StorageFullError if there is no room."""
        try:
            if self.local:
                self.fs.makedirs(posixpath.dirname(self.path(key)), exist_ok=True)
            return write()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFullError(error.errno, f"no room left at {self.url} while writing {key}") from error
            raise

    def _write(self, key: str, pieces: Iterable[Buffer]) -> None:
        # Not a `with` block: fsspec publishes the truncated object when an exception leaves it.
        handle = self.fs.open(self.path(key), "wb")
        try:
            for piece in pieces:
                handle.write(piece)
        except BaseException:
            if self.local:
                handle.f.close()
            elif isinstance(handle, AbstractBufferedFile):
                handle.discard()
                handle.closed = True  # or its destructor would publish what there is
            raise
        handle.close()

    def exists(self, key: str) -> bool:
        try:
            return self._info(key)["type"] == "file"
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _info(self, key: str) -> dict[str, Any]:
        path = self.path(key)

        def ask() -> dict[str, Any]:
            # s3fs would answer from its last listing, and miss what other processes have done since.
            self.fs.invalidate_cache(posixpath.dirname(path))
            return self.fs.info(path)

        return self._persist("looking for", key, ask)

    def size(self, key: str) -> int:
        """Size in bytes. Raises FileNotFoundError."""
        return int(self._info(key)["size"])

    def stamp(self, key: str) -> str:
        """Changes whenever the object is replaced: size with ETag or modification time."""
        info = self._info(key)
        # By backend: S3, Azure, the hub, local disks, Google, memory.
        marks = ("ETag", "etag", "blob_id", "mtime", "LastModified", "md5Hash", "created")
        mark = next((info[name] for name in marks if info.get(name)), None)
        if mark is None:
            raise UserError(
                f"{self.describe(key)}: this kind of storage does not tell when an object was replaced; copy the model elsewhere"
            )
        return f"{info['size']}:{mark}"

    def list(self, prefix: str = "") -> dict[str, int]:
        """Every key under a folder, with its size in bytes; empty if there is no such folder."""
        base = self.path(prefix) if prefix else self.root

        def ask() -> dict[str, Any]:
            if self.local:
                return _find(base)
            self.fs.invalidate_cache()
            return self.fs.find(base, detail=True)

        found = self._persist("listing", prefix, ask)
        return {path[len(self.root) + 1 :]: int(info["size"]) for path, info in sorted(found.items())}

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if it is not there."""
        path = self.path(key)
        try:
            self._persist("deleting", key, lambda: self.fs.rm_file(path))
        except FileNotFoundError:
            return

    def delete_all(self, prefix: str) -> None:
        """Remove every object under a folder, not of the whole store."""
        path = self.path(prefix)
        if self.local:
            self._persist("deleting", prefix, lambda: _remove_tree(path))
            return
        for key in self.list(prefix):
            self.delete(key)

    def check_writable(self, key: str = "storage.run") -> None:
        """Raise UserError now if nothing can be written here, rather than hours later. `key`: what names this place."""
        probe = f".write-check-{secrets.token_hex(4)}"  # a name of its own: others may check at this moment
        try:
            self.put(probe, b"ok")
            if self.get(probe) != b"ok":
                raise OSError("what was written could not be read back")
            self.delete(probe)
        except StorageFullError as error:
            raise UserError(
                f"{self.url}: no space left on the device; free some and run the same command again"
            ) from error
        except Exception as error:  # each backend raises its own: botocore's are no OSErrors
            raise UserError(
                f"{self.url}: cannot write there ({self.clean(str(error))}); choose another {key} or change its permissions"
            ) from error


def _find(base: str) -> dict[str, Any]:
    """As fsspec's, which leaves a whole folder out when a file of it vanishes at that moment."""
    found = {}
    for folder, _, names in os.walk(base, followlinks=True):
        for name in names:
            with suppress(FileNotFoundError):
                path = os.path.join(folder, name)
                found[path] = {"size": os.stat(path).st_size}
    return found


def _remove_tree(path: str) -> None:
    """A folder and all in it; what others delete at the same moment is no error, nor is a folder that is not there."""

    def note(function: object, name: str, info: tuple[Any, BaseException, Any]) -> None:
        if not isinstance(info[1], FileNotFoundError):
            raise info[1]

    shutil.rmtree(path, onerror=note)


def _producer(data: Data) -> Callable[[], Iterable[Buffer]]:
    if isinstance(data, bytes | memoryview):
        return lambda: [data]
    return data if callable(data) else lambda: data


def clean_options(text: str, options: dict[str, Any]) -> str:
    """A text without the values of fsspec options."""
    for value in _leaves(options):
        text = text.replace(value, "***")
    return text


def _leaves(options: dict[str, Any]) -> Iterator[str]:
    """The values that must not be shown: every text of some length, but for those that are addresses."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        elif isinstance(value, str) and len(value) > 3 and name not in _SHOWN:
            yield value


def absolute(url: str) -> str:
    """A local path made independent of the working directory; any other address as it is."""
    return url if "://" in url or "::" in url else os.path.abspath(os.path.expanduser(url))


def iter_pieces(data: memoryview, size: int = 1 << 24) -> Iterator[memoryview]:
    """A buffer in pieces, so that one upload never doubles it."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


def open_store(url: str, options: dict[str, Any] | None = None) -> Store:
    """A store at any fsspec URL or plain local path."""
    return Store(url, options or {})
