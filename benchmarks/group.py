"""One block, two Ray actors: the loss curve against one actor's, and the wall time.

    python benchmarks/group.py --epochs 4 --repeats 2 --json OUT

The first block of SmolLM2-135M on its own inputs, 512 tokens a sample, one thread an actor. The times are of the training
steps alone, and every repeat measures one actor and two, one after the other.
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
from first_blocks import ASSETS, Trial, parse

from cluster.group import Handler, Membership, ShouldYield
from cluster.loop import run_units
from cluster.pools import Pool
from cluster.ray_group import RayGroup
from cluster.session import ray_session
from cluster.units import Unit
from lsi.group import GroupEngine
from pipeline.gguf_import import import_gguf
from pipeline.members import Members
from pipeline.model_source import open_model
from pipeline.sample_material import MODEL_FILE
from pipeline.store import open_store


def setup(settings: list[str], name: str, should_yield: ShouldYield, membership: Membership) -> Handler:
    torch.set_num_threads(1)
    members = Members(membership)
    members.join("cpu")
    options = parse(settings)

    def train(model: str) -> dict[str, Any]:
        engine = GroupEngine(options.batch) if members.size > 1 else None
        trial = Trial(open_model(open_store(model)), options, engine)
        training, arguments = trial.begin(0), trial.arguments[0]
        inputs, targets = (torch.cat(trial.boundaries[boundary]) for boundary in (0, 1))
        training.begin_clipping([(inputs[:16], arguments)])
        losses = []
        began = time.monotonic()
        for _ in range(options.epochs):
            for pair in zip(inputs.split(options.batch), targets.split(options.batch), strict=True):
                losses.append(training.step(*pair, arguments))
        return {"losses": losses, "seconds": time.monotonic() - began}

    return train


def measure(model: str, members: int, settings: list[str]) -> dict[str, Any]:
    with ray_session("local", cpus=2):
        group = RayGroup(partial(setup, settings), [Pool(most=1, members=members)])
        try:
            outcome = run_units(group, [Unit("train", model)], max_attempts=1)
        finally:
            group.close()
    if outcome.status != "done":
        raise RuntimeError(outcome.reason)
    return outcome.results["train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    settings = ["--blocks", "1"]
    settings += [f"--{name}={getattr(options, name)}" for name in ("epochs", "samples", "batch")]
    with tempfile.TemporaryDirectory() as model:
        import_gguf(str(ASSETS / MODEL_FILE), {}, open_store(model), torch.bfloat16)
        runs = [{n: measure(model, n, settings) for n in (1, 2)} for _ in range(options.repeats)]
    one, two = (runs[0][n]["losses"] for n in (1, 2))
    found = {
        "settings": vars(options) | {"json": None},
        "load": os.getloadavg()[1],
        "losses": {"one": one, "two": two},
        "largest_relative_difference": max(abs(a - b) / b for a, b in zip(two, one, strict=True)),
        "repeats_to_the_bit": all(run[n]["losses"] == runs[0][n]["losses"] for run in runs for n in (1, 2)),
        "seconds": [{n: round(run[n]["seconds"], 1) for n in (1, 2)} for run in runs],
        "time_ratio": [round(run[2]["seconds"] / run[1]["seconds"], 3) for run in runs],
    }
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found | {"losses": None}))


if __name__ == "__main__":
    main()
