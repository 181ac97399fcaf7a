"""Stage `end to end`: the scales of all blocks, trained together towards the full-precision model's predictions.

A step is many units: each sums the gradient over some sequences (`GradientTask`), and one moves the scales by all of them
(`UpdateTask`). So the workers share a step, the sums do not depend on how many there are, and a lost worker costs a few sequences.
Codes and zero points stay.

The divergence is measured over the same first sequences (`COMPARED_SAMPLES`) with the scales that the blocks ended with and
with the last step's: these are kept if it has become less (`ScaledTask`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lsi.scales import adam_step, finite, initial_state, scaled
from pipeline.artifacts import Artifact, Writer, read_meta, read_tensors
from pipeline.block_state import WEIGHTS_FILE, number, read_result
from pipeline.config import RunConfig
from pipeline.optimize import permutation
from pipeline.student import Student, block_file
from pipeline.worker import Chunk, PassedByAll, Worker

# The scales before and after are compared over so many of the stage's sequences.
COMPARED_SAMPLES = 4

EndStatus = Literal["ok", "non_finite"]


@dataclass(frozen=True)
class Share:
    """Sequences of one unit: some of a chunk's, by their places in it."""

    chunk: int
    samples: tuple[int, ...]


def samples_of(config: RunConfig) -> int:
    """How many of the calibration samples the stage takes, the first ones."""
    return min(config.data.samples, config.end_to_end.samples or config.data.samples)


def compared_of(config: RunConfig) -> list[Share]:
    """The sequences that the scales are compared by, in units like a step's."""
    places = [
        divmod(sample, config.storage.chunk_samples) for sample in range(min(COMPARED_SAMPLES, samples_of(config)))
    ]
    return list(_parts(places, config.end_to_end.unit_samples))


def steps_of(config: RunConfig) -> list[list[Share]]:
    """The parts of every step's batch, over all epochs, in an order that depends on the seed alone."""
    settings, seed = config.end_to_end, config.optimizer.seed
    size, samples = config.storage.chunk_samples, samples_of(config)
    steps: list[list[Share]] = []
    for epoch in range(settings.epochs):
        order: list[tuple[int, int]] = []
        for chunk in permutation(config.storage.chunks_of(samples), seed, "end to end", epoch):
            here = min(size, samples - chunk * size)
            order += [(chunk, place) for place in permutation(here, seed, "end to end", epoch, chunk)]
        for start in range(0, samples, settings.batch_size):
            steps.append(list(_parts(order[start : start + settings.batch_size], settings.unit_samples)))
    return steps


def _parts(batch: list[tuple[int, int]], size: int) -> Iterator[Share]:
    """A batch cut where chunks end, and into so many sequences at the most."""
    for chunk in dict.fromkeys(chunk for chunk, _ in batch):
        places = [place for other, place in batch if other == chunk]
        for start in range(0, len(places), size):
            yield Share(chunk, tuple(places[start : start + size]))


def moments_file(index: int) -> str:
    """The file of AdamW's moments of one block, in a file of their own: many read the scales, and one reads these."""
    return f"moments-{index:03d}.safetensors"


def mean_loss(parts: list[dict[str, Any]]) -> float:
    """A token's, of what the units of a batch committed; infinite where one was not finite."""
    if any(part["loss"] is None for part in parts):
        return math.inf
    return float(sum(part["loss"] for part in parts) / sum(part["tokens"] for part in parts))


def student_of(worker: Worker, results: tuple[Artifact, ...], scales: Artifact | None) -> Student:
    """The worker's student, with the scales of a state; made when it has none of these results.

    It is the caller's until he gives it back: after a unit that failed half-way it must be made anew.
    """
    student, worker.student = worker.student, None
    if not isinstance(student, Student) or student.results != results:
        del student
        worker.release()
        student = Student(worker, results)
    student.load(scales)
    return student


@dataclass(frozen=True)
class GradientTask(PassedByAll):
    """The loss over some sequences, and with `backward` its gradient for every scale. The processes of a group share the sequences.

    `results`: of all blocks. `scales`: the state after the step before; None: the results' own scales. `inputs` enter the
    first block, `targets` leave the full-precision model's last one.
    """

    share: Share
    results: tuple[Artifact, ...]
    scales: Artifact | None
    inputs: Chunk
    targets: Chunk
    out: Artifact
    backward: bool = True

    def __call__(self, worker: Worker) -> dict[str, Any]:
        student = student_of(worker, self.results, self.scales)
        worker.chunks.prefetch([self.inputs, self.targets])
        inputs, targets = worker.chunks.get(self.inputs), worker.chunks.get(self.targets)
        places = [slice(place, place + 1) for place in worker.part(self.share.samples)]
        ends = [(inputs[one].to(worker.device), targets[one].to(worker.device)) for one in places]
        writer, good = worker.writer(self.out), True

        def write(block: int, gradients: dict[str, Tensor]) -> None:
            nonlocal good
            worker.add_up(gradients.values())
            good = good and finite(gradients)
            writer.write_tensors(block_file(block), {name: gradient.cpu() for name, gradient in gradients.items()})

        own = student.backward(ends, write) if self.backward else student.losses(ends)
        whole = torch.tensor(own, dtype=torch.float64)
        worker.add_up([whole])
        loss, tokens = whole.item(), len(self.share.samples) * inputs.shape[1]
        good = good and math.isfinite(loss)
        writer.commit({"tokens": tokens, "loss": number(loss), "finite": good, "stamp": worker.stamp()})
        worker.student = student
        return {"loss": loss / tokens} if math.isfinite(loss) else {}


@dataclass(frozen=True)
class UpdateTask:
    """Step `step`: the scales moved by a batch's gradients, block after block. After a loss or gradient that was not finite
    they stay as they are, for all further steps."""

    step: int
    steps: int
    blocks: int
    gradients: tuple[Artifact, ...]
    previous: Artifact | None
    out: Artifact

    def __call__(self, worker: Worker) -> dict[str, Any]:
        parts = [read_meta(worker.store, artifact) for artifact in self.gradients]
        before: dict[str, Any] = (
            read_meta(worker.store, self.previous) if self.previous else {"status": "ok", "done": 0}
        )
        tokens = sum(part["tokens"] for part in parts)
        good = before["status"] == "ok" and all(part["finite"] for part in parts)
        rate = worker.config.end_to_end.learning_rate
        writer = Writer(worker.store, self.out)
        for index in range(self.blocks):
            worker.leave_if_asked()
            summed = self._summed(worker, index, tokens)
            state = self._before(worker, index) if self.previous else initial_state(summed)
            if good:
                state = adam_step(state, summed, rate, before["done"], self.steps)
            values = {name: state.pop(name) for name in sorted(state) if name.startswith("value/")}
            writer.write_tensors(block_file(index), values)
            writer.write_tensors(moments_file(index), state)
        loss = sum(part["loss"] for part in parts) / tokens if good else None
        status: EndStatus = "ok" if good else "non_finite"
        done = before["done"] + good
        writer.commit({"loss": loss, "status": status, "done": done, "stamp": worker.stamp()})
        return {"loss": loss, "status": status}

    def _before(self, worker: Worker, block: int) -> dict[str, Tensor]:
        """One block's state after the step before."""
        assert self.previous is not None
        files = block_file(block), moments_file(block)
        return {n: t for file in files for n, t in read_tensors(worker.store, self.previous, file).items()}

    def _summed(self, worker: Worker, block: int, tokens: int) -> dict[str, Tensor]:
        """The mean gradient over the batch's tokens of one block's scales, added up in the order of the parts."""
        total: dict[str, Tensor] = {}
        for artifact in self.gradients:
            for name, gradient in read_tensors(worker.store, artifact, block_file(block)).items():
                total[name] = total[name].add_(gradient) if name in total else gradient
        return {name: gradient.div_(tokens) for name, gradient in total.items()}


@dataclass(frozen=True)
class ScaledTask:
    """What a block has become: its codes with the trained scales, or as it was if the loss is not less for them.

    `before` and `after` have the loss over the same sequences, with the results' own scales and with `scales`.
    """

    block: int
    result: Artifact
    scales: Artifact
    before: tuple[Artifact, ...]
    after: tuple[Artifact, ...]
    out: Artifact

    def __call__(self, worker: Worker) -> dict[str, Any]:
        trained = read_meta(worker.store, self.scales)
        before, after = ([read_meta(worker.store, a) for a in measured] for measured in (self.before, self.after))
        initial, final = mean_loss(before), mean_loss(after)
        better = final < initial
        result = read_result(worker.store, self.result)
        if better:
            factors = read_tensors(worker.store, self.scales, block_file(self.block))
            weights = {name: scaled(weight, factors[f"value/{name}"]) for name, weight in result.weights.items()}
            result = replace(result, weights=weights)
        writer = Writer(worker.store, self.out)
        writer.write_tensors(WEIGHTS_FILE, result.pack())
        losses = {"initial_loss": number(initial), "loss": number(final if better else initial)}
        told = {"kept": "trained" if better else "initial", "status": trained["status"], "steps": trained["done"]}
        writer.commit(losses | told | {"tokens": sum(part["tokens"] for part in before)})
        return {"loss": losses["loss"], "status": trained["status"]}
