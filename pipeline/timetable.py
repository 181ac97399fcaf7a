"""What a block trains on, unit by unit, and what it hands on to the block after it. The schedules differ in this alone.

A unit of a block is one epoch, or under `wave` one of its `parts`: a range of the chunks of samples, the same for every block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config import RunConfig
from pipeline.config_sections import ScheduleConfig

Comparison = Literal["none", "begins", "goes_on"]


@dataclass(frozen=True)
class Reading:
    """Chunks of a block's inputs, by number. `source`: after which of its units the block before gives them; None: they are
    the full-precision stream's."""

    chunks: tuple[int, ...]
    source: int | None


@dataclass(frozen=True)
class Timetable:
    """Of every block that trains. `chunks`: how many the samples make."""

    schedule: ScheduleConfig
    epochs: int
    chunks: int

    @property
    def units(self) -> int:
        """Of one block, all epochs together."""
        return self.epochs * self.schedule.parts

    @property
    def last(self) -> int:
        """A block's last unit."""
        return self.units - 1

    def epoch(self, unit: int) -> int:
        """The epoch that a unit belongs to."""
        return unit // self.schedule.parts

    def part(self, unit: int) -> range:
        """The chunks that a unit trains on."""
        part, parts = unit % self.schedule.parts, self.schedule.parts
        return range(part * self.chunks // parts, (part + 1) * self.chunks // parts)

    def training(self, unit: int) -> Reading:
        """What a unit trains on.

        sequential: the last state of the block before. parallel: the one before the latest refresh. wave: the one of the
        latest refresh, or `lead` units later, so that a block's last units train on inputs that have settled.
        """
        return Reading(tuple(self.part(unit)), self._source(unit))

    def _source(self, unit: int) -> int | None:
        schedule = self.schedule
        if schedule.kind == "sequential":
            return self.last
        if not schedule.refresh_every:
            return None
        refresh = unit // schedule.refresh_every * schedule.refresh_every
        if schedule.kind == "parallel":
            return refresh - 1 if refresh else None
        return min(refresh + schedule.lead, self.last)

    def passing(self, unit: int) -> Reading:
        """What the state after a unit is measured over, and hands its outputs on for, if any block reads them.

        With parts, these are the chunks that the block after it trains on `lead` units later than this one did, and after
        the last unit all that are left. They come from the unit of the block before that this one has trained on them after,
        or from one that is so many epochs later as `lead` holds.
        """
        parts, lead = self.schedule.parts, self.schedule.lead
        if parts > 1 and unit == self.last:
            left = {chunk for before in range(max(0, unit - lead), self.units) for chunk in self.part(before)}
            return Reading(tuple(sorted(left)), unit)
        if parts == 1 or unit < lead:
            return self.training(unit)
        return Reading(tuple(self.part(unit - lead)), min(unit + lead // parts * parts, self.last))

    def handed_on(self) -> set[int | None]:
        """The units of a block whose outputs the block after it reads."""
        return {self._source(reader) for reader in range(self.units)}

    def comparison(self, unit: int) -> Comparison:
        """Whether the state after a unit is measured on what the last one is, and is the first that is: losses are compared
        from there on."""
        final = self.passing(self.last)
        if self.passing(unit) != final:
            return "none"
        return "begins" if unit == 0 or self.passing(unit - 1) != final else "goes_on"


def timetable_of(config: RunConfig) -> Timetable:
    """A run's."""
    chunks = config.storage.chunks_of(config.data.samples)
    return Timetable(config.schedule, config.optimizer.epochs, chunks)
