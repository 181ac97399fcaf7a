"""DeepSpeed's cpu_adam where `lsi doctor --build` has compiled it: the tests themselves compile nothing."""

import copy

import pytest
from test_engines import METHODS, RELATIVE, STEPS, begin, same, steps

from pipeline.deepspeed_engine import DeepSpeedEngine, Offload
from pipeline.deepspeed_ops import is_built

pytestmark = pytest.mark.skipif(not is_built("cpu_adam"), reason="cpu_adam is not built here: lsi doctor --build")


@pytest.mark.parametrize("name", ["diagonal", "dense-rounding-bounds"])
def test_it_steps_as_torch_does_and_goes_on_bit_for_bit(name: str) -> None:
    engine = DeepSpeedEngine("cpu", Offload(parameters=True, optimizer=True, adam="cpu_adam"))
    losses = steps(begin(METHODS[name], engine))
    assert losses == pytest.approx(steps(begin(METHODS[name])), rel=RELATIVE)
    first = begin(METHODS[name], engine)
    begun = steps(first, range(3))
    state = copy.deepcopy(first.export_state())
    second = begin(METHODS[name], engine)
    second.import_state(state)
    assert begun + steps(second, range(3, STEPS)) == losses
    whole = begin(METHODS[name], engine)
    steps(whole)
    expected = copy.deepcopy(whole.export_state())
    again = begin(METHODS[name], engine)
    steps(again)
    assert same(again.export_state(), expected)
    engine.close()
