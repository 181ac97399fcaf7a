"""What keeps 80 workers on the 80 blocks of a 70B model from 90 %, one thing after another (simulated, as in scaling.py).

    python benchmarks/ladder.py [--json OUT]

Each step keeps those before it, but for the first of the two with 40 epochs. Steps marked * are settings of today; the others are changes to the workers or the graph.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from model_shapes import H100
from scaling import Setting, figures, play

from pipeline.simulate import Network


def steps(setting: Setting, network: Network) -> Iterator[tuple[str, Setting, Network]]:
    """Words, setting and network of every step."""
    yield "defaults: parallel, refreshed every epoch, 20 epochs *", setting, network
    setting = replace(setting, cache_gib=10)
    yield "storage.cache_mib 10240: inputs and targets stay in memory *", setting, network
    setting = replace(setting, refresh_every=4)
    yield "schedule.refresh_every 4 *", setting, network
    setting = replace(setting, chunk_samples=16)
    yield "storage.chunk_samples 16 *", setting, network
    yield "40 epochs, with the above *", replace(setting, epochs=40), network
    network = replace(network, weights_ahead=True)
    yield "a worker has its block's weights before its unit begins", setting, network
    setting = replace(setting, evaluation=False)
    yield "no perplexity (the bound of what a faster evaluation brings)", setting, network
    network = replace(network, writes_behind=True)
    yield "captures and states, too, are written while units compute", setting, network
    setting = replace(setting, chunk_samples=4)
    yield "storage.chunk_samples 4 (pays once the weights are there) *", setting, network
    setting = replace(setting, epochs=40)
    yield "40 epochs *", setting, network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    rows = [
        {"step": words} | figures(play(setting, H100, network))
        for words, setting, network in steps(Setting("llama-2-70b", 80), Network())
    ]
    print("| step | efficiency | minutes | idle | link | store |\n|---|---|---|---|---|---|")
    for row in rows:
        shares = " | ".join(f"{row['shares'][use]:.0%}" for use in ("dependencies", "link", "store"))
        print(f"| {row['step']} | {row['efficiency']:.1%} | {row['hours'] * 60:.1f} | {shares} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
