"""One driver a run: a lease on the run directory, with fencing.

A term is one driver's turn, numbered without end. `driver/TERM.json` is created exclusively and says who holds it;
`driver/TERM.beat` is rewritten while the holder lives; `driver/TERM.end` says that the turn is over. Nobody compares clocks: who wants a
term that seems alive watches its beat for as long as the lease lasts, by its own clock. Who wrote under an earlier term finds
a higher one in the folder, and writes nothing more.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.faults import StorageError
from pipeline.store import Store

FOLDER = "driver"
LONGEST_LEASE = 600.0  # a lease that claims more is not believed
_KEY = re.compile(rf"{FOLDER}/(\d{{8}})\.(json|beat|end)")

log = logging.getLogger("lsi.lease")


class LeaseLostError(UserError):
    """Another driver has the run, or this one could not say for too long that it is alive: nothing more may be written."""


@dataclass(frozen=True)
class Holder:
    """Who holds a term. `machine` and `process` are of use only on the same machine; `nonce` tells two attempts apart."""

    host: str
    pid: int
    machine: str
    process: str
    since: str
    seconds: float
    nonce: str

    def describe(self) -> str:
        return f"the driver on host {self.host} (process {self.pid}, since {self.since})"


def this_machine() -> str:
    """This boot of this machine, as far as process numbers reach (a container has its own); empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> str:
    """When a process of this machine started, in ticks since the boot; empty if there is none (a zombie is none)."""
    try:
        # The second field is the program's name in brackets, and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def myself(seconds: float) -> Holder:
    """This process as the holder of a new term."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    process = process_start(os.getpid())
    return Holder(socket.gethostname(), os.getpid(), this_machine(), process, since, seconds, secrets.token_hex(16))


def is_gone(holder: Holder) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    here = this_machine()
    return bool(here) and here == holder.machine and process_start(holder.pid) != holder.process


def key_of(term: int, part: str) -> str:
    return f"{FOLDER}/{term:08d}.{part}"


def parse_holder(text: bytes) -> Holder | None:
    """A holder from its object; None if that is torn or says something else."""
    try:
        raw = json.loads(text)
        holder = Holder(**{**raw, "pid": int(raw["pid"]), "seconds": float(raw["seconds"])})
    except (ValueError, TypeError, KeyError):
        return None
    return holder if 0 < holder.seconds <= LONGEST_LEASE and all(map(_plain, asdict(holder).values())) else None


def _plain(value: object) -> bool:
    """Fit to be shown: a number, or a short printable text."""
    return not isinstance(value, str) or (len(value) <= 200 and value.isprintable())


@dataclass(frozen=True)
class Turn:
    """The newest term of a run directory; term 0 before the first."""

    term: int
    parts: frozenset[str]
    holder: Holder | None = None

    @property
    def open(self) -> bool:
        return "json" in self.parts and "end" not in self.parts


def parts_by_term(store: Store) -> dict[int, set[str]]:
    """What lies in the folder of the lease; one listing."""
    found: dict[int, set[str]] = {}
    for key in store.list(FOLDER):
        if match := _KEY.fullmatch(key):
            found.setdefault(int(match[1]), set()).add(match[2])
    return found


def newest(store: Store) -> Turn:
    """The newest term, with its holder if it is open and its object is whole."""
    found = parts_by_term(store)
    if not found:
        return Turn(0, frozenset())
    term = max(found)
    turn = Turn(term, frozenset(found[term]))
    text = _get(store, key_of(term, "json")) if turn.open else None
    return Turn(term, turn.parts, parse_holder(text) if text is not None else None)


def _get(store: Store, key: str) -> bytes | None:
    try:
        return store.get(key)
    except FileNotFoundError:
        return None


def check_term(store: Store, term: int) -> None:
    """The fence: raises LeaseLostError unless this is the newest term and has not ended."""
    turn = newest_parts(store)
    if turn.term == term and turn.open:
        return
    if turn.term > term:
        now = newest(store)
        who = now.holder.describe() if now.holder else "another driver"
        raise LeaseLostError(
            f"{store.url}: {who} has taken this run over, so this one stopped without writing anything more; "
            "it was silent for longer than storage.lease_seconds, or it was replaced"
        )
    raise LeaseLostError(
        f"{store.url}: the lease of this run's driver has ended or was removed, so nothing more is written; start the run again"
    )


def newest_parts(store: Store) -> Turn:
    """The newest term without its holder."""
    found = parts_by_term(store)
    term = max(found, default=0)
    return Turn(term, frozenset(found.get(term, ())))


class Lease:
    """A held term. Renewed by a thread of its own; `lost` says why it is not held any more."""

    def __init__(self, store: Store, term: int, holder: Holder) -> None:
        self.store = store
        self.term = term
        self.holder = holder
        self.lost: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Ask storage whether the lease still holds. Raises LeaseLostError."""
        if self.lost is None:
            try:
                check_term(self.store, self.term)
                return
            except LeaseLostError as error:
                self.lost = str(error)
        raise LeaseLostError(self.lost)

    def _renew(self) -> None:
        renewed, count = time.monotonic(), 0
        while self.lost is None and not self._ended.wait(self.holder.seconds / 4):
            count += 1
            try:
                self._beat(count)
                renewed = time.monotonic()
            except LeaseLostError as error:
                self.lost = str(error)
            except Exception as error:  # each backend raises its own; the next beat may succeed
                silent = time.monotonic() - renewed
                log.warning("the lease could not be renewed: %s", self.store.clean(str(error)))
                if silent > self.holder.seconds:
                    self.lost = (
                        f"{self.store.url}: the driver's lease could not be renewed for {silent:.0f} s "
                        f"({self.store.clean(str(error))}), so that another driver may have taken over; start the run again"
                    )

    def _beat(self, count: int) -> None:
        # Where objects cannot be created exclusively, two may have seen their own; the last one's stays.
        text = _get(self.store, key_of(self.term, "json"))
        if text is not None and text != _object(self.holder):
            raise LeaseLostError(
                f"{self.store.url}: another driver took this run at the same moment, so this one stopped"
            )
        check_term(self.store, self.term)
        self.store.put(key_of(self.term, "beat"), str(count).encode())

    def release(self) -> None:
        """End the turn; one small object stays, so that no later term has the same number."""
        self._ended.set()
        self._thread.join(self.holder.seconds)  # longer only if it hangs in a request
        if self.lost is not None:
            return
        try:
            self.check()
            self.store.put(key_of(self.term, "end"), b"")
            for part in ("json", "beat"):
                self.store.delete(key_of(self.term, part))
        except Exception as error:  # the run is over one way or the other; the next driver finds out by itself
            log.warning("the lease could not be given back: %s", self.store.clean(str(error)))


def _object(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def acquire(store: Store, seconds: float, say: Callable[[str], None]) -> Lease:
    """Take the run, waiting if the driver before may be dead. Raises UserError if it is alive."""
    while True:
        turn = newest(store)
        if turn.open and not _over(store, turn, seconds, say):
            continue
        if lease := _take(store, turn.term + 1, seconds):
            return lease


def _over(store: Store, turn: Turn, seconds: float, say: Callable[[str], None]) -> bool:
    """Whether an open turn is over; False if the folder changed meanwhile, so that it must be looked at again."""
    who = turn.holder.describe() if turn.holder else "a driver that left no whole record of itself"
    if turn.holder and is_gone(turn.holder):
        say(f"{who} has ended without giving the run back: taken over")
        return True
    patience = turn.holder.seconds if turn.holder else seconds
    say(f"watching for up to {patience:.0f} s whether {who} is alive")
    beat = key_of(turn.term, "beat")
    before, until = _get(store, beat), time.monotonic() + patience
    while time.monotonic() < until:
        time.sleep(min(1.0, patience / 20))
        now = newest(store)
        if now.term != turn.term or not now.open:
            return False
        if _get(store, beat) != before:
            who = now.holder.describe() if now.holder else who
            raise UserError(
                f"{store.url}: {who} is working on this run; wait until it has finished, stop it, or choose another storage.run"
            )
    say(f"{who} gave no sign of life for {patience:.0f} s: taken over")
    return True


def _take(store: Store, term: int, seconds: float) -> Lease | None:
    """Create a term; None if another was faster. The folder is read again: a term that has ended has no object any more."""
    holder = myself(seconds)
    if not store.create(key_of(term, "json"), _object(holder)):
        return None
    try:
        check_term(store, term)
    except LeaseLostError:
        store.delete(key_of(term, "json"))
        return None
    if _get(store, key_of(term, "json")) != _object(holder):
        return None
    for older, parts in parts_by_term(store).items():
        for part in parts if older < term else ():
            store.delete(key_of(older, part))
    return Lease(store, term, holder)


@contextmanager
def hold(store: Store, seconds: float, say: Callable[[str], None]) -> Iterator[Lease]:
    """The lease for the time of a `with` block, given back however that ends."""
    lease = acquire(store, seconds, say)
    try:
        yield lease
    finally:
        lease.release()


def check_same_place(store: Store, term: int, nonce: str) -> None:
    """For a worker: the run directory it sees is the driver's. Raises UserError naming this host.

    The driver's lease is the proof; another machine's folder of the same name does not hold it.
    """
    try:
        found: Any = parse_holder(store.get(key_of(term, "json")))
        reason = "it holds another driver's lease" if found is None or found.nonce != nonce else ""
    except FileNotFoundError:
        reason = "what the driver wrote is not there"
    except StorageError:  # it may pass, and the next start of a worker may succeed
        raise
    except Exception as error:  # each backend raises its own
        reason = store.clean(f"{type(error).__name__}: {error}")
    if reason:
        raise UserError(
            f"host {socket.gethostname()} does not see the run directory {store.url} as the driver does ({reason}): "
            "storage.run must be one place for all workers, an object store or a shared file system"
        )
