"""One small contract over fsspec: whole objects by key, on a local disk, in memory or in an object store.

Nothing here relies on rename or on atomic overwrites: an object may be torn by a crash, and the commit records in
`pipeline.artifacts` are what makes an object count.
"""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from pipeline.errors import UserError

Buffer = bytes | memoryview


class StorageFullError(OSError):
    """The medium under a store has no room left."""


@dataclass
class Store:
    """Objects under one root URL.

    Keys are relative POSIX paths without `..`. `options` go to fsspec (an S3 endpoint, say) and are never written anywhere.
    Pickles into actors: the file system is opened anew where it arrives.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        try:
            self.fs, self.root = url_to_fs(self.url, **self.options)
        except ImportError as error:
            raise UserError(
                f"{self.url}: this kind of storage needs a package that is not installed: {error}"
            ) from error
        except ValueError as error:
            raise UserError(f"{self.url}: not a storage address that fsspec knows ({error})") from error
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

    def get(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        return self.fs.cat_file(self.path(key))

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes start … end − 1. Raises FileNotFoundError, and EOFError if the object is shorter."""
        if start == end:  # s3fs would read the whole object
            self.size(key)
            return b""
        try:
            data = self.fs.cat_file(self.path(key), start=start, end=end)
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

    def put(self, key: str, data: Buffer | Iterable[Buffer]) -> None:
        """Write a whole object, replacing what was there; `data` may come in pieces, so that it need not be in one buffer."""
        pieces = [data] if isinstance(data, bytes | memoryview) else data
        try:
            if self.local:
                self.fs.makedirs(posixpath.dirname(self.path(key)), exist_ok=True)
            self._write(key, pieces)
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
        # s3fs would answer from its last listing, and miss what other processes have done since.
        self.fs.invalidate_cache(posixpath.dirname(self.path(key)))
        return self.fs.info(self.path(key))

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
        self.fs.invalidate_cache()
        base = self.path(prefix) if prefix else self.root
        found = self.fs.find(base, detail=True)
        return {path[len(self.root) + 1 :]: int(info["size"]) for path, info in sorted(found.items())}

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if it is not there."""
        try:
            self.fs.rm_file(self.path(key))
        except FileNotFoundError:
            return

    def delete_all(self, prefix: str) -> None:
        """Remove every object under a folder, not of the whole store."""
        self.path(prefix)
        if self.local:
            if self.fs.isdir(self.path(prefix)):
                self.fs.rm(self.path(prefix), recursive=True)
            return
        for key in self.list(prefix):
            self.delete(key)

    def check_writable(self) -> None:
        """Raise UserError now if nothing can be written here, rather than hours later."""
        probe = ".write-check"
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
                f"{self.url}: cannot write there ({error}); choose another storage.run or change its permissions"
            ) from error


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
