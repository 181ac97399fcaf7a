"""DeepSpeed's compiled operators: built ahead by `lsi doctor --build`, loaded as they were built, never compiled by a worker.

A compilation takes minutes, and one that is killed leaves a lock that every later load waits for, for ever. So a worker starts
DeepSpeed without any operator, and whatever in it would compile one raises instead. What the doctor has built is loaded
as the file it is, without the loader that checks, locks and compiles.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ExtensionFileLoader
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NoReturn

from pipeline.errors import UserError

Op = Literal["cpu_adam"]
BUILDERS: dict[Op, str] = {"cpu_adam": "CPUAdamBuilder"}
STAMP = "lsi-built.json"
LOCK = "lock"


def extensions_root() -> Path:
    """Where torch keeps compiled extensions, one folder each."""
    import torch
    from torch.utils import cpp_extension

    if found := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(found)
    cuda, hip = torch.version.cuda, torch.version.hip
    accelerator = f"rocm{hip.replace('.', '')}" if hip else f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    abi = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(cpp_extension.get_default_build_root()) / f"{abi}_{accelerator}"


def stamp() -> dict[str, str]:
    """All that a compiled operator fits: versions, and the processor that it was compiled for."""
    found = {"python": platform.python_version(), "processor": _processor()}
    for package in ("torch", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _processor() -> str:
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))
        )
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:12]}"


def library(op: Op) -> Path:
    """The operator's compiled file."""
    return extensions_root() / op / f"{op}.so"


def is_built(op: Op) -> bool:
    """Whether the doctor has built it here, with these versions."""
    file = library(op)
    try:
        return file.exists() and json.loads((file.parent / STAMP).read_text()) == stamp()
    except (OSError, ValueError):
        return False


def missing_tools() -> list[str]:
    """What compiling needs and PATH does not have."""
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    have_compiler = shutil.which(compiler) or shutil.which("g++")
    beside_python = Path(sys.executable).parent / "ninja"
    return [
        *([] if have_compiler else ["g++"]),
        *([] if shutil.which("ninja") or beside_python.exists() else ["ninja"]),
    ]


def build(op: Op) -> None:
    """Compile an operator, minutes long. Raises UserError where a tool is missing or the compiler fails."""
    import torch

    if missing := missing_tools():
        raise UserError(
            f"compiling {op} needs {' and '.join(missing)}, not found on PATH: install a C++ compiler (such as the package g++) and "
            "ninja (pip install ninja), or leave it unbuilt: torch's own AdamW then steps in its place"
        )
    if lock := next((lock for lock in locks() if lock.folder == op), None):
        raise UserError(lock.sentence())
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Or it says on standard output which one it has found.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    deepspeed = quiet_deepspeed()
    builder = getattr(deepspeed.ops.op_builder, BUILDERS[op])()
    try:
        builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"compiling {op} failed ({reason}); torch's own AdamW steps in its place") from error
    (library(op).parent / STAMP).write_text(json.dumps(stamp()))


@dataclass(frozen=True)
class Lock:
    """A lock in the extensions cache, and the processes of this machine that hold it."""

    path: Path
    holders: tuple[int, ...]

    @property
    def folder(self) -> str:
        """The extension's name."""
        return self.path.parent.name

    def sentence(self) -> str:
        """What it is, and what to do."""
        if self.holders:
            return f"{self.path} is held by process {self.holders[0]}, which compiles {self.folder}: wait for it to end"
        return (
            f"{self.path} is held by no process of this machine: a compilation that was killed left it, and every load of "
            f"{self.folder} waits for it; remove it with `lsi doctor --build`"
        )


def locks() -> list[Lock]:
    """All locks in the extensions cache."""
    return [Lock(path, tuple(holders(path))) for path in sorted(extensions_root().glob(f"*/{LOCK}"))]


def holders(path: Path) -> Iterator[int]:
    """Processes that have the file open, as far as this user may see. Whoever compiles keeps its lock open."""
    wanted = os.path.realpath(path)
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(entry) == wanted:
                yield int(entry.parts[2])
        except OSError:  # it has ended, or is another user's
            continue


def remove_stale_locks() -> list[Path]:
    """Remove the locks that nobody holds."""
    stale = [lock.path for lock in locks() if not lock.holders]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def quiet_deepspeed() -> Any:
    """The package, without its messages on standard output. Raises UserError if it is not installed."""
    try:
        import deepspeed
        import deepspeed.ops.op_builder
    except ImportError as error:
        raise UserError(
            f"compute.engine is deepspeed, but it cannot be imported here ({error}): install it (pip install deepspeed), "
            "or set compute.engine to torch"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by the names that torch has renamed, thousands of times.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    return deepspeed


def start_deepspeed(device: str) -> Any:
    """The package, ready in this process alone or in the group that it has joined (`pipeline.members`): no launcher, nothing else
    reached over a network, nothing compiled.

    Once a process; what another call finds is left as it is.
    """
    import torch.distributed as dist

    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Read when the package is imported, and when an engine is made. Every process sees its own GPU as the first.
    os.environ["DS_ACCELERATOR"] = device
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ["LOCAL_SIZE"] = "1"  # or it asks a subprocess for the machine's NUMA nodes at every step
    deepspeed = quiet_deepspeed()
    if not dist.is_initialized():
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        # A store in this process: there is nobody to meet.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    from deepspeed.ops.op_builder.builder import OpBuilder

    OpBuilder.jit_load = _refuse
    # It speeds up a group of processes on one machine; asked for here, it would be compiled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo")
    return deepspeed


def _refuse(builder: Any, verbose: bool = True) -> NoReturn:
    raise UserError(
        f"DeepSpeed asks for its operator {builder.name}, and a worker compiles nothing: run `lsi doctor --build` on this machine"
    )


def load_cpu_adam() -> None:
    """Hand DeepSpeed the cpu_adam that was built ahead. Raises UserError where it was not."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    if "cpu_adam" in OpBuilder._loaded_ops:
        return
    if not is_built("cpu_adam"):
        raise UserError(
            f"this run steps with cpu_adam, which is not built on {platform.node()} for its versions and processor: "
            "run `lsi doctor --build` there, or set compute.adam to torch in a new storage.run"
        )
    loader = ExtensionFileLoader("cpu_adam", str(library("cpu_adam")))
    spec = importlib.util.spec_from_loader("cpu_adam", loader)
    assert spec is not None
    OpBuilder._loaded_ops["cpu_adam"] = importlib.util.module_from_spec(spec)
    loader.exec_module(OpBuilder._loaded_ops["cpu_adam"])
