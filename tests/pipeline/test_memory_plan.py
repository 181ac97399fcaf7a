"""The planned memory against the tensors that a step really makes, and what a plan proposes and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ledger import Ledger
from running import Silent, tiny_config, tiny_tree
from transformers import LlamaConfig, OPTConfig
from typer.testing import CliRunner

from lsi import grid
from lsi.block import linear_names
from lsi.reconstruct import Reconstruction
from pipeline import fit
from pipeline.block_state import make_method
from pipeline.calibrate import calibrated, random_block, random_factors
from pipeline.call_arguments import made_up_arguments
from pipeline.cli import app
from pipeline.config import RunConfig
from pipeline.config_file import parse_config
from pipeline.costs import Device
from pipeline.errors import UserError
from pipeline.memory_plan import BASE, DRIVER, GIB, MemoryPlan, Peak, worker_peak
from pipeline.plan import Workers, parse_size, plan
from pipeline.plan_choice import Choice, Limits, changed, choose, present_engine
from pipeline.plan_shapes import BlockShape, block_shape
from pipeline.prepare import prepare
from pipeline.skeleton import Skeleton, make_skeleton

LLAMA = LlamaConfig(
    hidden_size=256,
    intermediate_size=896,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_hidden_layers=2,
    vocab_size=256,
)
OPT = OPTConfig(
    hidden_size=256, ffn_dim=1024, num_attention_heads=8, num_hidden_layers=2, vocab_size=256, word_embed_proj_dim=256
)
RANKED = {"increment": "diagonal", "rank": 32}
AGAIN = {"recompute": True}
# Shape, tokens, method, how it is computed.
CASES: dict[str, tuple[Any, int, dict[str, Any], dict[str, Any]]] = {
    "diagonal": (LLAMA, 64, RANKED, AGAIN),
    "diagonal, all kept": (LLAMA, 64, RANKED, {}),
    "all singular values": (LLAMA, 64, {"increment": "diagonal"}, AGAIN),
    "dense": (LLAMA, 64, {"increment": "dense"}, {**AGAIN, "dtype": "bfloat16"}),
    "dense, all kept": (LLAMA, 64, {"increment": "dense"}, {}),
    "long": (LLAMA, 512, RANKED, {**AGAIN, "dtype": "bfloat16"}),
    "long, one by one": (LLAMA, 512, RANKED, {**AGAIN, "micro_batch": 1}),
    "long, parts again": (LLAMA, 512, RANKED, {**AGAIN, "checkpoint": True}),
    "rounding": (LLAMA, 64, {"increment": "none", "rounding": "learned"}, AGAIN),
    "narrow, all kept": (LLAMA, 64, RANKED, {"dtype": "bfloat16"}),
    "equivalence": (LLAMA, 64, {**RANKED, "equivalence": "auto"}, AGAIN),
    "equivalence, all kept": (LLAMA, 64, {"increment": "diagonal", "equivalence": "auto"}, {}),
    "bfloat16 factors": (LLAMA, 64, {"increment": "diagonal", "factor_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    "bfloat16 factors, again": (
        LLAMA,
        64,
        {"increment": "diagonal", "factor_dtype": "bfloat16"},
        {**AGAIN, "dtype": "bfloat16"},
    ),
    "not gated": (OPT, 512, RANKED, AGAIN),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elementwise passes go in pieces that are small beside a weight, as they are at the sizes that matter."""
    monkeypatch.setitem(grid.PIECE, "cpu", 1 << 14)


def given(length: int = 64, **sections: Any) -> RunConfig:
    tree = tiny_tree("model", "text", "run", **{"scheme": {"group_size": 128}, "compute": {}, **sections})
    tree["data"]["sequence_length"] = length
    return parse_config(tree)


def planned(skeleton: Skeleton, config: RunConfig) -> tuple[BlockShape, MemoryPlan]:
    shape = block_shape(skeleton, config, torch.bfloat16)
    return shape, MemoryPlan(shape, config, present_engine(config))


def moments_of(plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Every moment of a training unit, without what is no tensor of the block's training."""
    seen: dict[str, float] = {}

    def keep(moments: dict[str, dict[str, float]]) -> Peak:
        others = ("process", "activation cache", "best state so far", "libraries at work")
        seen.update(
            {name: sum(s for term, s in terms.items() if term not in others) for name, terms in moments.items()}
        )
        return Peak("", {})

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.memory_plan.fullest", keep)
        plan.optimize()
    return seen


def counted(skeleton: Skeleton, config: RunConfig, shape: BlockShape) -> Iterator[tuple[str, float]]:
    """The bytes that are there at most in each moment, block and batch included."""
    torch.manual_seed(0)
    length = config.data.sequence_length
    block = random_block(skeleton.blocks[0], torch.bfloat16, torch.device("cpu"))
    weights = sum(p.nbytes for p in block.parameters())
    names = linear_names(skeleton.blocks[0], skeleton.block_prefix(0), config.scheme.skip)
    products = torch.bfloat16 if present_engine(config).products == 2 else None
    context = make_context(config, products)
    arguments = made_up_arguments(skeleton, length, torch.bfloat16, "cpu")[0]
    hidden = torch.randn(config.optimizer.batch_size, length, shape.hidden).bfloat16()
    with Ledger() as ledger:
        trained = Reconstruction(block, names, make_method(context), factorizer=random_factors)
        ledger.peak = ledger.live
        trained.begin_clipping([(hidden, arguments)])
        yield "the clipping's start", ledger.peak + weights
        trained.step(hidden, hidden, arguments)
        ledger.peak = ledger.live
        trained.step(hidden, hidden, arguments)
        yield "a step", ledger.peak + weights
        ledger.peak = ledger.live
        codes = trained.quantized()
        yield "codes of the result", ledger.peak + weights
        del codes


def make_context(config: RunConfig, products: torch.dtype | None) -> Any:
    from pipeline.worker import Context

    return Context(config, "", "", "", torch.bfloat16, products)


@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_factors_are_multiplied_in_the_dtype_of_training(products: torch.dtype | None) -> None:
    assert make_method(make_context(given(), products)).parts.increment.products is products


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_a_step_makes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, length, method, compute = CASES[case]
    # One chunk is one batch, so that the clipping's start sees what the plan reckons with.
    sizes = {"data": {"samples": 2}, "storage": {"chunk_samples": 2}}
    config = given(length, method=method, compute={"dtype": "float32", **compute}, **sizes)
    skeleton = make_skeleton(model)
    shape, memory = planned(skeleton, config)
    found = moments_of(memory, monkeypatch)
    found["a step"] = max(found["a step's backward pass"], found["the optimizer's update"])
    for moment, real in counted(skeleton, config, shape):
        assert 0.95 * real <= found[moment] <= 1.2 * real, (
            f"{moment}: {found[moment] / real:.3f} of {real / 2**20:.1f} MiB"
        )


def test_more_of_anything_is_more_memory() -> None:
    skeleton = make_skeleton(LLAMA)

    def peak(length: int = 2048, **sections: Any) -> float:
        plan = planned(skeleton, given(length, **sections))[1]
        return worker_peak(plan.units(), "host")[1].total

    least = peak(method={"increment": "diagonal", "rank": 16})
    assert least < peak(method={"increment": "diagonal"}) < peak(method={"increment": "dense"})
    assert least < peak(4096, method={"increment": "diagonal", "rank": 16})
    assert least < peak(method={"increment": "diagonal", "rank": 16}, optimizer={"batch_size": 4})
    assert least > BASE


# -- what is proposed and refused -----------------------------------------------------------------------------------------

SEVENTY = BlockShape(
    linears=((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)),
    rest=16384,
    hidden=8192,
    attention=8192,
    keys=1024,
    intermediate=28672,
    vocabulary=32000,
    outer=2 * 32000 * 8192 + 8192,
    largest_outer=32000 * 8192,
)


def large(**compute: Any) -> RunConfig:
    sections = {"optimizer": {"batch_size": 4}, "method": {"increment": "diagonal", "rank": 1024}}
    return given(2048, compute={"dtype": "bfloat16", **compute}, **sections)


def test_a_smaller_micro_batch_is_proposed_where_memory_asks_for_it() -> None:
    assert choose(SEVENTY, large(), Limits(memory=64 * GIB)).lines == ()
    whole = worker_peak(choose(SEVENTY, large(), Limits()).units, "host")[1].total
    chosen = choose(SEVENTY, large(), Limits(memory=whole - GIB))
    assert chosen.engine.micro_batch == 2
    assert chosen.lines[0][0] == "compute.micro_batch: 2"
    assert worker_peak(chosen.units, "host")[1].total <= whole - GIB


def test_an_explicit_micro_batch_stays() -> None:
    whole = worker_peak(choose(SEVENTY, large(micro_batch=4), Limits()).units, "host")[1].total
    with pytest.raises(UserError, match="micro-batch 4"):
        choose(SEVENTY, large(micro_batch=4, recompute=True, checkpoint=True), Limits(memory=0.7 * whole))


def test_what_fits_nowhere_is_refused_with_what_is_missing_and_what_would_help() -> None:
    with pytest.raises(UserError) as caught:
        choose(SEVENTY, large(), Limits(memory=4 * GIB))
    said = str(caught.value)
    assert "stage optimize needs" in said
    assert "GiB more than the 4.0 GiB of a worker" in said
    assert "data.sequence_length 1024 (shorter texts; " in said
    assert "\n" not in said


def test_the_whole_model_at_the_end_is_a_byte_a_weight_and_a_block_at_a_time_is_not() -> None:
    seventy = replace(SEVENTY, blocks=80)
    config = changed(large(), {"end_to_end": {"epochs": 2}})
    kept = MemoryPlan(seventy, config, present_engine(config)).units()["end_to_end"].host
    assert kept.terms["codes of the blocks"] == 80 * seventy.weights
    assert kept.total > 80 * seventy.weights
    with pytest.raises(UserError, match=r"stage end_to_end needs .* end_to_end.resident false \(.*, which is enough\)"):
        choose(seventy, config, Limits(memory=64 * GIB))
    choose(seventy, changed(config, {"end_to_end": {"resident": False}}), Limits(memory=64 * GIB))


@pytest.mark.parametrize(("device", "rows"), [("cpu", 2**18), ("cuda", 2**24)])
def test_the_heads_pass_counts_logits_and_the_rows_of_its_device(device: Any, rows: int) -> None:
    """Of a vocabulary so large that it is the fullest moment, and a row of it more than a CPU's piece; the config says nothing of a device."""
    narrow: dict[str, Any] = {"hidden": 128, "attention": 128, "keys": 128, "intermediate": 128, "largest_outer": 2**24}
    shape = replace(SEVENTY, blocks=1, linears=((128, 128),) * 4, rest=128, vocabulary=2**18, outer=2**24, **narrow)
    config = changed(large(), {"end_to_end": {"epochs": 1}})
    peaks = MemoryPlan(shape, config, present_engine(config, device)).units()["end_to_end"]
    found = peaks.device if device == "cuda" else peaks.host
    assert found.terms["logits"] == 3 * shape.itemsize * 256 * 2**18 + 20 * rows


def test_a_gpu_holds_the_block_and_the_host_does_not() -> None:
    found = choose(SEVENTY, large(), Limits(gpu_memory=80 * GIB), "cuda")
    host, device = worker_peak(found.units, "host")[1], worker_peak(found.units, "device")[1]
    assert "activations" in device.terms
    assert "activations" not in host.terms
    with pytest.raises(UserError, match="of GPU memory"):
        choose(SEVENTY, large(), Limits(gpu_memory=4 * GIB), "cuda")


def test_a_group_with_deepspeed_is_proposed_and_holds_parts() -> None:
    """Where a block in each of four actors is too much, and a quarter of one is not."""

    def peak(found: Choice | MemoryPlan) -> float:
        units = found.units if isinstance(found, Choice) else found.units()
        return worker_peak(units, "host")[1].total

    sections: dict[str, Any] = {"method": {"increment": "dense"}, "optimizer": {"batch_size": 4}}
    config = given(512, compute={"dtype": "bfloat16", "group": 4}, **sections)
    assert choose(SEVENTY, config, Limits()).engine.name == "torch"
    whole = MemoryPlan(SEVENTY, config, replace(present_engine(config), micro_batch=1, recompute=True, checkpoint=True))
    found = choose(SEVENTY, config, Limits(memory=peak(whole) - GIB / 2))
    assert (found.engine.name, found.engine.parts) == ("deepspeed", 4)
    assert "compute.engine: deepspeed" in dict(found.lines)
    eight = MemoryPlan(SEVENTY, config, replace(found.engine, parts=8))
    assert peak(eight) < peak(found) < peak(whole)
    two = given(512, compute={"dtype": "bfloat16", "group": 2}, **sections)
    with pytest.raises(UserError, match=r"compute.group 4 with compute.engine deepspeed \(4 actors hold a part"):
        choose(SEVENTY, two, Limits(memory=0.7 * peak(whole)))


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * GIB), ("64 GB", 64e9), ("1.5tib", 1536 * GIB), ("100 B", 100)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "much", "0GiB", "-3GiB", "80 XB", "64"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match=r"--memory .*: write a size above zero with its unit"):
        parse_size(text, "--memory")


# -- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A configuration of a model of which there is config.json alone, and no text."""
    LLAMA.save_pretrained(tmp_path / "model")
    tree = tiny_tree(tmp_path / "model", "no-text", tmp_path / "run", data={"sequence_length": 64})
    file = tmp_path / "run.json"  # JSON is YAML
    file.write_text(json.dumps(tree))
    return file


def test_a_plan_needs_config_json_alone(config_only: Path) -> None:
    arguments = ["plan", str(config_only), "--workers", "8", "--gpu-memory", "80GiB", "--memory", "64GiB"]
    found = CliRunner().invoke(app, [*arguments, "--price", "2.5"])
    assert found.exit_code == 0, found.output
    for stage in ("inspect", "embed", "capture", "optimize", "evaluate", "merge"):
        assert f"\n{stage} " in found.output
    assert "engine        torch on cuda, 2 sequences at once" in found.output
    assert "on 8 workers" in found.output
    assert "money         0.0" in found.output
    assert not (config_only.parent / "run").exists()


def test_a_plan_that_fits_no_worker_ends_with_2(config_only: Path) -> None:
    found = CliRunner().invoke(app, ["plan", str(config_only), "--memory", "512MiB"])
    assert found.exit_code == 2
    assert "GiB more than the 0.5 GiB of a worker" in " ".join(found.output.split())


def test_money_is_time_times_workers_times_price(config_only: Path) -> None:
    config = parse_config(json.loads(config_only.read_text()))
    found = plan(config, Workers(count=4, price=360.0))["time"]
    low, high = found["seconds"]
    assert found["money"] == pytest.approx([0.4 * low, 0.4 * high], abs=0.05)
    assert low < high


def test_a_calibration_measures_this_machine(config_only: Path) -> None:
    speed = calibrated(parse_config(json.loads(config_only.read_text())))
    assert 1e8 < speed.flops < 1e14
    assert 1e6 < speed.memory < 1e13
    assert 1e-4 < speed.decompositions < 10


def test_a_speed_of_another_device_than_the_plans_is_refused(config_only: Path) -> None:
    config = parse_config(json.loads(config_only.read_text()))
    with pytest.raises(
        UserError, match=r"--calibrate measures compute.device cpu, and the plan is for workers on cuda"
    ):
        plan(config, Workers(limits=Limits(gpu_memory=80 * GIB)), Device(1e12, 1e10))


# -- before a run -------------------------------------------------------------------------------------------------------


def test_a_run_that_fits_no_worker_is_refused_before_any_work(
    tiny_model: Any, short_text: Path, tmp_path: Path
) -> None:
    model = tiny_model(tmp_path / "model")
    config = tiny_config(model, short_text, tmp_path / "run", cluster={"memory_gib": 0.25})
    with pytest.raises(UserError, match=r"needs 0\.\d GiB of host memory at the least .* more than the 0\.2 GiB"):
        prepare(config, Silent())
    prepare(tiny_config(model, short_text, tmp_path / "run", cluster={"memory_gib": 4}), Silent())


def test_a_group_shares_the_batch_and_counts_by_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"optimizer": {"batch_size": 3}, "storage": {"chunk_samples": 4}, "data": {"samples": 4}}
    assert present_engine(given(512, **sizes)).micro_batch == 3
    config = given(512, **sizes, compute={"group": 2}, cluster={"workers": 4})
    assert present_engine(config).micro_batch == 2
    monkeypatch.setattr(fit, "machine_memory", lambda: DRIVER + 5.5 * GIB)
    report = Silent()
    fit.warn_of_workers(config, GIB, report)
    assert report.messages[0].startswith("8 processes of workers and the driver may need 9.1 GiB together")
    assert report.messages[0].endswith("set cluster.workers to 2")


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    fit.check_room(str(tmp_path / "not" / "there" / "yet"), 0.0, 1e6)
    with pytest.raises(UserError, match=r"storage.run .*: the run needs .* too little: free some"):
        fit.check_room(str(tmp_path), 0.0, 1e18)
