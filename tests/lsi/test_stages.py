"""A staged start: what joins late does not move before it does, then has a decay of its own; the bytes do not depend on cuts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from material import NAMES, assert_same_weight, make_layer, make_task
from safetensors.torch import load_file, save_file
from tolerances import assert_close, assert_same
from torch import Tensor

from lsi.engine import TorchAttachment
from lsi.grid import Grid
from lsi.increment import Increment, Kind
from lsi.linear import Clipping, Parts
from lsi.reconstruct import Method, Reconstruction, part_of
from lsi.steps import Steps

WARM, TOTAL = 3, 8


def of(clipping: Clipping, kind: Kind, steps: Steps, *, rounding: bool = False, let: bool = False) -> Method:
    return Method(
        grid=Grid(2, 32, symmetric=False),
        parts=Parts(clipping, Increment(kind), rounding, torch.float32),
        rates={"clipping": 1e-1, "increment": 5e-2, "rounding": 5e-2, "equivalence": 5e-2},
        total_steps=TOTAL,
        steps=steps,
        equivalence=("norm",) if let else (),
        warm_steps=WARM,
    )


WAYS = {
    "adamw: clipping, then diagonal": of("learned", "diagonal", "adamw"),
    "adamw: clipping, then dense": of("learned", "dense", "adamw"),
    "adamw: clipping and LET, then diagonal": of("learned", "diagonal", "adamw", let=True),
    "adamw: LET, then rounding": of("none", "none", "adamw", rounding=True, let=True),
    "signed: clipping, then diagonal and rounding": of("direct", "diagonal", "signed", rounding=True),
}
WAY = pytest.mark.parametrize("way", WAYS)


def begin(way: str) -> Reconstruction:
    return Reconstruction(make_layer(), NAMES, WAYS[way])


def steps(reconstruction: Reconstruction, numbers: range) -> list[float]:
    tasks = [make_task(seed=number) for number in numbers]
    return [reconstruction.step(task.inputs, task.targets, task.arguments) for task in tasks]


def values(reconstruction: Reconstruction, *, late: bool) -> dict[str, Tensor]:
    """Of the parts that join late, or of the others."""
    found = {n: p.detach().clone() for n, p in reconstruction.parameters.items()}
    return {n: p for n, p in found.items() if (part_of(n) in ("increment", "rounding")) is late}


@WAY
def test_what_joins_late_stays_as_it_is_until_then(way: str) -> None:
    reconstruction = begin(way)
    late, early = values(reconstruction, late=True), values(reconstruction, late=False)
    assert late
    assert early
    steps(reconstruction, range(WARM))
    for name, tensor in late.items():
        assert_same(reconstruction.parameters[name], tensor)
    assert all((reconstruction.parameters[name] != tensor).any() for name, tensor in early.items())
    steps(reconstruction, range(WARM, WARM + 1))
    assert all((reconstruction.parameters[name] != tensor).any() for name, tensor in late.items())


@WAY
def test_the_first_stage_is_training_without_the_others_along_one_decay(way: str) -> None:
    method = WAYS[way]
    alone = Reconstruction(
        make_layer(),
        NAMES,
        replace(method, parts=replace(method.parts, increment=Increment("none"), rounding=False), warm_steps=0),
    )
    staged = begin(way)
    losses = steps(staged, range(WARM))
    assert losses == steps(alone, range(WARM))
    for name, tensor in values(alone, late=False).items():
        assert_same(staged.parameters[name], tensor)


def watch_gradients(reconstruction: Reconstruction) -> dict[str, Tensor | None]:
    """Those of the last step, by parameter; a step itself leaves none."""
    gradients: dict[str, Tensor | None] = {}

    def keep(*_: object) -> None:
        for name, parameter in reconstruction.parameters.items():
            gradients[name] = None if parameter.grad is None else parameter.grad.clone()

    assert isinstance(reconstruction.attachment, TorchAttachment)
    reconstruction.attachment.optimizer.register_step_pre_hook(keep)
    return gradients


def test_each_part_has_adam_and_a_cosine_from_its_own_first_step() -> None:
    """The updates written out in float64, from the gradients of each step."""
    method = WAYS["adamw: clipping, then diagonal"]
    reconstruction = begin("adamw: clipping, then diagonal")
    found = {name: parameter.detach().double() for name, parameter in reconstruction.parameters.items()}
    first = {name: torch.zeros_like(value) for name, value in found.items()}
    second = {name: torch.zeros_like(value) for name, value in found.items()}
    gradients = watch_gradients(reconstruction)
    for number in range(WARM + 2):
        steps(reconstruction, range(number, number + 1))
        for name in reconstruction.parameters:
            start, gradient = WARM if ".increment." in name else 0, gradients[name]
            if number < start:
                assert gradient is None
                continue
            assert gradient is not None
            gradient, done = gradient.double(), number - start
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            rate = method.rates[part_of(name)] * 0.5 * (1 + math.cos(math.pi * done / (TOTAL - start)))
            corrected = (second[name] / (1 - 0.999 ** (done + 1))).sqrt() + 1e-8
            found[name] = found[name] - rate * first[name] / (1 - 0.9 ** (done + 1)) / corrected
    for name, parameter in reconstruction.parameters.items():
        assert_close(parameter, found[name], torch.float32)


def test_signed_steps_have_a_straight_line_from_their_own_first_step() -> None:
    reconstruction = begin("signed: clipping, then diagonal and rounding")
    gradients = watch_gradients(reconstruction)
    steps(reconstruction, range(WARM))
    for done in range(2):
        before = values(reconstruction, late=True)
        steps(reconstruction, range(WARM + done, WARM + done + 1))
        for name, tensor in before.items():
            parameter = reconstruction.parameters[name]
            gradient = gradients[name]
            assert gradient is not None
            assert_close(parameter, tensor - 5e-2 * (1 - done / (TOTAL - WARM)) * gradient.sign())


@WAY
def test_interrupted_anywhere_is_the_same(way: str, tmp_path: Path) -> None:
    whole = begin(way)
    losses = steps(whole, range(WARM + 3))
    for stop in (0, WARM - 1, WARM, WARM + 1):
        part = begin(way)
        assert steps(part, range(stop)) == losses[:stop]
        save_file(part.export_state(), tmp_path / "state.safetensors")
        fresh = begin(way)
        fresh.import_state(load_file(tmp_path / "state.safetensors"))
        assert steps(fresh, range(stop, WARM + 3)) == losses[stop:]
        expected = whole.export_state()
        assert fresh.export_state().keys() == expected.keys()
        for name, tensor in fresh.export_state().items():
            assert_same(tensor, expected[name])
        for name, quantized in whole.quantized().items():
            assert_same_weight(fresh.quantized()[name], quantized)


def test_an_earlier_state_takes_back_what_has_joined() -> None:
    """A worker that goes on from a state of the first stage after it had been in the second."""
    whole, used = (begin("adamw: clipping, then diagonal") for _ in range(2))
    early = {name: tensor.clone() for name, tensor in whole.export_state().items()}
    losses = steps(whole, range(WARM + 2))
    steps(used, range(WARM + 2))
    used.import_state(early)
    assert steps(used, range(WARM + 2)) == losses
