"""A private Ray on a machine that is too busy: what is done about a start that comes too late."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from cluster import session
from cluster.units import ClusterError

LATE = Exception("The current node timed out during startup. This could happen because the GCS has become overloaded.")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Exception | str]:
    """What comes of the next starts, one after the other."""
    planned: list[Exception | str] = []

    def start(**options: Any) -> str:
        come = planned.pop(0)
        if isinstance(come, Exception):
            raise come
        return come

    monkeypatch.setattr(session, "_init", start)
    return planned


def test_a_late_start_is_tried_once_more(starts: list[Exception | str]) -> None:
    starts += [LATE, ""]
    with session.ray_session(None):
        assert not starts


def test_what_a_late_start_has_left_is_ended(starts: list[Exception | str], monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[subprocess.Popen[bytes]] = []

    def late(directory: str) -> str:
        with open(f"{directory}/log", "wb") as file:
            left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=file))
        raise LATE

    starts += [""]
    first = session._init
    monkeypatch.setattr(
        session, "_init", lambda **options: late(options["_temp_dir"]) if not left else first(**options)
    )
    with session.ray_session(None):
        assert left[0].wait(5) < 0


def test_two_late_starts_are_told_with_a_remedy(starts: list[Exception | str]) -> None:
    starts += [LATE, LATE]
    with (
        pytest.raises(ClusterError, match="too busy or short of memory; give the same command again"),
        session.ray_session(None),
    ):
        pass


def test_other_failures_are_not_tried_again(starts: list[Exception | str]) -> None:
    starts += [ValueError("no such option"), ""]
    with pytest.raises(ValueError, match="no such option"), session.ray_session(None):
        pass
    assert starts == [""]
