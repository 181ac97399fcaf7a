"""Perplexity, time and memory of our presets and of other tools, on the same model and the same calibration tokens.

    python benchmarks/quality.py --settings w3g64,w2g64 --tools best,fast,paper,auto-round,gptq --seeds 3 --json OUT
    python benchmarks/quality.py --table OUT

Tools: the presets of configs/presets, `rtn` (round-to-nearest), `lwc-let` and `lwc-let-lsi` (OmniQuant's parts, and the increment
beside them, one epoch at rates that were tuned alike), both with `-end` (the last stage of `fast` behind them), `fast-group` (`fast`
with two actors a block), `best-wave` (`best` for many workers), `best-8` (`best` in the batches that eight actors a block need), `gptq`
and `awq` (llm-compressor, its defaults), `awq-4` (4 points of its search, which has 20), `auto-round` (50 steps of batch 2),
`auto-round-default` (200 of batch 8), and `full-precision`, which only measures the model itself, once for all settings. Settings:
w4ch is one scale per output channel, w3g64 one per 64 inputs; asymmetric, or symmetric with -sym; w8a8ch-sym quantizes activations
too, for our own tools.

One command after another, each in processes of one thread. Its cost is that of all its processes, from their start to the
saved checkpoint. Perplexity is measured afterwards by `pipeline/perplexity.py` on the model that transformers loads from that
checkpoint, in the checkpoint's dtype. The seed orders the samples; tools without chance run with the first one. The first 32 windows
of the texts are for choosing settings and are left out here. Results that are in the file are kept: the same command goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from process_tree import Cost, measure
from quality_records import (
    FULL_PRECISION,
    Setting,
    key_of,
    markdown,
    parse_setting,
    put_record,
    read_records,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config_sections import DataConfig, SchemeConfig
from pipeline.data import calibration_tokens, evaluation_tokens
from pipeline.errors import UserError
from pipeline.gguf_import import import_gguf
from pipeline.packed_format import refusal
from pipeline.perplexity import model_perplexity, take_windows
from pipeline.presets import merged, preset_names, preset_values
from pipeline.sample_material import MODEL_FILE
from pipeline.store import open_store

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = {
    "gptq": ["gptq"],
    "awq": ["awq"],
    "awq-4": ["awq", "--awq-points", "4"],
    "auto-round": ["auto-round", "--iterations", "50", "--batch", "2"],
    "auto-round-default": ["auto-round"],
}


def omniquant(increment: str, clipping_rate: float) -> dict[str, Any]:
    """Learned clipping and equivalent transformation for one epoch of batches of 2, with an increment or without, at the rates
    that left the first blocks' losses lowest (benchmarks/results)."""
    return {
        "method": {"rounding": "none", "increment": increment, "factor_dtype": "bfloat16", "equivalence": "auto"},
        "optimizer": {"epochs": 1, "batch_size": 2, "clipping_learning_rate": clipping_rate},
        "schedule": {"kind": "sequential"},
    }


END_OF_FAST = {"end_to_end": preset_values("fast", SchemeConfig().model_dump())["end_to_end"]}
# Of our own tools that are no presets, the sections of their configuration.
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": {"clipping": "none", "increment": "none"}, "optimizer": {"epochs": 0}},
    "lwc-let": omniquant("none", 3e-1),
    "lwc-let-lsi": omniquant("diagonal", 1e-1),
    "lwc-let-end": omniquant("none", 3e-1) | END_OF_FAST,
    "lwc-let-lsi-end": omniquant("diagonal", 1e-1) | END_OF_FAST,
    "fast-group": {"preset": "fast", "compute": {"group": 2}},
    "best-wave": {"preset": "best", "schedule": {"kind": "wave"}},
    "best-8": {
        "preset": "best",
        "optimizer": {"batch_size": 8},
        "end_to_end": {"batch_size": 4},
    },
}
WITHOUT_CHANCE = {"rtn", "gptq", "awq", "awq-4"}
TUNING_WINDOWS = 32


@dataclass(frozen=True)
class Job:
    """One tool with one setting and seed; full precision has no setting."""

    tool: str
    setting: Setting | None
    seed: int

    @property
    def name(self) -> str:
        return f"{self.tool}-{self.setting.name if self.setting else ''}-{self.seed}"


class Bench:
    """The model, the texts and a working folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        named = Path(options.model)
        self.model = self.work / "models" / named.stem if named.suffix == ".gguf" else named.resolve()
        if options.model.endswith(".gguf") and not (self.model / "config.json").exists():
            import_gguf(options.model, {}, open_store(str(self.model)), torch.bfloat16)
        self.data = DataConfig(
            source=str(Path(options.calibration).resolve()),
            samples=options.samples,
            sequence_length=options.length,
        )

    @cached_property
    def windows(self) -> dict[str, torch.Tensor]:
        """The test windows of each text."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        skip, length = self.options.first_window, self.options.length
        count = skip + self.options.windows
        return {
            name: take_windows(evaluation_tokens(tokenizer, path, count * length), count, length, path)[skip:]
            for name, path in (text.split("=", 1) for text in self.options.text)
        }

    @cached_property
    def tokens(self) -> Path:
        """The calibration windows for tools that take tokens; ours cut the same ones out of the text."""
        path = self.work / f"tokens-{self.model.name}-{self.options.samples}x{self.options.length}.safetensors"
        save_file({"input_ids": calibration_tokens(AutoTokenizer.from_pretrained(self.model), self.data)}, path)
        return path

    def record(self, job: Job) -> dict[str, Any]:
        """The part of a result that says what it is of."""
        model = {"model": Path(self.options.model).name, "samples": self.options.samples}
        return model | {"tool": job.tool, "setting": job.setting.name if job.setting else "", "seed": job.seed}

    def perplexities(self, checkpoint: Path) -> dict[str, float]:
        """By text, through transformers' own loader."""
        model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        return {name: model_perplexity(model, windows) for name, windows in self.windows.items()}

    def config(self, job: Job, setting: Setting, folder: Path) -> dict[str, Any]:
        """A run of ours on one worker that measures nothing."""
        recipe = RECIPES.get(job.tool, {"preset": job.tool})
        return {
            **merged(recipe, {"optimizer": {"seed": job.seed}}),
            "model": {"source": str(self.model)},
            "data": self.data.model_dump(),
            "scheme": asdict(setting),
            "cluster": {"workers": 1},
            "storage": {"run": str(folder / "run")},
            "outputs": {"checkpoint": str(folder / "checkpoint")},
        }

    def command(self, job: Job, setting: Setting, folder: Path) -> list[str]:
        """What quantizes; it leaves folder/checkpoint."""
        if job.tool not in PEERS:
            config = folder / "config.yaml"
            config.write_text(yaml.safe_dump(self.config(job, setting, folder)))
            return [sys.executable, "-m", "pipeline.cli", "quantize", str(config)]
        command = [str(peers_python(self.options.peers_env)), str(HERE / "peers" / "run_peer.py"), *PEERS[job.tool]]
        command += ["--model", str(self.model), "--tokens", str(self.tokens), "--out", str(folder / "checkpoint")]
        command += ["--bits", str(setting.bits), "--seed", str(job.seed)]
        command += ["--group-size", str(setting.group_size)] if setting.group_size else []
        return [*command, "--symmetric"] if setting.symmetric else command

    def folder(self, job: Job) -> Path:
        """Where a job works and leaves its checkpoint: another model's, or of other tokens, is another one."""
        return self.work / f"{self.model.name}-{self.options.samples}x{self.options.length}-{job.name}"

    def quantize(self, job: Job, setting: Setting) -> tuple[Path, Cost]:
        """The checkpoint and what it cost; one that waits for its measurement is taken as it is.

        Raises RuntimeError with the log's last line if there is none.
        """
        folder = self.folder(job)
        checkpoint, costs = folder / "checkpoint", folder / "cost.json"
        if costs.exists() and not self.options.again:
            return checkpoint, Cost(**json.loads(costs.read_text()))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = self.command(job, setting, folder)
        log = folder.with_name(f"{folder.name}.log")
        status, cost = measure(command, one_thread(), ROOT, log)
        if status or not (checkpoint / "config.json").exists():
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"{job.name} ended with {status}: {last} (all of it: {log})")
        costs.write_text(json.dumps(asdict(cost)))
        shutil.rmtree(folder / "run", ignore_errors=True)
        return checkpoint, cost

    def result(self, job: Job) -> dict[str, Any]:
        """Quantize and measure."""
        if job.setting is None:
            return self.record(job) | self.perplexities(self.model)
        checkpoint, cost = self.quantize(job, job.setting)
        found = self.record(job) | self.perplexities(checkpoint) | asdict(cost)
        if not self.options.keep:
            shutil.rmtree(checkpoint.parent)
        return found


def one_thread() -> dict[str, str]:
    """The environment of every tool: one thread, no model hub."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    # Ours are found by the folder that they run in, and the peers must not find ours.
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return ours | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def peers_python(folder: Path) -> Path:
    """The interpreter of the peers' environment, which is made if it is not there."""
    folder = folder.absolute()
    python, mark = folder / "bin" / "python", folder / ".installed"
    if not mark.exists():
        print(f"installing the peers into {folder}", file=sys.stderr)
        pins = (HERE / "peers" / "requirements.txt").read_text()
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        # torch first and alone, as for ourselves; the rest as pinned, since the two tools' own ranges exclude each other.
        torch_pin = next(line for line in pins.splitlines() if line.startswith("torch=="))
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([*pip, torch_pin], check=True)
        subprocess.run([*pip, "--no-deps", "--requirement", str(HERE / "peers" / "requirements.txt")], check=True)
        mark.touch()
    return python


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """First seeds first, so that a command that is stopped has something of everything."""
    full = [Job(FULL_PRECISION, None, 0)] if FULL_PRECISION in options.tools else []
    return full + [
        Job(tool, setting, seed)
        for seed in range(options.seeds)
        for setting in options.settings
        for tool in options.tools
        if tool != FULL_PRECISION and (seed == 0 or tool not in WITHOUT_CHANCE)
    ]


def run(options: argparse.Namespace) -> int:
    """All jobs whose results are not there yet. Returns how many failed; 1 where a file is not there, or too short."""
    torch.set_num_threads(1)
    files = [options.model, options.calibration, *(text.partition("=")[2] for text in options.text)]
    if missing := [file for file in files if not Path(file).exists()]:
        print(
            f"{missing[0]} is not there; `lsi sample-material assets` gets the default model and texts", file=sys.stderr
        )
        return 1
    try:
        bench = Bench(options)
        # Before anything is quantized: that there is enough of each text.
        _ = bench.windows, bench.tokens
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    path: Path = options.json
    failed = 0
    for job in jobs_of(options):
        done = {key_of(record) for record in read_records(path)}
        if key_of(bench.record(job)) in done and not options.again:
            continue
        try:
            put_record(path, found := bench.result(job))
            print(yaml.safe_dump(found, default_flow_style=True, sort_keys=False, width=1000).strip(), flush=True)
        except RuntimeError as error:
            failed += 1
            print(error, file=sys.stderr, flush=True)
    return failed


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def tools(text: str) -> list[str]:
        known = [FULL_PRECISION, *preset_names(), *RECIPES, *PEERS]
        if unknown := [tool for tool in text.split(",") if tool not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no tool; there are {', '.join(known)}")
        return text.split(",")

    def settings(text: str) -> list[Setting]:
        try:
            return [parse_setting(name) for name in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no count: give 1 or more")
        return int(text)

    def named_file(text: str) -> str:
        name, _, file = text.partition("=")
        if not (name and file):
            raise argparse.ArgumentTypeError(f"{text!r} has no name: write NAME=FILE, as in wikipedia=heldout.txt")
        return text

    assets = ROOT / "assets"
    texts = [f"wikipedia={assets / 'wikipedia-heldout.txt'}", f"news={assets / 'news.txt'}"]
    parser.add_argument("--tools", type=tools, default="full-precision,best,fast,paper,rtn,auto-round,gptq")
    parser.add_argument("--settings", type=settings, default="w4ch,w3g64,w3ch,w2g64,w2g32")
    parser.add_argument("--seeds", type=count, default=1, help="how many")
    parser.add_argument("--json", type=Path, help="where the results are, or go")
    parser.add_argument("--again", action="store_true", help="make those again that are there")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="print results as tables, run nothing")
    parser.add_argument("--model", default=str(assets / MODEL_FILE), help="a GGUF file, or a folder of safetensors")
    parser.add_argument("--calibration", default=str(assets / "wikipedia-calibration.txt"), help="a text file")
    parser.add_argument(
        "--text", type=named_file, action="append", metavar="NAME=FILE", help="what to measure on; may be repeated"
    )
    parser.add_argument("--samples", type=count, default=64)
    parser.add_argument("--length", type=count, default=512, help="tokens of a sample and of a window")
    parser.add_argument("--windows", type=count, default=64)
    parser.add_argument("--first-window", type=int, default=TUNING_WINDOWS)
    parser.add_argument("--peers-env", type=Path, default=ROOT / ".venv-peers", help="made if it is not there")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality", help="logs and checkpoints")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    options = parser.parse_args(given)
    options.text = options.text or texts
    for setting in options.settings:
        scheme = SchemeConfig(**asdict(setting))
        if reason := refusal(scheme.bits, scheme.activation_grid, operands=scheme.quantize_qkv):
            parser.error(f"{setting.name} has no checkpoint to measure: {reason}")
    peers = [tool for tool in options.tools if tool in PEERS]
    if peers and (quantized := [setting.name for setting in options.settings if setting.activation_bits]):
        parser.error(
            f"{peers[0]} is run on weights alone, and {quantized[0]} quantizes activations: leave one of them out"
        )
    if not (options.json or options.table):
        parser.error("say --json FILE to run, or --table FILE to show")
    return options


def main() -> None:
    options = parse()
    if options.table:
        print(markdown([record for path in options.table for record in read_records(path)]))
        return
    raise SystemExit(1 if run(options) else 0)


if __name__ == "__main__":
    main()
