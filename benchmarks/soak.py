"""Scheduled runs one after another on one Ray cluster: does anything stay behind?

    python benchmarks/soak.py --runs 20 --json OUT

A cluster of one node on loopback lives through all of it. Every run is the command as a schedule would give it, in a process of
its own: mostly the same configuration on the same run directory, every fourth time a changed one on a new directory. After each
run are counted: processes below the cluster that are not idle Ray workers, and processes of the command's session; live actors by
the cluster's own list; files in the run directories and in the runs' temporary directory; open leases; the resident memory of
the cluster's servers. `left_behind` names what there is more of after the last run than after the second (the first ones fill
caches): it must be empty.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # nodes on 127.0.0.1 keep that address

import psutil
import yaml
from arena import ROOT, family, is_actor, tiny_model, tree_for, until
from ray.cluster_utils import Cluster

from pipeline.graph import TRANSIENT
from pipeline.store import open_store

NEWS = ROOT / "assets" / "news.txt"
SERVERS = ("raylet", "gcs_server")
GROWTH = 1.2  # of memory between the second and the last count: allocators keep some


def command(config: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(config.parent / "tmp")}
    program = [sys.executable, "-m", "pipeline.cli", "quantize", str(config)]
    with log.open("ab") as sink:
        return subprocess.Popen(program, stdout=sink, stderr=sink, start_new_session=True, env=environment)


def of_session(session: int) -> list[psutil.Process]:
    """Processes of a session, whoever their parents are by now."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getsid(process.pid) == session:
                found.append(process)
    return found


def servers(cluster: Any) -> list[psutil.Process]:
    """The cluster's own processes."""
    return [psutil.Process(one.process.pid) for kind in cluster.head_node.all_processes.values() for one in kind]


def busy(cluster: Any) -> list[psutil.Process]:
    """Ray workers that are somebody's actor or task."""
    below = [p for server in servers(cluster) for p in family(server.pid)]
    return [process for process in below if is_actor(process)]


def count(cluster: Any, session: int, folder: Path) -> dict[str, Any]:
    """What there is after a run."""
    actors = [a for a in cluster.global_state.actor_table(None).values() if a["State"] != "DEAD"]
    memory = dict.fromkeys(SERVERS, 0.0)
    for server in servers(cluster):
        with suppress(psutil.Error):
            if server.name() in memory:
                memory[server.name()] += server.memory_info().rss / 2**20
    runs = [open_store(str(path)) for path in sorted(folder.glob("run-*")) if path.is_dir()]
    return {
        "session_processes": len(of_session(session)),
        "busy_workers": len(busy(cluster)),
        "live_actors": len(actors),
        "transient_files": sum(len(run.list(kind)) for run in runs for kind in TRANSIENT),
        "open_leases": sum(_open_leases(run.list("driver")) for run in runs),
        "files_a_run": round(sum(len(run.list()) for run in runs) / max(1, len(runs)), 2),
        "temporary_entries": len(os.listdir(folder / "tmp")),
        **{f"{name}_mib": round(size, 1) for name, size in memory.items()},
    }


def _open_leases(keys: dict[str, int]) -> int:
    """Terms that were begun and not ended."""
    begun = {key.rpartition(".")[0] for key in keys if key.endswith(".json")}
    return len(begun - {key.rpartition(".")[0] for key in keys if key.endswith(".end")})


def one_run(cluster: Any, number: int, folder: Path) -> dict[str, Any]:
    """One scheduled run, and what there is after it."""
    changed = number % 4 == 3
    run = folder / f"run-{number if changed else 0}"
    extra = {"cluster.address": cluster.address, "optimizer.epochs": 1, "optimizer.seed": number if changed else 0}
    tree = tree_for(folder / "model", folder / "text.txt", str(run), extra)
    if not changed and number:
        # What a schedule meets: some results have to be made again.
        open_store(str(run)).delete_all("quantized")
        open_store(str(run)).delete_all("shard")
    config = folder / f"config-{number}.yaml"
    config.write_text(yaml.safe_dump(tree))
    began = time.monotonic()
    process = command(config, folder / "runs.log")
    peak = 0.0
    while process.poll() is None:
        with suppress(psutil.Error):
            peak = max(peak, psutil.Process(process.pid).memory_info().rss / 2**20)
        time.sleep(0.2)
    with suppress(TimeoutError):  # what is still there after it is the finding
        until(lambda: not of_session(process.pid) and not busy(cluster), 20, "the run's processes have ended")
    seconds = round(time.monotonic() - began, 1)
    found = count(cluster, process.pid, folder)
    return {"run": number, "exit": process.returncode, "seconds": seconds, "driver_mib": round(peak, 1), **found}


def left_behind(rows: list[dict[str, Any]]) -> list[str]:
    """What there is more of at the end than after the second run."""
    early, late = rows[min(1, len(rows) - 1)], rows[-1]
    counts = ("session_processes", "busy_workers", "live_actors", "transient_files", "open_leases", "temporary_entries")
    found = [f"{name}: {early[name]} then {late[name]}" for name in counts if late[name] > early[name]]
    found += [f"{name}: {late[name]}" for name in ("session_processes", "live_actors", "open_leases") if late[name]]
    memory = [name for name in late if name.endswith("_mib")]
    return found + [f"{name}: {early[name]} then {late[name]}" for name in memory if late[name] > GROWTH * early[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder = Path(scratch)
        (folder / "tmp").mkdir()
        tiny_model(folder / "model")
        (folder / "text.txt").write_text(NEWS.read_text()[:20_000])
        node = {"num_cpus": 2, "node_ip_address": "127.0.0.1", "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        try:
            for number in range(options.runs):
                rows.append(one_run(cluster, number, folder))
                print(json.dumps(rows[-1]), flush=True)
        finally:
            cluster.shutdown()
        log = (folder / "runs.log").read_text()
    failed = [row["run"] for row in rows if row["exit"]]
    found = {"runs": len(rows), "failed": failed, "left_behind": left_behind(rows), "rows": rows}
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}))
    if failed:
        print(log[-4000:])


if __name__ == "__main__":
    main()
