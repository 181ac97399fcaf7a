"""A model of a few decoder blocks of LLaMA-2-70B's shapes, end to end: memory of every process, and time by phase.

    python benchmarks/large_block.py --blocks 2 --increment diagonal --rank 1024 --engine torch --json OUT

The weights are random, written to disk tensor by tensor; the vocabulary is small, the sequences are short and the steps few:
what is asked is whether a block goes through, and what it takes. `--scale 4` takes a quarter of every width. Without --rank
the dense increment is a free difference, and the diagonal one has all singular values.

Peaks are resident memory as the kernel counts it (VmHWM), of the driver and of the actor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from pipeline.config_file import parse_config
from pipeline.plan import Workers, plan
from pipeline.skeleton import make_skeleton, tensor_names
from pipeline.store import Store, open_store
from pipeline.tensors import Layout, write_lazily

HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS = 8192, 28672, 64, 8
SHARD_BYTES = 2 << 30
TEXT = Path(__file__).parent.parent / "assets" / "wikipedia-calibration.txt"
Sizes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def llama(blocks: int, scale: int, vocabulary: int) -> LlamaConfig:
    """The configuration of the 70B model, with fewer blocks and every width divided by `scale`."""
    return LlamaConfig(
        hidden_size=HIDDEN // scale,
        intermediate_size=INTERMEDIATE // scale,
        num_attention_heads=HEADS // scale,
        num_key_value_heads=max(1, KEY_HEADS // scale),
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_tensor(layout: Layout, places: dict[str, int], name: str) -> Tensor:
    """Norms of ones, all else normal with a deviation of 0.02; the same at every call."""
    dtype, shape = layout[name]
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(places[name])
    return torch.randn(shape, generator=generator).mul_(0.02).to(dtype)


def shards(sizes: Sizes) -> Iterator[Sizes]:
    """The tensors in files of at most `SHARD_BYTES`."""
    part: Sizes = {}
    used = 0
    for name, (dtype, shape) in sizes.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        if part and used + size > SHARD_BYTES:
            yield part
            part, used = {}, 0
        part[name] = (dtype, shape)
        used += size
    yield part


def write_model(store: Store, folder: Path, config: LlamaConfig) -> None:
    """The whole model on disk, one tensor in memory at a time."""
    tensors = tensor_names(make_skeleton(config).model)
    sizes: Sizes = {name: (torch.bfloat16, tuple(tensor.shape)) for name, tensor in tensors.items()}
    places = {name: place for place, name in enumerate(sizes)}
    weight_map: dict[str, str] = {}
    for number, part in enumerate(shards(sizes)):
        file = f"model-{number + 1:05d}.safetensors"
        store.put(file, partial(write_lazily, part, partial(random_tensor, part, places), {"format": "pt"}))
        weight_map |= dict.fromkeys(part, file)
    store.put("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
    config.save_pretrained(folder)


def configuration(arguments: argparse.Namespace, model: Path, run: Path) -> dict[str, Any]:
    """A run of few steps on short sequences, with one actor."""
    # Only what was asked for: a value that is given is one that a plan leaves alone.
    compute = {
        "engine": arguments.engine,
        "group": arguments.group,
        "threads": arguments.threads,
        "micro_batch": arguments.micro_batch,
        "recompute": arguments.recompute,
    }
    return {
        "model": {"source": str(model)},
        "data": {
            "source": str(TEXT),
            "samples": arguments.samples,
            "sequence_length": arguments.length,
        },
        "scheme": {"bits": 3, "group_size": 128},
        "method": {"increment": arguments.increment, "rank": arguments.rank},
        "optimizer": {"epochs": arguments.epochs, "batch_size": arguments.batch},
        "compute": {key: value for key, value in compute.items() if value is not None},
        "cluster": {"workers": 1, "cpus_per_worker": 1, "commit_every_seconds": 100_000, "deadline_seconds": 900},
        "storage": {"run": str(run), "chunk_samples": arguments.samples},
        "evaluation": {
            "texts": {"wikipedia": str(TEXT)},
            "windows": 1,
            "length": arguments.length,
            "baselines": ["round_to_nearest"],
        },
    }


def phase_seconds(progress: dict[str, Any]) -> dict[str, float]:
    """Seconds in the units of each phase, summed."""
    seconds: dict[str, float] = {}
    for unit, *_, started, ended, _ in progress["units"]:
        phase = str(unit).partition("/")[0]
        seconds[phase] = seconds.get(phase, 0.0) + ended - started
    return {phase: round(value, 1) for phase, value in seconds.items()}


def unit_peaks(progress: dict[str, Any]) -> dict[str, float]:
    """The actor's peak after the units of each phase, GiB: it only grows."""
    peaks: dict[str, float] = {}
    for unit, *_, peak in progress["units"]:
        phase = str(unit).partition("/")[0]
        peaks[phase] = round(max(peaks.get(phase, 0.0), peak / 1024), 2)
    return peaks


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Write the model, run, and read what the run says of itself."""
    model, run = scratch / "model", scratch / "run"
    model.mkdir()
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(model)
    write_model(open_store(str(model)), model, llama(arguments.blocks, arguments.scale, len(tokenizer)))
    tree = configuration(arguments, model, run)
    memory = plan(parse_config(tree), Workers(1))["memory"]
    path = scratch / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "pipeline.cli", "quantize", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent.parent)
    result = json.loads((run / "result.json").read_text())
    progress = json.loads((run / "progress.json").read_text())
    peaks = {name: gib(peak * 2**20) for name, peak in result["peak_rss_mib"].items()}
    return {
        "peak_rss_gib": max(peaks.values()),
        "planned_gib": gib(max(memory["worker"]["host"], memory["driver"])),
        "seconds": phase_seconds(progress) | {"start and inspect": result["seconds"]["start_and_inspect"]},
        "peaks_by_process_gib": peaks,
        "planned_by_process_gib": {"driver": gib(memory["driver"]), "worker-0": gib(memory["worker"]["host"])},
        "peaks_by_phase_gib": unit_peaks(progress),
        "planned_by_phase_gib": {stage: gib(unit["host"]["bytes"]) for stage, unit in memory["units"].items()},
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("json", "scratch")},
    }


def gib(size: float) -> float:
    return round(size / 2**30, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--increment", choices=["diagonal", "dense"], default="diagonal")
    parser.add_argument("--rank", type=int, help="leading singular values; default: all")
    parser.add_argument("--engine", choices=["torch", "deepspeed"], default="torch")
    parser.add_argument(
        "--group", type=int, default=1, help="actors for one block; the worker's peak is the first one's"
    )
    parser.add_argument("--scale", type=int, default=1, help="divide every width by this")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2, help="sequences a step")
    parser.add_argument("--micro-batch", type=int, help="sequences at once within a step")
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", help="a folder with room for the model and the run")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    if arguments.scratch and not Path(arguments.scratch).is_dir():
        parser.error(f"--scratch {arguments.scratch}: there is no such folder; make it, on a disk with room")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        row = measure(arguments, Path(scratch))
    print(json.dumps(row, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
