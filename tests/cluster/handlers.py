"""Setups and handlers that run in Ray's workers."""

import os
import time
from pathlib import Path
from typing import Any

from cluster.group import Handler, ShouldYield, stay
from cluster.units import UnitError


def setup(worker: str, should_yield: ShouldYield = stay) -> Handler:
    def handle(payload: dict[str, Any]) -> dict:
        return ACTIONS[payload["do"]](payload) | {"worker": worker, "pid": os.getpid()}

    return handle


def refusing_setup(worker: str, should_yield: ShouldYield = stay) -> Handler:
    raise UnitError("fatal", "this driver is too old")


def failing_setup(worker: str, should_yield: ShouldYield = stay) -> Handler:
    raise OSError("no such device")


def _fail(payload: dict[str, Any]) -> dict:
    raise UnitError(payload["kind"], payload["message"])


def _crash(payload: dict[str, Any]) -> dict:
    raise ZeroDivisionError("by nothing")


def _report_then_sleep(payload: dict[str, Any]) -> dict:
    """Sleeps on the first attempt alone, so that the test can end the process in the middle of it."""
    mark = Path(payload["mark"])
    if not mark.exists():
        mark.with_suffix(".part").write_text(str(os.getpid()))
        mark.with_suffix(".part").rename(mark)
        time.sleep(60)
    return {}


def _nothing(payload: dict[str, Any]) -> dict:
    return {}


def _unpicklable(payload: dict[str, Any]) -> dict:
    return {"lambda": (i for i in ())}


ACTIONS = {
    "nothing": _nothing,
    "fail": _fail,
    "crash": _crash,
    "sleep": _report_then_sleep,
    "unpicklable": _unpicklable,
}
