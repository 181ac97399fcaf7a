"""Which run a directory belongs to: the recipe, the versions and the weights, checked before anything is added to it."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lsi import ALGORITHM
from pipeline.config import ComputeConfig, RunConfig, differing_keys, parse_config
from pipeline.errors import UserError
from pipeline.store import Store

RUN_FILE = "run.json"
MODEL_FILE = "model.json"


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def autocast_dtype(compute: ComputeConfig) -> torch.dtype | None:
    """The dtype of products in training; `auto` asks this machine, and what it says holds for all actors."""
    if compute.dtype == "float32":
        return None
    if compute.dtype == "bfloat16":
        return torch.bfloat16
    native = torch.cuda.is_bf16_supported() if compute.device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else None


def run_identity(config: RunConfig, autocast: torch.dtype | None) -> dict[str, Any]:
    """All that decides a run's bytes and is known before the model is read."""
    return {
        "recipe": config.recipe(),
        "resolved": {"autocast": str(autocast) if autocast else None},
        "versions": {name: package_version(name) for name in ("torch", "transformers", "compressed-tensors")}
        | {"algorithm": ALGORITHM},
    }


def check_claim(store: Store, config: RunConfig, autocast: torch.dtype | None) -> None:
    """Refuse a run directory that belongs to another run, naming every key that differs."""
    identity = run_identity(config, autocast)
    try:
        theirs = json.loads(store.get(RUN_FILE))["identity"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{store.describe(RUN_FILE)}: damaged ({error}); choose another storage.run, or delete this file if its config is this one"
        ) from error
    differing = differing_keys(json.loads(json.dumps(identity)), theirs)
    if differing:
        raise UserError(
            f"{store.url} belongs to another run: {'; '.join(d.removeprefix('recipe.') for d in differing)}. "
            "Choose another storage.run, or go back to that config"
        )


def claim(store: Store, config: RunConfig, autocast: torch.dtype | None) -> None:
    """Make the directory this run's; done when every check has passed, so that a refused config claims nothing.

    Written once: a driver that dies while it rewrote the file would leave a torn one.
    """
    if store.exists(RUN_FILE):
        return
    whole = config.model_dump(mode="json")
    whole["storage"].pop("options")
    record = {"identity": run_identity(config, autocast), "config": whole}
    store.put(RUN_FILE, json.dumps(record, indent=1, sort_keys=True).encode())


def recorded_config(store: Store, options: dict[str, Any]) -> RunConfig:
    """The configuration that a run directory was made with. Raises UserError if it is none."""
    try:
        tree = json.loads(store.get(RUN_FILE))["config"]
    except FileNotFoundError as error:
        raise UserError(
            f"{store.url}: no run here (no {RUN_FILE}); give the directory that storage.run names"
        ) from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{store.describe(RUN_FILE)}: damaged: {error}") from error
    tree["storage"]["options"] = options
    return parse_config(tree, store.describe(RUN_FILE))


def claim_model(store: Store, digests: dict[str, str]) -> None:
    """Check that the weights are those that the run began with. Raises UserError naming the parts that differ."""
    try:
        theirs = json.loads(store.get(MODEL_FILE))
    except FileNotFoundError:
        store.put(MODEL_FILE, json.dumps(digests, indent=1, sort_keys=True).encode())
        return
    if differing := [name for name in digests if theirs.get(name) != digests[name]]:
        raise UserError(
            f"{store.url} belongs to another model: the weights of {', '.join(differing[:5])}"
            f"{' and others' if len(differing) > 5 else ''} are not those that this run began with. Choose another storage.run"
        )
