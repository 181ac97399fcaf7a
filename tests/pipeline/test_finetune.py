"""Fine-tunes of packed checkpoints, whole runs in one process: what changes, what does not, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Silent, break_steps, checkpoint_hashes, run, tiny_config, tiny_tree
from safetensors.torch import load_file, save_file

from pipeline.config import RunConfig
from pipeline.config_file import parse_config
from pipeline.driver import StoppedError
from pipeline.errors import UserError
from pipeline.evaluate_checkpoint import evaluate_checkpoint
from pipeline.packed_source import open_packed
from pipeline.report import block_reports
from pipeline.run import Finished
from pipeline.store import open_store

TRAINED = ("model.layers.1.", "model.layers.2.")
GRIDS = {
    "asymmetric": {"symmetric": False},
    "symmetric": {"symmetric": True},
    "per-channel": {"symmetric": False, "group_size": None},
    "6 bits": {"symmetric": False, "bits": 6},
}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), blocks=3, dtype="bfloat16", max_shard_size="100KB")


@pytest.fixture(scope="module")
def rounded(model: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Round-to-nearest checkpoints of our own, by the scheme, in shards of a third of a megabyte."""
    made: dict[str, Path] = {}

    def make(grid: str) -> Path:
        if grid not in made:
            folder = tmp_path_factory.mktemp("rounded")
            scheme, outputs = GRIDS[grid], {"max_shard_mib": 1}
            run(tiny_config(model, short_text, folder, scheme=scheme, optimizer={"epochs": 0}, outputs=outputs))
            made[grid] = folder / "checkpoint"
        return made[grid]

    return make


def tune_config(checkpoint: Path, text: Path, folder: Path, **sections: Any) -> RunConfig:
    """The last two blocks, dense increments with steps that are large for so few of them."""
    tree = tiny_tree(checkpoint, text, folder)
    del tree["scheme"]
    tree |= {"finetune": {"blocks": 2}, "method": {"increment": "dense", "clipping": "none"}}
    tree["data"]["samples"] = 16
    tree["optimizer"] = {"epochs": 3, "increment_learning_rate": 0.1}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check_tuned(before: Path, finished: Finished, result: dict[str, Any], text: Path) -> None:
    """All that holds for any fine-tune that found something better."""
    after = Path(finished.prepared.checkpoint.url)
    old, new = tensors(before), tensors(after)
    assert {n: (t.dtype, t.shape) for n, t in old.items()} == {n: (t.dtype, t.shape) for n, t in new.items()}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed, "nothing was trained"
    assert all(name.startswith(TRAINED) and name.rpartition(".")[2].startswith("weight_") for name in changed)
    assert any(name.endswith("weight_packed") for name in changed)
    blocks = block_reports(finished)
    assert [block["block"] for block in blocks] == [1, 2]
    assert all(block["loss"] < block["initial_loss"] and block["kept"] != "initial" for block in blocks)
    table = result["perplexity"]
    assert table["tuned"]["news"] < table["checkpoint"]["news"]
    for folder, variant in ((before, "checkpoint"), (after, "tuned")):
        loaded = evaluate_checkpoint(str(folder), [str(text)], 2, 16, "cpu", show=False)
        assert loaded[str(text)] == pytest.approx(table[variant]["news"], rel=5e-3)


@pytest.mark.parametrize("grid", GRIDS)
def test_only_codes_and_scales_of_the_last_blocks_change_and_the_text_improves(
    rounded: Callable[..., Path], short_text: Path, tmp_path: Path, grid: str
) -> None:
    before = rounded(grid)
    finished, result = run(tune_config(before, short_text, tmp_path / "run"))
    check_tuned(before, finished, result, short_text)
    manifest = json.loads((tmp_path / "run/checkpoint/lsi_manifest.json").read_text())
    assert manifest["tuned_from"]["blocks"] == 2
    assert manifest["tuned_from"]["checkpoint"] == str(before)
    card = (tmp_path / "run/checkpoint/README.md").read_text()
    assert "Fine-tuned" in card
    assert manifest["tuned_from"]["digest"][:16] in card


def gptq_checkpoint(model: Path, folder: Path, *, symmetric: bool) -> Path:
    """A checkpoint as llm-compressor writes GPTQ's: packed by the library, the codes not those of the nearest grid points."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": symmetric, "type": "int"}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(1)
    for file in folder.glob("*.safetensors"):
        written = {}
        for name, weight in load_file(file).items():
            if not name.startswith("model.layers.") or weight.ndim != 2:
                written[name] = weight
                continue
            groups = weight.float().unflatten(1, (-1, 32))
            scale = (groups.abs().amax(-1) / 7.5).bfloat16()
            codes = (groups / scale.float().unsqueeze(-1)).round() + torch.randint(
                -1, 2, groups.shape, generator=generator
            )
            zero = torch.randint(-2, 3, scale.shape, generator=generator).to(torch.int8) * (not symmetric)
            exact = (codes.clamp(-8, 7) - zero.unsqueeze(-1)) * scale.float().unsqueeze(-1)
            state = {"weight": exact.flatten(1).bfloat16(), "weight_scale": scale, "weight_zero_point": zero}
            packed = PackedQuantizationCompressor.compress(state, scheme)
            written |= {f"{name.removesuffix('.weight')}.{part}": t.contiguous() for part, t in packed.items()}
        save_file(written, file, {"format": "pt"})
    index = {n: file.name for file in folder.glob("*.safetensors") for n in load_file(file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    nothing = {"input_activations": None, "output_activations": None}
    group = {"targets": ["Linear"], "weights": arguments | {"actorder": "static", "dynamic": False}, **nothing}
    return with_quantization(
        folder,
        quant_method="compressed-tensors",
        config_groups={"group_0": group},
        format="pack-quantized",
        ignore=["lm_head"],
        kv_cache_scheme=None,
        quantization_status="compressed",
    )


def with_quantization(folder: Path, **changes: Any) -> Path:
    """The folder with keys of its quantization_config set."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_a_checkpoint_that_the_library_packed(model: Path, short_text: Path, tmp_path: Path, symmetric: bool) -> None:
    before = gptq_checkpoint(model, tmp_path / "gptq", symmetric=symmetric)
    finished, result = run(tune_config(before, short_text, tmp_path / "run"))
    # transformers loads asymmetric ones only with this key, which llm-compressor does not write.
    check_tuned(with_quantization(before, dequantize=True), finished, result, short_text)


def test_packed_linears_are_read_as_the_library_unpacks_them(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = gptq_checkpoint(model, tmp_path / "gptq", symmetric=False)
    source = open_packed(open_store(str(folder)))
    loaded = AutoModelForCausalLM.from_pretrained(with_quantization(folder, dequantize=True)).state_dict()
    names = [name for name in source.index if source.is_packed(name)]
    assert len(names) == 3 * 7
    for name in source.index:
        assert torch.equal(source.read(name), loaded[name].to(source.read(name).dtype)), name


@pytest.mark.parametrize("commits", [1, 2, 4])
def test_a_killed_run_goes_on_to_the_same_bytes(
    rounded: Callable[..., Path], short_text: Path, tmp_path: Path, commits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies after so many commits of its training, the last of them in mid-epoch."""
    from pipeline import partial

    def config(name: str) -> RunConfig:
        return tune_config(rounded("asymmetric"), short_text, tmp_path / name, cluster={"commit_every_seconds": 0})

    whole, _ = run(config("whole"))
    with monkeypatch.context() as patch:
        write, done = partial.Commits._write, 0

        def dying(self: partial.Commits, epoch: partial.Epoch) -> None:
            nonlocal done
            write(self, epoch)
            done += 1
            if done == commits * 5:
                raise KeyboardInterrupt

        patch.setattr(partial.Commits, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            run(config("cut"))
    report = Silent()
    again, _ = run(config("cut"), report)
    assert not any(unit.startswith("capture") for unit in report.units), "what was committed is done again"
    ours, theirs = checkpoint_hashes(again.prepared.checkpoint), checkpoint_hashes(whole.prepared.checkpoint)
    differing = {name for name in theirs if ours.get(name) != theirs[name]}
    assert not differing
    report = Silent()
    run(config("cut"), report)
    assert report.units == []


def test_steps_that_do_harm_leave_the_checkpoint_as_it_was(
    rounded: Callable[..., Path], short_text: Path, tmp_path: Path
) -> None:
    """A fine-tune of what a fine-tune made, by steps that throw every code to an end of the grid."""
    optimizer = {"epochs": 12, "increment_learning_rate": 0.3}
    finished, _ = run(tune_config(rounded("asymmetric"), short_text, tmp_path / "first", optimizer=optimizer))
    before = Path(finished.prepared.checkpoint.url)
    finished, _ = run(tune_config(before, short_text, tmp_path / "run", optimizer={"increment_learning_rate": 1e3}))
    assert {(block["status"], block["kept"]) for block in block_reports(finished)} == {("ok", "initial")}
    old, new = tensors(before), tensors(Path(finished.prepared.checkpoint.url))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def weights_with(**changes: Any) -> dict[str, Any]:
    """A group of the quantization_config whose weights have some other keys."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"targets": ["Linear"], "weights": weights | changes}


def transforms_at(*locations: str) -> dict[str, Any]:
    apply = [{"targets": ["re:.*down_proj$"], "location": location} for location in locations]
    return {"transform_config": {"config_groups": {"u": {"type": "hadamard", "apply": apply}}}}


def test_transforms_that_are_in_the_weights_are_nothing_to_refuse(rounded: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(rounded("symmetric"), tmp_path / "other")
    with_quantization(folder, **transforms_at("weight_input", "weight_output"))
    assert open_packed(open_store(str(folder))).grid.bits == 3


REFUSED = {
    "gptq-format": ({"quant_method": "gptq"}, "in the format of 'gptq'"),
    "awq-format": ({"quant_method": "awq"}, "in the format of 'awq'"),
    "other-form": (
        {"format": "int-quantized", "config_groups": {"g": weights_with()}},
        "in the form int-quantized",
    ),
    "activations": (
        {"config_groups": {"group_0": weights_with() | {"input_activations": {"num_bits": 8}}}},
        "its activations are quantized",
    ),
    "transforms": (transforms_at("weight_output", "input"), "go through transforms"),
    "cache": ({"kv_cache_scheme": {"num_bits": 8}}, "its activations are quantized"),
    "activation-order": (
        {"config_groups": {"g": weights_with(actorder="group")}},
        "in activation order (actorder 'group')",
    ),
    "activation-order-flag": (
        {"config_groups": {"g": weights_with(actorder=True)}},
        "in activation order (actorder True)",
    ),
    "floats": ({"config_groups": {"g": weights_with(type="float")}}, "its weights are float of 4 bits"),
    "blocks-of-scales": ({"config_groups": {"g": weights_with(strategy="block")}}, "its scales are by block"),
    "two-grids": ({"config_groups": {"g": weights_with(), "h": weights_with(num_bits=8)}}, "on 2 different grids"),
    "no-weights": ({"config_groups": {}}, "describes no quantized weights"),
    "odd-bits": ({"config_groups": {"g": weights_with(num_bits=5)}}, "have 5 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_checkpoints_of_other_kinds_are_refused(
    rounded: Callable[..., Path], short_text: Path, tmp_path: Path, case: str
) -> None:
    changes, words = REFUSED[case]
    folder = with_quantization(shutil.copytree(rounded("symmetric"), tmp_path / "other"), **changes)
    with pytest.raises(UserError) as error:
        run(tune_config(folder, short_text, tmp_path / "run"))
    assert words in str(error.value)
    assert "compressed-tensors pack-quantized" in str(error.value)
    assert not (tmp_path / "run/run.json").exists()


def test_a_model_in_full_precision_is_refused(model: Path, short_text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a quantized checkpoint"):
        run(tune_config(model, short_text, tmp_path / "run"))


def test_stored_activation_order_is_refused(rounded: Callable[..., Path], short_text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(rounded("symmetric"), tmp_path / "ordered")
    file = next(folder.glob("*.safetensors"))
    name = next(n for n in load_file(file) if n.endswith("_packed")).replace("weight_packed", "weight_g_idx")
    save_file(load_file(file) | {name: torch.arange(64)}, file, {"format": "pt"})
    if (index := folder / "model.safetensors.index.json").exists():
        found = json.loads(index.read_text())
        found["weight_map"][name] = file.name
        index.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"in activation order \(it holds model.layers"):
        run(tune_config(folder, short_text, tmp_path / "run"))


def with_tensors(checkpoint: Path, folder: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy in which every NAME.part is another tensor."""
    shutil.copytree(checkpoint, folder)
    for file in folder.glob("*.safetensors"):
        tensors = {n: change(t) if n.endswith(part) else t for n, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_packed_tensors_of_another_layout_are_refused(
    rounded: Callable[..., Path], short_text: Path, tmp_path: Path, part: str
) -> None:
    """Such as that of 3 bits with ten codes a word."""
    folder = with_tensors(rounded("symmetric"), tmp_path / "other", part, lambda t: t[:, :-1].contiguous())
    with pytest.raises(UserError, match=r"model\.layers.*, and a linear of this grid \(3 bits\) has torch"):
        run(tune_config(folder, short_text, tmp_path / "run"))


def test_shapes_in_other_integers_are_kept(rounded: Callable[..., Path], short_text: Path, tmp_path: Path) -> None:
    folder = with_tensors(rounded("symmetric"), tmp_path / "other", "weight_shape", lambda t: t.int())
    finished, _ = run(tune_config(folder, short_text, tmp_path / "run"))
    tensors = load_file(next(Path(finished.prepared.checkpoint.url).glob("*.safetensors")))
    assert {t.dtype for n, t in tensors.items() if n.endswith("weight_shape")} == {torch.int32}


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "blocks": ({"finetune": {"blocks": 4}}, "finetune.blocks 4: the model has 3 blocks"),
    "bits": ({"scheme": {"bits": 4}}, "scheme.bits 4 contradicts the checkpoint, which has 3"),
    "group": ({"scheme": {"group_size": None}}, "scheme.group_size None contradicts the checkpoint, which has 32"),
    "symmetric": ({"scheme": {"symmetric": True}}, "scheme.symmetric True contradicts the checkpoint, which has False"),
    "no-epochs": ({"optimizer": {"epochs": 0}}, "optimizer.epochs is 0"),
    "loss": ({"method": {"loss": "mse"}}, "method.loss mse means nothing for a fine-tune"),
    "equivalence": ({"method": {"equivalence": "auto"}}, "method.equivalence auto means nothing"),
    "schedule": ({"schedule": {"kind": "sequential"}}, "schedule.kind sequential means nothing"),
    "expert-tokens": ({"method": {"expert_tokens": 5}}, "method.expert_tokens 5 means nothing"),
    "activations": ({"scheme": {"activation_bits": 8}}, "scheme.activation_bits 8 contradicts the checkpoint"),
    "look-ahead": ({"method": {"look_ahead": 1}}, "method.look_ahead 1 means nothing for a fine-tune"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_are_refused(
    rounded: Callable[..., Path], short_text: Path, tmp_path: Path, case: str
) -> None:
    sections, words = SETTINGS[case]
    with pytest.raises(UserError) as error:
        run(tune_config(rounded("asymmetric"), short_text, tmp_path / "run", **sections))
    assert words in str(error.value)
    assert not (tmp_path / "run/run.json").exists()


def test_a_preset_is_refused_by_its_own_name(rounded: Callable[..., Path], short_text: Path, tmp_path: Path) -> None:
    tree = tune_config(rounded("asymmetric"), short_text, tmp_path / "run").model_dump(exclude_unset=True)
    with pytest.raises(UserError, match=r"preset fast is for quantizing a model .*: leave it out"):
        run(parse_config(tree | {"preset": "fast"}))


def test_a_plan_of_a_fine_tune_is_refused(rounded: Callable[..., Path], short_text: Path, tmp_path: Path) -> None:
    from pipeline.estimate import estimate

    with pytest.raises(UserError, match=r"finetune.blocks 2: lsi plan reckons what lsi quantize does"):
        estimate(tune_config(rounded("asymmetric"), short_text, tmp_path / "run"))


def test_a_scheme_that_agrees_is_taken(rounded: Callable[..., Path], short_text: Path, tmp_path: Path) -> None:
    from pipeline.finetune_plan import resolve

    resolved = resolve(tune_config(rounded("asymmetric"), short_text, tmp_path / "run", scheme={"bits": 3}))
    assert (resolved.scheme.bits, resolved.scheme.group_size, resolved.scheme.symmetric) == (3, 32, False)
    assert resolve(resolved) == resolved


def test_a_loss_that_is_not_finite_keeps_the_best_state_and_flags_it(
    rounded: Callable[..., Path], short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ninth step meets a NaN: what is kept is the state before it, and never round-to-nearest."""
    break_steps(monkeypatch, lambda step: step == 9)
    finished, result = run(tune_config(rounded("symmetric"), short_text, tmp_path / "run"))
    assert result["flagged_blocks"] == [1, 2]
    for block in block_reports(finished):
        assert (block["status"], block["kept"]) == ("non_finite", "epoch 0")
        assert block["loss"] < block["initial_loss"]


def test_a_fine_tune_that_fails_for_good_stops_and_quarantines_nothing(
    rounded: Callable[..., Path], short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> float:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("lsi.reconstruct.Reconstruction.step", fail)
    with pytest.raises(StoppedError, match=r"failed 3 times.*the device is gone"):
        run(tune_config(rounded("symmetric"), short_text, tmp_path / "run"))
    assert not (tmp_path / "run/quarantine").exists()
    assert not (tmp_path / "run/checkpoint/config.json").exists()


def test_checkpointing_runs_the_blocks_parts_again_and_changes_no_byte(
    rounded: Callable[..., Path], short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lsi import block

    plain, parts, hashes = block.checkpoint, 0, []

    def counted(*arguments: Any, **settings: Any) -> Any:
        nonlocal parts
        parts += 1
        return plain(*arguments, **settings)

    monkeypatch.setattr(block, "checkpoint", counted)
    for again in (False, True):
        compute = {"checkpoint": again}
        config = tune_config(rounded("symmetric"), short_text, tmp_path / str(again), compute=compute)
        finished, _ = run(config)
        hashes.append(checkpoint_hashes(finished.prepared.checkpoint))
        assert bool(parts) == again
    assert parts == 2 * 2 * 8 * 3, "attention and feed-forward part of two blocks, in each of 8 steps of 3 epochs"
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("family", ["mixtral", "gemma3"])
def test_families_with_other_names_heads_and_masks(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path, family: str
) -> None:
    """Experts that checkpoints call otherwise; blocks that are called with different masks, and scaled embeddings."""
    from transformers import Gemma3TextConfig, MixtralConfig

    common: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    configs = {
        "mixtral": lambda: MixtralConfig(**common, num_local_experts=4),
        "gemma3": lambda: Gemma3TextConfig(
            **common,
            head_dim=16,
            sliding_window=8,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
    }
    model = tiny_model(tmp_path / "model", config=configs[family](), dtype="bfloat16")
    scheme = {"symmetric": True}
    run(tiny_config(model, short_text, tmp_path / "rounded", scheme=scheme, optimizer={"epochs": 0}))
    before = tmp_path / "rounded/checkpoint"
    finished, result = run(tune_config(before, short_text, tmp_path / "run"))
    check_tuned(before, finished, result, short_text)
