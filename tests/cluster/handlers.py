"""Setups and handlers that run in Ray's workers."""

import os
import time
from pathlib import Path
from typing import Any

from cluster.group import ALONE, Handler, Membership, ShouldYield, stay
from cluster.units import UnitError, YieldUnit


def setup(worker: str, should_yield: ShouldYield = stay, membership: Membership = ALONE) -> Handler:
    def handle(payload: dict[str, Any]) -> dict:
        if membership.rank:
            payload = payload.get("others", {"do": "nothing"})
        action = ACTIONS[payload["do"]]
        result = action(payload, should_yield) if action is _yield_when_told else action(payload)
        return result | {"worker": worker, "pid": os.getpid(), "address": membership.address}

    return handle


def refusing_setup(worker: str, should_yield: ShouldYield = stay, membership: Membership = ALONE) -> Handler:
    raise UnitError("fatal", "this driver is too old")


def failing_setup(worker: str, should_yield: ShouldYield = stay, membership: Membership = ALONE) -> Handler:
    raise OSError("no such device")


def _fail(payload: dict[str, Any]) -> dict:
    raise UnitError(payload["kind"], payload["message"])


def _crash(payload: dict[str, Any]) -> dict:
    raise ZeroDivisionError("by nothing")


def _report(payload: dict[str, Any]) -> bool:
    """Whether this is the first attempt: tests do something to its process in the middle of it."""
    mark = Path(payload["mark"])
    if mark.exists():
        return False
    mark.with_suffix(".part").write_text(str(os.getpid()))
    mark.with_suffix(".part").rename(mark)
    return True


def _report_then_sleep(payload: dict[str, Any]) -> dict:
    if _report(payload):
        time.sleep(60)
    return {}


def _report_then_linger(payload: dict[str, Any]) -> dict:
    """Comes to an end soon, unless it is stopped; in short sleeps, as a stopped process sleeps on."""
    if _report(payload):
        for _ in range(100):
            time.sleep(0.01)
    return {}


def _yield_when_told(payload: dict[str, Any], should_yield: ShouldYield) -> dict:
    if _report(payload):
        while not should_yield():
            time.sleep(0.01)
        raise YieldUnit
    return {"went on from": int(Path(payload["mark"]).read_text())}


def _nothing(payload: dict[str, Any]) -> dict:
    return {}


def _unpicklable(payload: dict[str, Any]) -> dict:
    return {"lambda": (i for i in ())}


ACTIONS: dict[str, Any] = {
    "nothing": _nothing,
    "fail": _fail,
    "crash": _crash,
    "sleep": _report_then_sleep,
    "linger": _report_then_linger,
    "yield": _yield_when_told,
    "unpicklable": _unpicklable,
}
