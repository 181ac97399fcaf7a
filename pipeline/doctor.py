"""`lsi doctor`: whether this machine and a configuration are fit for a run, before one is begun; builds ahead what is compiled.

Every check is a function that returns what it found and never raises. It speaks for the machine it runs on: run it on those
of the workers, too.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from cluster.session import ray_session
from cluster.units import ClusterError
from cluster.versions import here
from pipeline import deepspeed_ops, finetune_plan
from pipeline.config import RunConfig
from pipeline.config_sections import DataConfig
from pipeline.container import container_limit
from pipeline.data import evaluation_data, read_beginning
from pipeline.errors import UserError
from pipeline.model_source import locate, open_model
from pipeline.packed_source import open_packed
from pipeline.prepare import check_engine, checked_skeleton
from pipeline.store import Store, clean_options, open_store

State = Literal["ok", "note", "failed"]
PACKAGES = ("torch", "ray", "transformers", "deepspeed", "compressed-tensors")
GIB = 2**30
# Ray's session and a converted file's parts go there.
SCRATCH_BYTES = 2 * GIB


@dataclass(frozen=True)
class Check:
    """One finding. note: worth knowing, and no obstacle. remedy: what to do, where there is something."""

    name: str
    finding: str
    state: State = "ok"
    remedy: str = ""


def examine(config: RunConfig | None, *, build: bool, say: Callable[[str], None]) -> list[Check]:
    """All checks, on this machine and, with a configuration, on all that it names."""
    checks = [*versions(config), *devices(config), memory(), scratch(Path(tempfile.gettempdir()), SCRATCH_BYTES)]
    checks += [bfloat16(), *tools(), *locks(build), cpu_adam(config, build, say), shm_comm()]
    if config is not None:
        checks += [storage(config), model(config), *texts(config), *cluster(config)]
    return [without_secrets(check, config) for check in checks]


def without_secrets(check: Check, config: RunConfig | None) -> Check:
    """What a backend or an address may repeat: credentials in URLs, fsspec options, secrets of the environment."""

    def clean(text: str) -> str:
        text = re.sub(r"//[^/@\s]+@", "//***@", text)
        if config is not None:
            text = clean_options(text, config.storage.options)
        for name, value in os.environ.items():
            if len(value) >= 8 and re.search("SECRET|TOKEN|PASSWORD|KEY", name):
                text = text.replace(value, "***")
        return text

    return replace(check, finding=clean(check.finding), remedy=clean(check.remedy))


def usable(checks: Iterable[Check]) -> bool:
    """Whether nothing that is required failed."""
    return all(check.state != "failed" for check in checks)


def as_json(checks: list[Check]) -> str:
    """One line."""
    return json.dumps({"usable": usable(checks), "checks": [asdict(check) for check in checks]})


def versions(config: RunConfig | None) -> list[Check]:
    """Python and the packages whose versions decide what a run does."""
    found = here(PACKAGES)
    needless = set() if config and config.compute.engine == "deepspeed" else {"deepspeed"}
    checks = [Check("python", platform.python_version())]
    for name in PACKAGES:
        if found[name] != "missing":
            checks.append(Check(name, found[name]))
        else:
            state: State = "note" if name in needless else "failed"
            checks.append(Check(name, "not installed", state, f"pip install {name}"))
    return checks


def devices(config: RunConfig | None) -> list[Check]:
    """CUDA devices and their free memory."""
    if not torch.cuda.is_available():
        wanted = config is not None and config.compute.device == "cuda" and config.cluster.address is None
        remedy = "set compute.device to cpu, or give cluster.address" if wanted else ""
        return [Check("device", "CPU alone, no CUDA device", "failed" if wanted else "ok", remedy)]
    return [_device(index) for index in range(torch.cuda.device_count())]


def _device(index: int) -> Check:
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # another process has it for itself, or its driver is broken
        return Check(f"device {index}", _first(error), "failed", "see what nvidia-smi says of it")
    name = torch.cuda.get_device_name(index)
    return Check(f"device {index}", f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")


def memory() -> Check:
    """What this process may take of the machine's memory: a container's limit counts."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (int(lines[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        return Check("memory", "cannot be told on this system", "note")
    limit = container_limit()
    within = f", of which this container may have {limit / GIB:.1f}" if limit and limit < total else ""
    return Check("memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free{within}")


def scratch(folder: Path, needed: int) -> Check:
    """A directory for what is written and thrown away."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check("scratch", f"{folder} is no writable directory", "failed", "make it, or set TMPDIR to another")
    free = shutil.disk_usage(folder).free
    finding = f"{folder}, {free / GIB:.1f} GiB free"
    if free < needed:
        remedy = f"free {(needed - free) / GIB:.1f} GiB there, or set TMPDIR to another disk"
        return Check("scratch", f"{finding}, {needed / GIB:.1f} needed", "failed", remedy)
    return Check("scratch", finding)


def bfloat16() -> Check:
    """Whether the processor multiplies bfloat16 itself: what compute.dtype auto goes by."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Check(
            "bfloat16", "native on the CUDA device" if native else "emulated on the CUDA device", _noted(native)
        )
    amx, avx = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    if amx or avx:
        return Check("bfloat16", f"native ({'AMX' if amx else 'AVX512'})")
    return Check("bfloat16", "not native: compute.dtype auto means float32", "note")


def _noted(fine: bool) -> State:
    return "ok" if fine else "note"


def tools() -> list[Check]:
    """What compiling needs."""
    missing = deepspeed_ops.missing_tools()
    remedy = "needed by --build alone: install a C++ compiler (g++) and ninja (pip install ninja)" if missing else ""
    found = f"no {' and no '.join(missing)}" if missing else "C++ compiler and ninja found"
    checks = [Check("compiler", found, _noted(not missing), remedy)]
    if torch.version.cuda and not shutil.which("nvcc"):
        checks.append(Check("nvcc", "not found", "note", "only DeepSpeed's CUDA operators need it, and none is used"))
    return checks


def locks(build: bool) -> list[Check]:
    """Locks that killed compilations left; removed when building."""
    removed = (
        [Check("extension lock", f"removed {path}") for path in deepspeed_ops.remove_stale_locks()] if build else []
    )
    left = [Check("extension lock", *_told(lock)) for lock in deepspeed_ops.locks()]
    return removed + left or [Check("extension lock", "none left in the cache")]


def _told(lock: deepspeed_ops.Lock) -> tuple[str, State, str]:
    finding, _, remedy = lock.sentence().partition("; ")
    return finding, "note", remedy


def cpu_adam(config: RunConfig | None, build: bool, say: Callable[[str], None]) -> Check:
    """DeepSpeed's AdamW for host memory; compiled here if asked for."""
    name: deepspeed_ops.Op = "cpu_adam"
    if here(["deepspeed"])["deepspeed"] == "missing":
        return Check(name, "deepspeed is not installed", "note")
    if build and not deepspeed_ops.is_built(name):
        say("compiling DeepSpeed's cpu_adam; this takes some minutes")
        try:
            deepspeed_ops.build(name)
        except UserError as error:
            return Check(name, str(error), "failed")
    if deepspeed_ops.is_built(name):
        return Check(name, f"built in {deepspeed_ops.library(name).parent}")
    required = config is not None and config.compute.adam == name
    remedy = "lsi doctor --build" + ("" if required else "; without it torch's AdamW steps in host memory")
    return Check(name, "not built for these versions and this processor", "failed" if required else "note", remedy)


def shm_comm() -> Check:
    """Compiled by DeepSpeed itself at its start, for minutes, unless it is kept from it."""
    return Check("shm_comm", "not used: DeepSpeed is started without it, groups of processes meet through gloo or NCCL")


def storage(config: RunConfig) -> Check:
    """A small object in the run directory: written, read, listed, deleted."""
    try:
        store = open_store(config.storage.run, config.storage.options)
        probe(store)
    except Exception as error:  # each backend raises its own
        finding = f"{config.storage.run}: {_first(error)}"
        return Check(
            "storage.run", finding, "failed", "choose another storage.run, or mend its permissions or credentials"
        )
    return Check("storage.run", f"{store.url}: write, read, list and delete work")


def probe(store: Store) -> None:
    """Raises whatever the storage raises, and OSError where it does not give back what it was given."""
    folder = f"doctor-{secrets.token_hex(4)}"
    key = f"{folder}/probe"
    store.put(key, b"ok")
    try:
        if store.get(key) != b"ok":
            raise OSError("what was written could not be read back")
        if key not in store.list(folder):
            raise OSError("what was written is not listed")
    finally:
        store.delete_all(folder)
    if store.exists(key):
        raise OSError("what was deleted is still there")


def model(config: RunConfig) -> Check:
    """The model's configuration, the headers of its weights, its tokenizer, and whether the run can have of it what it asks."""
    source, options = config.model.source, config.storage.options
    try:
        check_engine(config.compute)
        if source.endswith(".gguf"):
            folder, _, name = os.path.expanduser(source).rpartition("/")
            open_store(folder or ".", options if "://" in source else None).stamp(name)
            return Check("model.source", f"{source}: readable")
        trust = config.model.trust_remote_code
        if config.is_finetune:
            config = finetune_plan.resolve(config)
        open_source = open_packed if config.is_finetune else open_model
        found = open_source(locate(config.model, options), trust_remote_code=trust)
        found.tokenizer(trust_remote_code=trust)
        found.dtype(config.model.dtype)
        checked_skeleton(config, found)
    except FileNotFoundError:
        return Check("model.source", f"{source}: there is no such file", "failed", "correct model.source")
    except Exception as error:
        return Check("model.source", _first(error), "failed", "correct the configuration, or make the model readable")
    return Check(
        "model.source", f"{source}: {found.config.model_type}, {len(found.index)} tensors in {len(found.shards)} files"
    )


def texts(config: RunConfig) -> list[Check]:
    """That the calibration text and every evaluation text can be read; their beginnings alone are."""
    named = {"data.source": config.data} | {
        f"evaluation.texts.{name}": evaluation_data(text, config.evaluation.column)
        for name, text in config.evaluation.texts.items()
    }
    return [_text(name, data) for name, data in named.items()]


def _text(name: str, data: DataConfig) -> Check:
    try:
        empty = not read_beginning(data).strip()
    except UserError as error:
        return Check(name, _first(error), "failed", f"correct {name}, or make it readable")
    return Check(name, f"{data.source}: {'empty' if empty else 'readable'}", "failed" if empty else "ok")


def cluster(config: RunConfig) -> list[Check]:
    """Whether a driver here reaches the cluster of the configuration, and what that has."""
    address = config.cluster.address
    if address is None:
        return []
    import ray

    try:
        with ray_session(address):
            has = ray.cluster_resources()
            nodes = sum(node["Alive"] for node in ray.nodes())
    except ClusterError as error:
        return [Check("cluster.address", _first(error), "failed", "start Ray there, or correct cluster.address")]
    finding = f"{address}: {nodes} nodes, {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs"
    return [Check("cluster.address", finding)]


def _first(error: Exception) -> str:
    """An exception's first line, or its kind."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
