"""Blocks that are not trained because their training failed for good: decisions, committed like results.

A decision changes the plan: its block is rounded without data, and all that reads the block has other addresses. So a run
that goes on later reads the decisions first, and comes to the same bytes. Without its decision a block is tried again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from pipeline.artifacts import Artifact, Writer, committed, digest, discard, intact
from pipeline.driver import GaveUpError, StoppedError
from pipeline.reporter import Reporter
from pipeline.store import Store

KIND = "quarantine"


def decision(block: int) -> Artifact:
    """Where the decision on a block is: there is one at most, whatever the reason."""
    return Artifact(KIND, f"block-{block:03d}", digest({"kind": KIND, "block": block}))


def decided(store: Store) -> list[int]:
    """Blocks with a decision."""
    return sorted(int(path.split("-")[1]) for path in committed(store, [KIND]))


def read_decisions(store: Store, report: Reporter) -> dict[int, str]:
    """Quarantined blocks with the reason. A damaged decision is none, and is said."""
    records = {block: intact(store, decision(block), report.message) for block in decided(store)}
    return {block: record.meta["reason"] for block, record in records.items() if record is not None}


def give_up(store: Store, error: GaveUpError, *, strict: bool) -> None:
    """Quarantine the block of a unit that failed for good; `strict` raises StoppedError instead, and decides nothing."""
    if strict:
        raise refused({error.node.block: str(error)}) from error
    meta = {
        "block": error.node.block,
        "unit": error.node.name,
        "reason": str(error),
        "failures": error.failures,
        "decided": time.time(),
    }
    Writer(store, decision(error.node.block)).commit(meta)


def forget(store: Store) -> None:
    """Remove every decision, so that the blocks are tried again."""
    for block in decided(store):
        discard(store, decision(block))


def blocks_words(blocks: list[int]) -> str:
    """Such as "block 7" and "blocks 7, 9"."""
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, sorted(blocks)))}"


def refused(flagged: dict[int, str]) -> StoppedError:
    """What --strict says to flagged blocks, each with its reason."""
    each = "; ".join(f"block {block}: {reason.rstrip('.')}" for block, reason in sorted(flagged.items()))
    return StoppedError(
        f"--strict takes no flagged block, and {blocks_words(list(flagged))} would be flagged ({each}). All else is committed.",
        interrupted=False,
    )


def refuse_flagged(flagged: dict[int, str]) -> None:
    """Raises StoppedError if there are any."""
    if flagged:
        raise refused(flagged)


def follow_decisions(store: Store, report: Reporter, blocks: int, *, strict: bool) -> Iterator[dict[int, str]]:
    """The quarantined blocks with the reason, then again after each further decision, of which there is at most one a block.

    Raises StoppedError if there may be none, or if so many blocks failed that it cannot be their fault.
    """
    said: set[int] = set()
    for _ in range(blocks + 1):
        decisions = read_decisions(store, report)
        if strict:
            refuse_flagged(decisions)
        for block in decisions.keys() - said:
            report.message(f"block {block} is quantized without data: {decisions[block]}")
        said |= decisions.keys()
        if 2 * len(decisions) > blocks:
            raise StoppedError(
                f"{blocks_words(list(decisions))} of {blocks} failed for good, more than half, so the cause is hardly the "
                f"blocks': {list(decisions.values())[-1]} Find it, then go on with --retry-quarantined.",
                interrupted=False,
            )
        yield decisions
