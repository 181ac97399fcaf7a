"""Whether two processes run the same software: pickles and sums differ between versions in ways that nobody sees."""

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping

from cluster.units import UnitError


def here(packages: Iterable[str]) -> dict[str, str]:
    """This process's Python and the versions of installed packages, "missing" for those that are not."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python} | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package).partition("+")[0]  # what follows names the build: cpu or cu128
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def differing(driver: Mapping[str, str], worker: Mapping[str, str]) -> list[str]:
    """Those that differ, as `torch 2.13.0 here, 2.12.0 there`."""
    there = {name: worker.get(name, "missing") for name in driver}
    return [f"{name} {driver[name]} here, {there[name]} there" for name in driver if driver[name] != there[name]]


def check_same(driver: Mapping[str, str], where: str) -> None:
    """Raises a fatal UnitError if this process's versions are not the driver's."""
    worker = here(name for name in driver if name != "python")
    if found := differing(driver, worker):
        raise UnitError(
            "fatal", f"driver and worker on {where} differ ({'; '.join(found)}); install the same versions on both."
        )
