"""What every stage needs inside an actor: the open stores, the model skeleton, and memory that is bounded and explicit."""

from __future__ import annotations

import copy
import os
import resource
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cluster.group import ALONE, Membership, ShouldYield, stay
from cluster.units import UnitError, YieldUnit
from lsi.block import linear_names, outputs_of
from lsi.engine import Engine
from lsi.objective import freeze
from pipeline.artifacts import Artifact, CorruptArtifactError, Standby, Writer, discard, read_tensors
from pipeline.call_arguments import call_arguments
from pipeline.config import RunConfig
from pipeline.engines import home_of, make_engine
from pipeline.errors import UserError
from pipeline.faults import StorageError
from pipeline.identity import Resolved
from pipeline.lease import check_same_place, check_term
from pipeline.members import Members
from pipeline.model_source import ModelSource, open_model
from pipeline.packed_source import PackedSource, open_packed
from pipeline.skeleton import (
    Arguments,
    Skeleton,
    Surroundings,
    load_block,
    load_surroundings,
    make_skeleton,
    stored_name,
)
from pipeline.store import StorageFullError, Store, open_store
from pipeline.tail import Tail, Trainee, local_name


@dataclass(frozen=True)
class Chunk:
    """One activation object: `file` of a committed artifact, holding a tensor `hidden`, samples × sequence × hidden.

    `tensor` names another one in a file of the same kind, such as tokens, samples × sequence.
    """

    artifact: Artifact
    file: str
    tensor: str = "hidden"


@dataclass(frozen=True)
class Context:
    """What a driver tells its actors. Everything here is resolved: nothing depends on the machine an actor runs on."""

    config: RunConfig
    run_url: str
    model_url: str
    checkpoint_url: str
    dtype: torch.dtype
    autocast: torch.dtype | None
    model_options: dict[str, Any] = field(default_factory=dict, repr=False)
    # The driver's turn, which its workers commit under, and what proves that they see the driver's storage; 0: neither is checked.
    term: int = 0
    nonce: str = ""
    adam: Literal["torch", "cpu_adam"] = "torch"

    @property
    def resolved(self) -> Resolved:
        """What `auto` came to."""
        return Resolved(self.autocast, self.adam)


class ChunkCache:
    """Activation chunks, kept up to a number of bytes, the next ones read ahead by one thread."""

    def __init__(self, store: Store, limit_bytes: int) -> None:
        self.store = store
        self.limit = limit_bytes
        self.kept: OrderedDict[Chunk, Tensor] = OrderedDict()
        self.coming: dict[Chunk, Future[Tensor]] = {}
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def _read(self, chunk: Chunk) -> Tensor:
        return read_tensors(self.store, chunk.artifact, chunk.file)[chunk.tensor]

    def prefetch(self, chunks: Iterable[Chunk]) -> None:
        """Begin to read chunks that will be asked for next."""
        for chunk in chunks:
            if chunk not in self.kept and chunk not in self.coming:
                self.coming[chunk] = self.reader.submit(self._read, chunk)

    def get(self, chunk: Chunk) -> Tensor:
        """The chunk's hidden states. Raises CorruptArtifactError."""
        if chunk in self.kept:
            self.kept.move_to_end(chunk)
            return self.kept[chunk]
        coming = self.coming.pop(chunk, None)
        tensor = self._arrived(chunk, coming) if coming else self._read(chunk)
        self._keep(chunk, tensor)
        return tensor

    def _arrived(self, chunk: Chunk, coming: Future[Tensor]) -> Tensor:
        try:
            return coming.result()
        except Exception:  # it may have failed long ago, on what has been made anew since
            return self._read(chunk)

    def _keep(self, chunk: Chunk, tensor: Tensor) -> None:
        self.kept[chunk] = tensor
        total = sum(t.nbytes for t in self.kept.values())
        # The newest goes: dropping the oldest would empty the whole cache on each pass over a set just above the limit.
        while total > self.limit and self.kept:
            _, dropped = self.kept.popitem()
            total -= dropped.nbytes

    def drop_except(self, artifacts: set[str]) -> None:
        """Forget chunks of other artifacts, and reads that nobody waits for any more."""
        for chunk in [c for c in self.kept if c.artifact.path not in artifacts]:
            del self.kept[chunk]
        for chunk in [c for c in self.coming if c.artifact.path not in artifacts]:
            self.coming.pop(chunk).cancel()


class Worker:
    """An actor's open model and stores, and the last block it worked on. `members`: those it trains blocks with, joined."""

    def __init__(
        self, context: Context, name: str, should_yield: ShouldYield = stay, members: Members | None = None
    ) -> None:
        self.members = members or Members()
        self.context = context
        self.config = context.config
        self.name = name
        self.should_yield = should_yield
        self.device = context.config.compute.device
        # Where a block in training is built, for its engine to take over.
        self.home = home_of(context.config.compute)
        self.store = open_store(context.run_url, context.config.storage.options)
        self.checkpoint = open_store(context.checkpoint_url, context.config.storage.options)
        if context.term:
            self.store.check_fence = partial(check_term, self.store, context.term)
        shared = context.config.storage.factors
        self.factors = open_store(shared, context.config.storage.options) if shared else self.store
        self.chunks = ChunkCache(self.store, context.config.storage.cache_mib << 20)
        self._arguments: dict[int, list[Arguments]] = {}
        self._block: tuple[int, nn.Module] | None = None
        self._frozen: dict[int, nn.Module] = {}
        self._tail: Trainee | None = None
        # The end-to-end stage keeps its model here from one unit to the next.
        self.student: object = None
        self._engine: Engine | None = None
        # The optimize stage keeps its block here from one epoch to the next.
        self.held: tuple[str, Any] | None = None
        self.started = time.time()
        # What a person should know of the present unit; told with its result.
        self.notes: list[str] = []

    @property
    def engine(self) -> Engine:
        """Serves all blocks that this worker trains."""
        if self._engine is None:
            self._check_group()
            config = self.config
            self._engine = make_engine(config.compute, self.context.adam, config.optimizer.batch_size)
        return self._engine

    def _check_group(self) -> None:
        """A block that fewer or more processes train has other bytes than its address says."""
        if self.config.compute.group != self.members.size:
            raise UserError(
                f"compute.group is {self.config.compute.group}, but this worker is a group of {self.members.size}: "
                "groups are Ray's workers alone; set compute.group to 1 to train in this process"
            )

    @cached_property
    def source(self) -> ModelSource:
        store = open_store(self.context.model_url, self.context.model_options)
        open_source = open_packed if self.config.is_finetune else open_model
        return open_source(store, trust_remote_code=self.config.model.trust_remote_code)

    @cached_property
    def skeleton(self) -> Skeleton:
        return make_skeleton(self.source.config, trust_remote_code=self.config.model.trust_remote_code)

    def surroundings(self) -> Surroundings:
        """Embeddings, norm and head. Not kept: a stage that needs them holds them for one unit."""
        return load_surroundings(self.skeleton, self.source, self.context.dtype, self.device)

    def arguments(self, block: int, sequence_length: int) -> Arguments:
        """What a block is called with; recorded once per sequence length."""
        if sequence_length not in self._arguments:
            self._arguments[sequence_length] = call_arguments(
                self.skeleton, self.source, sequence_length, self.context.dtype, self.device
            )
        return self._arguments[sequence_length][block]

    def block(self, index: int) -> nn.Module:
        """The full-precision block in the model's dtype. The last one is kept; do not change it."""
        if self._block is None or self._block[0] != index:
            self._block = self.student = None
            self._block = (index, self.new_block(index))
        return self._block[1]

    def new_block(self, index: int, without: Collection[str] = ()) -> nn.Module:
        """A full-precision block of the caller's own, the weights of the linears in `without` not read."""
        return load_block(self.skeleton, self.source, index, self.context.dtype, self.device, without)

    def forget_block(self) -> None:
        """Let go of the kept one: it is read again when it is asked for."""
        self._block = None

    def frozen_block(self, index: int) -> nn.Module:
        """The full-precision block as a loss runs it. Kept until `keep_frozen`; do not change it."""
        if index not in self._frozen:
            held = self._block is not None and self._block[0] == index
            own = copy.deepcopy(self.block(index)) if held else self.new_block(index)
            self._frozen[index] = freeze(own, self.context.autocast)
        return self._frozen[index]

    def keep_frozen(self, needed: Collection[int]) -> None:
        """Let go of all other blocks that losses ran."""
        self._frozen = {index: block for index, block in self._frozen.items() if index in needed}

    def trainee(self, index: int) -> Trainee:
        """What a training unit of block `index` trains: that block, or in a fine-tune all from there on. Kept as `block` is."""
        if not self.config.is_finetune:
            return Trainee(self.block(index), self.linears(index), partial(self.arguments, index))
        if self._tail is None:
            self._tail = self._make_tail(range(index, len(self.skeleton)))
        return self._tail

    def trainee_arguments(self, index: int, sequence_length: int) -> Arguments:
        """What it is called with."""
        if not self.config.is_finetune:
            return self.arguments(index, sequence_length)
        return self.trainee(index).arguments(sequence_length)

    def _make_tail(self, blocks: range) -> Trainee:
        assert isinstance(self.source, PackedSource)
        starts = {}
        for place, block in enumerate(blocks):
            for name in self.linears(block):
                full = f"{self.skeleton.block_prefix(block)}.{name}.weight"
                weight = self.source.quantized(stored_name(full, self.source, self.skeleton.model))
                starts[local_name(place, name)] = weight.to(self.device)

        def arguments(sequence_length: int) -> Arguments:
            return {"each": [self.arguments(block, sequence_length) for block in blocks]}

        around = self.surroundings()
        # A function and no bound method: copies of the tail share the embeddings and the head.
        tail = Tail([self.new_block(block) for block in blocks], lambda hidden: around.head(hidden))
        return Trainee(tail, list(starts), arguments, starts)

    def release(self) -> None:
        """Let go of blocks and activations: a stage that comes after them needs the memory."""
        self._block = None
        self._frozen = {}
        self._tail = None
        self.student = None
        self.held = None
        if self._engine is not None:
            self._engine.close()
        self.chunks.drop_except(set())

    @property
    def together(self) -> bool:
        """Whether all processes of a group take part in whatever reads a block in training, and in passes without gradients. Where each
        holds a part of the block only, the first one alone does, and the others serve it."""
        return not self.config.compute.partitions

    def writer(self, artifact: Artifact) -> Writer:
        """Writes an artifact in this process's name, if it is the one who does."""
        return Writer(self.store, artifact) if self.members.leads else Standby(self.store, artifact)

    def outputs(self, block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
        """What a block makes of hidden states, without gradients. Each process of a group computes a part of the samples."""
        if not self.together:
            return outputs_of(block, hidden, arguments)
        return self.members.shared(hidden, lambda part: outputs_of(block, part, arguments))

    def part(self, samples: Sequence[int]) -> Sequence[int]:
        """This process's own of some samples, where they are computed together; else all."""
        return self.members.part(samples) if self.together else samples

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Sums over the processes that compute together, in place."""
        if self.together:
            self.members.add_up(tensors)

    def agreed(self, loss: float) -> float:
        """A loss that all processes of a group have computed, as the first one has: it decides what becomes of the block."""
        return self.members.agree(loss) if self.together else loss

    def leave_if_asked(self) -> None:
        """Between two pieces of work, wherever a unit may be cut. Raises YieldUnit."""
        if self.should_yield():
            raise YieldUnit

    def stamp(self) -> dict[str, Any]:
        """Who does the present unit, since when and with how much memory so far."""
        return stamp(self.name, self.started)

    def linears(self, index: int) -> list[str]:
        """The linears of a block that are quantized."""
        return linear_names(self.skeleton.blocks[index], self.skeleton.block_prefix(index), self.config.scheme.skip)


def peak_rss_mib() -> float:
    """Peak resident memory of this process, MiB."""
    # Linux's getrusage begins with the peak of the process that started this one.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def limit_threads(threads: int) -> None:
    """Set the thread counts that decide the order of sums. The inter-op pool can be set only once a process."""
    torch.set_num_threads(threads)
    with suppress(RuntimeError):
        torch.set_num_interop_threads(1)


Task = Callable[[Worker], dict[str, Any]]


class DoneByAll:
    """A unit that all processes of a worker do together. Others are the first one's alone."""


class PassedByAll:
    """A unit that they do together where they compute together (`Worker.together`), and else the first one alone."""


def takes_part(task: Task, worker: Worker) -> bool:
    """Whether a unit is this process's to do."""
    return worker.members.leads or isinstance(task, DoneByAll) or (isinstance(task, PassedByAll) and worker.together)


def make_handler(
    context: Context, name: str, should_yield: ShouldYield = stay, membership: Membership = ALONE
) -> Callable[[Task], dict[str, Any]]:
    """The function that an actor runs units with. A unit is a picklable callable on the worker, such as a dataclass."""
    limit_threads(context.config.compute.threads)
    # cuBLAS is deterministic only with a fixed workspace, chosen before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    members = Members(membership)
    worker = Worker(context, name, should_yield, members)
    if context.term:
        try:
            check_same_place(worker.store, context.term, context.nonce)
        except UserError as error:
            raise UnitError("fatal", str(error)) from error
    members.join(context.config.compute.device)
    return lambda task: handle_unit(task, worker) if takes_part(task, worker) else {}


def handle_unit(task: Task, worker: Worker) -> dict[str, Any]:
    """Run one unit; what went wrong is told apart by what cures it. Raises UnitError, and YieldUnit as it comes."""
    worker.started = time.time()
    worker.notes = []
    try:
        result = _run_or_discard(task, worker)
    except (UserError, StorageFullError, PermissionError) as error:
        raise UnitError("fatal", str(error)) from error
    except StorageError as error:
        raise UnitError("outage", str(error)) from error
    return result | worker.stamp() | {"notes": worker.notes}


def _run_or_discard(task: Task, worker: Worker) -> dict[str, Any]:
    try:
        return task(worker)
    except CorruptArtifactError as error:
        discard(worker.store, error.artifact)
        raise UnitError("replan", str(error)) from error


def stamp(worker: str, started: float) -> dict[str, Any]:
    """Who did a unit, when, and with how much memory."""
    return {
        "worker": worker,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": started,
        "ended": time.time(),
        "peak_rss_mib": round(peak_rss_mib(), 1),
    }
