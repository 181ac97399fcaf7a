"""Seeded trials of runs that are killed, paused, cut off and damaged, on real Ray processes and real storage.

    python benchmarks/chaos.py --trials 50 --seed 0 --json OUT [--only FAULT]

Each trial runs `lsi quantize` on a tiny model in a fresh run directory (every second one on an S3 server on loopback), lets one
fault strike after a seeded number of commits, gives the same command again until it is done, and compares the checkpoint with
that of an undisturbed run, byte for byte. Outcomes are appended to OUT.trials.jsonl as they come: a run that was stopped goes on.

`units_lost`: results that the plan names and storage does not hold at the end. `committed_units_redone`: artifacts whose commit
record was written again though nothing had damaged it; `remade_after_damage` counts those of the trials that damage storage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before ray is imported, here and in every driver: nodes on 127.0.0.1 keep that address.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

import yaml
from arena import (
    BUCKET,
    ROOT,
    Trial,
    has_key,
    hashes,
    new_trial,
    s3_environment,
    s3_server,
    tiny_model,
    tree_for,
    undisturbed,
)
from faults import FAULTS, Fault

FEWEST, MOST = 8, 48  # commits before the fault; an undisturbed run makes about 55
RERUNS = 5
NEWS = ROOT / "assets" / "news.txt"


@dataclass(frozen=True)
class Outcome:
    """What became of one trial. `reason` is empty for a good one."""

    number: int
    fault: str
    storage: str
    struck_after: int
    exits: list[int]
    identical: bool
    lost: int
    redone: int
    seconds: float
    reason: str
    folder: str


class Arena:
    """The model, the text and the undisturbed checkpoint that all trials share."""

    def __init__(self, folder: Path, seed: int, ports: tuple[int, int]) -> None:
        self.folder, self.seed, self.ports = folder, seed, ports
        self.text = folder / "text.txt"
        self.text.write_text(NEWS.read_text()[:20_000])
        self.model = tiny_model(folder / "model")
        self.reference = undisturbed(self.model, self.text, folder / "reference")

    def run(self, number: int, name: str, storage: str) -> Outcome:
        """One trial, whatever happens."""
        began, fault = time.monotonic(), FAULTS[name]
        trial, tree = self._prepare(number, name, storage, fault)
        after, exits, reason = trial.draw.randint(FEWEST, MOST), [], ""
        try:
            with fault.setting(trial, tree):
                trial.config.write_text(yaml.safe_dump(tree))
                exits = self._run(trial, fault, after)
                reason = self._judge(trial, exits)
        except Exception as error:  # a trial that fails is a finding, and the others go on
            reason = f"{type(error).__name__}: {error}"
        finally:
            trial.end()
        redone = trial.redone()
        (trial.folder / "redone.json").write_text(json.dumps(redone))
        outcome = Outcome(
            number, name, storage, after, exits, not reason, self._lost(trial), len(redone),
            round(time.monotonic() - began, 1), reason, str(trial.folder),
        )  # fmt: skip
        self._clear(trial, keep=bool(reason))
        return outcome

    def _prepare(self, number: int, name: str, storage: str, fault: Fault) -> tuple[Trial, dict[str, Any]]:
        folder = self.folder / f"trial-{number:03d}-{name}-{time.time_ns()}"
        run = f"s3://{BUCKET}/{folder.name}" if storage == "s3" else str(folder / "run")
        tree = tree_for(self.model, self.text, run, dict(fault.extra))
        environment = s3_environment(self.ports[fault.faulty_door]) if storage == "s3" else {}
        return new_trial(number, name, folder, run, tree, environment, self.seed), tree

    def _run(self, trial: Trial, fault: Fault, after: int) -> list[int]:
        """The exit codes of all drivers, the last being that of a run that is done."""
        driver = trial.start()
        trial.wait_for_commits(after, driver)
        driver = fault.strike(trial, driver)
        trial.wait(driver)
        for _ in range(RERUNS):
            if driver.returncode == 0:
                break
            driver = trial.start()
            trial.wait(driver)
        return [one.returncode for one in trial.drivers]

    def _judge(self, trial: Trial, exits: list[int]) -> str:
        if 0 not in exits:
            return f"not done after {len(exits)} runs"
        found = hashes(trial.store.child("checkpoint"))
        differing = sorted(k for k in {*found, *self.reference} if found.get(k) != self.reference.get(k))
        return f"differing files: {', '.join(differing)}" if differing else ""

    def _lost(self, trial: Trial) -> int:
        try:
            return len(trial.missing())
        except Exception:
            return -1

    def _clear(self, trial: Trial, *, keep: bool) -> None:
        if keep and trial.store.local:
            return
        if not trial.store.local:
            for key in trial.store.list():
                trial.store.delete(key)
        if not keep:
            shutil.rmtree(trial.folder, ignore_errors=True)


def planned(trials: int, only: str | None) -> list[tuple[int, str, str]]:
    """Number, fault and storage of every trial: all faults in turn, each on a disk and on S3 in turn."""
    names = [name for name in FAULTS if only in (None, name)]
    plan = []
    for number in range(trials):
        turn, place = divmod(number, len(names))
        storage = "s3" if FAULTS[names[place]].faulty_door or (turn + place) % 2 else "disk"
        plan.append((number, names[place], storage))
    return plan


def summary(outcomes: list[dict[str, Any]], skipped: dict[str, str]) -> dict[str, Any]:
    """The figures of all trials."""
    by_fault: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts = by_fault.setdefault(outcome["fault"], Counter())
        kind = "remade_after_damage" if FAULTS[outcome["fault"]].damages else "committed_units_redone"
        counts.update(
            {
                "trials": 1,
                "on_s3": int(outcome["storage"] == "s3"),
                "identical": int(outcome["identical"]),
                "units_lost": max(0, outcome["lost"]),
                kind: outcome["redone"],
            }
        )
    total = sum(by_fault.values(), Counter())
    return {
        "trials": total["trials"],
        "identical": total["identical"],
        "units_lost": total["units_lost"],
        "committed_units_redone": total["committed_units_redone"],
        "remade_after_damage": total["remade_after_damage"],
        "on_s3": total["on_s3"],
        "by_fault": {name: dict(counts) for name, counts in by_fault.items()},
        "failed": [outcome for outcome in outcomes if not outcome["identical"]],
        "skipped": skipped,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--only", choices=sorted(FAULTS), help="this fault alone")
    parser.add_argument("--rate", type=float, default=0.05, help="part of the requests that fail at the faulty door")
    return parser.parse_args()


def main() -> None:
    options = parse()
    log = options.json.with_suffix(".trials.jsonl")
    outcomes = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(outcome["number"], outcome["fault"]) for outcome in outcomes}
    skipped = {name: f"needs {fault.needs}" for name, fault in FAULTS.items() if not has_key(fault.needs)}
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with ExitStack() as stack:
        arena = Arena(folder, options.seed, stack.enter_context(s3_server(options.rate, options.seed)))
        for number, name, storage in planned(options.trials, options.only):
            if (number, name) in done or name in skipped:
                continue
            outcome = asdict(arena.run(number, name, storage))
            outcomes.append(outcome)
            with log.open("a") as file:
                file.write(json.dumps(outcome) + "\n")
            state = "identical" if outcome["identical"] else outcome["reason"]
            print(
                f"{number:>3} {name:<15} {storage:<5} {outcome['seconds']:>5.0f} s  exits {outcome['exits']}  {state}",
                flush=True,
            )
    found = summary(outcomes, skipped)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key not in ("by_fault", "failed")}))
    if not found["failed"]:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
