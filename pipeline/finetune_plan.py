"""A fine-tune before its units: what its configuration means for a packed checkpoint, and its graph."""

from __future__ import annotations

from collections.abc import Mapping

from lsi.block import linear_names
from pipeline.artifacts import Artifact
from pipeline.capture import CHUNK_FILE, TOKENS_FILE
from pipeline.config import RunConfig
from pipeline.config_sections import EndToEndConfig, MethodConfig, ScheduleConfig, SchemeConfig
from pipeline.errors import UserError
from pipeline.evaluate import EvaluateTask, Variant
from pipeline.finetune import TuneTask
from pipeline.finetune_merge import CopyTask
from pipeline.graph import Builder, Graph, Inputs, Node
from pipeline.model_source import locate
from pipeline.optimize import Piece
from pipeline.packed_source import PackedSource, open_packed
from pipeline.partial import unit_name
from pipeline.skeleton import Skeleton, make_skeleton, stored_name
from pipeline.timetable import Comparison
from pipeline.worker import Chunk, Task

# Settings of blocks that are trained towards full-precision ones: they mean nothing here.
IDLE = {
    "method": (
        "loss",
        "first_token",
        "clipping_start",
        "equivalence",
        "equivalence_start",
        "shifts",
        "expert_tokens",
        "look_ahead",
        "quantized_stream_loss",
    ),
    "schedule": tuple(ScheduleConfig.model_fields),
    "end_to_end": tuple(EndToEndConfig.model_fields),
}


def first_trained(config: RunConfig, blocks: int) -> int:
    """The first block that a fine-tune trains. Raises UserError if there are not so many."""
    wanted = config.finetune.blocks
    assert wanted is not None
    if wanted > blocks:
        raise UserError(f"finetune.blocks {wanted}: the model has {blocks} blocks; set it to {blocks} or less")
    return blocks - wanted


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with the checkpoint's grid as its scheme. Raises UserError for what does not go together."""
    check_settings(config)
    source = open_packed(locate(config.model, config.storage.options), trust_remote_code=config.model.trust_remote_code)
    skeleton = make_skeleton(source.config, trust_remote_code=config.model.trust_remote_code)
    first_trained(config, len(skeleton))
    found = scheme_of(source, skeleton)
    for name in config.scheme.model_fields_set:
        asked, theirs = getattr(config.scheme, name), getattr(found, name)
        if asked != theirs:
            raise UserError(
                f"scheme.{name} {asked} contradicts the checkpoint, which has {theirs} and keeps it: leave section scheme out"
            )
    config = config.model_copy(update={"scheme": found})
    if not any(trained_linears(config, skeleton).values()):
        raise UserError(
            f"{source.store.url}: its last {config.finetune.blocks} blocks hold no packed linear; raise finetune.blocks"
        )
    return config


def trained_linears(config: RunConfig, skeleton: Skeleton) -> dict[int, list[str]]:
    """The linears of every block that is trained, by names within it."""
    blocks = range(first_trained(config, len(skeleton)), len(skeleton))
    return {i: linear_names(skeleton.blocks[i], skeleton.block_prefix(i), config.scheme.skip) for i in blocks}


def check_settings(config: RunConfig) -> None:
    """Refuse settings that would not do anything."""
    if config.preset is not None:
        raise UserError(
            f"preset {config.preset} is for quantizing a model block by block, and a fine-tune trains its blocks together from their "
            "codes: leave it out"
        )
    if not config.optimizer.epochs:
        raise UserError(
            "optimizer.epochs is 0, but a fine-tune without training is the checkpoint itself: set 1 or more"
        )
    defaults = {"method": MethodConfig(), "schedule": ScheduleConfig(), "end_to_end": EndToEndConfig()}
    for section, keys in IDLE.items():
        for key in keys:
            asked, default = getattr(getattr(config, section), key), getattr(defaults[section], key)
            if asked != default:
                raise UserError(
                    f"{section}.{key} {asked} means nothing for a fine-tune, which trains its blocks together on the next "
                    "token's cross entropy: leave it out"
                )


def scheme_of(source: PackedSource, skeleton: Skeleton) -> SchemeConfig:
    """The checkpoint's grid; skipped are the linears that it does not hold packed."""
    grid = source.grid
    plain = []
    for index, block in enumerate(skeleton.blocks):
        prefix = skeleton.block_prefix(index)
        names = [f"{prefix}.{name}" for name in linear_names(block, prefix, [])]
        plain += [n for n in names if not source.is_packed(stored_name(f"{n}.weight", source, skeleton.model))]
    return SchemeConfig(bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric, skip=["lm_head", *plain])


class TuneBuilder(Builder):
    """The units of a fine-tune: embed, capture up to the trained blocks, their epochs one after another, evaluate, merge."""

    shard_kind = "copied shard"

    def build(self) -> Graph:
        """The whole run."""
        self.first = first_trained(self.config, self.inputs.blocks)
        self._embed()
        for block in range(self.first):
            self._capture(block)
        self._tune()
        self._evaluate()
        self._merge()
        return self.graph

    def _tune(self) -> None:
        settings = self._settings("scheme", "method", "optimizer", "finetune")
        weights = [*self.inputs.block_digests[self.first :], self.inputs.outer_digest]
        inputs, tokens = self.hidden[self.first], self.inputs.tokens
        targets = Chunk(tokens, TOKENS_FILE, "tokens")
        pieces = tuple(Piece(place, Chunk(artifact, CHUNK_FILE), targets) for place, artifact in enumerate(inputs))
        previous: Artifact | None = None
        for epoch in range(self.config.optimizer.epochs):
            key = self.key(
                "tune",
                settings=settings,
                weights=weights,
                epoch=epoch,
                inputs=[a.key for a in inputs],
                targets=tokens.key,
                previous=previous.key if previous else None,
            )
            last = epoch == self.config.optimizer.epochs - 1
            name = unit_name(self.first, epoch)
            state = None if last else Artifact("state", name, key)
            blocks = range(self.first, self.inputs.blocks) if last else ()
            results = tuple(Artifact("quantized", f"block-{block:03d}", key) for block in blocks)
            quantized = results[0] if results else None
            compare: Comparison = "goes_on" if epoch else "begins"
            outputs = (previous, state, None, quantized)
            task = TuneTask(self.first, epoch, epoch, pieces, pieces, *outputs, compare, key, results=results)
            reads = (*inputs, *((previous,) if previous else ()))
            makes = results or ((state,) if state else ())
            node_name = f"optimize/{self.first:03d}/{epoch:03d}"
            self.add(Node(node_name, "optimize", self.first, task, reads, makes, (self.first, 1, epoch), "tail"))
            previous = state
        self.quantized = self.final = list(results)

    def shard_task(self, file: str, names: tuple[str, ...], results: Mapping[int, Artifact], out: Artifact) -> Task:
        """What makes a shard."""
        return CopyTask(file, names, results, out)

    def _evaluate(self) -> None:
        """The checkpoint and what becomes of it: up to the trained blocks they are one."""
        for name, text in self.inputs.texts.items():
            before = self._untouched(name, text)
            variants: list[tuple[Variant, tuple[Artifact, ...]]] = [
                ("checkpoint", ()),
                ("tuned", tuple(self.quantized)),
            ]
            for variant, results in variants:
                reads = {"variant": variant, "text": text.key, "results": [a.key for a in results]}
                weights = [*self.inputs.block_digests, self.inputs.outer_digest]
                out = Artifact("evaluation", f"{variant}-{name}", self.key("evaluate", **reads, weights=weights))
                task = EvaluateTask(variant, text, self.first, self.inputs.blocks, results, before, out)
                self._add_evaluation(f"evaluate/{variant}/{name}", task)
                self.graph.goals.append(out)

    def _untouched(self, name: str, text: Artifact) -> Artifact | None:
        """A text's hidden states before the trained blocks; None where these are all."""
        if not self.first:
            return None
        weights = [*self.inputs.block_digests[: self.first], self.inputs.outer_digest]
        key = self.key("evaluation states", variant="checkpoint", text=text.key, weights=weights)
        out = Artifact("hidden", f"evaluation-{name}-boundary-{self.first:03d}", key)
        task = EvaluateTask("checkpoint", text, 0, self.first, (), None, out)
        self._add_evaluation(f"evaluate/checkpoint/{name}/{self.first:03d}", task)
        return out


def build_finetune(inputs: Inputs) -> Graph:
    """All units of a fine-tune."""
    return TuneBuilder(inputs).build()
