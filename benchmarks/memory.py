"""Peak resident memory of the driver and the actors against the number of blocks and of calibration samples.

    python benchmarks/memory.py --json benchmarks/results/memory.json

SmolLM2-135M's first 2 and 8 blocks, 32 and 128 samples of 256 tokens, one epoch, the activation cache small enough to be full
in every run. What must not grow is what a process holds; each run is a fresh set of processes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.gguf_import import import_gguf
from pipeline.sample_material import MODEL_FILE
from pipeline.store import open_store

ASSETS = Path(__file__).parent.parent / "assets"
CASES = [(2, 32), (8, 32), (2, 128), (8, 128)]


def first_blocks(model: Path, blocks: int, folder: Path) -> Path:
    """The model with fewer blocks: another configuration over the same shards."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": blocks}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure(model: Path, samples: int, run: Path) -> dict[str, Any]:
    """One run's result."""
    config = {
        "model": {"source": str(model)},
        "data": {"source": str(ASSETS / "wikipedia-calibration.txt"), "samples": samples, "sequence_length": 256},
        "scheme": {"bits": 3, "group_size": 64},
        "method": {"increment": "dense"},
        "optimizer": {"epochs": 1},
        "cluster": {"workers": 2},
        "storage": {"run": str(run), "cache_mib": 4},
    }
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    subprocess.run([sys.executable, "-m", "pipeline.cli", "quantize", str(path)], check=True, stdout=subprocess.DEVNULL)
    return json.loads((run / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        import_gguf(str(ASSETS / MODEL_FILE), {}, open_store(str(model)), torch.bfloat16)
        for blocks, samples in CASES:
            name = f"{blocks}-blocks-{samples}-samples"
            cut = first_blocks(model, blocks, Path(scratch) / f"model-{name}")
            peaks = measure(cut, samples, Path(scratch) / name)["peak_rss_mib"]
            rows.append({"blocks": blocks, "samples": samples, "peak_rss_mib": peaks})
            print(f"{blocks} blocks, {samples:>3} samples: " + ", ".join(f"{k} {v:.0f} MiB" for k, v in peaks.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
