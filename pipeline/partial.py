"""Commits inside a training unit: one that is cut goes on from the last of them and not from its start.

Each is an artifact of its own, `partial/block-003-unit-001-step-000012-KEY`, with the key of what the unit makes: it holds
for exactly that unit, wherever it goes on. Each takes the place of the one before, and none outlives the unit's own commit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.units import YieldUnit
from pipeline.artifacts import Artifact, CorruptArtifactError, discard, read_record, read_tensors
from pipeline.block_state import Best, Trained, own_part, pack_state, unpack_state
from pipeline.worker import Worker

KIND = "partial"
FILE = "partial.safetensors"
# What the first of a group says to the others: nothing, commit, or commit and leave.
LEAVE = 2


@dataclass
class Epoch:
    """A unit in the middle of its epoch. `history` and `best` are those before it; `losses` has one entry a step done."""

    trained: Trained
    best: Best | None
    history: list[dict[str, Any]]
    losses: list[float]


def unit_name(block: int, unit: int) -> str:
    """What the artifacts of one training unit are called."""
    return f"block-{block:03d}-unit-{unit:03d}"


def partial_owner(path: str) -> tuple[str, str]:
    """The unit's name and its shortened key, from the path of a partial artifact or of anything in it."""
    folder = "/".join(path.split("/")[:2])
    rest, _, key = folder.removeprefix(f"{KIND}/").rpartition("-")
    return rest.rpartition("-step-")[0], key


class Commits:
    """The commits of one unit, by a clock that starts with it."""

    def __init__(self, worker: Worker, block: int, unit: int, key: str) -> None:
        self.worker = worker
        self.block = block
        self.name = unit_name(block, unit)
        self.key = key
        self.last = time.monotonic()
        self.written = -1

    def _artifact(self, step: int) -> Artifact:
        return Artifact(KIND, f"{self.name}-step-{step:06d}", self.key)

    def _steps(self) -> list[int]:
        """What there is of this unit's, committed or not, the newest first."""
        own = (self.name, self.key[:16])
        folders = {key.split("/")[1] for key in self.worker.store.list(KIND) if partial_owner(key) == own}
        return sorted((int(folder.rpartition("-step-")[2].partition("-")[0]) for folder in folders), reverse=True)

    def take_up(self) -> Epoch | None:
        """The newest intact one, all others being removed; None if the unit must begin."""
        members = self.worker.members
        found = self._newest() if members.leads else None
        step = members.agree(self.written)
        if step < 0:
            return None
        found = found or self._read(step)
        if found is None:
            raise RuntimeError(f"{self.name}: its commit at step {step} is not there any more")
        meta, tensors = found
        trained, best = unpack_state(self.worker, self.block, tensors, meta["best"])
        return Epoch(trained, best, meta["history"], tensors["losses"].tolist())

    def _newest(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        found = None
        for step in self._steps():
            if found is None:
                found = self._read(step)
            if self.written != step:
                discard(self.worker.store, self._artifact(step))
        return found

    def _read(self, step: int) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        artifact = self._artifact(step)
        try:
            record = read_record(self.worker.store, artifact)
            if record is None:
                return None
            tensors = read_tensors(self.worker.store, artifact, FILE, own_part(self.worker))
        except CorruptArtifactError as error:
            self.worker.notes.append(f"damaged, its unit goes on from an earlier commit or begins again: {error}")
            return None
        self.written = step
        return record.meta, tensors

    def check(self, epoch: Epoch) -> None:
        """Between two steps: commit if it is time. Raises YieldUnit, after a commit, if the worker has to leave."""
        members, together = self.worker.members, self.worker.together
        if not (members.leads or together):
            return
        leaving = self.worker.should_yield()
        due = leaving or time.monotonic() - self.last >= self.worker.config.cluster.commit_every_seconds
        # The first one's word: it has the state from the others.
        said = due + leaving
        said = members.agree(said) if together else said
        if said:
            self._write(epoch)
        if said == LEAVE:
            raise YieldUnit

    def _write(self, epoch: Epoch) -> None:
        step = len(epoch.losses)
        if step != self.written:
            # In float64 a loss stays what it is, NaN included, which JSON does not know.
            losses = torch.tensor(epoch.losses, dtype=torch.float64)
            writer = self.worker.writer(self._artifact(step))
            writer.write_tensors(FILE, pack_state(epoch.trained, epoch.best) | {"losses": losses})
            writer.commit({"history": epoch.history, "best": epoch.best.meta() if epoch.best else None})
            before, self.written = self.written, step
            if before >= 0 and self.worker.members.leads:
                discard(self.worker.store, self._artifact(before))
        self.last = time.monotonic()

    def clear(self) -> None:
        """Remove them all: the unit's own commit is there."""
        if not self.worker.members.leads:
            return
        for step in self._steps():
            discard(self.worker.store, self._artifact(step))
