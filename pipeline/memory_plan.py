"""What every kind of unit holds in memory at its peak, from a block's shapes and the configuration alone.

A unit goes through moments (a block is loaded, factored, stepped, measured …); at each it holds terms that have a name and a
size, and its peak is the moment with the largest sum. Terms are counted from the tensors that the code makes. Four numbers
are constants that were measured: what processes hold before any work (`BASE`, `DRIVER`, `CUDA_HOST`, `CUDA_CONTEXT`).

With W the numbers of the largest linear, and everything computed from a weight in float32:

    step       W' while it is made is two or three matrices of 4·W: the weight widened, the increment, their sum. In the
               backward pass W', the gradient of W_hat and what passes the clamp are. Without recomputation W' and what the
               product keeps of W_hat stay for every linear.
    a token    what its way through the block leaves for the backward pass, `saved_per_token`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lsi.factors import LARGEST_PART, MANY, SMALL
from pipeline.config import RunConfig
from pipeline.costs import factored, size_of_factors
from pipeline.plan_shapes import BlockShape

GIB = float(1 << 30)
# Resident memory of a worker that has imported torch, Ray and transformers and built the skeleton; measured, Linux.
BASE = 0.68 * GIB
# Of the driver, which has read the texts and made tokens and the plan, too.
DRIVER = 1.05 * GIB
# What a CUDA context takes on the host and on the device. Taken from other work with H100s, not measured here.
CUDA_HOST, CUDA_CONTEXT = 2.0 * GIB, 0.6 * GIB
# What is read beside a file's tensors, and written behind computing.
PIECE = float(1 << 26)

Place = Literal["host", "device"]
Terms = Mapping[str, float]


@dataclass(frozen=True)
class Engine:
    """What of a worker's choices decides its memory. products: bytes of a number in products. offload_*: kept in host memory
    by DeepSpeed; without, everything lies on the device."""

    name: Literal["torch", "deepspeed"] = "torch"
    device: Literal["cpu", "cuda"] = "cpu"
    micro_batch: int = 1
    recompute: bool | None = None
    checkpoint: bool = False
    products: int = 2
    offload_parameters: bool = False
    offload_optimizer: bool = False


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


class MemoryPlan:
    """The peaks of a configuration's units on a worker with an engine."""

    def __init__(self, shape: BlockShape, config: RunConfig, engine: Engine) -> None:
        self.shape, self.config, self.engine = shape, config, engine
        self.increment = config.method.increments
        self.cuda = engine.device == "cuda"
        self.trained = bool(config.optimizer.epochs)
        self.block = float((shape.weights + shape.rest) * shape.itemsize)

    def units(self) -> dict[str, UnitPeaks]:
        """By stage, in the order of a run."""
        found = {"inspect": self.inspect()}
        if self.trained:
            found |= {"embed": self.embed(), "capture": self.capture()}
            if self._factored():
                found["factors"] = self.factors()
        found["optimize"] = self.optimize() if self.trained else self.rounding()
        if self.config.evaluation.texts:
            found["evaluate"] = self.evaluate()
        return found | {"merge": self.merge()}

    # -- sizes ----------------------------------------------------------------------------------------------------------

    def _factored(self) -> bool:
        return factored(self.increment)

    def _rank(self, shape: tuple[int, int]) -> int:
        return min(self.increment.rank or min(shape), *shape)

    def factor_size(self) -> float:
        """Of all factors of a block, bytes."""
        return sum(size_of_factors(*shape, self.increment) for shape in self.shape.linears)

    def groups(self) -> int:
        return sum(out * self.config.scheme.grid.groups(width) for out, width in self.shape.linears)

    def _trained_in(self, shape: tuple[int, int]) -> float:
        method, (out, width) = self.config.method, shape
        total = self.increment.entries(out, width) + (out * width if method.rounding == "learned" else 0)
        return float(total + (2 * out * self.config.scheme.grid.groups(width) if method.clipping != "none" else 0))

    def trained_numbers(self) -> float:
        return sum(self._trained_in(shape) for shape in self.shape.linears)

    def largest_trained(self) -> float:
        """Of the largest trained tensor."""
        every = self.config.method.rounding == "learned" or (not self._factored() and self.increment.kind == "dense")
        return float(math.prod(self.shape.largest)) if every else 2.0 * self.groups()

    def result_size(self) -> float:
        """Codes, scales and zero points."""
        return float(self.shape.weights + self.groups() * (self.shape.itemsize + 1))

    def boundary(self, samples: int) -> float:
        """Hidden states of some samples."""
        return float(samples * self.config.data.sequence_length * self.shape.hidden * self.shape.itemsize)

    def cached(self) -> float:
        """Activations on the host: what is kept, and what is read ahead of inputs and targets."""
        data, storage = self.config.data, self.config.storage
        chunk = self.boundary(min(storage.chunk_samples, data.samples))
        kept = min(float(storage.cache_mib << 20), 2 * self.boundary(data.samples))
        ahead = min(4 * chunk, 2 * self.boundary(data.samples))
        return max(kept, 2 * chunk) + (ahead if kept < 2 * self.boundary(data.samples) else 0.0)

    def saved_per_token(self) -> float:
        """Bytes that a token leaves in a block for the backward pass, its linears keeping their inputs alone."""
        s, p = self.shape, self.engine.products
        attention = p * (5 * s.attention + 2 * s.keys)
        wide = p * (4 if s.gated else 2) * s.intermediate * s.passes
        # Inputs, the stream between the parts, their normed inputs, outputs, their error, and the gradients of two of these.
        if self.engine.checkpoint:
            return 4.0 * 10 * s.hidden + max(attention, wide)
        return 4.0 * 8 * s.hidden + attention + wide

    def _frozen_per_token(self) -> float:
        s, p = self.shape, self.engine.products
        return 4.0 * 3 * s.hidden + p * (5 * s.attention + 2 * s.keys + 3 * s.intermediate * s.passes)

    def passing_per_token(self) -> float:
        """Bytes of a token on its way through a block that nothing is kept of, and of the error of its outputs."""
        s = self.shape
        wide = (3 if s.gated else 2) * s.intermediate * s.passes
        return max(s.itemsize * (5 * s.hidden + wide), s.itemsize * 3 * s.hidden + 4.0 * 4 * s.hidden)

    def _starting_per_token(self) -> float:
        """The same in float32 with products in their dtype, while what enters a linear is widened and squared."""
        s, p = self.shape, self.engine.products
        squared = p + (4.0 if p < 4 else 0.0) + 4.0
        wide = max((3.0 if s.gated else 2.0) * p, squared) * s.intermediate * s.passes
        return 4.0 * 2 * s.hidden + max(wide, squared * s.attention)

    def _recomputes(self, shape: tuple[int, int]) -> bool:
        return math.prod(shape) >= MANY if self.engine.recompute is None else self.engine.recompute

    def _kept(self, shape: tuple[int, int]) -> float:
        """What a linear that does not recompute keeps between the passes: W' and what the product has of W_hat, and factors
        in float32 where they are kept narrower."""
        if self._recomputes(shape):
            return 0.0
        widened = 4.0 * sum(shape) * self._rank(shape) if self._factored() else 0.0
        narrow = widened > size_of_factors(*shape, self.increment)
        return math.prod(shape) * (4 + self.engine.products) + widened * narrow

    def making(self, shape: tuple[int, int], *, training: bool = True) -> float:
        """What is made of a linear at once until there are its codes, or in training its gradients."""
        out, width = shape
        whole, rank = 4.0 * out * width, self._rank(shape) if self._factored() else 0
        left, right = 4.0 * out * rank, 4.0 * width * rank
        matrices = 3 if self.increment.kind != "none" else 2
        matrices += self.config.method.rounding == "learned"
        # Where an equivalent transformation is trained, the range follows it by the difference of two more.
        matrices += 2 * (training and bool(self.config.method.equivalence))
        return max(matrices * whole + left + right, whole + left + 3 * right)

    def backward(self) -> dict[str, float]:
        """The fullest linear in the backward pass, the last one first: gradients so far, what is kept of those that are to
        come, and what is made of itself."""
        parts = self.config.optimizer.batch_size > self.engine.micro_batch
        kept = sum(self._kept(shape) for shape in self.shape.linears)
        gradients = 4 * self.trained_numbers() if parts else 0.0
        fullest: dict[str, float] = {}
        for shape in reversed(self.shape.linears):
            made = self.making(shape)
            if not self._recomputes(shape):
                made = 4.0 * math.prod(shape)  # W' and W_hat are among what is kept
            now = {"gradients": gradients, "kept between the passes": kept, "one linear": made}
            if sum(now.values()) > sum(fullest.values()):
                fullest = now
            gradients += 0.0 if parts else 4 * self._trained_in(shape)
            kept -= self._kept(shape)
        return fullest

    # -- what lies on the device all through a block's training -----------------------------------------------------------

    def state(self, steps_done: bool, best: bool = False) -> dict[str, float]:
        """What of a block in training is where it is trained."""
        terms = self._fixed(best)
        if self.engine.name == "torch":
            return terms | self._frozen_part() | self._trained_part(steps_done)
        away = self.engine
        if self.cuda and away.offload_parameters:
            # The linear that computes and the one that is read ahead.
            terms["linears that are fetched"] = 2.0 * math.prod(self.shape.largest) * self.shape.itemsize
        elif self.cuda or not away.offload_parameters:
            terms |= self._frozen_part()
        if not (self.cuda and away.offload_optimizer):
            terms |= self._trained_part(steps_done)
        return terms if self.cuda else terms | self._at_home(steps_done)

    def _at_home(self, steps_done: bool) -> dict[str, float]:
        """What DeepSpeed keeps in host memory."""
        if self.engine.name == "torch":
            return {}
        kept = self._frozen_part() if self.engine.offload_parameters else {}
        return kept | (self._trained_part(steps_done) if self.engine.offload_optimizer else {})

    def _fixed(self, best: bool) -> dict[str, float]:
        terms = {"grids": self.groups() * (self.shape.itemsize + 1.0)}
        if self.increment.kind == "dense" and not self._factored():
            terms["grids"] += 4.0 * self.groups()
        if best:
            terms["best state so far"] = self.result_size()
        method = self.config.method
        frozen = method.look_ahead + (method.quantized_stream_loss > 0)
        terms["frozen blocks of the loss"] = frozen * float(self.shape.weights * self.engine.products)
        return terms

    def _frozen_part(self) -> dict[str, float]:
        return {"weights": self.block, "factors": self.factor_size()}

    def _trained_part(self, steps_done: bool) -> dict[str, float]:
        numbers = self.trained_numbers()
        # DeepSpeed has the values twice, its own and the optimizer's, and gradients of both for good.
        terms = {"trained values": (4 if self.engine.name == "torch" else 16) * numbers}
        if steps_done and self.config.optimizer.steps == "adamw":
            terms["AdamW's moments"] = 8 * numbers
        return terms

    def _transformed(self, *, training: bool) -> float:
        """Weights as an equivalent transformation leaves them, in float32; in training what they are made from and their
        gradients, too."""
        if not self.config.method.equivalence:
            return 0.0
        return (12.0 if training else 4.0) * self.shape.weights

    def step_terms(self) -> dict[str, float]:
        """What one step adds on the device."""
        config = self.config
        tokens = self.engine.micro_batch * config.data.sequence_length
        saved = self.saved_per_token() + config.method.look_ahead * self._frozen_per_token()
        transformed = {"transformed weights": self._transformed(training=True)}
        return self.backward() | transformed | {"activations": tokens * saved}

    def _chunk_tokens(self) -> float:
        data = self.config.data
        return float(min(self.config.storage.chunk_samples, data.samples) * data.sequence_length)

    def _read(self, size: float) -> float:
        """Of a file that is read: its bytes beside its tensors."""
        return min(size, PIECE)

    # -- units ------------------------------------------------------------------------------------------------------------

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
        """One epoch of one block, the fullest one."""
        config, moments = self.config, self._moments()
        cache = {"activation cache": self.cached()} | (self._at_home(steps_done=True) if self.cuda else {})
        self.load(moments)
        if self._factored():
            self._factorize(moments)
        several = config.optimizer.epochs > 1
        begun, whole = self.state(steps_done=False), 4.0 * math.prod(self.shape.largest)
        chunk, passing = self._chunk_tokens(), self.passing_per_token()
        if config.method.clipping != "none" and config.method.clipping_start == "search":
            # The weight in float32, and as the product has it.
            wide = whole * (1.5 if self.engine.products == 2 else 1) + self._transformed(training=False)
            moments.add(
                "the clipping's start",
                begun | {"one linear": wide, "activations": chunk * self._starting_per_token()},
                cache,
            )
        stepping = self.state(steps_done=True, best=several) | self.step_terms()
        moments.add("a step's backward pass", stepping, cache)
        update = self.state(steps_done=True, best=several) | {"gradients": 4 * self.trained_numbers()}
        moments.add("the optimizer's update", update | {"its temporaries": self._temporaries()}, cache)
        result, after = self.result_size(), self.state(steps_done=True, best=several)
        codes = {"codes of the result": result, "transformed weights": self._transformed(training=False)}
        moments.add(
            "codes of the result",
            after | codes | {"one linear": self.making(self.shape.largest, training=False)},
            cache,
        )
        measured = {"codes of the result": result, "the block as it is loaded": self.block}
        moments.add("measuring", after | measured | {"activations": chunk * passing}, cache | self._writing())
        if several:
            self._take_up(moments, cache)
        return moments.peaks("optimize")

    def _temporaries(self) -> float:
        """torch's AdamW: three tensors of the largest parameter's size on a CPU (one of them the parameter's before); on a GPU
        one of all parameters'."""
        if self.config.optimizer.steps != "adamw":
            return 4 * self.largest_trained()
        return 4 * self.trained_numbers() if self.cuda else 12 * self.largest_trained()

    def _writing(self) -> dict[str, float]:
        return {"a chunk on its way out": self.boundary(int(self._chunk_tokens() // self.config.data.sequence_length))}

    def _take_up(self, moments: _Moments, cache: Terms) -> None:
        """A state is read from storage while the block is made anew, and taken over."""
        state = 4.0 * self.trained_numbers() * (3 if self.config.optimizer.steps == "adamw" else 1) + self.result_size()
        begun = self.state(steps_done=False)
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
