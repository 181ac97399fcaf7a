"""An S3 server in memory with two doors on loopback: one honest, one through which some requests fail.

    python benchmarks/faulty_s3.py PORT FAULTY_PORT RATE SEED

Behind the second door a request is, by a seeded draw, refused before it is done, done but answered with an error, or answered
with a body that breaks off.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]
ERRORS = ("503 Slow Down", "500 Internal Server Error")


class Faulty:
    """A WSGI application that fails now and then."""

    def __init__(self, inner: Application, rate: float, seed: int) -> None:
        self.inner, self.rate = inner, rate
        self.draw = random.Random(seed)
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self.lock:
            fails, kind, error = self.draw.random() < self.rate, self.draw.randrange(3), self.draw.choice(ERRORS)
        if not fails:
            return self.inner(environ, start_response)
        if kind == 0:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return refuse(start_response, error)
        if kind == 1:
            b"".join(self.inner(environ, lambda *args: None))
            return refuse(start_response, error)
        body = b"".join(self.inner(environ, start_response))
        return [body[: len(body) // 2]]  # shorter than its Content-Length says


def refuse(start_response: Any, error: str) -> Iterable[bytes]:
    code = "SlowDown" if error.startswith("503") else "InternalError"
    start_response(error, [("Content-Type", "application/xml"), ("Connection", "close")])
    return [f"<Error><Code>{code}</Code><Message>drawn</Message></Error>".encode()]


def main(port: int, faulty_port: int, rate: float, seed: int) -> None:
    honest: Any = DomainDispatcherApplication(create_backend_app)
    doors = [(port, honest), (faulty_port, Faulty(honest, rate, seed))]
    servers = [make_server("127.0.0.1", number, application, threaded=True) for number, application in doors]
    for server in servers[1:]:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    servers[0].serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
