"""Which state of the block before a block trains on, unit by unit, and what it hands on."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from pipeline.config_sections import ScheduleConfig
from pipeline.timetable import Timetable


def table(kind: str, every: int = 1, *, parts: int = 1, epochs: int = 4, chunks: int = 8) -> Timetable:
    """kind: with the lead behind a plus."""
    kind, _, lead = kind.partition("+")
    schedule = {"kind": kind, "refresh_every": every, "lead": int(lead or 0), "parts": parts}
    return Timetable(ScheduleConfig.model_validate(schedule), epochs, chunks)


@pytest.mark.parametrize(
    ("kind", "every", "expected"),
    [
        ("sequential", 1, [3, 3, 3, 3]),
        ("parallel", 1, [None, 0, 1, 2]),
        ("parallel", 2, [None, None, 1, 1]),
        ("parallel", 0, [None, None, None, None]),
        ("wave", 1, [0, 1, 2, 3]),
        ("wave", 2, [0, 0, 2, 2]),
        ("wave+1", 1, [1, 2, 3, 3]),
        ("wave+3", 1, [3, 3, 3, 3]),
        ("wave+1", 2, [1, 1, 3, 3]),
    ],
)
def test_schedule_says_which_state_of_the_block_before_is_the_input(kind: str, every: int, expected: list[Any]) -> None:
    found = table(kind, every)
    assert [found.training(unit).source for unit in range(4)] == expected
    assert all(found.training(unit).chunks == tuple(range(8)) for unit in range(4))
    assert all(found.passing(unit) == found.training(unit) for unit in range(4))


@pytest.mark.parametrize(
    ("kind", "every", "expected"),
    [
        ("sequential", 1, ["begins", "goes_on", "goes_on", "goes_on"]),
        ("parallel", 0, ["begins", "goes_on", "goes_on", "goes_on"]),
        ("parallel", 2, ["none", "none", "begins", "goes_on"]),
        ("wave", 1, ["none", "none", "none", "begins"]),
        ("wave+1", 1, ["none", "none", "begins", "goes_on"]),
        ("wave+3", 1, ["begins", "goes_on", "goes_on", "goes_on"]),
    ],
)
def test_losses_are_compared_only_on_the_last_inputs(kind: str, every: int, expected: list[str]) -> None:
    found = table(kind, every)
    assert [found.comparison(unit) for unit in range(4)] == expected


def test_an_epoch_in_parts_trains_on_each_chunk_once_in_the_same_order_in_every_epoch() -> None:
    found = table("wave", parts=3, epochs=2)
    assert [found.training(unit).chunks for unit in range(6)] == [(0, 1), (2, 3, 4), (5, 6, 7)] * 2
    assert [found.epoch(unit) for unit in range(6)] == [0, 0, 0, 1, 1, 1]


def test_without_a_lead_a_unit_hands_on_what_it_has_trained_on() -> None:
    found = table("wave", parts=4, epochs=2)
    for unit in range(8):
        assert found.passing(unit) == found.training(unit)
        assert found.training(unit).source == unit
    assert [found.comparison(unit) for unit in range(8)] == ["none"] * 7 + ["begins"]


def test_with_a_lead_a_unit_hands_on_what_the_next_block_trains_on_then_and_the_last_all_that_is_left() -> None:
    found = table("wave+2", parts=8, epochs=1)
    assert [found.training(unit).source for unit in range(8)] == [2, 3, 4, 5, 6, 7, 7, 7]
    assert [found.passing(unit).chunks for unit in range(2, 8)] == [(0,), (1,), (2,), (3,), (4,), (5, 6, 7)]
    assert [found.passing(unit).source for unit in range(2, 8)] == [2, 3, 4, 5, 6, 7]
    assert found.handed_on() == set(range(2, 8))


EVERY_WAVE = [
    (parts, epochs, lead, chunks)
    for parts, epochs, lead, chunks in product((1, 2, 3, 5), (1, 2, 4), (0, 1, 2, 3, 4, 7, 30), (5, 8))
]


@pytest.mark.parametrize(("parts", "epochs", "lead", "chunks"), EVERY_WAVE)
def test_what_a_unit_reads_has_been_handed_on(parts: int, epochs: int, lead: int, chunks: int) -> None:
    found = table(f"wave+{lead}", parts=parts, epochs=epochs, chunks=chunks)
    for unit in range(found.units):
        readings = [found.training(unit), *([found.passing(unit)] if unit in found.handed_on() else [])]
        for reading in readings:
            assert reading.source is not None
            # It is there when the wave has come so far: `lead` units after this one, one state of the whole chain.
            assert unit <= reading.source <= unit + lead
            assert reading.source in found.handed_on()
            assert set(reading.chunks) <= set(found.passing(reading.source).chunks)
    trained = sorted(chunk for unit in range(found.units) for chunk in found.training(unit).chunks)
    assert trained == sorted(list(range(chunks)) * epochs)
    assert found.comparison(found.last) != "none"
