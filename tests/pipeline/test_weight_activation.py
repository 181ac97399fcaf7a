"""Whole runs with quantized activations: what transformers loads computes what was evaluated, the rest is refused in time."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from running import Silent, checkpoint_hashes, run, run_in_pieces, tiny_config, tiny_tree
from safetensors.torch import load_file, save_file
from test_equivalence_run import COMMON, FAMILIES, MIXTURE, assert_loader_agrees, family, trained_keys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lsi.activations import quantize_tokens
from lsi.grid import Grid
from pipeline.activations import attentions, quantize_activations
from pipeline.cli import app
from pipeline.config_file import parse_config
from pipeline.config_sections import SchemeConfig
from pipeline.costs import placeholder_inputs
from pipeline.errors import UserError
from pipeline.estimate import estimate, estimate_lines
from pipeline.graph import build_graph
from pipeline.packed_format import SERVED
from pipeline.prepare import prepare
from pipeline.report import block_reports
from pipeline.run import inline_workers
from pipeline.skeleton import block_list_name
from pipeline.status import read_status
from pipeline.status_view import status_lines

TinyModel = Callable[..., Path]
EVALUATION = {"windows": 4, "length": 64}
FAKE: dict[str, Any] = {"bits": 4, "activation_bits": 4, "activation_symmetric": False, "quantize_qkv": True}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(tiny_model: TinyModel, tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


@pytest.fixture
def outlying(model: Path) -> Path:
    """The same with norms in which a few channels are ten times the others."""
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[[3, 17, 40]] *= 10
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def scheme(bits: int, activation_bits: int | None, **more: Any) -> dict[str, Any]:
    return {"bits": bits, "activation_bits": activation_bits, "group_size": None, "symmetric": True, **more}


# --- against the library and the families' own attention ---------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_tokens_are_quantized_as_the_library_does(bits: int, symmetric: bool) -> None:
    x = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 30
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    assert torch.equal(quantize_tokens(x, Grid(bits, None, symmetric)), fake_quantize(x, scale, zero, args))


@pytest.mark.parametrize("model_type", [*FAMILIES, "llama", "mistral", "mixtral", "qwen3_moe"])
def test_replaced_attention_is_the_familys_own(model_type: str) -> None:
    """On so fine a grid that only the attention's replacement could show: groups, windows, soft caps, norms, rotations."""
    config = AutoConfig.for_model(model_type, **COMMON | FAMILIES.get(model_type, {}) | MIXTURE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = AutoModelForCausalLM.from_config(config).eval()
    for parameter in whole.parameters():
        parameter.data *= 5
    tokens = torch.arange(2 * 20).view(2, 20)
    with torch.no_grad():
        expected = whole(tokens).logits
        for block in whole.get_submodule(block_list_name(whole)):
            # Blocks are run one by one and have a configuration of their own: here the masks are the model's still.
            [attention] = attentions(block)
            attention.config = copy.deepcopy(attention.config)
            quantize_activations(block, [], SchemeConfig(activation_bits=8, quantize_qkv=True))
            coarse, attention.operand_grid = attention.operand_grid, Grid(22, None, symmetric=False)
            assert coarse == Grid(8, None, symmetric=True)
        found = whole(tokens).logits
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


# --- what is published -------------------------------------------------------------------------------------------------


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any, folder: Path, text: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)(text.read_text()[:300], return_tensors="pt")["input_ids"]
    return model(tokens).logits


CASES = [(pair, group, symmetric) for pair in SERVED for group in (None, 32) for symmetric in (True, False)]


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), CASES)
def test_transformers_computes_what_was_evaluated(
    model: Path, short_text: Path, tmp_path: Path, bits: tuple[int, int], group_size: int | None, symmetric: bool
) -> None:
    wanted = scheme(*bits, group_size=group_size, symmetric=symmetric)
    sections: dict[str, Any] = {"scheme": wanted, "optimizer": {"epochs": 0}, "evaluation": EVALUATION}
    finished, result = run(tiny_config(model, short_text, tmp_path / "run", **sections))
    # The baseline is the same: weights and activations to the nearest.
    assert result["perplexity"]["quantized"] == result["perplexity"]["round_to_nearest"]
    assert_loader_agrees(finished, result, short_text, 1e-6)
    folder = finished.prepared.checkpoint.url
    quantization = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    assert quantization["format"] == "int-quantized"
    loaded = load(folder)
    with_activations = logits(loaded, model, short_text)
    for module in loaded.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
    off = (logits(loaded, model, short_text) - with_activations).abs().max()
    assert off > 0.01 * with_activations.abs().max(), "it quantizes no activation at run time"


def test_training_w8a8_from_text_to_a_checkpoint_that_loads(outlying: Path, short_text: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"scheme": scheme(8, 8), "evaluation": EVALUATION, "method": {"equivalence": "auto"}}
    finished, result = run(tiny_config(outlying, short_text, tmp_path / "run", **sections))
    assert_loader_agrees(finished, result, short_text)
    assert result["scheme"] == "W8A8 per channel, symmetric, activations symmetric"
    assert result["unpublished"] is None
    card = finished.prepared.checkpoint.get("README.md").decode()
    assert "W8A8 per channel" in card
    assert "`int-quantized`" in card
    found = read_status(finished.prepared.store)
    assert found["state"] == "finished"
    assert ": W8A8 per channel, symmetric, activations symmetric; finished" in status_lines(found)[0]
    again, _ = run(tiny_config(outlying, short_text, tmp_path / "again", **sections))
    assert checkpoint_hashes(again.prepared.checkpoint) == checkpoint_hashes(finished.prepared.checkpoint)


@pytest.mark.parametrize("activation_bits", [None, 8], ids=["weights", "activations"])
def test_symmetric_scales_are_positive_where_kernels_multiply_integers(
    model: Path, short_text: Path, tmp_path: Path, activation_bits: int | None
) -> None:
    wanted = scheme(4, activation_bits, group_size=32)
    finished, result = run(tiny_config(model, short_text, tmp_path / "run", scheme=wanted, evaluation=EVALUATION))
    assert_loader_agrees(finished, result, short_text)
    tensors = load_file(Path(finished.prepared.checkpoint.url) / "model.safetensors")
    signs = {
        float(sign) for n, scale in tensors.items() if n.endswith("weight_scale") for sign in scale.sign().unique()
    }
    assert signs == ({-1.0, 1.0} if activation_bits is None else {1.0})


def test_in_bfloat16_the_loader_is_near(model: Path, short_text: Path, tmp_path: Path) -> None:
    """The library quantizes in the input's dtype, ours and engines' kernels in float32."""
    sections: dict[str, Any] = {"optimizer": {"epochs": 0}, "evaluation": EVALUATION}
    sections["model"] = {"source": str(model), "dtype": "bfloat16"}
    finished, result = run(tiny_config(model, short_text, tmp_path / "run", scheme=scheme(8, 8), **sections))
    assert_loader_agrees(finished, result, short_text, 5e-2)


# --- what it is for ----------------------------------------------------------------------------------------------------


def test_activations_are_in_every_evaluation_but_full_precision(
    outlying: Path, short_text: Path, tmp_path: Path
) -> None:
    found = {}
    for bits in (None, 4):
        sections: dict[str, Any] = {"scheme": scheme(8, bits), "evaluation": EVALUATION, "optimizer": {"epochs": 1}}
        found[bits] = run(tiny_config(outlying, short_text, tmp_path / f"run-{bits}", **sections))[1]["perplexity"]
    assert found[None]["full_precision"] == found[4]["full_precision"]
    for variant in ("round_to_nearest", "quantized"):
        assert found[None][variant]["news"] != found[4][variant]["news"]


def test_equivalence_lowers_every_loss_where_channels_differ(outlying: Path, short_text: Path, tmp_path: Path) -> None:
    """With 8-bit weights, so that nearly all of the error is the activations'; on full-precision inputs, equal in both."""
    losses = []
    for equivalence in ([], "auto"):
        sections: dict[str, Any] = {
            "scheme": scheme(8, 4),
            "data": {"samples": 12},
            "optimizer": {"epochs": 3},
            "schedule": {"kind": "parallel", "refresh_every": 0},
            "method": {"increment": "none", "equivalence": equivalence},
            "evaluation": EVALUATION,
        }
        finished, _ = run(tiny_config(outlying, short_text, tmp_path / f"run-{len(losses)}", **sections))
        losses.append([block["loss"] for block in block_reports(finished)])
    assert all(with_it < 0.7 * without for without, with_it in zip(*losses, strict=True))


def test_w4a4_as_in_the_paper_ends_with_its_evaluation(outlying: Path, short_text: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"scheme": FAKE, "evaluation": EVALUATION, "method": {"equivalence": "auto"}}
    sections |= {"data": {"samples": 12}, "optimizer": {"epochs": 3}}
    finished, result = run(tiny_config(outlying, short_text, tmp_path / "one", **sections))
    assert result["checkpoint"] is None
    assert (
        result["unpublished"] == "asymmetric activations are served by no engine (scheme.activation_symmetric true is)"
    )
    assert result["scheme"] == "W4A4 group 32, asymmetric, activations asymmetric with q, k and v"
    assert {*result["perplexity"]} == {"full_precision", "round_to_nearest", "quantized"}
    assert not list(finished.prepared.checkpoint.list())
    assert read_status(finished.prepared.store)["state"] == "finished"
    reports = block_reports(finished)
    assert all(block["loss"] < block["initial_loss"] for block in reports)
    config = tiny_config(outlying, short_text, tmp_path / "two", **sections)
    again, result_again, _ = run_in_pieces(config, 8)
    assert [block["loss"] for block in block_reports(again)] == [block["loss"] for block in reports]
    assert result_again["perplexity"] == result["perplexity"]


def test_w6a6_is_trained_and_evaluated(outlying: Path, short_text: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"scheme": scheme(6, 6), "evaluation": EVALUATION, "method": {"equivalence": "auto"}}
    sections |= {"data": {"samples": 12}, "optimizer": {"epochs": 3}}
    finished, result = run(tiny_config(outlying, short_text, tmp_path / "run", **sections))
    assert all(block["loss"] < block["initial_loss"] for block in block_reports(finished))
    assert result["scheme"] == "W6A6 per channel, symmetric, activations symmetric"
    assert result["unpublished"] == "W6A6 is served by no engine (those served: W8A8, W4A8, W4A4)"
    assert {*result["perplexity"]} == {"full_precision", "round_to_nearest", "quantized"}


@pytest.mark.parametrize(("start", "moved"), [("identity", False), ("smoothquant", True)])
def test_what_equivalence_starts_from(
    outlying: Path, short_text: Path, tmp_path: Path, start: str, moved: bool
) -> None:
    """With learning rates that change nothing, it is all there is."""
    sections: dict[str, Any] = {
        "scheme": scheme(8, 4),
        "method": {"increment": "none", "clipping": "none", "equivalence": ["norm"], "equivalence_start": start},
        "optimizer": {"epochs": 1, "equivalence_learning_rate": 1e-12},
        "schedule": {"kind": "parallel", "refresh_every": 0},
    }
    finished, _ = run(tiny_config(outlying, short_text, tmp_path / "run", **sections))
    for block in block_reports(finished):
        assert (block["kept"] != "initial") == (block["loss"] < 0.9 * block["initial_loss"]) == moved


def test_the_command_says_why_there_is_no_checkpoint_and_merge_refuses(
    model: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.ray_workers", inline_workers)
    tree = tiny_tree(model, short_text, tmp_path / "run", scheme=FAKE, optimizer={"epochs": 0})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    quantized = CliRunner().invoke(app, ["quantize", str(path)])
    assert quantized.exit_code == 0, quantized.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["checkpoint"] is None
    assert "no checkpoint is published: asymmetric activations" in " ".join(quantized.output.split())
    merged = CliRunner().invoke(app, ["merge", str(tmp_path / "run")])
    assert merged.exit_code == 2
    assert "no checkpoint to merge: asymmetric activations are served by no engine" in " ".join(merged.output.split())


def test_plan_names_the_scheme(model: Path, short_text: Path, tmp_path: Path) -> None:
    found = estimate(tiny_config(model, short_text, tmp_path / "run", scheme=FAKE))
    assert "merge" not in found["units"]
    assert found["bytes"]["checkpoint"] == 0
    text = "\n".join(estimate_lines(found))
    assert "scheme        W4A4 group 32" in text
    assert "none is published: asymmetric activations" in text
    served = estimate(tiny_config(model, short_text, tmp_path / "run", scheme=scheme(8, 8)))
    assert served["unpublished"] is None
    assert served["units"]["merge"] == 1


def test_every_setting_is_part_of_the_addresses() -> None:
    settings: list[dict[str, Any]] = [{}, {"activation_bits": 8}, {"activation_bits": 4}]
    settings += [{"activation_bits": 4, "activation_symmetric": False}, {"activation_bits": 4, "quantize_qkv": True}]
    for epochs in (0, 2):
        configs = [tiny_config("m", "t", "r", scheme=each, optimizer={"epochs": epochs}) for each in settings]
        found = [trained_keys(config) for config in configs]
        assert len(set.union(*found)) == sum(map(len, found))
        graphs = [build_graph(placeholder_inputs(config, 2, [])) for config in configs]
        evaluations = [
            {a.name: a.key for node in graph.nodes for a in node.makes if a.kind == "evaluation"} for graph in graphs
        ]
        for name, distinct in (("full_precision-news", 1), ("round_to_nearest-news", 5), ("quantized-news", 5)):
            assert len({keys[name] for keys in evaluations}) == distinct


# --- refused -----------------------------------------------------------------------------------------------------------

SENTENCES: list[tuple[dict[str, Any], str]] = [
    ({"quantize_qkv": True}, "quantize_qkv true means nothing without activation_bits: set that to 4, 6 or 8"),
    ({"activation_symmetric": False}, "activation_symmetric false means nothing without activation_bits"),
    ({"activation_bits": 5}, "scheme.activation_bits = 5: input should be 4, 6 or 8"),
]


@pytest.mark.parametrize(("wrong", "sentence"), SENTENCES)
def test_what_means_nothing_is_refused(wrong: dict[str, Any], sentence: str) -> None:
    tree = {"model": {"source": "m"}, "data": {"source": "t"}, "storage": {"run": "r"}, "scheme": wrong}
    with pytest.raises(UserError) as error:
        parse_config(tree)
    assert sentence in str(error.value)
    assert len(str(error.value).splitlines()) == 1


UNPUBLISHED: list[tuple[dict[str, Any], str]] = [
    (scheme(6, 6), "W6A6 is served by no engine (those served: W8A8, W4A8, W4A4)"),
    (scheme(8, 4), "W8A4 is served by no engine (those served: W8A8, W4A8, W4A4)"),
    (scheme(8, 8, activation_symmetric=False), "asymmetric activations are served by no engine"),
    (scheme(8, 8, quantize_qkv=True), "quantized q, k and v are served by no engine"),
]


@pytest.mark.parametrize(("unserved", "reason"), UNPUBLISHED)
def test_a_run_that_would_leave_nothing_is_refused(
    model: Path, short_text: Path, tmp_path: Path, unserved: dict[str, Any], reason: str
) -> None:
    tree = tiny_tree(model, short_text, tmp_path / "run", scheme=unserved) | {"evaluation": {}}
    with pytest.raises(UserError) as error:
        prepare(parse_config(tree), Silent())
    assert f"no checkpoint is published because {reason}" in str(error.value)
    assert "evaluation.texts names no text" in str(error.value)
    with pytest.raises(UserError, match="nothing would come of this run"):
        estimate(parse_config(tree))


def test_experts_are_evaluated_and_not_published(tiny_model: TinyModel, short_text: Path, tmp_path: Path) -> None:
    folder = family(tiny_model, tmp_path / "model", "qwen3_moe", **MIXTURE)
    sections: dict[str, Any] = {"scheme": scheme(8, 8), "optimizer": {"epochs": 0}}
    _, result = run(tiny_config(folder, short_text, tmp_path / "run", **sections))
    assert result["checkpoint"] is None
    assert result["unpublished"] == "transformers loads no mixture of experts with quantized activations"
    assert result["perplexity"]["quantized"]["news"] > 0


def test_attention_that_cannot_be_replaced_is_refused(tiny_model: TinyModel, short_text: Path, tmp_path: Path) -> None:
    config = AutoConfig.for_model("mpt", vocab_size=320, d_model=64, n_layers=2, n_heads=4, max_seq_len=64)
    folder = tiny_model(tmp_path / "model", config=config)
    with pytest.raises(UserError, match=r"the attention of MptForCausalLM cannot be replaced .* to false"):
        prepare(tiny_config(folder, short_text, tmp_path / "run", scheme=FAKE), Silent())


def test_inputs_that_a_family_flattens_are_coarser_in_transformers(
    tiny_model: TinyModel, short_text: Path, tmp_path: Path
) -> None:
    """One range for all tokens before OPT's fc1 and fc2. The day the two agree, the comment in `packed_format` can go."""
    folder = family(tiny_model, tmp_path / "model", "opt")
    for skip, agrees in (([], False), (["fc1", "fc2"], True)):
        sections: dict[str, Any] = {"optimizer": {"epochs": 0}, "evaluation": EVALUATION}
        sections["scheme"] = scheme(8, 8, skip=["lm_head", *skip])
        finished, result = run(tiny_config(folder, short_text, tmp_path / f"run-{agrees}", **sections))
        if agrees:
            assert_loader_agrees(finished, result, short_text)
        else:
            with pytest.raises(AssertionError):
                assert_loader_agrees(finished, result, short_text)
