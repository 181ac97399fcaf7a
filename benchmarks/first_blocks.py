"""A quick look at settings: quantize the first blocks of SmolLM2-135M in one process, leave the others in full precision.

    python benchmarks/first_blocks.py --blocks 14 --epochs 2 --loss relative --schedule wave

Prints one JSON line: perplexities on the third split (windows 16 to 31 of the held-out Wikipedia text and of the news; the
quickstart reports the first 16, `quality.py` those from 32 on), final losses and seconds. Minutes instead of the quickstart's full run, and no actors in the way.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lsi.block import linear_names, load_quantized, round_block, run_block
from lsi.engine import Engine
from lsi.equivalence import collect_ranges
from lsi.increment import DEFAULT_LEARNING_RATE, KINDS, Increment
from lsi.linear import Parts
from lsi.objective import Call, Frozen, freeze, token_losses
from lsi.pairs import KINDS as EQUIVALENCES
from lsi.reconstruct import Method, Reconstruction
from pipeline.activations import quantize_activations
from pipeline.block_state import EQUIVALENCE_LEARNING_RATE, clipping_rate, result_of, rounding_rate
from pipeline.config_sections import ComputeConfig, DataConfig, ScheduleConfig, SchemeConfig
from pipeline.data import calibration_tokens, evaluation_tokens
from pipeline.engines import make_engine
from pipeline.gguf_import import import_gguf
from pipeline.model_source import ModelSource, open_model
from pipeline.optimize import START_SAMPLES, permutation
from pipeline.perplexity import negative_log_likelihood, perplexity
from pipeline.sample_material import MODEL_FILE
from pipeline.skeleton import load_block, load_surroundings, make_skeleton
from pipeline.store import open_store
from pipeline.timetable import Reading, Timetable

ASSETS = Path(__file__).parent.parent / "assets"
CHUNK, LENGTH, WINDOWS = 8, 512, 16


class Trial:
    """One setting on one model."""

    def __init__(self, source: ModelSource, options: argparse.Namespace, engine: Engine | None = None) -> None:
        self.options = options
        self.engine = engine
        self.source = source
        self.skeleton = make_skeleton(source.config)
        self.surroundings = load_surroundings(self.skeleton, source, torch.bfloat16)
        self.arguments = self.surroundings.arguments(LENGTH)
        self.tokenizer = source.tokenizer()
        self.scheme = SchemeConfig(
            bits=options.bits,
            group_size=options.group_size or None,
            symmetric=options.symmetric,
            activation_bits=options.activation_bits,
            activation_symmetric=not options.asymmetric_activations,
            quantize_qkv=options.quantize_qkv,
        )
        schedule = ScheduleConfig(
            kind=options.schedule, refresh_every=options.refresh_every, parts=options.parts, lead=options.lead
        )
        self.timetable = Timetable(schedule, options.epochs, -(-options.samples // CHUNK))
        text = DataConfig(
            source=str(ASSETS / "wikipedia-calibration.txt"), samples=options.samples, sequence_length=LENGTH
        )
        tokens = calibration_tokens(self.tokenizer, text)
        batches = [tokens[start : start + CHUNK].long() for start in range(0, len(tokens), CHUNK)]
        self.boundaries = [[self.surroundings.embed(batch) for batch in batches]]
        for block in range(min(options.blocks + options.look_ahead, len(self.skeleton))):
            self.boundaries.append(self.apply(self.block(block), block, self.boundaries[-1]))
        self.training: dict[int, Reconstruction] = {}
        self.frozen: dict[int, Frozen] = {}
        self.streams: dict[tuple[int, int], dict[int, Tensor]] = {}
        self.finished: dict[int, nn.Module] = {}
        self.losses: dict[int, float] = {}

    def block(self, index: int) -> nn.Module:
        return load_block(self.skeleton, self.source, index, torch.bfloat16)

    @torch.no_grad()
    def apply(self, block: nn.Module, index: int, chunks: list[Tensor]) -> list[Tensor]:
        return [run_block(block, chunk, self.arguments[index]) for chunk in chunks]

    def names(self, index: int) -> list[str]:
        return linear_names(self.skeleton.blocks[index], self.skeleton.block_prefix(index), [])

    def begin(self, index: int) -> Reconstruction:
        options = self.options
        epoch = -(-CHUNK // options.batch) * len(self.boundaries[0])
        total, joined = options.epochs * epoch, (options.epochs - options.warm_epochs) * epoch
        method = Method(
            grid=self.scheme.grid,
            parts=Parts(
                options.clipping,
                Increment(options.increment, options.rank, options.corner, options.band),
                options.rounding,
                torch.bfloat16,
            ),
            rates={
                "clipping": options.clipping_rate or clipping_rate(options.clipping, options.clipping_start, total),
                "increment": options.increment_rate or DEFAULT_LEARNING_RATE,
                "rounding": options.rounding_rate or rounding_rate(joined),
                "equivalence": options.equivalence_rate,
            },
            total_steps=total,
            steps=options.steps,
            loss=options.loss,
            first_token=options.first_token,
            autocast=torch.bfloat16,
            equivalence=tuple(options.equivalence),
            quantized_stream=options.quantized_stream_loss,
            warm_steps=options.warm_epochs * epoch,
        )
        block = self.block(index)
        training = Reconstruction(block, self.names(index), method, engine=self.engine)
        quantize_activations(training.block, self.names(index), self.scheme)
        return training

    def freeze(self, index: int) -> Frozen:
        """The full-precision blocks that the loss of a block runs."""

        def call(place: int) -> Call:
            return Call(freeze(self.block(place), torch.bfloat16), self.arguments[place])

        following = range(index + 1, min(index + 1 + self.options.look_ahead, len(self.skeleton)))
        itself = call(index) if self.options.quantized_stream_loss else None
        return Frozen(tuple(map(call, following)), itself)

    def smooth(self, index: int, training: Reconstruction, inputs: list[Tensor]) -> None:
        """Start the scales as SmoothQuant does."""
        assert training.equivalence is not None
        block = self.block(index)
        batches = ((chunk, self.arguments[index]) for chunk in inputs)
        training.equivalence.start(block, collect_ranges(block, training.equivalence.pairs, batches))

    def inputs(self, index: int, reading: Reading) -> dict[int, Tensor]:
        """A block's inputs, by the chunks' numbers."""
        if index == 0 or reading.source is None:
            return {chunk: self.boundaries[index][chunk] for chunk in reading.chunks}
        return {chunk: self.streams[index - 1, reading.source][chunk] for chunk in reading.chunks}

    def unit(self, index: int, unit: int) -> None:
        """Train one block for one unit, and keep its outputs."""
        table, options = self.timetable, self.options
        training = self.training.setdefault(index, self.begin(index)) if unit == 0 else self.training[index]
        inputs = self.inputs(index, table.training(unit))
        if unit == 0:
            self.frozen[index] = self.freeze(index)
        frozen = self.frozen[index]
        targets = self.boundaries[index + 1 + len(frozen.following)]
        chunks = list(inputs)
        if unit == 0 and options.smoothquant:
            self.smooth(index, training, list(inputs.values()))
        if unit == 0 and options.clipping_start == "search" and training.fresh:
            first = chunks[: -(-START_SAMPLES // CHUNK)]
            training.begin_clipping((inputs[chunk], self.arguments[index]) for chunk in first)
        for place in permutation(len(chunks), options.seed, index, table.epoch(unit)):
            chunk = chunks[place]
            order = permutation(len(inputs[chunk]), options.seed, index, table.epoch(unit), chunk)
            for start in range(0, len(order), options.batch):
                batch = order[start : start + options.batch]
                training.step(inputs[chunk][batch], targets[chunk][batch], self.arguments[index], frozen)
        if unit < table.last and unit not in table.handed_on():
            return
        block = self.block(index)
        result_of(training, torch.bfloat16).load(block)
        quantize_activations(block, self.names(index), self.scheme)
        passed = self.inputs(index, table.passing(unit))
        outputs = dict(zip(passed, self.apply(block, index, list(passed.values())), strict=True))
        self.streams[index, unit] = outputs
        if unit == table.last:
            # At the block's own end, whatever it was trained on: so settings can be compared.
            losses = [token_losses(o, self.boundaries[index + 1][c], options.loss).mean() for c, o in outputs.items()]
            self.losses[index] = sum(map(float, losses)) / len(losses)
            self.finished[index] = block
            del self.training[index], self.frozen[index]

    def run(self) -> None:
        """All units in an order that every schedule's dependencies allow."""
        units, blocks = range(self.timetable.units), range(self.options.blocks)
        for index in blocks if not units else ():
            self.finished[index] = block = self.block(index)
            load_quantized(block, round_block(block, self.names(index), self.scheme.grid, torch.bfloat16))
            quantize_activations(block, self.names(index), self.scheme)
        if self.options.schedule == "parallel":
            for unit in units:
                for index in blocks:
                    self.unit(index, unit)
                    self.streams.pop((index, unit - 2), None)
            return
        for index in blocks:
            for unit in units:
                self.unit(index, unit)
            for unit in units:
                self.streams.pop((index - 1, unit), None)

    def windows(self, file: str) -> Tensor:
        """Of the third split, [windows, 1, length]."""
        tokens = evaluation_tokens(self.tokenizer, str(ASSETS / file), 1 << 30)
        return tokens[WINDOWS * LENGTH : 2 * WINDOWS * LENGTH].view(WINDOWS, 1, LENGTH).long()[: self.options.windows]

    @torch.no_grad()
    def held_out(self, windows: Tensor) -> float:
        """Mean loss of the hidden states after the quantized blocks against the full-precision ones, on text that was not trained on."""
        full = [self.surroundings.embed(window) for window in windows]
        hidden = full
        for index in range(self.options.blocks):
            hidden = self.apply(self.finished[index], index, hidden)
            full = self.apply(self.block(index), index, full)
        pairs = zip(hidden, full, strict=True)
        return sum(float(token_losses(own, wanted, self.options.loss).mean()) for own, wanted in pairs) / len(full)

    @torch.no_grad()
    def perplexity(self, windows: Tensor) -> float:
        hidden = [self.surroundings.embed(window) for window in windows]
        for index in range(len(self.skeleton)):
            hidden = self.apply(self.finished.get(index) or self.block(index), index, hidden)
        total = sum(
            negative_log_likelihood(self.surroundings.logits(w, h), w) for w, h in zip(windows, hidden, strict=True)
        )
        return perplexity(total, len(windows), LENGTH)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8, help="how many to quantize; 0: full precision")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64, help="0: one scale per output channel")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--activation-bits", type=int, help="quantize activations too")
    parser.add_argument("--asymmetric-activations", action="store_true")
    parser.add_argument("--quantize-qkv", action="store_true")
    parser.add_argument("--increment", choices=sorted(KINDS), default="dense")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--corner", type=int, default=100)
    parser.add_argument("--band", type=int, default=1)
    parser.add_argument("--increment-rate", type=float)
    parser.add_argument("--clipping", choices=["learned", "direct", "none"], default="learned")
    parser.add_argument("--clipping-start", choices=["search", "range"], default="search")
    parser.add_argument("--clipping-rate", type=float)
    parser.add_argument("--rounding", action="store_true")
    parser.add_argument("--rounding-rate", type=float)
    parser.add_argument("--equivalence", nargs="*", choices=EQUIVALENCES, default=[])
    parser.add_argument("--equivalence-rate", type=float, default=EQUIVALENCE_LEARNING_RATE)
    parser.add_argument("--smoothquant", action="store_true", help="the equivalent transformation's start")
    parser.add_argument("--steps", choices=["adamw", "signed"], default="adamw")
    parser.add_argument("--loss", choices=["relative", "mse"], default="relative")
    parser.add_argument("--first-token", type=float, default=0.1)
    parser.add_argument("--look-ahead", type=int, default=0)
    parser.add_argument("--quantized-stream-loss", type=float, default=0.0)
    parser.add_argument("--warm-epochs", type=int, default=0, help="of clipping and equivalence alone")
    parser.add_argument("--schedule", choices=["sequential", "parallel", "wave"], default="sequential")
    parser.add_argument("--refresh-every", type=int, default=1)
    parser.add_argument("--parts", type=int, default=1, help="units of an epoch")
    parser.add_argument("--lead", type=int, default=0, help="in units")
    parser.add_argument("--epochs", type=int, default=3, help="0: round-to-nearest")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of the third split, from its start")
    parser.add_argument("--engine", choices=["torch", "deepspeed"], default="torch", help="deepspeed: sequential alone")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = open_store(scratch)
        import_gguf(str(ASSETS / MODEL_FILE), {}, model, torch.bfloat16)
        began = time.monotonic()
        compute = ComputeConfig(engine=options.engine)
        trial = Trial(open_model(model), options, make_engine(compute, "torch", options.batch))
        trial.run()
        seconds = time.monotonic() - began
        texts = {"wikipedia": trial.windows("wikipedia-heldout.txt"), "news": trial.windows("news.txt")}
        found = {name: trial.perplexity(windows) for name, windows in texts.items()}
        held_out = {name: trial.held_out(windows) for name, windows in texts.items()}
    print(
        json.dumps(
            {
                "settings": vars(options),
                **found,
                "held_out": held_out,
                "losses": trial.losses,
                "seconds": round(seconds),
            }
        )
    )


if __name__ == "__main__":
    main()
