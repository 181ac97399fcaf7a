"""Ray for the length of a `with`: a private one on this machine, or a connection to a cluster."""

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from cluster import guard
from cluster.units import ClusterError

log = logging.getLogger("lsi.ray")

_CONNECT_SECONDS = 3.0
_LATE = "timed out during startup"  # Ray waits for its own node for 30 s, which a busy machine may pass
_LONGEST_DIRECTORY = 40  # a socket's path has at most 107 bytes, and Ray puts 65 after its directory
_OBJECT_STORE = 128 * 2**20  # payloads and results are small: what units read and write is on storage


@contextmanager
def ray_session(
    address: str | None,
    cpus: int | None = None,
    *,
    dashboard: bool = False,
    on_message: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
    """None or "local" starts a private Ray on 127.0.0.1 with `cpus` CPUs (all there are by default) and ends it after;
    anything else ("auto", "host:port") connects to a running cluster. A private Ray listens on
    127.0.0.1 alone and takes nobody without its token. `on_message` hears where the dashboard is, if there is one, and for
    a private Ray where its token and the metrics are."""
    local = address is None or address == "local"
    with _private_ray(cpus, dashboard) if local else _connection(str(address)) as said:
        for text in said:
            on_message(text)
        yield


@contextmanager
def _private_ray(cpus: int | None, dashboard: bool) -> Iterator[list[str]]:
    directory = _directory()
    command = [sys.executable, "-I", guard.__file__, directory]
    # A session of its own, or Ctrl-C would end the guard together with those it guards against.
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        # The workers must find the handlers' modules wherever the driver found them.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        with _environment(RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=path), _loopback(), _token(directory) as token:
            url = _start(cpus, dashboard, directory)
        yield _where_to_look(url, token) if url else []
    finally:
        ray.shutdown()
        _forget_token()
        watcher.communicate()


def _where_to_look(url: str, token: Path) -> list[str]:
    """Of a private Ray, for a person. The token itself goes into no log."""
    metrics = ray.nodes()[0]["MetricsExportPort"]
    return [
        f"Ray dashboard: http://{url} (it asks for the token, which is in {token})",
        f"metrics for Prometheus: http://127.0.0.1:{metrics}/metrics",
    ]


def _start(cpus: int | None, dashboard: bool, directory: str, *, again: bool = True) -> str:
    """A private Ray, at the second attempt if the first one was only late."""
    try:
        return _start_once(cpus, dashboard, directory)
    except Exception as late:
        if _LATE not in str(late):
            raise
        if not again:
            raise ClusterError(
                "Ray has twice not started within the 30 seconds that it gives itself: this machine is too busy or short of memory; "
                "give the same command again when it is not, what was committed is taken up."
            ) from late
    log.warning("Ray has not started within its time; once more")
    guard.end_all(directory, spare=os.getpid())
    return _start(cpus, dashboard, directory, again=False)


def _start_once(cpus: int | None, dashboard: bool, directory: str) -> str:
    try:
        return _init(
            address="local",
            num_cpus=cpus,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            object_store_memory=_OBJECT_STORE,
            _temp_dir=directory,
        )
    except Exception as error:
        if dashboard and "dashboard" in str(error):
            raise ClusterError(
                f"Ray cannot start its dashboard ({_first_line(str(error))}): "
                "install it with `pip install 'ray[default]'`, or do without (cluster.dashboard: false)."
            ) from error
        raise


@contextmanager
def _connection(address: str) -> Iterator[list[str]]:
    if address != "auto":
        _check_listens(address)
    try:
        # A Ray that was started on loopback is nowhere else.
        with _loopback() if address.startswith(("127.", "localhost:")) else nullcontext():
            url = _init(address=address)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _refusal(address, error) from error
    try:
        yield [f"Ray dashboard: http://{url}"] if url else []
    finally:
        ray.shutdown()


def _init(**options: Any) -> str:
    # Ray prints a page on standard output for every process that ends, whatever `log_to_driver` says: ours is for results.
    ray_worker.print_to_stdstream = _to_log
    before = signal.getsignal(signal.SIGTERM)
    context = ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    # Ray's core takes SIGTERM for itself, prints addresses and ends the process: the caller's handler would never run.
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
    return getattr(context, "dashboard_url", None) or ""


def _to_log(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    for line in data["lines"]:
        log.info("%s: %s", data["pid"], line)


@contextmanager
def _token(directory: str) -> Iterator[Path]:
    """A fresh one for the processes of this session: it is in a file that only we can read, and goes with the session."""
    path = Path(directory) / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    with _environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(path), RAY_AUTH_TOKEN=None):
        _forget_token()
        yield path


def _forget_token() -> None:
    """Ray's core reads mode and token once a process; in this order, or a late thread finds the mode without the token."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _directory() -> str:
    directory = tempfile.mkdtemp(prefix="ray-")
    if len(directory) <= _LONGEST_DIRECTORY:
        return directory
    os.rmdir(directory)
    return tempfile.mkdtemp(prefix="ray-", dir="/tmp")


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _loopback() -> Iterator[None]:
    # Ray puts the machine's own address in the place of 127.0.0.1 wherever it is built for clusters, and then listens
    # on every interface. Its switch for that is read from the environment when ray is imported: too early for us.
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _environment(**{ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _check_listens(address: str) -> None:
    """Ray itself tries for a long time before it gives up."""
    if address.startswith("ray://"):
        raise ClusterError(
            f"{address} is an address of Ray Client, whose driver sees no nodes come and go; run on a machine of the cluster "
            "and give host:port of its head (6379 by default), or auto."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"{address} is no address of a Ray cluster; give host:port, auto or local.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _nobody(address, str(error)) from error


def _refusal(address: str, error: Exception) -> ClusterError:
    if isinstance(error, ray.exceptions.AuthenticationError):
        return ClusterError(
            f"The Ray cluster at {address} asks for a token that this process lacks or has wrong: set RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN_PATH to a file with the cluster's token."
        )
    if "ersion mismatch" in str(error):
        return ClusterError(
            f"The Ray cluster at {address} runs other versions than this driver ({_told_versions(str(error))}): "
            "install the same Ray and Python on both."
        )
    return _nobody(address, str(error))


def _told_versions(text: str) -> str:
    """Ray lists them on lines of their own: Ray: 2.60.0, Python: 3.11.9, of the cluster and then of this process."""
    told = [line.strip() for line in text.splitlines() if line.strip().startswith(("Ray:", "Python:"))]
    half = len(told) // 2
    return f"there {', '.join(told[:half])}; here {', '.join(told[half:])}" if half else _first_line(text)


def _nobody(address: str, why: str) -> ClusterError:
    reason = _first_line(why) if why else "no reason given"
    return ClusterError(
        f"No Ray cluster answers at {address} ({reason}); "
        "start one with `ray start --head`, or leave the address out to run on this machine."
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".")
