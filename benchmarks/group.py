"""One block, a group of Ray actors: the loss curve against one actor's, wall time, CPU time and peak memory of every actor.

    python benchmarks/group.py --epochs 4 --repeats 2 --json OUT
    python benchmarks/group.py --members 2 4 8 --batch 8 --rounding --json OUT
    python benchmarks/group.py --epochs 1 --repeats 1 --hidden 2048 --engines torch deepspeed --json OUT

The first block of SmolLM2-135M on its own inputs, 512 tokens a sample, one thread an actor; or with --hidden a random one of
LLaMA-2-70B's proportions. The times are of the training steps alone, and every repeat measures one actor (plain torch) and groups of each
engine, one after the other. Wall time says something where every actor has a core; CPU time, what they send each other over loopback
included, says what an actor has to do. Peaks are resident memory (VmHWM), with what a process holds before any work.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from first_blocks import ASSETS, Trial, parse
from large_block import HIDDEN, byte_tokenizer, llama, write_model

from cluster.group import Handler, Membership, ShouldYield
from cluster.loop import run_units
from cluster.pools import Pool
from cluster.ray_group import RayGroup
from cluster.session import ray_session
from cluster.units import Unit
from pipeline.config_sections import ComputeConfig
from pipeline.engines import make_engine
from pipeline.gguf_import import import_gguf
from pipeline.members import Members
from pipeline.model_source import open_model
from pipeline.sample_material import MODEL_FILE
from pipeline.store import open_store
from pipeline.worker import peak_rss_mib

Case = tuple[int, str]  # members, engine


def setup(settings: list[str], name: str, should_yield: ShouldYield, membership: Membership) -> Handler:
    torch.set_num_threads(1)
    members = Members(membership)
    members.join("cpu")
    options = parse(settings)

    def train(model: str) -> dict[str, Any]:
        compute = ComputeConfig(engine=options.engine, group=members.size)
        engine = make_engine(compute, "torch", options.batch)
        trial = Trial(open_model(open_store(model)), options, engine)
        training, arguments = trial.begin(0), trial.arguments[0]
        inputs, targets = (torch.cat(trial.boundaries[boundary]) for boundary in (0, 1))
        training.begin_clipping([(inputs[:16], arguments)])
        losses = []
        began, before = time.monotonic(), time.process_time()
        for _ in range(options.epochs):
            for pair in zip(inputs.split(options.batch), targets.split(options.batch), strict=True):
                losses.append(training.step(*pair, arguments))
        seconds, own = time.monotonic() - began, (time.process_time() - before, peak_rss_mib())
        every = [own] * members.size
        if members.size > 1:
            dist.all_gather_object(every, own)
        return {
            "losses": losses,
            "seconds": seconds,
            "cpu_seconds": [round(cpu, 2) for cpu, _ in every],
            "peak_rss_mib": [round(peak) for _, peak in every],
        }

    return train


def measure(model: str, case: Case, settings: list[str]) -> dict[str, Any]:
    members, engine = case
    with ray_session("local", cpus=members):
        group = RayGroup(partial(setup, [*settings, f"--engine={engine}"]), [Pool(most=1, members=members)])
        try:
            outcome = run_units(group, [Unit("train", model)], max_attempts=1)
        finally:
            group.close()
    if outcome.status != "done":
        raise RuntimeError(outcome.reason)
    return outcome.results["train"]


def make_model(folder: Path, hidden: int | None) -> None:
    """SmolLM2, or a random model of one block."""
    if hidden is None:
        import_gguf(str(ASSETS / MODEL_FILE), {}, open_store(str(folder)), torch.bfloat16)
        return
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    write_model(open_store(str(folder)), folder, llama(1, HIDDEN // hidden, len(tokenizer)))


def named(case: Case) -> str:
    return f"{case[0]} {case[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--hidden", type=int, help="of a random block, a divisor of 8192; default: SmolLM2's")
    parser.add_argument("--members", type=int, nargs="+", default=[2], help="of the groups")
    parser.add_argument("--engines", nargs="+", choices=["torch", "deepspeed"], default=["torch"], help="of the groups")
    parser.add_argument(
        "--rounding", action="store_true", help="learned rounding and signed steps in place of a dense increment"
    )
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    settings = ["--blocks", "1"]
    settings += [f"--{name}={getattr(options, name)}" for name in ("epochs", "samples", "batch")]
    if options.rounding:
        settings += ["--increment=none", "--rounding", "--clipping=direct", "--steps=signed", "--bits=2"]
    alone: Case = (1, "torch")
    together: list[Case] = [(members, engine) for engine in options.engines for members in options.members]
    with tempfile.TemporaryDirectory() as model:
        make_model(Path(model), options.hidden)
        runs = [{case: measure(model, case, settings) for case in (alone, *together)} for _ in range(options.repeats)]
    first = {case: run["losses"] for case, run in runs[0].items()}
    found = {
        "settings": vars(options) | {"json": None},
        "load": os.getloadavg()[1],
        "losses": {named(case): losses for case, losses in first.items()},
        "largest_relative_difference": {
            named(case): max(abs(a - b) / b for a, b in zip(first[case], first[alone], strict=True))
            for case in together
        },
        "repeats_to_the_bit": all(run[case]["losses"] == first[case] for run in runs for case in run),
        "seconds": [{named(case): round(run[case]["seconds"], 1) for case in run} for run in runs],
        "time_ratio": [
            {named(case): round(run[case]["seconds"] / run[alone]["seconds"], 3) for case in together} for run in runs
        ],
        "cpu_seconds": [{named(case): run[case]["cpu_seconds"] for case in run} for run in runs],
        "peak_rss_mib": [{named(case): run[case]["peak_rss_mib"] for case in run} for run in runs],
    }
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found | {"losses": None}))


if __name__ == "__main__":
    main()
