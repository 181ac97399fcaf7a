"""Which run a directory belongs to: the recipe, the versions and the weights, checked before anything is added to it.

No block depends on the last stage, so that a directory may see several of those, one after another (`END_FILE`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from lsi import ALGORITHM
from pipeline.config import RunConfig
from pipeline.config_file import differing_keys, parse_config
from pipeline.config_sections import ComputeConfig
from pipeline.deepspeed_ops import is_built
from pipeline.errors import UserError
from pipeline.store import Store

RUN_FILE = "run.json"
MODEL_FILE = "model.json"
# The last stage's section of the last driver's configuration, where it is not the first one's.
END_FILE = "end_to_end.json"


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """A JSON object; None if it is not there or was torn by a crash, and so never counted."""
    try:
        found = json.loads(store.get(key))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Resolved:
    """What `auto` came to. adam: who steps in host memory."""

    autocast: torch.dtype | None
    adam: Literal["torch", "cpu_adam"]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"autocast": str(self.autocast) if self.autocast else None, "adam": self.adam}


def resolve(config: RunConfig, store: Store) -> Resolved:
    """What `auto` once found for a run holds for all its actors and resumptions."""
    recorded = (read_json(store, RUN_FILE) or {}).get("identity", {}).get("resolved", {})
    return Resolved(_autocast(config.compute, recorded), _adam(config, recorded))


def _adam(config: RunConfig, recorded: dict[str, Any]) -> Literal["torch", "cpu_adam"]:
    if config.compute.adam != "auto":
        return config.compute.adam
    if "adam" in recorded:
        return "cpu_adam" if recorded["adam"] == "cpu_adam" else "torch"
    wanted = config.compute.offloads_optimizer and config.optimizer.steps == "adamw"
    return "cpu_adam" if wanted and is_built("cpu_adam") else "torch"


def _autocast(compute: ComputeConfig, recorded: dict[str, Any]) -> torch.dtype | None:
    """The dtype of products in training."""
    if compute.dtype != "auto":
        return torch.bfloat16 if compute.dtype == "bfloat16" else None
    if "autocast" in recorded:
        return torch.bfloat16 if recorded["autocast"] else None
    if compute.device == "cuda":
        # A driver without a device speaks for workers that have one; those multiply bfloat16 since 2020.
        native = not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else None


def packages_of(compute: ComputeConfig) -> tuple[str, ...]:
    """Packages whose versions may change a run's bytes."""
    always = ("torch", "transformers", "compressed-tensors")
    return (*always, "deepspeed") if compute.engine == "deepspeed" else always


def run_identity(config: RunConfig, resolved: Resolved) -> dict[str, Any]:
    """All that decides a run's bytes and is known before the model is read."""
    return {
        "recipe": config.recipe(),
        "resolved": resolved.record(),
        "versions": {name: package_version(name) for name in packages_of(config.compute)} | {"algorithm": ALGORITHM},
    }


def _of_blocks(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without what no block depends on."""
    return identity | {
        "recipe": {key: value for key, value in identity.get("recipe", {}).items() if key != "end_to_end"}
    }


def check_claim(store: Store, config: RunConfig, resolved: Resolved) -> None:
    """Refuse a run directory that belongs to another run, naming every key that differs."""
    recorded = read_json(store, RUN_FILE)
    if recorded is None:
        return
    differing = differing_keys(_of_blocks(run_identity(config, resolved)), _of_blocks(recorded.get("identity", {})))
    if differing:
        raise UserError(
            f"{store.url} belongs to another run: {'; '.join(d.removeprefix('recipe.') for d in differing)}. "
            "Choose another storage.run, or go back to that config"
        )


def claim(store: Store, config: RunConfig, resolved: Resolved) -> None:
    """Make the directory this run's; done when every check has passed, so that a refused config claims nothing.

    Written once: a driver that dies while it rewrote the file would leave a torn one.
    """
    if read_json(store, RUN_FILE) is not None:
        return
    whole = config.model_dump(mode="json")
    whole["storage"].pop("options")
    record = {"identity": run_identity(config, resolved), "config": whole}
    store.put(RUN_FILE, json.dumps(record, indent=1, sort_keys=True).encode())


def record_end(store: Store, config: RunConfig) -> None:
    """Let the directory tell of this last stage from now on. The driver's to call, who holds the lease."""
    present = config.end_to_end.model_dump(mode="json")
    if present != recorded_tree(store)["end_to_end"]:
        store.put(END_FILE, json.dumps(present, indent=1, sort_keys=True).encode())


def recorded_tree(store: Store) -> dict[str, Any]:
    """The configuration that a run directory was made with, and the last stage that it saw last. Raises UserError if it is none."""
    recorded = read_json(store, RUN_FILE)
    if recorded is None or "config" not in recorded:
        raise UserError(f"{store.url}: no run here (no {RUN_FILE}); give the directory that storage.run names")
    tree: dict[str, Any] = recorded["config"]
    return tree | {"end_to_end": read_json(store, END_FILE) or tree.get("end_to_end", {})}


def recorded_config(store: Store, options: dict[str, Any]) -> RunConfig:
    """`recorded_tree`, checked, with the storage options that are not recorded."""
    tree = recorded_tree(store)
    tree["storage"]["options"] = options
    return parse_config(tree, store.describe(RUN_FILE))


def claim_model(store: Store, digests: dict[str, str]) -> None:
    """Check that the weights are those that the run began with. Raises UserError naming the parts that differ."""
    theirs = read_json(store, MODEL_FILE)
    if theirs is None:
        store.check_fence()
        store.put(MODEL_FILE, json.dumps(digests, indent=1, sort_keys=True).encode())
        return
    if differing := [name for name in digests if theirs.get(name) != digests[name]]:
        raise UserError(
            f"{store.url} belongs to another model: the weights of {', '.join(differing[:5])}"
            f"{' and others' if len(differing) > 5 else ''} are not those that this run began with. Choose another storage.run"
        )
