"""What a run has done, read from its storage alone."""

from __future__ import annotations

import json
import time
from typing import Any

from pipeline.artifacts import Artifact, CorruptArtifactError, committed, read_record
from pipeline.config_sections import SchemeConfig
from pipeline.errors import UserError
from pipeline.graph import KINDS, Graph, Node
from pipeline.identity import RUN_FILE, read_json
from pipeline.lease_view import LeaseWatch
from pipeline.progress import stage_of
from pipeline.run import PLAN_FILE
from pipeline.store import Store
from pipeline.watch import FIELDS, read_progress

STAGES = ("inspect", "capture", "optimize", "end_to_end", "evaluate", "merge")


def load_plan(store: Store) -> Graph | None:
    """The graph that the last driver wrote, without its tasks; None if no driver came that far."""
    try:
        plan = json.loads(store.get(PLAN_FILE))
        nodes = [
            Node(n["name"], n["stage"], -1, _no_task, _artifacts(n["reads"]), _artifacts(n["makes"]), ())
            for n in plan["nodes"]
        ]
        return Graph(nodes, list(_artifacts(plan["goals"])))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{store.describe(PLAN_FILE)}: damaged; `lsi quantize` writes it anew") from error


def _artifacts(paths: list[str]) -> tuple[Artifact, ...]:
    return tuple(map(Artifact.parse, paths))


def _no_task(worker: object) -> dict[str, Any]:
    raise NotImplementedError("a plan read back from storage describes units, it cannot run them")


def read_status(store: Store, watch: LeaseWatch | None = None) -> dict[str, Any]:
    """All that `lsi status` shows. Raises UserError if there is no run. Who looks again gives the same `watch`.

    `stages` by name: total, left, running, and where this driver has done units of it: per_minute and seconds_left (about).
    """
    if not store.exists(RUN_FILE):
        raise UserError(f"{store.url}: no run here (no {RUN_FILE}); give the directory that storage.run names")
    progress, graph = read_progress(store), load_plan(store)
    listed = committed(store, KINDS)
    blocks = block_statuses(store, graph, listed) if graph else []
    counts = _planned(graph, listed) if graph else _told(progress)
    left = sum(stage["left"] for stage in counts.values())
    done = graph is not None and not left and store.exists("result.json")
    return {
        "run": store.url,
        "scheme": scheme_words(store),
        "state": "finished" if done else "unfinished" if graph else "weights not inspected yet",
        "driver": driver_status(progress, (watch or LeaseWatch(store)).look()),
        "stages": {stage: count | _pace(progress, stage, count["left"]) for stage, count in counts.items()},
        "workers": [{"name": name, **worker} for name, worker in progress["workers"].items()],
        "failures": progress["failures"],
        "blocks": blocks,
        "blocks_total": sum(a.kind == "quantized" for n in graph.nodes for a in n.makes) if graph else None,
        "flagged_blocks": [block["block"] for block in blocks if block["status"] != "ok"],
        "quarantined": quarantined(store, listed),
        "end_to_end": end_status(store, graph, listed) if graph else None,
        "stored_bytes": sum(listed.values()),
    }


def scheme_words(store: Store) -> str | None:
    """Such as "W3 group 64, asymmetric"; None where the driver died while it wrote its configuration down."""
    recorded = read_json(store, RUN_FILE)
    return SchemeConfig(**recorded["config"]["scheme"]).words if recorded else None


def _planned(graph: Graph, listed: dict[str, int]) -> dict[str, dict[str, int]]:
    left = graph.needed(lambda artifact: artifact.path in listed)
    return {
        stage: {"total": total, "left": sum(n.stage == stage for n in left)}
        for stage in STAGES
        if (total := sum(n.stage == stage for n in graph.nodes))
    }


def _told(progress: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Before there is a plan: what the driver says of the weights."""
    return {stage: {"total": total, "left": total - done} for stage, (done, total) in progress["stages"].items()}


def _pace(progress: dict[str, Any], stage: str, left: int) -> dict[str, Any]:
    """Units that run now, how many are done a minute, and the time left: about, for units differ and stages wait."""
    running = sum(
        worker["unit"] is not None and stage_of(worker["unit"]) == stage for worker in progress["workers"].values()
    )
    spans = _spans(progress, stage)
    if not spans:
        return {"running": running, "per_minute": None, "seconds_left": None}
    busy = sum(ended - started for started, ended in spans)
    whole = max(max(ended for _, ended in spans) - min(started for started, _ in spans), 0.01)
    # A schedule may keep workers waiting: what ran side by side so far says more than their number, which bounds it.
    side_by_side = min(max(busy / whole, 1.0), max(len(progress["workers"]), 1))
    about = left * (busy / len(spans)) / side_by_side
    return {"running": running, "per_minute": round(60 * len(spans) / whole, 2), "seconds_left": round(about, 1)}


def _spans(progress: dict[str, Any], stage: str) -> list[tuple[float, float]]:
    """Start and end of the stage's units that the present driver has seen done."""
    since = (progress["driver"] or {}).get("since", 0.0)
    entries = [dict(zip(FIELDS, entry, strict=True)) for entry in progress["units"]]
    return [(e["started"], e["ended"]) for e in entries if stage_of(e["unit"]) == stage and e["started"] >= since]


def driver_status(progress: dict[str, Any], lease: dict[str, Any] | None) -> dict[str, Any] | None:
    """Who drives, or drove last, by the lease; by what the driver left where nobody holds the run or the lease is torn.

    `state`: alive, held, silent or gone as in `LeaseWatch.look`; ended; or lost, if it neither ended nor holds the lease.
    `last_word_seconds_ago` compares its clock with this one, and decides nothing.
    """
    told = progress["driver"]
    if told is None and lease is None:
        return None
    age = None if told is None else round(max(0.0, time.time() - progress["written"]), 1)
    who = {name: (lease or {}).get(name) or (told or {}).get(name) for name in ("host", "pid")}
    state = lease["state"] if lease else "ended" if progress["end"] else "lost"
    since = (told or {}).get("since")
    end = None if lease else progress["end"]
    return who | {"since": since, "state": state, "end": end, "last_word_seconds_ago": age, "lease": lease}


def block_statuses(store: Store, graph: Graph, listed: dict[str, int]) -> list[dict[str, Any]]:
    """Number, status, kept state, loss and reason of the plan's finished blocks; those with damaged records are left out."""
    paths = [a.path for n in graph.nodes for a in n.makes if a.kind == "quantized" and a.path in listed]
    names = ("block", "status", "kept", "loss", "reason")
    return [{name: meta[name] for name in names} for path in paths if (meta := _meta(store, path))]


def end_status(store: Store, graph: Graph, listed: dict[str, int]) -> dict[str, Any] | None:
    """Losses, status and what was kept of the stage after the blocks; None where it has not ended, or there is none."""
    paths = [a.path for n in graph.nodes for a in n.makes if a.kind == "scaled" and a.path in listed]
    return _meta(store, paths[0]) if paths else None


def quarantined(store: Store, listed: dict[str, int]) -> list[dict[str, Any]]:
    """The decisions on blocks whose training failed for good."""
    found = [_meta(store, path) for path in sorted(listed) if path.startswith("quarantine/")]
    return [meta for meta in found if meta]


def _meta(store: Store, path: str) -> dict[str, Any] | None:
    try:
        record = read_record(store, Artifact.parse(path))
    except CorruptArtifactError:
        return None
    return record.meta if record else None
