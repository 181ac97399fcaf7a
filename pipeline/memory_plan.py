"""What every kind of unit holds in memory at its peak, from a block's shapes and the configuration alone.

A unit goes through moments (a block is loaded, factored, stepped, measured …); at each it holds terms that have a name and a
size (`memory_terms.py`), and its peak is the moment with the largest sum. Terms are counted from the tensors that the code makes.
Four numbers are constants: what processes hold before any work (`BASE`, `DRIVER`, measured; `CUDA_HOST`, `CUDA_CONTEXT`, not).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lsi.factors import LARGEST_PART, SMALL
from lsi.grid import piece_on
from lsi.scales import TOKENS_AT_ONCE
from pipeline.artifacts import PIECE
from pipeline.block_state import steps_per_epoch
from pipeline.memory_terms import WORK, BlockMemory, Engine
from pipeline.timetable import timetable_of

GIB = float(1 << 30)
# Resident memory of a worker that has imported torch, Ray and transformers and built the skeleton; measured, Linux.
BASE = 0.68 * GIB
# Of the driver, which has read the texts and made tokens and the plan, too.
DRIVER = 1.05 * GIB
DRIVER_DEEPSPEED = 0.10 * GIB
# What a CUDA context takes on the host and on the device. Taken from other work with H100s, not measured here.
CUDA_HOST, CUDA_CONTEXT = 2.0 * GIB, 0.6 * GIB

Place = Literal["host", "device"]
Terms = Mapping[str, float]


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a unit in one place; `terms` in bytes."""

    moment: str
    terms: Terms

    @property
    def total(self) -> float:
        return sum(self.terms.values())


@dataclass(frozen=True)
class UnitPeaks:
    """Of one kind of unit."""

    stage: str
    host: Peak
    device: Peak | None = None


@dataclass
class _Moments:
    """Moments of a unit; on a CPU all that is on the device is on the host."""

    cuda: bool
    host: dict[str, dict[str, float]] = field(default_factory=dict)
    device: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, name: str, device: Terms, host: Terms | None = None) -> None:
        base = {"process": BASE + CUDA_HOST * self.cuda}
        own = base | dict(host or {})
        if self.cuda:
            self.device[name] = {"CUDA context": CUDA_CONTEXT} | dict(device)
        else:
            own |= {term: own.get(term, 0.0) + size for term, size in device.items()}
        self.host[name] = own

    def peaks(self, stage: str) -> UnitPeaks:
        return UnitPeaks(stage, fullest(self.host), fullest(self.device) if self.device else None)


def fullest(moments: Mapping[str, Terms]) -> Peak:
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    return Peak(name, {term: size for term, size in moments[name].items() if size})


class MemoryPlan(BlockMemory):
    """The peaks of a configuration's units on a worker with an engine."""

    def units(self) -> dict[str, UnitPeaks]:
        """By stage, in the order of a run."""
        found = {"inspect": self.inspect()}
        trains, ends = self.config.optimizer.epochs > 0, self.config.end_to_end.epochs > 0
        if trains or ends:
            found |= {"embed": self.embed(), "capture": self.capture()}
        if trains and self._factored():
            found["factors"] = self.factors()
        found["optimize"] = self.optimize() if trains else self.rounding()
        if ends:
            found["end_to_end"] = self.end_to_end()
        if self.config.evaluation.texts:
            found["evaluate"] = self.evaluate()
        return found | {"merge": self.merge()}

    def _moments(self) -> _Moments:
        return _Moments(self.cuda)

    def _largest_tensor(self) -> float:
        return float(math.prod(self.shape.largest) * self.shape.itemsize)

    def load(self, moments: _Moments) -> None:
        """A block's weights are read tensor by tensor into host memory."""
        beside = {"a tensor's bytes": self._largest_tensor()}
        if self.cuda:
            moments.add("loading a block", {"weights": self.block}, {"weights on their way": self.block} | beside)
        else:
            moments.add("loading a block", {"weights": self.block}, beside)

    def inspect(self) -> UnitPeaks:
        """Reads one tensor after another: its bytes, itself, the one before it."""
        largest = max(math.prod(self.shape.largest), self.shape.largest_outer) * float(self.shape.itemsize)
        moments = _Moments(self.cuda)
        moments.add("reading a tensor", {}, {"a tensor, its bytes, the one before": 3 * largest})
        return moments.peaks("inspect")

    def _surroundings(self) -> dict[str, float]:
        return {"embeddings and head": float(self.shape.outer * self.shape.itemsize)}

    def embed(self) -> UnitPeaks:
        moments = self._moments()
        around, bytes_of = self._surroundings(), float(self.shape.largest_outer * self.shape.itemsize)
        on_way = around | {"a tensor's bytes": bytes_of} if self.cuda else {"a tensor's bytes": bytes_of}
        moments.add("loading the embeddings", around, on_way)
        moments.add("embedding", around | {"activations": self._chunk_tokens() * self.passing_per_token() / 4})
        return moments.peaks("embed")

    def capture(self) -> UnitPeaks:
        moments = self._moments()
        self.load(moments)
        passing = {"activations": self._chunk_tokens() * self.passing_per_token()}
        moments.add("a chunk's pass", {"weights": self.block} | passing, {"activation cache": self.cached()})
        return moments.peaks("capture")

    def factors(self) -> UnitPeaks:
        moments = self._moments()
        self._factorize(moments)
        return moments.peaks("factors")

    def _factorize(self, moments: _Moments) -> None:
        out, width = self.shape.largest
        whole, rank = 4.0 * out * width, self._rank((out, width))
        small = min(out, width)
        if self.increment.rank is not None and small > SMALL and rank <= LARGEST_PART * small:
            size = min(rank + max(16, rank // 8), small)
            # A basis, what it is made from and QR's copies; then the small matrix's decomposition.
            work = 4.0 * size * (4 * out + 3 * width)
        else:
            # LAPACK's copy of the weight, its U, the results and the work space of gesdd.
            work = 4 * whole + 4.0 * 4 * small * small
        held = self._frozen_part() | {"trained values": 4 * self.trained_numbers()}
        moments.add("factoring the largest linear", held | {"the weight widened": whole, "decomposition": work})

    def optimize(self) -> UnitPeaks:
        """One unit of one block, the fullest one."""
        config, moments = self.config, self._moments()
        cache = {"activation cache": self.cached()} | (self._at_home(steps_done=True) if self.cuda else {})
        self.load(moments)
        if self._factored():
            self._factorize(moments)
        several = timetable_of(config).units > 1
        again = config.optimizer.epochs * steps_per_epoch(config) > 1
        begun, whole = self.state(steps_done=False), 4.0 * math.prod(self.shape.largest)
        if self.engine.parts > 1:
            self._cut_up(moments, cache)
            # Every member builds it whole, and keeps the weights until it has begun.
            begun |= {"the block's weights, whole": self.block} | self.together()
        chunk, passing = self._chunk_tokens(), self.passing_per_token()
        first = {"one linear": self.making(self.shape.largest, training=False)}
        moments.add(
            "the first grids", begun | first | {"transformed weights": self._transformed(training=False)}, cache
        )
        if config.method.clipping != "none" and config.method.clipping_start == "search":
            # The weight in float32, and as the product has it.
            wide = whole * (1.5 if self.engine.products == 2 else 1) + self._transformed(training=False)
            moments.add(
                "the clipping's start",
                begun | {"one linear": wide, "activations": chunk * self._starting_per_token()},
                cache,
            )
        stepping = self.state(steps_done=again, best=several) | self.step_terms()
        moments.add("a step's backward pass", stepping, cache)
        update = self.state(steps_done=True, best=several)
        if self.engine.parts == 1:  # in parts they are among the values
            update |= {"gradients": 4 * self.trained_numbers()}
        moments.add("the optimizer's update", update, cache)
        result, after = self.result_size(), self.state(steps_done=True, best=several)
        codes = {"codes of the result": result, "transformed weights": self._transformed(training=False)}
        moments.add(
            "codes of the result",
            after | codes | {"one linear": self.making(self.shape.largest, training=False)} | self.together(),
            cache,
        )
        measured = {"codes of the result": result, "the block as it is loaded": self.block}
        if self.engine.parts > 1:
            measured["the block's weights, whole"] = self.block
        moments.add("measuring", after | measured | {"activations": chunk * passing}, cache | self._writing())
        if several:
            self._take_up(moments, cache)
        return moments.peaks("optimize")

    def _cut_up(self, moments: _Moments, cache: Terms) -> None:
        """A block of which every member of a group is to keep a part."""
        whole = self._frozen_part() | {"trained values": 4 * self.trained_numbers()}
        if self.cuda and self.engine.offload_parameters:
            moments.add("a block before it is cut up", {"weights": self.block}, dict(cache) | whole)
        else:
            moments.add("a block before it is cut up", whole, cache)

    def _writing(self) -> dict[str, float]:
        return {"a chunk on its way out": self.boundary(int(self._chunk_tokens() // self.config.data.sequence_length))}

    def _take_up(self, moments: _Moments, cache: Terms) -> None:
        """A state is read from storage while the block is made anew, and taken over."""
        numbers = self.trained_numbers() * (3 if self.config.optimizer.steps == "adamw" else 1)
        state = 4.0 * numbers / self.engine.parts + self.result_size()
        begun = self.state(steps_done=False)
        if self.engine.parts > 1:
            begun["the block's weights, whole"] = self.block
        host = {"a state that is read": state + self._read(state)}
        moments.add("taking up a state", begun, dict(cache) | host)

    def rounding(self) -> UnitPeaks:
        """Round-to-nearest, without training."""
        moments = self._moments()
        self.load(moments)
        whole = 4.0 * math.prod(self.shape.largest)
        moments.add(
            "rounding", {"weights": self.block, "one linear": 1.5 * whole, "codes of the result": self.result_size()}
        )
        return moments.peaks("optimize")

    def end_to_end(self) -> UnitPeaks:
        """The gradient of all blocks' scales over some sequences: the whole model, a byte a weight, and all its activations
        of one of them; or a block and its activations, and what entered each of them."""
        s, config, moments, length = self.shape, self.config, self._moments(), self.config.data.sequence_length
        at_hand = s.blocks if config.end_to_end.resident else 1
        kept = sum(math.prod(shape) for shape in s.linears if not self._recomputes(shape)) * at_hand
        held = self._surroundings() | {
            "codes of the blocks": float(s.weights * at_hand),
            "weights that are kept": float(kept * self.engine.products),
            # In storage's dtype, zero point, factor and gradient.
            "scales of the blocks": float(self.groups() * at_hand) * (s.itemsize + 1 + 4 + 4),
            "norms": 4.0 * s.rest * at_hand,
        }
        if not self.cuda:
            held["libraries at work"] = WORK
        boundary = 4.0 * s.hidden * length * s.blocks
        if not config.end_to_end.resident:
            samples = min(config.end_to_end.unit_samples, config.end_to_end.batch_size)
            saved = boundary * samples + self.saved_per_token(whole=True) * length
        elif self.engine.checkpoint:
            saved = boundary + self.saved_per_token(whole=True) * length
        else:
            saved = self.saved_per_token() * length * s.blocks
        one = (4.0 + 2.0 * self.engine.products) * math.prod(s.largest)
        entries = min(length, TOKENS_AT_ONCE) * s.vocabulary
        # Two logits and their gradient, and a few rows of the divergence in float32.
        logits = 3.0 * s.itemsize * entries + 20.0 * min(entries, max(s.vocabulary, piece_on(self.engine.device)))
        cache = {"activation cache": self.cached()}
        # Its linears are there in the model's dtype until the codes take their places.
        between = {"what entered the blocks": 0.0 if config.end_to_end.resident else saved}
        moments.add("loading a block", held | between | {"a block as it is made": self.block}, cache)
        moments.add("the head's pass", held | {"activations": saved, "logits": logits}, cache)
        moments.add("the backward pass", held | {"activations": saved, "one linear": one}, cache)
        return moments.peaks("end_to_end")

    def evaluate(self) -> UnitPeaks:
        config, moments = self.config, self._moments()
        window = float(config.evaluation.length * self.shape.hidden * self.shape.itemsize)
        hidden = min(config.evaluation.windows * window, max(window, float(config.storage.cache_mib << 20)))
        around = self._surroundings() | {"hidden states": hidden}
        moments_host = {"a tensor's bytes": self._largest_tensor()}
        if self.cuda:
            moments_host |= {"weights on their way": self.block}
        moments.add("loading a block", around | {"weights": self.block}, moments_host)
        whole, result = 4.0 * math.prod(self.shape.largest), self.result_size()
        rounding = around | {"weights": self.block, "one linear": 1.5 * whole, "codes of the result": result}
        if "round_to_nearest" in config.evaluation.baselines:
            moments.add("rounding", rounding)
        loaded = around | {"weights": self.block, "codes of the result": result}
        host = {"codes of the result": result} if self.cuda else {}
        moments.add("a block's codes", loaded, host | {"a file's bytes": self._read(result)})
        tokens = config.evaluation.length
        passing = tokens * self.passing_per_token() + tokens * self.shape.vocabulary * (self.shape.itemsize + 8.0)
        moments.add("a window's pass", around | {"weights": self.block, "activations": passing})
        return moments.peaks("evaluate")

    def merge(self) -> UnitPeaks:
        """One shard: a block's codes, one linear packed, one tensor written."""
        moments = _Moments(self.cuda)
        out, width = self.shape.largest
        packed = out * width * self.config.scheme.bits / 8
        outer = 2.0 * self.shape.largest_outer * self.shape.itemsize
        codes = {"codes of a block": self.result_size()}
        moments.add("packing", {}, codes | {"a linear packed": 2 * packed, "pieces": 2 * PIECE})
        moments.add("a tensor around the blocks", {}, codes | {"a tensor and its bytes": outer})
        return moments.peaks("merge")


def driver_memory(engine: Engine) -> float:
    """Of the driver's process; it does not grow with the model."""
    return DRIVER + DRIVER_DEEPSPEED * (engine.name == "deepspeed")


def worker_peak(units: Mapping[str, UnitPeaks], place: Place) -> tuple[str, Peak]:
    """The stage and the peak of a worker that runs all kinds of units; on a machine without a GPU there is no device.

    Raises ValueError for a device that no unit has.
    """
    found = {stage: unit.host if place == "host" else unit.device for stage, unit in units.items()}
    peaks = {stage: peak for stage, peak in found.items() if peak is not None}
    if not peaks:
        raise ValueError(f"no unit of this plan has a {place}")
    stage = max(peaks, key=lambda name: peaks[name].total)
    return stage, peaks[stage]
