"""Whether a run fits the machines that it is given: memory of workers and room for the run directory, before any work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from pipeline.config import RunConfig
from pipeline.container import container_limit
from pipeline.errors import UserError
from pipeline.estimate import human_bytes, lay_out, simulated
from pipeline.memory_plan import DRIVER, GIB, MemoryPlan, worker_peak
from pipeline.plan_choice import Limits, choose, fits, missing, present_engine
from pipeline.plan_shapes import block_shape
from pipeline.reporter import Reporter
from pipeline.skeleton import Skeleton
from pipeline.store import Store


def check_fit(config: RunConfig, skeleton: Skeleton, dtype: torch.dtype, store: Store, report: Reporter) -> None:
    """Refuse what fits nowhere, and say what would fit with other settings. Raises UserError."""
    check_memory(config, skeleton, dtype, report)
    if store.local:
        workers = config.cluster.workers or 1
        needed = simulated(lay_out(config, skeleton, dtype), workers).high_water
        check_room(config.storage.run, float(sum(store.list().values())), needed)


def known_limits(config: RunConfig) -> Limits:
    """What a worker has, as far as it is known here: as configured, or this machine's where the run starts Ray itself."""
    cluster, here = config.cluster, config.cluster.address is None
    memory = cluster.memory_gib * GIB if cluster.memory_gib else machine_memory() - DRIVER if here else None
    on_gpu = config.compute.device == "cuda" and here and torch.cuda.is_available()
    return Limits(memory, float(torch.cuda.mem_get_info()[1]) if on_gpu else None)


def machine_memory() -> float:
    """Of this machine, or of the container that the process is in."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(total, container_limit() or total)


def free_memory(device: str) -> float:
    """What is free of it at this moment, on a device or on this machine."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux
        return machine_memory()
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), machine_memory())


def check_memory(config: RunConfig, skeleton: Skeleton, dtype: torch.dtype, report: Reporter) -> None:
    """Refuse a run of which some unit fits no worker in any way; where the configured way does not, name one that does."""
    limits, shape = known_limits(config), block_shape(skeleton, config, dtype)
    units = MemoryPlan(shape, config, present_engine(config)).units()
    if fits(units, limits):
        if config.cluster.address is None and config.cluster.memory_gib is None:
            warn_of_workers(config, worker_peak(units, "host")[1].total, report)
        return
    place, (stage, peak, short) = next(iter(missing(units, limits).items()))
    settings = "; ".join(f"{line} ({why})" for line, why in choose(shape, config, limits).lines)
    raise UserError(
        f"a unit of stage {stage} needs {peak.total / GIB:.1f} GiB on the {place}, {short / GIB:.1f} GiB more than a worker has; it fits "
        f"with {settings}"
    )


def warn_of_workers(config: RunConfig, peak: float, report: Reporter) -> None:
    """Say so where each process fits this machine, and all of them do not. peak: bytes of one."""
    group, workers, here = config.compute.group, config.cluster.workers or 1, machine_memory()
    needed = workers * group * peak + DRIVER
    if needed <= here:
        return
    fitting = int((here - DRIVER) // peak)
    remedy = (
        f"cluster.workers to {fitting // group}" if fitting >= group else f"compute.group to {max(1, fitting)} or less"
    )
    report.message(
        f"{workers * group} processes of workers and the driver may need {needed / GIB:.1f} GiB together, and this machine has "
        f"{here / GIB:.1f}: set {remedy}"
    )


def check_room(run: str, held: float, high_water: float) -> None:
    """Refuse a run directory on a disk too small for it. held: bytes of the run that are there already. Raises UserError."""
    place = Path(run).expanduser().absolute()
    while not place.exists():
        place = place.parent
    room = shutil.disk_usage(place).free + held
    if room < high_water:
        raise UserError(
            f"storage.run {run}: the run needs {human_bytes(high_water)} at one time and there is room for {human_bytes(room)}, "
            f"{human_bytes(high_water - room)} too little: free some, name a larger disk or an object store, or take fewer samples "
            "(data.samples)"
        )
