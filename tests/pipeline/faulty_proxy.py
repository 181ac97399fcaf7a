"""A proxy in front of an S3 server on loopback that fails a part of the requests, from a seed.

Three faults: `error` answers 503, `reset` breaks the connection off, `cut` sends half of an upload on as if it were all of it and then
breaks off, which leaves a torn object (of an answer, it passes on half). Runs in threads of a test's process, or as a script:

    python tests/pipeline/faulty_proxy.py --upstream 127.0.0.1:9000 --port 9001 --rate 0.05 --seed 1
"""

from __future__ import annotations

import argparse
import random
import socket
import socketserver
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

FAULTS = ("error", "reset", "cut")
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_SLOW_DOWN), _SLOW_DOWN)
)


@dataclass
class Request:
    """One HTTP request: first line, headers by lower-case name, body."""

    line: str
    headers: dict[str, str]
    body: bytes = b""

    def encode(self, body: bytes) -> bytes:
        headers = {k: v for k, v in self.headers.items() if k not in ("expect", "connection", "transfer-encoding")}
        headers |= {"connection": "close", "content-length": str(len(body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"{self.line}\r\n{head}\r\n".encode() + body


class _Handler(socketserver.StreamRequestHandler):
    """One request a connection."""

    server: FaultyProxy
    timeout = 60

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):
            request = self._read()
            if request is not None:
                self._serve(request)

    def _read(self) -> Request | None:
        line = self.rfile.readline().decode().strip()
        if not line:
            return None
        headers = {}
        while text := self.rfile.readline().decode().strip():
            name, _, value = text.partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return Request(line, headers, self._body(headers))

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _serve(self, request: Request) -> None:
        fault = self.server.draw()
        if fault == "error":
            self.wfile.write(_BUSY)
        elif fault == "reset":
            self._reset()
        elif fault == "cut" and request.body:
            self._ask(request.encode(request.body[: len(request.body) // 2]))
            self._reset()
        else:
            answer = self._ask(request.encode(request.body))
            self.wfile.write(answer[: len(answer) // 2] if fault == "cut" else answer)
            if fault == "cut":
                self._reset()

    def _ask(self, data: bytes) -> bytes:
        """The server's whole answer, marked as the connection's last."""
        with socket.create_connection(self.server.upstream) as upstream:
            upstream.sendall(data)
            answer = b"".join(iter(lambda: upstream.recv(1 << 16), b""))
        line, _, rest = answer.partition(b"\r\n")
        return line + b"\r\nConnection: close\r\n" + rest

    def _reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@dataclass
class Plan:
    """Which requests fail: `rate` of them, each with one of `faults`."""

    rate: float
    seed: int = 0
    faults: Sequence[str] = FAULTS
    done: Counter[str] = field(default_factory=Counter)


class FaultyProxy(socketserver.ThreadingTCPServer):
    """Listens on 127.0.0.1. `plan.done` counts the faults; `plan.rate` may be changed at any time."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream: tuple[str, int], plan: Plan, port: int = 0) -> None:
        self.upstream = upstream
        self.plan = plan
        self._random = random.Random(plan.seed)
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self) -> str | None:
        """The fault of the next request, if any."""
        with self._lock:
            chance, fault = self._random.random(), self._random.choice(self.plan.faults)
            chosen = fault if chance < self.plan.rate else None
            self.plan.done[chosen or "none"] += 1
            return chosen

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that we broke ourselves is nothing to print."""


@contextmanager
def faulty_proxy(upstream: str, plan: Plan, port: int = 0) -> Iterator[FaultyProxy]:
    """A proxy in a thread, for the time of a `with` block. `upstream` as host:port, with or without http://."""
    host, _, number = upstream.removeprefix("http://").partition(":")
    with FaultyProxy((host, int(number)), plan, port) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", required=True, help="host:port of the real server")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--rate", type=float, default=0.05, help="part of the requests that fail")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    given = parser.parse_args()
    with faulty_proxy(given.upstream, Plan(given.rate, given.seed, given.faults), given.port) as proxy:
        print(proxy.url, flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
