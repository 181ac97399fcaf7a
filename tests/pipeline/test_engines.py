"""The engines: DeepSpeed trains as plain torch does, repeats to the byte, grows nothing, and compiles nothing."""

import copy
import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from running import Silent, checkpoint_hashes, run, tiny_config
from test_finetune import tune_config
from test_partial import UNITS, leave_at, node_of, same, stopped_before, tensors_of
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from cluster.units import YieldUnit
from lsi.block import sharing_copy
from lsi.engine import Engine
from lsi.grid import Grid
from lsi.increment import Increment
from lsi.linear import Parts
from lsi.reconstruct import Method, Reconstruction
from pipeline.deepspeed_engine import DeepSpeedEngine, Offload
from pipeline.graph import Node
from pipeline.report import block_reports
from pipeline.run import ray_workers

# Fused and plain AdamW, and sums in another layout; measured 3e-7.
RELATIVE = 5e-6
STEPS = 8
NAMES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
RATES = {"clipping": 1e-2, "increment": 1e-2, "rounding": 1e-2}


@pytest.fixture(autouse=True, scope="module")
def nothing_is_compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever a test here does, the extensions cache stays empty."""
    folder = tmp_path_factory.mktemp("extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        yield
    assert list(folder.iterdir()) == []


def layer_config(hidden: int) -> LlamaConfig:
    config = LlamaConfig(hidden_size=hidden, intermediate_size=hidden * 2, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = "sdpa"
    return config


def make_block(seed: int = 0, hidden: int = 64) -> nn.Module:
    """A random decoder block of its own for every seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = LlamaDecoderLayer(layer_config(hidden), 0)
        for parameter in block.parameters():
            parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1)
    return block


Batch = tuple[Tensor, Tensor, dict[str, Any]]


def make_batches(hidden: int = 64, count: int = 3) -> list[Batch]:
    """Inputs, a full-precision block's outputs, and what it is called with."""
    inputs = torch.randn(count, 2, 8, hidden, generator=torch.Generator().manual_seed(1))
    rotary = LlamaRotaryEmbedding(layer_config(hidden))(inputs[0], torch.arange(8).unsqueeze(0))
    arguments = {"position_embeddings": rotary, "attention_mask": None}
    with torch.no_grad():
        return [(x, make_block(0, hidden)(x, **arguments), arguments) for x in inputs]


BATCHES = make_batches()


def method(kind: Any = "diagonal", **changes: Any) -> Method:
    parts = Parts("learned", Increment(kind, corner=4), False, torch.float32)
    return replace(Method(Grid(3, 32, False), parts, RATES, STEPS), **changes)


DIRECT = Parts("direct", Increment("dense"), True, torch.float32)
METHODS = {
    "diagonal": method(),
    "dense-rounding-bounds": method(parts=DIRECT),
    "corner-signed": method(parts=replace(DIRECT, increment=Increment("corner", corner=4)), steps="signed"),
    "band-bfloat16": method("band", autocast=torch.bfloat16),
    "recomputed": method("corner", recompute=True),
    "micro-batches": method("corner", micro_batch=1),
    "warm": method(warm_steps=3),
    "warm-signed": method(parts=DIRECT, steps="signed", warm_steps=3),
}
OFFLOADS = {
    "all": Offload(parameters=True, optimizer=True),
    "parameters": Offload(parameters=True, optimizer=False),
    "optimizer": Offload(parameters=False, optimizer=True),
    "none": Offload(parameters=False, optimizer=False),
}


def steps(reconstruction: Reconstruction, numbers: range = range(STEPS)) -> list[float]:
    return [reconstruction.step(*BATCHES[number % len(BATCHES)]) for number in numbers]


def begin(method: Method, engine: Engine | None = None, seed: int = 0) -> Reconstruction:
    return Reconstruction(make_block(seed), NAMES, method, engine=engine)


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, DeepSpeedEngine]]:
    """One a kind of offloading, used by all tests as an actor would for its blocks."""
    made = {name: DeepSpeedEngine("cpu", offload) for name, offload in OFFLOADS.items()}
    yield made
    for engine in made.values():
        engine.close()


@pytest.mark.parametrize(
    ("name", "offload"),
    [
        *((name, "all") for name in METHODS),
        *((name, "none") for name in ("dense-rounding-bounds", "warm")),
    ],
)
def test_every_step_is_plain_torch_s_to_the_bit(engines: dict[str, DeepSpeedEngine], name: str, offload: str) -> None:
    plain, other = begin(METHODS[name]), begin(METHODS[name], engines[offload])
    expected, losses = steps(plain), steps(other)
    assert losses == expected
    assert expected[3] != expected[0], "the same batch again, and nothing was trained"
    assert same(other.export_state(), plain.export_state())


@pytest.mark.parametrize("offload", ["all", "optimizer"])
def test_an_engine_that_has_trained_other_blocks_gives_the_bytes_of_a_new_one(
    engines: dict[str, DeepSpeedEngine], offload: str
) -> None:
    settings = method("corner")
    steps(begin(settings, engines[offload], 1))
    used = begin(settings, engines[offload], 3)
    new_engine = DeepSpeedEngine("cpu", OFFLOADS[offload])
    new = begin(settings, new_engine, 3)
    assert steps(used) == steps(new)
    assert same(used.export_state(), new.export_state())
    new_engine.close()


@pytest.mark.parametrize(
    ("name", "offload", "stop"),
    [
        ("dense-rounding-bounds", "all", 3),
        ("corner-signed", "all", 4),
        # Before, at and after the step with which parts join.
        *(("warm", "all", stop) for stop in (2, 3, 4)),
        ("warm", "none", 4),
    ],
)
def test_a_state_goes_on_bit_for_bit(engines: dict[str, DeepSpeedEngine], name: str, offload: str, stop: int) -> None:
    engine = engines[offload]
    whole = begin(METHODS[name], engine)
    losses, expected = steps(whole), copy.deepcopy(whole.export_state())
    first = begin(METHODS[name], engine)
    begun = steps(first, range(stop))
    state = copy.deepcopy(first.export_state())
    steps(begin(METHODS[name], engine, seed=5))
    second = begin(METHODS[name], engine)
    second.import_state(state)
    assert begun + steps(second, range(stop, STEPS)) == losses
    assert same(second.export_state(), expected)


@pytest.mark.parametrize("offload", ["all", "none"])
def test_the_clipping_begins_as_with_plain_torch(engines: dict[str, DeepSpeedEngine], offload: str) -> None:
    plain, other = begin(METHODS["diagonal"]), begin(METHODS["diagonal"], engines[offload])
    for one in (plain, other):
        one.begin_clipping((inputs, arguments) for inputs, _, arguments in BATCHES)
    expected, found = plain.export_state(), other.export_state()
    begun = [name for name in expected if ".clipping." in name]
    assert begun
    for name in begun:
        assert torch.equal(found[name], expected[name])
        assert (expected[name] != expected[name].max()).any(), "nothing was begun"
    assert steps(other) == pytest.approx(steps(plain), rel=RELATIVE)


@pytest.mark.parametrize("offload", ["all", "none"])
def test_a_block_that_shares_its_tensors_leaves_them_as_they_are(
    engines: dict[str, DeepSpeedEngine], offload: str
) -> None:
    sources = [make_block(seed).to(torch.bfloat16) for seed in (1, 2)]
    for number, source in enumerate(sources):
        source.register_buffer("kept", torch.full((3,), float(number)))
    before = [copy.deepcopy(source.state_dict()) for source in sources]
    for source in (*sources, sources[0]):
        trained = Reconstruction(sharing_copy(source), NAMES, METHODS["dense-rounding-bounds"], engine=engines[offload])
        trained.begin_clipping((inputs, arguments) for inputs, _, arguments in BATCHES)
        steps(trained)
        trained.quantized()
    engines[offload].close()
    assert all(same(source.state_dict(), old) for source, old in zip(sources, before, strict=True))


@pytest.mark.parametrize("broken", ["inputs", "targets"])
def test_numbers_that_are_not_finite_change_nothing(engines: dict[str, DeepSpeedEngine], broken: str) -> None:
    engine = engines["all"]
    reconstruction = begin(METHODS["diagonal"], engine)
    steps(reconstruction, range(2))
    before = copy.deepcopy(reconstruction.export_state())
    inputs, targets, arguments = (t.clone() if isinstance(t, Tensor) else t for t in BATCHES[0])
    (inputs if broken == "inputs" else targets)[0, 0, 0] = torch.inf
    reconstruction.step(inputs, targets, arguments)
    assert (reconstruction.status, reconstruction.steps_done) == ("non_finite", 2)
    after = reconstruction.export_state()
    assert same({k: t for k, t in after.items() if k != "steps"}, {k: t for k, t in before.items() if k != "steps"})
    # What the next block does is not touched by it.
    assert steps(begin(METHODS["diagonal"], engine)) == steps(begin(METHODS["diagonal"], engine))


def test_a_block_of_another_structure_makes_another_engine_and_ends_the_old_blocks(
    engines: dict[str, DeepSpeedEngine],
) -> None:
    engine = engines["all"]
    old = begin(METHODS["diagonal"], engine)
    expected = steps(begin(METHODS["dense-rounding-bounds"]))
    assert steps(begin(METHODS["dense-rounding-bounds"], engine)) == pytest.approx(expected, rel=RELATIVE)
    with pytest.raises(RuntimeError, match="taken in another block"):
        steps(old)


def tensor_bytes() -> int:
    """Of all tensors that anything still points at."""
    gc.collect()
    return sum(found.nbytes for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter))


def train_and_leave(engine: DeepSpeedEngine, seed: int, hidden: int, batch: Batch) -> None:
    reconstruction = Reconstruction(make_block(seed, hidden), NAMES, method("dense"), engine=engine)
    reconstruction.step(*batch)
    reconstruction.quantized()
    reconstruction.export_state()


def test_sixteen_blocks_through_one_engine_do_not_grow() -> None:
    """A block here has 3 MiB of tensors: what is kept of each would be seen."""
    hidden, engine, process = 192, DeepSpeedEngine("cpu", OFFLOADS["all"]), psutil.Process()
    (batch, *_) = make_batches(hidden, count=1)
    held, resident = {}, []
    for number in range(16):
        train_and_leave(engine, number, hidden, batch)
        resident.append(process.memory_info().rss)
        if number in (1, 15):
            held[number] = tensor_bytes()
    engine.close()
    assert held[15] == held[1]
    assert max(resident[12:]) - max(resident[1:4]) < 20 * 2**20


def test_closing_lets_go_of_all_tensors() -> None:
    hidden = 64
    held = []
    for seed in range(3):
        engine = DeepSpeedEngine("cpu", OFFLOADS["all"])
        train_and_leave(engine, seed, hidden, BATCHES[0])
        engine.close()
        held.append(tensor_bytes())
    assert max(held) - min(held) < 10_000, "a block has 400 kB"


DEEPSPEED: dict[str, Any] = {
    "compute": {"engine": "deepspeed"},
    "cluster": {"workers": 1},
    "storage": {"keep_activations": True},
}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("engines") / "model")


@pytest.fixture(scope="module")
def undisturbed(model: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tiny_config(model, short_text, tmp_path_factory.mktemp("deepspeed") / "run", **DEEPSPEED))


def test_a_run_comes_to_what_plain_torch_comes_to(
    undisturbed: Any, model: Path, short_text: Path, tmp_path: Path
) -> None:
    finished, result = undisturbed
    plain, other = run(tiny_config(model, short_text, tmp_path / "run"))
    losses = [[block["loss"] for block in block_reports(one)] for one in (finished, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    ours, theirs = (found["perplexity"]["quantized"]["news"] for found in (result, other))
    assert ours == pytest.approx(theirs, rel=2e-3)
    assert {a.key for a in finished.graph.goals}.isdisjoint(a.key for a in plain.graph.goals)


class Weigher(Silent):
    """Notes how much memory this process holds after every training unit."""

    def __init__(self) -> None:
        super().__init__()
        self.resident: list[int] = []

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        super().finished(node, result)
        if node.name.startswith("optimize"):
            self.resident.append(psutil.Process().memory_info().rss)


def test_a_run_of_sixteen_blocks_through_one_worker_does_not_grow(
    tiny_model: Callable[..., Path], tiny_tokenizer: Any, short_text: Path, tmp_path: Path
) -> None:
    """Twelve blocks' tensors, kept, were 34 MiB; what is measured is 1.5."""
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tiny_tokenizer),
        eos_token_id=tiny_tokenizer.eos_token_id,
        bos_token_id=None,
    )
    folder, report = tiny_model(tmp_path / "model", config=config), Weigher()
    # In this order the units of one block follow those of the one before.
    changed = DEEPSPEED | {"optimizer": {"epochs": 1}, "schedule": {"kind": "sequential"}, "evaluation": {"texts": {}}}
    run(tiny_config(folder, short_text, tmp_path / "run", **changed), report)
    assert len(report.resident) == 16
    assert report.resident[15] - report.resident[3] < 12 * 2**20


EVERYTHING: dict[str, Any] = {
    "scheme": {"bits": 4, "group_size": None, "activation_bits": 8, "quantize_qkv": True},
    "method": {"look_ahead": 1, "quantized_stream_loss": 0.5},
    "optimizer": {"warm_epochs": 1},
}


def test_it_takes_what_plain_torch_takes(model: Path, short_text: Path, tmp_path: Path) -> None:
    """Look-ahead, the quantized stream, quantized activations and late parts, in micro-batches."""
    compute = {"micro_batch": 1, "recompute": True}
    losses = []
    for engine in ("torch", "deepspeed"):
        changed = EVERYTHING | {"compute": compute | {"engine": engine}}
        finished, _ = run(tiny_config(model, short_text, tmp_path / engine, **changed))
        losses.append([block["loss"] for block in block_reports(finished)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_fine_tune_comes_to_what_plain_torch_comes_to(model: Path, short_text: Path, tmp_path: Path) -> None:
    run(tiny_config(model, short_text, tmp_path / "rounded", optimizer={"epochs": 0}))
    losses = []
    for engine in ("torch", "deepspeed"):
        folder = tmp_path / "rounded" / "checkpoint"
        finished, _ = run(tune_config(folder, short_text, tmp_path / engine, compute={"engine": engine}))
        (first, *_) = block_reports(finished)
        assert first["loss"] < first["initial_loss"]
        losses.append([first["initial_loss"], first["loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_cut_after_every_other_step_and_gone_on_elsewhere_it_makes_the_same_bytes(
    undisturbed: Any, model: Path, short_text: Path, tmp_path: Path
) -> None:
    graph, store, worker = stopped_before(tiny_config(model, short_text, tmp_path / "run", **DEEPSPEED), UNITS[0])
    node = node_of(graph, UNITS[0])
    for cuts in range(20):  # noqa: B007
        cut = worker(leave_at(2))
        try:
            node.task(cut)
            break
        except YieldUnit:
            cut.engine.close()
    assert 1 < cuts < 19
    finished, _ = undisturbed
    assert same(tensors_of(store, node), tensors_of(finished.prepared.store, node_of(finished.graph, UNITS[0])))


class Killer(Silent):
    """Ends the process that has done the first training unit, while it does the next."""

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        super().finished(node, result)
        if node.name == UNITS[0]:
            os.kill(result["pid"], signal.SIGKILL)


@pytest.mark.ray
def test_killed_in_a_ray_actor_and_gone_on_in_another_it_makes_the_same_bytes(
    undisturbed: Any, model: Path, short_text: Path, tmp_path: Path
) -> None:
    changed = DEEPSPEED | {"cluster": {"workers": 1, "commit_every_seconds": 0}}
    finished, _ = run(tiny_config(model, short_text, tmp_path / "run", **changed), Killer(), ray_workers)
    assert checkpoint_hashes(finished.prepared.checkpoint) == checkpoint_hashes(undisturbed[0].prepared.checkpoint)
    manifest = json.loads(finished.prepared.store.get("manifest.json"))
    assert len({entry["pid"] for entry in manifest["timeline"] if entry["unit"].startswith("optimize")}) == 2
