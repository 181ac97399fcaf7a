"""Storage that fails for a moment: which errors may pass by themselves, and asking again after a while.

Backends have their own retries of single requests; this is the layer above them, for a whole object at a time.
"""

from __future__ import annotations

import errno
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

log = logging.getLogger("lsi.storage")

TRIES = 6
FIRST_DELAY = (
    0.5  # seconds; doubled after each try, and the wait is drawn between nothing and that: 15 s at most in all
)
LONGEST = 30.0  # no further try after so long: with a backend's own retries each may take many seconds
SAY_EVERY = 60.0

_PASSING = {
    getattr(errno, name)
    for name in [
        "EIO",
        "EAGAIN",
        "EBUSY",
        "EINTR",
        "ECONNRESET",
        "ECONNREFUSED",
        "ECONNABORTED",
        "EPIPE",
        "ETIMEDOUT",
        "EHOSTUNREACH",
        "ENETUNREACH",
        "ENETDOWN",
        "ENETRESET",
        "ESTALE",
        "EREMOTEIO",
    ]
    if hasattr(errno, name)
}
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
# Of aiohttp, botocore, requests and urllib3, by name: none of them is needed for a local disk.
_PASSING_CLASSES = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ServerTimeoutError",
    "HTTPClientError",
    "ConnectionError",
    "Timeout",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseParserError",
    "ResponseStreamingError",
    "TransportError",
}
_PASSING_STATUS = {408, 409, 429, 500, 502, 503, 504, 509}
_PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"}


class StorageError(OSError):
    """Storage failed again and again; the message names the operation and the address."""


def http_answer(error: BaseException | None) -> tuple[int, str] | None:
    """Status and error code of the server's answer that an exception stands for; None if it stands for none."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
        status = getattr(error, "status", getattr(error, "status_code", None))
        if isinstance(status, int):  # aiohttp, and the clients of Google and Azure
            return status, ""
        error = error.__cause__
    return None


def is_transient(error: BaseException) -> bool:
    """Whether asking again may help: broken connections, timeouts, a busy server. Never what is refused, missing or full."""
    if isinstance(error, (StorageError, *_LASTING)):
        return False
    if answer := http_answer(error):
        return answer[0] in _PASSING_STATUS or answer[1] in _PASSING_CODES
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    return not _PASSING_CLASSES.isdisjoint(c.__name__ for c in type(error).__mro__)


class Counter:
    """Repeated requests of this process; said at most once a minute."""

    def __init__(self) -> None:
        self.total = 0
        self._unsaid = 0
        self._said = -SAY_EVERY
        self._lock = threading.Lock()

    def add(self, operation: str, reason: str) -> None:
        with self._lock:
            self.total += 1
            self._unsaid += 1
            if time.monotonic() - self._said < SAY_EVERY:
                return
            count, self._unsaid, self._said = self._unsaid, 0, time.monotonic()
        log.warning("%d storage requests had to be repeated; the latest: %s: %s", count, operation, reason)


repeated = Counter()


def delays() -> Iterator[float]:
    """Waits between tries: exponential with full jitter, so that many workers do not come back at one moment."""
    for attempt in range(TRIES - 1):
        yield random.uniform(0, FIRST_DELAY * 2**attempt)


def persist(operation: str, action: Callable[[], T], clean: Callable[[str], str] = str) -> T:
    """The result of `action`, tried again while its errors are transient. Raises StorageError if they do not end.

    `clean` takes secrets out of what is said.
    """
    began, waits = time.monotonic(), delays()
    for tries in range(1, TRIES + 1):
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            reason = clean(f"{type(error).__name__}: {error}")
            elapsed = time.monotonic() - began
            wait = next(waits, None)
            if wait is None or elapsed > LONGEST:
                raise StorageError(
                    f"{operation} failed {tries} times in {elapsed:.0f} s, the last time with {reason}"
                ) from error
        repeated.add(operation, reason)
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")
