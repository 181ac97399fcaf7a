"""Does a machine that joins in mid-run shorten the run?

    python benchmarks/elastic.py --json OUT

A cluster of nodes with one CPU each on loopback, `lsi quantize` with `cluster.workers: null` on a fresh run directory each time:
with one node all along, with a second one that joins after `--after` commits, and with two from the beginning. The checkpoints
must be equal. Writes `{"seconds": {...}, "workers": {...}, "identical"}`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # nodes on 127.0.0.1 keep that address

from arena import ROOT, Trial, hashes, new_trial, tiny_model, tree_for
from ray.cluster_utils import Cluster

from cluster.session import _loopback
from pipeline.store import open_store

NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False}
WORK = {
    "cluster.workers": None,
    "data.samples": 320,
    "data.sequence_length": 128,
    "optimizer.epochs": 4,
    "storage.chunk_samples": 16,
}
NEWS = ROOT / "assets" / "news.txt"


def run(folder: Path, model: Path, nodes: int, then: Callable[[Any, Trial, Any], None]) -> dict[str, Any]:
    """One run from the command's start to its end; `then` is called once the driver is under way."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        for _ in range(nodes - 1):
            with _loopback():
                cluster.add_node(**NODE)
        tree = tree_for(model, NEWS, str(folder / "run"), WORK | {"cluster.address": cluster.address})
        trial = new_trial(0, folder.name, folder, str(folder / "run"), tree, {}, seed=0)
        began = time.monotonic()
        driver = trial.start()
        then(cluster, trial, driver)
        code = trial.wait(driver, 600)
        seconds = time.monotonic() - began
        trial.end()
    finally:
        cluster.shutdown()
    if code:
        raise SystemExit(f"{folder.name} ended with {code}; its log is in {folder}")
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    workers = {unit["worker"] for unit in manifest["timeline"]}
    checkpoint = hashes(open_store(str(folder / "run" / "checkpoint")))
    return {"seconds": round(seconds, 1), "workers": len(workers), "checkpoint": checkpoint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--after", type=int, default=40, help="commits before the second node joins")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    def join(cluster: Any, trial: Trial, driver: Any) -> None:
        trial.wait_for_commits(options.after, driver)
        with _loopback():
            cluster.add_node(**NODE)

    def nothing(cluster: Any, trial: Trial, driver: Any) -> None: ...

    ways = {"one_node": (1, nothing), "second_joins": (1, join), "two_nodes": (2, nothing)}
    with tempfile.TemporaryDirectory(prefix="elastic-") as scratch:
        model = tiny_model(Path(scratch) / "model", blocks=6)
        found = {name: run(Path(scratch) / name, model, nodes, then) for name, (nodes, then) in ways.items()}
    result = {
        "seconds": {name: one["seconds"] for name, one in found.items()},
        "workers": {name: one["workers"] for name, one in found.items()},
        "identical": len({json.dumps(one["checkpoint"], sort_keys=True) for one in found.values()}) == 1,
    }
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
