"""Runs one peer on given tokens and saves what it made of the model, with plain dequantized weights.

    python run_peer.py auto-round --model FOLDER --tokens FILE.safetensors --out FOLDER --bits 3 --group-size 64
    python run_peer.py gptq --packed --model FOLDER --tokens FILE.safetensors --out FOLDER --bits 4 --group-size 64

Stands alone: it runs in the peers' own environment (requirements.txt beside it) and imports nothing of ours. The weights are
saved as the tool would dequantize them, so that whatever reads safetensors can measure them, and no tool's export is in the way;
with --packed, as llm-compressor's users save them (what `lsi finetune` takes).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

TOOLS = ("gptq", "awq", "auto-round")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--model", required=True, help="folder with safetensors")
    parser.add_argument("--tokens", required=True, help="safetensors file with input_ids [samples, length]")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, help="default: one scale per output channel")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=200, help="AutoRound's steps a block")
    parser.add_argument("--batch", type=int, default=8, help="AutoRound's sequences a step")
    parser.add_argument("--packed", action="store_true", help="gptq, awq: save llm-compressor's own checkpoint")
    parser.add_argument("--awq-points", type=int, default=20, help="points of AWQ's search for each scale")
    options = parser.parse_args()
    if options.packed and options.tool == "auto-round":
        parser.error("--packed is for gptq and awq")
    return options


def auto_round(model: PreTrainedModel, tokens: torch.Tensor, options: argparse.Namespace) -> nn.Module:
    """AutoRound's SignRound; with iterations 200 and batch 8 its default recipe."""
    from auto_round import AutoRound

    quantizer = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        bits=options.bits,
        group_size=options.group_size or -1,
        sym=options.symmetric,
        iters=options.iterations,
        batch_size=options.batch,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=list(tokens.long().split(options.batch)),
        seed=options.seed,
        device_map="cpu",
        enable_torch_compile=False,
    )
    return quantizer.quantize()[0]


def llm_compressor(model: PreTrainedModel, tokens: torch.Tensor, options: argparse.Namespace) -> None:
    """GPTQ, or AWQ followed by rounding, with the defaults of llm-compressor, which leaves the model wrapped."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(
        num_bits=options.bits,
        symmetric=options.symmetric,
        strategy="group" if options.group_size else "channel",
        group_size=options.group_size,
    )
    what = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    if options.tool == "gptq":
        recipe = [GPTQModifier(**what)]
    else:
        without_pinned_memory()
        recipe = [AWQModifier(n_grid=options.awq_points), QuantizationModifier(**what)]
    rows = tokens.long().tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )


def without_pinned_memory() -> None:
    """AWQ pins its cache for an accelerator, and crashes on a machine that has none."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, *arguments, **more: None


@torch.no_grad()
def dequantized(model: nn.Module) -> nn.Module:
    """Round every weight to its grid, as the wrapped forward does, and take the marks of quantization away."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        module.weight.data = forward_quantize(module, module.weight, "weight", scheme.weights)
    return model


def save(model: nn.Module, source: str, out: Path) -> None:
    """A transformers folder with the dequantized tensors that the source has, and its configuration."""
    plain = AutoModelForCausalLM.from_pretrained(source)
    names = plain.state_dict()
    found = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    missing = sorted(set(names) - set(found))
    if missing:
        raise SystemExit(f"the tool's model lacks {len(missing)} tensors, {missing[0]} first")
    plain.load_state_dict(found)
    plain.save_pretrained(out)


def copy_tokenizer(source: str, out: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (Path(source) / name).exists():
            shutil.copy(Path(source) / name, out / name)


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokens = load_file(options.tokens)["input_ids"]
    out = Path(options.out)
    if options.tool == "auto-round":
        save(auto_round(model, tokens, options), options.model, out)
    else:
        llm_compressor(model, tokens, options)
        if options.packed:
            model.save_pretrained(out, save_compressed=True)
        else:
            save(dequantized(model), options.model, out)
    copy_tokenizer(options.model, out)


if __name__ == "__main__":
    main()
