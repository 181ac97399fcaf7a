"""What a run leaves for people and machines: result, manifest, model card, and the published checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pipeline.artifacts import Artifact, Record, digest, read_record
from pipeline.block_state import number
from pipeline.config import RunConfig
from pipeline.config_sections import MethodConfig, ScheduleConfig
from pipeline.end_to_end import samples_of
from pipeline.errors import UserError
from pipeline.finetune_merge import copied_config
from pipeline.identity import MODEL_FILE, read_json, run_identity
from pipeline.merge import CHECKPOINT_MANIFEST, publish, published_config, quantized_linears, unpublished
from pipeline.packed_format import format_of
from pipeline.prepare import Prepared
from pipeline.run import Finished
from pipeline.store import Store
from pipeline.watch import FIELDS
from pipeline.worker import peak_rss_mib

RESULT_FILE = "result.json"
MANIFEST_FILE = "manifest.json"
TIMES = ("worker", "host", "pid", "started", "ended", "peak_rss_mib")
FLAG_WORDS = {
    "non_finite": "training or measuring met a number that is not finite; it keeps its best state",
    "fallback": "training or measuring met a number that is not finite, and no state was better than round-to-nearest, which it holds",
    "quarantined": "training failed for good; it holds round-to-nearest, made without data",
}


def records(store: Store, artifacts: list[Artifact]) -> list[Record]:
    """Commit records of artifacts that a finished run must have."""
    found = [read_record(store, artifact) for artifact in artifacts]
    missing = [a.path for a, record in zip(artifacts, found, strict=True) if record is None]
    if missing:
        raise UserError(f"{store.describe(missing[0])}: not committed although the run ended; run `lsi quantize` again")
    return [record for record in found if record is not None]


def artifacts_of(finished: Finished, kind: str) -> list[Artifact]:
    return [a for node in finished.graph.nodes for a in node.makes if a.kind == kind]


def perplexities(finished: Finished) -> dict[str, dict[str, float]]:
    """By variant and text, of what is evaluated: `lsi merge` may come before the evaluation."""
    found: dict[str, dict[str, float]] = {}
    for artifact in artifacts_of(finished, "evaluation"):
        record = read_record(finished.prepared.store, artifact)
        if record is not None:
            variant, _, text = artifact.name.partition("-")
            found.setdefault(variant, {})[text] = record.meta["perplexity"]
    return found


def as_json(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """A table of perplexities without infinities, which JSON does not have."""
    return {variant: {text: number(value) for text, value in row.items()} for variant, row in table.items()}


def block_reports(finished: Finished) -> list[dict[str, Any]]:
    """Status, losses and timeline of every block, from its commit record."""
    return [record.meta for record in records(finished.prepared.store, artifacts_of(finished, "quantized"))]


def end_report(finished: Finished) -> dict[str, Any] | None:
    """Losses, status and what was kept of the end-to-end stage; None where there was none."""
    found = records(finished.prepared.store, artifacts_of(finished, "scaled")[:1])
    return found[0].meta if found else None


def divergence_words(end: dict[str, Any]) -> str:
    """What the end-to-end stage did to its loss."""
    losses = (end["initial_loss"], end["loss"])
    words = ["not finite" if loss is None else f"{loss:.4f}" for loss in losses]
    return f"{words[0]} → {words[1]} nats a token, over {end['tokens']} tokens of the calibration text"


def end_flag(end: dict[str, Any] | None) -> list[str]:
    """A sentence if the end-to-end stage met a number that was not finite."""
    if end is None or end["status"] == "ok":
        return []
    held = (
        "its scales are those after these"
        if end["kept"] == "trained"
        else "scales are those that the blocks ended with"
    )
    return [f"end to end: a loss or gradient was not finite after {end['steps']} steps; {held}"]


def without_times(block: dict[str, Any]) -> dict[str, Any]:
    """A block's report without what differs from run to run."""
    history = [{k: v for k, v in entry.items() if k not in TIMES} for entry in block["history"]]
    return block | {"history": history}


def flagged(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Blocks that are not what training was to make them: number, status (see `FLAG_WORDS`), what they hold, and the reason."""
    names = ("block", "status", "kept", "reason")
    return [{name: block[name] for name in names} for block in blocks if block["status"] != "ok"]


def flag_line(block: dict[str, Any]) -> str:
    """One sentence on a flagged block."""
    return f"block {block['block']}: {FLAG_WORDS[block['status']]} ({block['reason'].rstrip('.')})"


def recipe_of(prepared: Prepared) -> dict[str, Any]:
    return run_identity(prepared.config, prepared.context.resolved)


def tuned_from(prepared: Prepared) -> dict[str, Any]:
    """Of a fine-tune: the checkpoint that it began with, by its content, and how many of the last blocks were trained."""
    blocks = prepared.config.finetune.blocks
    if blocks is None:
        return {}
    content = digest([read_json(prepared.store, MODEL_FILE), prepared.source.side_files["config.json"].decode()])
    return {"tuned_from": {"checkpoint": prepared.config.model.source, "digest": content, "blocks": blocks}}


def schedule_words(schedule: ScheduleConfig) -> str:
    """What blocks trained on."""
    if schedule.kind == "sequential":
        return "sequential"
    refresh = (
        f"inputs renewed every {schedule.refresh_every} epochs" if schedule.refresh_every else "inputs never renewed"
    )
    if schedule.parts > 1:
        refresh = f"epochs in {schedule.parts} parts"
    return f"{schedule.kind}, {refresh}" + (f", lead {schedule.lead}" if schedule.lead else "")


def equivalence_words(method: MethodConfig) -> str:
    """What the model card says of LET."""
    if not method.equivalence:
        return ""
    words = " with scales and shifts" if method.shifts else " with scales"
    return f"{words} of channels, folded into norms and weights (LET, arXiv 2308.13137)"


def trained_words(config: RunConfig) -> str:
    """The parts that were trained, and on which loss."""
    method = config.method
    parts = [f"clipping {method.clipping} from {method.clipping_start}", f"rounding {method.rounding}"]
    parts.append(f"increment {method.increment}" + (f" of rank {method.rank}" if method.rank else ""))
    if method.equivalence:
        more = f"{' with shifts' if method.shifts else ''} from {method.equivalence_start}"
        parts.append(f"equivalence {' '.join(method.equivalence_kinds(config.scheme))}{more}")
    loss = "cross entropy of the next token" if config.is_finetune else method.loss
    parts.append(f"loss {loss}")
    if method.look_ahead:
        parts.append(f"look-ahead {method.look_ahead}")
    if method.quantized_stream_loss:
        parts.append(f"loss on the quantized stream {method.quantized_stream_loss:g}")
    return ", ".join(parts)


METHOD_WORDS = {
    "diagonal": "increments of the singular values (LSI, arXiv 2406.16299)",
    "corner": "increments of the singular values with a dense corner (LSI, arXiv 2406.16299)",
    "band": "increments of the singular values and the diagonals beside them (SDE, arXiv 2407.15508)",
    "dense": "increments of every weight",
}
CLIPPING_WORDS = {
    "learned": "learned clipping (LWC, arXiv 2308.13137)",
    "direct": "learned clipping (as in SignRound, arXiv 2309.05516)",
}
ROUNDING_WORDS = {"learned": "learned rounding (as in SignRound, arXiv 2309.05516)"}
LABELS = {
    "full_precision": "full precision",
    "round_to_nearest": "round-to-nearest",
    "quantized": "quantized",
    "checkpoint": "checkpoint",
    "tuned": "fine-tuned",
}


def perplexity_rows(table: Mapping[str, Mapping[str, float | None]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the perplexity table."""
    texts = list(dict.fromkeys(text for row in table.values() for text in row))
    rows = [
        [LABELS[variant], *(perplexity_word(table[variant][text]) if text in table[variant] else "–" for text in texts)]
        for variant in LABELS
        if variant in table
    ]
    return ["", *texts], rows


def perplexity_word(value: float | None) -> str:
    """Two decimals; three digits where it is beyond reading. None is what JSON has for one that is not finite."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 1e5 else f"{value:.3g}"


def method_words(method: MethodConfig) -> str:
    """What was learned of the weights, as a phrase."""
    named = (
        METHOD_WORDS.get(method.increment),
        ROUNDING_WORDS.get(method.rounding),
        CLIPPING_WORDS.get(method.clipping),
    )
    parts = [words for words in named if words] or ["weights as they are"]
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) + equivalence_words(method)


def story(prepared: Prepared) -> list[str]:
    """What was done, in a sentence."""
    config = prepared.config
    what = method_words(config.method)
    if config.is_finetune:
        return [
            f"Fine-tuned from a checkpoint that was quantized already: {what}, of the last {config.finetune.blocks} blocks, trained",
            "on the next token's cross entropy. All other tensors are that checkpoint's, byte for byte.",
        ]
    return [
        f"Quantized block by block: {what}, trained so that",
        f"each block's output stays that of the full-precision block{end_words(config)}.",
    ]


def end_words(config: RunConfig) -> str:
    """What the model card says of the end-to-end stage."""
    if not config.end_to_end.epochs:
        return ""
    return ";\nthen the scales of all blocks together, towards the full-precision model's predictions"


def origin(prepared: Prepared) -> list[str]:
    """The model card's rows on what the blocks were trained from."""
    if found := tuned_from(prepared).get("tuned_from"):
        return [
            f"| fine-tuned | the last {found['blocks']} blocks together |",
            f"| from | {found['checkpoint']}, digest {found['digest'][:16]} |",
        ]
    rows = [f"| schedule | {schedule_words(prepared.config.schedule)} |"]
    if (end := prepared.config.end_to_end).epochs:
        taken = samples_of(prepared.config)
        some = f" of the first {taken} samples" if taken < prepared.config.data.samples else ""
        rows.append(
            f"| end to end | {end.epochs} epochs{some}, batches of {end.batch_size}, learning rate {end.learning_rate:g} |"
        )
    return rows


def model_card(
    prepared: Prepared,
    table: dict[str, dict[str, float]],
    blocks: list[dict[str, Any]],
    end: dict[str, Any] | None = None,
) -> str:
    """The checkpoint's README. Deterministic: no dates, no times, no machine."""
    config = prepared.config
    identity = recipe_of(prepared)
    header, rows = perplexity_rows(table)
    lines = [
        "---",
        "tags: [quantized, compressed-tensors, lsi]",
        "---",
        f"# {config.model.source.rstrip('/').rsplit('/', 1)[-1]}, {config.scheme.words}",
        "",
        *story(prepared),
        f"Stored in compressed-tensors `{format_of(config.scheme.activation_bits).value}` form; `transformers` loads it as it is:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| scheme | {config.scheme.words}; left alone: {', '.join(config.scheme.skip) or 'nothing'} |",
        f"| trained | {trained_words(config)} |",
        f"| optimizer | {config.optimizer.epochs} epochs, batches of {config.optimizer.batch_size} |",
        *origin(prepared),
        f"| calibration | {config.data.samples} × {config.data.sequence_length} tokens of {config.data.source}, seed {config.data.seed} |",
        f"| made with | {', '.join(f'{name} {value}' for name, value in identity['versions'].items())} |",
    ]
    if end is not None:
        lines[-1:] = [f"| divergence from full precision | {divergence_words(end)} |", lines[-1]]
    if rows:
        evaluation = config.evaluation
        lines += ["", f"Perplexity, {evaluation.windows} windows of {evaluation.length} tokens (lower is better):", ""]
        lines += [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]
    if few := {block["block"]: block["untrained_experts"] for block in blocks if block.get("untrained_experts")}:
        lines += ["", f"Experts that saw fewer than {config.method.expert_tokens} tokens, clipped without data:", ""]
        lines += [f"- block {block}: {', '.join(experts)}" for block, experts in few.items()]
    odd = [f"**block {block['block']}**: {FLAG_WORDS[block['status']]}" for block in flagged(blocks)] + end_flag(end)
    if odd:
        lines += ["", "**Not all is what training was to make it:**", "", *(f"- {line}" for line in odd)]
    return "\n".join([*lines, ""])


def publish_checkpoint(finished: Finished) -> None:
    """Everything but the shards, the configuration last. The same bytes for the same recipe.

    Nothing where no engine serves the scheme: `write_result` says so.
    """
    prepared = finished.prepared
    if unpublished(prepared.config, prepared.skeleton):
        return
    blocks, end = block_reports(finished), end_report(finished)
    shards = records(prepared.store, artifacts_of(finished, "shard"))
    table = perplexities(finished)
    manifest = {
        "identity": recipe_of(prepared),
        "perplexity": as_json(table),
        "end_to_end": end,
        "flagged": flagged(blocks),
        "blocks": [without_times(block) for block in blocks],
        **tuned_from(prepared),
        "files": {
            record.meta["file"]: {"size": record.meta["size"], "sha256": record.meta["sha256"]} for record in shards
        },
    }
    extra = {
        "README.md": model_card(prepared, table, blocks, end).encode(),
        CHECKPOINT_MANIFEST: json.dumps(manifest, indent=1, sort_keys=True).encode(),
    }
    publish(prepared.checkpoint, prepared.source, shards, checkpoint_config(prepared), extra)


def checkpoint_config(prepared: Prepared) -> bytes:
    """The checkpoint's `config.json`."""
    if prepared.config.is_finetune:
        return copied_config(prepared.source)
    linears = quantized_linears(prepared.skeleton, prepared.config.scheme.skip)
    return published_config(prepared.source, prepared.config, linears, prepared.skeleton, prepared.context.dtype)


def write_result(finished: Finished) -> dict[str, Any]:
    """`result.json` and `manifest.json` in the run directory. Returns the result."""
    prepared = finished.prepared
    blocks = block_reports(finished)
    reason = unpublished(prepared.config, prepared.skeleton)
    result = {
        "perplexity": as_json(perplexities(finished)),
        "checkpoint": None if reason else prepared.checkpoint.url,
        "unpublished": reason,
        "scheme": prepared.config.scheme.words,
        "untrained_experts": {
            str(block["block"]): block["untrained_experts"] for block in blocks if block.get("untrained_experts")
        },
        "end_to_end": end_report(finished),
        "flagged_blocks": [block["block"] for block in flagged(blocks)],
        "flagged": flagged(blocks),
        "seconds": {name: round(value, 2) for name, value in finished.seconds.items()} | training_seconds(blocks),
        "units": {"run": finished.units_run, "committed_before": finished.units_committed_before},
        "peak_rss_mib": {"driver": round(peak_rss_mib(), 1), **finished.peak_rss_mib},
    }
    manifest = {
        "identity": recipe_of(prepared),
        "result": result,
        "blocks": blocks,
        "most_blocks_at_once": most_at_once(training_timeline(blocks)),
    } | timeline(finished, blocks)
    prepared.store.check_fence()
    prepared.store.put(MANIFEST_FILE, json.dumps(manifest, indent=1, sort_keys=True).encode())
    prepared.store.put(RESULT_FILE, json.dumps(result, indent=1).encode())
    return result


def training_seconds(blocks: list[dict[str, Any]]) -> dict[str, float]:
    """Time in training units, summed over workers."""
    spans = [entry["ended"] - entry["started"] for block in blocks for entry in block["history"]]
    return {"training_all_workers": round(sum(spans), 2)}


def timeline(finished: Finished, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Every unit with who did it, in order of start; times are seconds after `timeline_began` (seconds since 1970).

    From the commit records where they are still there, else from what the drivers noted.
    """
    stamps = {entry[0]: dict(zip(FIELDS[1:], entry[1:], strict=True)) for entry in finished.units.values()}
    stamps |= {f"optimize/{e['block']:03d}/{e['unit']:03d}": e for e in training_timeline(blocks) if "unit" in e}
    for node in finished.graph.nodes:
        if node.name not in stamps:
            record = read_record(finished.prepared.store, node.makes[0])
            if record is not None and "stamp" in record.meta:
                stamps[node.name] = record.meta["stamp"]
    began = min((stamp["started"] for stamp in stamps.values()), default=0.0)
    entries = [
        {name: stamp[name] for name in ("worker", "host", "pid", "peak_rss_mib")}
        | {"unit": unit, "started": round(stamp["started"] - began, 2), "ended": round(stamp["ended"] - began, 2)}
        for unit, stamp in stamps.items()
    ]
    return {"timeline_began": round(began, 2), "timeline": sorted(entries, key=lambda entry: entry["started"])}


def training_timeline(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every training unit with its block."""
    return [{"block": block["block"], **entry} for block in blocks for entry in block["history"]]


def most_at_once(entries: list[dict[str, Any]]) -> int:
    """The largest number of different blocks in training at one time."""
    moments = [e["started"] for e in entries]
    return max((len({e["block"] for e in entries if e["started"] <= t < e["ended"]}) for t in moments), default=0)
