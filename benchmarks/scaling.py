"""What adding workers brings: simulated for large models, measured for small ones on this machine.

    python benchmarks/scaling.py --model llama-2-70b --workers 80 --schedule parallel --json OUT
    python benchmarks/scaling.py --table --json OUT.json --markdown OUT.md
    python benchmarks/scaling.py --real 1,2 --json OUT

The simulation is the real graph and the real scheduler under a clock (`pipeline/simulate.py`); unit costs come from the formulas
in `pipeline/costs.py` over an assumed device (`benchmarks/model_shapes.py`; `--real` tells what this machine achieves). Starting Ray and the inspection of the weights (one read of the model, spread over the workers) are not in it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from model_shapes import H100, MODELS, checkpoint_bytes

from pipeline.config_file import parse_config
from pipeline.costs import Costs, Device, placeholder_inputs
from pipeline.graph import build_graph
from pipeline.simulate import Network, Simulated, simulate

SHARD = 4768 << 20
TABLE = {"llama-2-70b": (1, 8, 16, 40, 80), "llama-3.1-405b": (8, 64, 128, 256, 512)}


@dataclass(frozen=True)
class Setting:
    """One simulated run."""

    model: str
    workers: int
    schedule: str = "parallel"
    refresh_every: int = 1
    lead: int = 0
    epochs: int = 20
    samples: int = 128
    sequence_length: int = 2048
    chunk_samples: int = 8
    batch_size: int = 2
    increment: str = "diagonal"
    bits: int = 3
    cache_gib: float = 0.5
    evaluation: bool = True

    def tree(self) -> dict[str, Any]:
        schedule: dict[str, Any] = {"kind": self.schedule}
        if self.schedule != "sequential":
            schedule["refresh_every"] = self.refresh_every
        if self.schedule == "wave":
            schedule["lead"] = self.lead
        group = 64 if self.model == "smollm2-135m" else 128
        return {
            "model": {"source": self.model},
            "data": {"source": "text", "samples": self.samples, "sequence_length": self.sequence_length},
            "scheme": {"bits": self.bits, "group_size": group},
            "method": {"increment": self.increment},
            "optimizer": {"epochs": self.epochs, "batch_size": self.batch_size},
            "schedule": schedule,
            "storage": {
                "run": "run",
                "chunk_samples": self.chunk_samples,
                "cache_mib": int(self.cache_gib * 1024),
            },
            "evaluation": {"texts": {"text": "text"} if self.evaluation else {}},
        }


def play(setting: Setting, device: Device, network: Network) -> Simulated:
    """One setting simulated."""
    config = parse_config(setting.tree())
    shape = MODELS[setting.model].shape()
    whole = checkpoint_bytes(shape, config.scheme.grid)
    inputs = placeholder_inputs(config, shape.blocks, shards(shape.blocks, whole))
    graph = build_graph(inputs)
    costs = Costs(inputs, shape, device, whole)
    return simulate(
        graph,
        {node.name: costs.of(node) for node in graph.nodes},
        setting.workers,
        replace(network, cache=setting.cache_gib * 2**30),
    )


def shards(blocks: int, size: float) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Files of at most the default size, the blocks spread evenly over them."""
    count = max(1, -(-int(size) // SHARD))
    places = [range(blocks * i // count, blocks * (i + 1) // count) for i in range(count)]
    return [(f"model-{i:05d}.safetensors", (), tuple(place)) for i, place in enumerate(places)]


def figures(found: Simulated) -> dict[str, Any]:
    """For JSON."""
    return {
        "efficiency": round(found.efficiency, 4),
        "hours": round(found.makespan / 3600, 4),
        "storage_gib": round(found.high_water / 2**30, 1),
        "bottleneck": found.bottleneck,
        "shares": {use: round(share, 4) for use, share in found.shares.items()},
        "read_gib": round(found.read / 2**30, 1),
        "written_gib": round(found.written / 2**30, 1),
        "worker_hours_of_computing": round(found.compute / 3600, 3),
        "units": found.units,
    }


def schedules(base: Setting) -> Iterator[Setting]:
    """Those of the table."""
    for every in (1, 2, 4, 0):
        yield replace(base, schedule="parallel", refresh_every=every)
    for lead in (0, 1, 4):
        yield replace(base, schedule="wave", lead=lead)
    yield replace(base, schedule="sequential")


def words(setting: Setting) -> str:
    match setting.schedule:
        case "parallel":
            return (
                f"parallel, refreshed every {setting.refresh_every}"
                if setting.refresh_every
                else "parallel, never refreshed"
            )
        case "wave":
            return f"wave, lead {setting.lead}"
    return setting.schedule


def table(base: Setting, device: Device, network: Network) -> list[dict[str, Any]]:
    """Every model, number of workers and schedule."""
    return [
        {"setting": words(setting), **asdict(setting), **figures(play(setting, device, network))}
        for model, counts in TABLE.items()
        for workers in counts
        for setting in schedules(replace(base, model=model, workers=workers))
    ]


HEADER = [
    "model",
    "workers",
    "schedule",
    "efficiency",
    "hours",
    "read + written TiB",
    "storage at most, GiB",
    "bottleneck",
    "its share",
]


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table for people."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for row in rows:
        traffic = (row["read_gib"] + row["written_gib"]) / 1024
        lines.append(
            [
                row["model"],
                str(row["workers"]),
                row["setting"],
                f"{row['efficiency']:.1%}",
                f"{row['hours']:.2f}",
                f"{traffic:.1f}",
                f"{row['storage_gib']:.0f}",
                row["bottleneck"],
                f"{row['shares'][row['bottleneck']]:.0%}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Setting("llama-2-70b", 80)
    parser.add_argument("--model", choices=sorted(MODELS), default=defaults.model)
    parser.add_argument("--workers", type=int, default=defaults.workers)
    parser.add_argument("--schedule", choices=["sequential", "parallel", "wave"], default=defaults.schedule)
    parser.add_argument("--increment", choices=["none", "diagonal", "dense"], default=defaults.increment)
    for name in (
        "refresh_every",
        "lead",
        "epochs",
        "samples",
        "sequence_length",
        "chunk_samples",
        "batch_size",
        "bits",
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    parser.add_argument("--cache-gib", type=float, default=defaults.cache_gib, help="activations that a worker keeps")
    parser.add_argument("--no-evaluation", dest="evaluation", action="store_false", help="leave perplexity out")
    parser.add_argument("--tflops", type=float, default=H100.flops / 1e12, help="achieved by a worker in products")
    parser.add_argument("--memory-gb", type=float, default=H100.memory / 1e9, help="achieved GB/s in elementwise work")
    parser.add_argument("--link-gbit", type=float, default=25.0, help="of each worker")
    parser.add_argument("--store-gb", type=float, default=40.0, help="GB/s of the store, all workers together")
    parser.add_argument("--handling", type=float, default=0.1, help="seconds that every unit costs beside its work")
    parser.add_argument("--writes-behind", action="store_true", help="what if: units wrote while they compute")
    parser.add_argument("--weights-ahead", action="store_true", help="what if: weights were there when a unit begins")
    parser.add_argument("--table", action="store_true", help="all models, workers and schedules")
    parser.add_argument("--real", metavar="N,N", help="measure on this machine with these numbers of actors")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.real:
        from real_scaling import measure

        found: Any = measure([int(text) for text in options.real.split(",")])
    else:
        found = simulated(options)
    text = json.dumps(found, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    if not options.table:
        print(text)


def simulated(options: argparse.Namespace) -> Any:
    """One setting's figures, or the table's rows."""
    device = Device(options.tflops * 1e12, options.memory_gb * 1e9)
    network = Network(
        link=options.link_gbit * 1e9 / 8,
        store=options.store_gb * 1e9,
        handling=options.handling,
        writes_behind=options.writes_behind,
        weights_ahead=options.weights_ahead,
    )
    setting = Setting(**{name: getattr(options, name) for name in Setting.__dataclass_fields__})
    assumed = {"device": asdict(device), "network": asdict(network)}
    if not options.table:
        return figures(play(setting, device, network)) | {"setting": asdict(setting), "assumed": assumed}
    rows = table(setting, device, network)
    print(markdown(rows))
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    return {"assumed": assumed, "rows": rows}


if __name__ == "__main__":
    main()
