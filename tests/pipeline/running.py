"""Helpers to run the pipeline in tests: configurations, a silent reporter, and what a checkpoint holds."""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.scheduler import Event, Instruction
from lsi import reconstruct
from pipeline.config import RunConfig
from pipeline.config_file import parse_config
from pipeline.driver import StoppedError
from pipeline.graph import Node
from pipeline.prepare import prepare
from pipeline.report import publish_checkpoint, write_result
from pipeline.run import Finished, Workers, inline_workers, leased, run_to_goals
from pipeline.store import Store


class Silent:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.units: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def begin(self, stage_totals: dict[str, tuple[int, int]]) -> None:
        pass

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        self.units.append(node.name)

    def event(self, event: Event | Instruction) -> None:
        pass


def tiny_tree(model_folder: Path | str, text: Path | str, run_folder: Path | str, **sections: Any) -> dict[str, Any]:
    """A run of seconds: 6 samples of 16 tokens in chunks of 4, two epochs, W3 in groups of 32."""
    tree: dict[str, Any] = {
        "model": {"source": str(model_folder)},
        "data": {"source": str(text), "samples": 6, "sequence_length": 16},
        "scheme": {"bits": 3, "group_size": 32},
        "method": {"increment": "dense"},
        "optimizer": {"epochs": 2},
        "compute": {"dtype": "float32"},
        "storage": {"run": str(run_folder), "chunk_samples": 4},
        "evaluation": {"texts": {"news": str(text)}, "windows": 2, "length": 16},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return tree


def tiny_config(model_folder: Path | str, text: Path | str, run_folder: Path | str, **sections: Any) -> RunConfig:
    return parse_config(tiny_tree(model_folder, text, run_folder, **sections))


def run(
    config: RunConfig, report: Silent | None = None, workers: Workers = inline_workers, **more: Any
) -> tuple[Finished, dict[str, Any]]:
    """Prepare, run and publish, as the command does."""
    report = report or Silent()
    prepared = prepare(config, report)
    with leased(prepared, report):
        finished = run_to_goals(prepared, report, workers, **more)
        publish_checkpoint(finished)
        return finished, write_result(finished)


def run_in_pieces(config: RunConfig, units: int) -> tuple[Finished, dict[str, Any], list[str]]:
    """A new driver after every few units, each taking up what the last one left. Also the units that were done, in order."""
    done: list[str] = []
    for _ in range(100):
        report = Silent()
        try:
            finished, result = run(config, report, should_stop=lambda report=report: len(report.units) >= units)
            return finished, result, done
        except StoppedError:
            continue
        finally:
            done += report.units
    raise AssertionError(f"not finished after 100 drivers of {units} units")


def break_steps(monkeypatch: pytest.MonkeyPatch, broken: Callable[[int], bool]) -> None:
    """The training steps that `broken` says, by their number from 1, meet a NaN, as an overflow in them would make it."""
    calls, plain = itertools.count(1), reconstruct.run_block

    def run_block(*arguments: Any) -> torch.Tensor:
        return plain(*arguments) * (float("nan") if broken(next(calls)) else 1.0)

    monkeypatch.setattr(reconstruct, "run_block", run_block)


def checkpoint_hashes(store: Store) -> dict[str, str]:
    """sha256 of every file of a checkpoint."""
    return {key: hashlib.sha256(store.get(key)).hexdigest() for key in store.list()}
