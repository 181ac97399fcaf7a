"""What a run has done, read from its storage alone."""

from __future__ import annotations

import json
from typing import Any

from pipeline.artifacts import Artifact, CorruptArtifactError, committed, read_record
from pipeline.errors import UserError
from pipeline.graph import KINDS, Graph, Node
from pipeline.identity import RUN_FILE
from pipeline.run import PLAN_FILE
from pipeline.store import Store


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


def read_status(store: Store) -> dict[str, Any]:
    """Per stage what is done and left, block results, and whether the checkpoint is there. Raises UserError if there is no run."""
    if not store.exists(RUN_FILE):
        raise UserError(f"{store.url}: no run here (no {RUN_FILE}); give the directory that storage.run names")
    graph = load_plan(store)
    if graph is None:
        return {"run": store.url, "state": "weights not inspected yet", "stages": {}, "blocks": []}
    listed = committed(store, KINDS)
    left = graph.needed(lambda artifact: artifact.path in listed)
    stages = {
        stage: {"total": total, "left": sum(n.stage == stage for n in left)}
        for stage in ("capture", "optimize", "evaluate", "merge")
        if (total := sum(n.stage == stage for n in graph.nodes))
    }
    blocks = [
        block_status(store, a) for n in graph.nodes for a in n.makes if a.kind == "quantized" and a.path in listed
    ]
    state = "finished" if not left and store.exists("result.json") else "unfinished"
    return {
        "run": store.url,
        "state": state,
        "stages": stages,
        "blocks": [block for block in blocks if block],
        "stored_bytes": sum(listed.values()),
    }


def block_status(store: Store, artifact: Artifact) -> dict[str, Any] | None:
    """Number, status, kept state and loss of a finished block; None if its record is damaged."""
    try:
        record = read_record(store, artifact)
    except CorruptArtifactError:
        record = None
    return {k: record.meta[k] for k in ("block", "status", "kept", "loss")} if record else None


def status_lines(found: dict[str, Any]) -> list[str]:
    """For a person."""
    lines = [f"{found['run']}: {found['state']}"]
    for stage, counts in found["stages"].items():
        done = counts["total"] - counts["left"]
        lines.append(
            f"  {stage:<10} {done:>5} of {counts['total']} done"
            + (f", {counts['left']} left" if counts["left"] else "")
        )
    for block in found["blocks"]:
        loss = "" if block["loss"] is None else f"  loss {block['loss']:.4e}"
        odd = "" if block["status"] == "ok" else f"  {block['status'].upper()}"
        lines.append(f"  block {block['block']:>3}  kept: {block['kept']}{loss}{odd}")
    return lines
