"""The sections of a run's configuration, their keys and defaults; what of them goes together is in `config.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lsi.grid import Grid
from lsi.increment import Increment, Kind
from lsi.linear import Parts
from lsi.pairs import KINDS, WEIGHT_ONLY


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """What is quantized."""

    source: str = Field(
        min_length=1,
        description="local directory, hub id (org/name), any fsspec URL of a model folder, or a .gguf file",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype of unquantized tensors and scales in the result; auto: as stored (a GGUF file: bfloat16)",
    )
    trust_remote_code: bool = Field(
        False, description="run code that comes with the model; off unless you trust its author"
    )


class DataConfig(Section):
    """Calibration text."""

    source: str = Field(
        min_length=1,
        description="a text, .jsonl, .json or .parquet file (local or any fsspec URL), or a hub data set id",
    )
    subset: str | None = Field(None, description="the data set's configuration, such as wikitext-2-raw-v1")
    split: str = Field("train", description="the data set's split")
    column: str = Field("text", description="the column that holds the text")
    samples: int = Field(128, ge=1, description="number of calibration sequences")
    sequence_length: int = Field(2048, ge=2, description="tokens in each")
    seed: int = Field(0, ge=0, lt=1 << 63, description="which windows of the text are taken")


class SchemeConfig(Section):
    """The integer grids of the result's weights and, if wanted, of the activations that they meet."""

    bits: int = Field(4, ge=2, le=8, description="2, 3, 4, 6 or 8")
    group_size: int | None = Field(
        128, ge=1, description="input channels that share a scale; null: one scale per output channel"
    )
    symmetric: bool = Field(False, description="zero point fixed in the middle of the grid")
    activation_bits: Literal[4, 6, 8] | None = Field(
        None, description="4, 6 or 8: the linears' inputs are quantized too, with one range a token; null: they are not"
    )
    activation_symmetric: bool = Field(
        True,
        description="what engines serve; false: the paper's asymmetric ranges, which are evaluated and not published",
    )
    quantize_qkv: bool = Field(
        False, description="q, k and v inside the attention too, as in the paper; evaluated and not published"
    )
    skip: list[str] = Field(
        default=["lm_head"],
        description="linears left alone: names, suffixes or fnmatch patterns (routers and gates of one output always are)",
    )

    @field_validator("bits")
    @classmethod
    def _bits(cls, value: int) -> int:
        if value not in (2, 3, 4, 6, 8):
            raise ValueError("bits must be 2, 3, 4, 6 or 8")
        return value

    @model_validator(mode="after")
    def _activations(self) -> SchemeConfig:
        if self.activation_bits is None and (self.quantize_qkv or not self.activation_symmetric):
            key = "quantize_qkv true" if self.quantize_qkv else "activation_symmetric false"
            raise ValueError(f"{key} means nothing without activation_bits: set that to 4, 6 or 8, or leave it out")
        return self

    @property
    def grid(self) -> Grid:
        """The weights' grid as the algorithm takes it."""
        # Kernels that multiply integers may take a scale's sign for a part of its size (vLLM issue 48905).
        return Grid(self.bits, self.group_size, self.symmetric, positive=self.activation_bits is not None)

    @property
    def activation_grid(self) -> Grid | None:
        """The activations' grid: all of a token's channels are one group."""
        return None if self.activation_bits is None else Grid(self.activation_bits, None, self.activation_symmetric)

    @property
    def words(self) -> str:
        """Such as "W3 group 64, asymmetric", or "W4A8 per channel, symmetric, activations symmetric"."""
        size = f"group {self.group_size}" if self.group_size else "per channel"
        weights = f"{size}, {'symmetric' if self.symmetric else 'asymmetric'}"
        if self.activation_bits is None:
            return f"W{self.bits} {weights}"
        activations = f"activations {'symmetric' if self.activation_symmetric else 'asymmetric'}"
        operands = " with q, k and v" if self.quantize_qkv else ""
        return f"W{self.bits}A{self.activation_bits} {weights}, {activations}{operands}"


class MethodConfig(Section):
    """What is learned."""

    clipping: Literal["learned", "direct", "none"] = Field(
        "learned", description="clipping bounds: learned through a sigmoid (LWC), directly (for signed steps), or none"
    )
    clipping_start: Literal["search", "range"] = Field(
        "search",
        description="where the bounds begin: at the shrunken range that changes a linear's outputs least, or at the full range (OmniQuant)",
    )
    rounding: Literal["learned", "none"] = Field(
        "none", description="learned: an offset within half a step for every weight, added before rounding"
    )
    increment: Kind = Field(
        "diagonal",
        description="M in W' = W + U M Vh: none, diagonal (LSI), corner (and a dense k x k corner), band (SDE), dense (every weight)",
    )
    rank: int | None = Field(None, ge=1, description="keep the leading singular values only; null: all of them")
    corner: int = Field(100, ge=1, description="k of the corner increment; the paper has 100 to 600")
    band: int = Field(1, ge=0, description="diagonals on each side of the main one, of the band increment")
    factor_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of U and Vh; auto: bfloat16 for linears of 16 million weights and more. U is multiplied in it where compute.dtype is bfloat16, too",
    )
    equivalence: list[Literal["norm", "value_output", "query_key", "up_down"]] | Literal["auto"] = Field(
        default=[],
        description="equivalent transformations (LET), folded into norms and weights: norm, value_output, up_down, query_key "
        "(changes no code, serves quantize_qkv), or auto: those that the family has and the scheme gains by",
    )
    equivalence_start: Literal["identity", "smoothquant"] = Field(
        "smoothquant", description="LET's scales at first: 1, or from the ranges of inputs and weights"
    )
    shifts: bool = Field(False, description="LET with shifts, where a family's biases can hold them (OPT)")
    expert_tokens: int = Field(
        128,
        ge=0,
        description="an expert of a mixture that sees fewer in an epoch is clipped without data, and reported",
    )
    loss: Literal["relative", "mse"] = Field(
        "relative",
        description="error of a block's outputs: each token's e divided by its own size, as log(1 + e), or mse, as in the papers",
    )
    first_token: float = Field(
        0.1, ge=0, description="what the first token's error (the attention sink's) counts beside the mean of all"
    )
    look_ahead: int = Field(
        0,
        ge=0,
        le=2,
        description="full-precision blocks that a block's outputs pass before the loss is taken (CL has 2); the last blocks pass "
        "those that there are",
    )
    quantized_stream_loss: float = Field(
        0.0,
        ge=0,
        description="weight of a further loss: against the full-precision block on the same inputs (OmniQuant's aug_loss)",
    )

    @field_validator("equivalence", mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        """One sentence in place of one for each form that the value may have."""
        if given != "auto" and not (isinstance(given, list) and all(kind in KINDS for kind in given)):
            raise ValueError(f"input should be auto, or a list of some of {', '.join(KINDS)} ([] for none)")
        return given

    def parts(self, scale_dtype: torch.dtype, products: torch.dtype | None) -> Parts:
        """What is trained in a linear, as the algorithm takes it. products: the dtype of training's, None: float32."""
        increment = replace(self.increments, products=products)
        return Parts(self.clipping, increment, self.rounding == "learned", scale_dtype)

    @property
    def increments(self) -> Increment:
        """The increment as the algorithm takes it."""
        factors = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[self.factor_dtype]
        return Increment(self.increment, self.rank, self.corner, self.band, factors)

    def equivalence_kinds(self, scheme: SchemeConfig) -> tuple[str, ...]:
        """Kinds of equivalent transformations as the algorithm takes them, in its order; a block has some of auto's."""
        if self.equivalence == "auto":
            return KINDS if scheme.quantize_qkv else WEIGHT_ONLY
        return tuple(k for k in KINDS if k in self.equivalence)


class OptimizerConfig(Section):
    """How it is learned, with a learning rate that falls to zero over all epochs that train a part.

    adamw: AdamW without weight decay, along a cosine. signed: every parameter moves by the learning rate in the direction
    of its gradient's sign, along a straight line; no optimizer state.
    """

    steps: Literal["adamw", "signed"] = Field("adamw", description="adamw, or signed gradients (SignRound)")
    epochs: int = Field(
        4, ge=0, description="passes over the calibration samples; 0: no training, plain round-to-nearest"
    )
    warm_epochs: int = Field(
        0,
        ge=0,
        description="so many first epochs train clipping and equivalence alone; then increment and rounding join. 0: all at once",
    )
    batch_size: int = Field(2, ge=1, description="sequences a step")
    clipping_learning_rate: float | None = Field(
        None,
        gt=0,
        description="for the clipping bounds. Default: 1e-1 before a sigmoid, direct: 0.25 / steps of a block, 1 / steps where clipping_start is range; in a fine-tune direct at most 1.5e-3 and 0.2 / steps, the other twice that",
    )
    rounding_learning_rate: float | None = Field(
        None,
        gt=0,
        description="in grid steps. Default: 1 / sqrt(32 x steps of a block, but the warm epochs'), with which 32 signed steps can go half a step; "
        "2 / steps in a fine-tune",
    )
    increment_learning_rate: float | None = Field(
        None,
        gt=0,
        description="in grid steps of each linear, before LET's scales, whatever the increment's kind. Default: 1e-2; in a fine-tune at most 1.5e-2 and 2 / steps",
    )
    equivalence_learning_rate: float | None = Field(
        None, gt=0, description="of the logarithms of LET's scales, and of its shifts. Default: 5e-3"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="order of the samples")


class EndToEndConfig(Section):
    """After the blocks: the scales of all of them trained together, codes and zero points as they are, towards the
    full-precision model's distribution of the next token.

    AdamW along a cosine. A worker holds the whole model for it, a byte a weight and what the backward pass needs; or, if not
    `resident`, one block at a time.
    """

    epochs: int = Field(0, ge=0, description="passes over its samples; 0: blocks stay as they were trained")
    samples: int | None = Field(
        None, ge=1, description="at most so many of the calibration samples, the first ones; null: all"
    )
    batch_size: int = Field(4, ge=1, description="sequences a step")
    unit_samples: int = Field(
        4,
        ge=1,
        description="sequences of a step that one worker takes at a time; workers share a step, and the actors of a group (compute.group) these",
    )
    learning_rate: float = Field(5e-3, gt=0, description="of each scale, as a part of itself")
    resident: bool = Field(
        True,
        description="keep all blocks in each worker's memory; false: every unit reads each block twice, and runs it forward twice "
        "(set unit_samples as large as batch_size then). It changes no bit of the result",
    )

    def address(self) -> dict[str, Any]:
        """What of it decides bytes."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key != "resident"}


class ScheduleConfig(Section):
    """What a block trains on, and so which blocks can train at the same time."""

    kind: Literal["sequential", "parallel", "wave"] = Field(
        "wave",
        description="sequential: on the finished blocks before it; wave: on the block before it in the same epoch; parallel: on its state one "
        "epoch ago. This is from the best result to the most blocks at once",
    )
    refresh_every: int = Field(
        1, ge=0, description="parallel and wave: renew the inputs every k-th epoch; 0: never (full-precision inputs)"
    )
    parts: int = Field(
        1,
        ge=1,
        description="wave: units that an epoch is cut into, each trained on some chunks of the samples: a block begins when the one before "
        "has trained on the first of them",
    )
    lead: int = Field(
        0,
        ge=0,
        description="wave: how many units (epochs, or parts of them) the block before is ahead; epochs × parts / (lead + 1) blocks train at once",
    )


class ClusterConfig(Section):
    """Where it runs; changes nothing in the result."""

    address: str | None = Field(
        None,
        description="a Ray cluster (host:port, or auto on one of its machines); null or local: start Ray on this machine",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="most actors that train; null: as many as the cluster has room for, machines that join too",
    )
    cpu_workers: int = Field(0, ge=0, description="further actors without a GPU, for the merge")
    cpus_per_worker: float = Field(
        1, gt=0, description="what Ray sets aside; the threads of each actor are compute.threads"
    )
    gpus_per_worker: float = Field(0, ge=0, description="a part of one counts")
    memory_gib: float | None = Field(
        None,
        gt=0,
        description="host memory of each worker, which Ray sets aside; null: not asked for (where Ray is started here, this machine's)",
    )
    deadline_seconds: float = Field(60, ge=2, description="an actor that does not answer for so long is lost")
    dashboard: bool = Field(False, description="start Ray's dashboard, on 127.0.0.1; needs ray[default]")
    max_attempts: int = Field(
        3,
        ge=1,
        description="failures of one unit before its block is quantized without data, or the run gives up; losing a worker is none",
    )
    commit_every_seconds: float = Field(
        120, ge=0, description="a training unit commits its state so often; 0: after every step"
    )

    @field_validator("address")
    @classmethod
    def _local_is_here(cls, address: str | None) -> str | None:
        return None if address == "local" else address


# Of `compute`: what moves work and memory about and changes no bit of any result.
SAME_BYTES = ("recompute", "checkpoint")


class ComputeConfig(Section):
    """How it is computed. What changes sums is part of every content address."""

    device: Literal["cpu", "cuda"] = Field("cpu", description="cuda: give each worker a GPU, cluster.gpus_per_worker")
    engine: Literal["torch", "deepspeed"] = Field(
        "torch", description="who keeps a block's tensors and steps its optimizer: plain torch, or DeepSpeed's ZeRO-3"
    )
    offload: Literal["none", "optimizer", "parameters", "all"] | None = Field(
        None, description="what DeepSpeed keeps in host memory, off the device; null: all of it"
    )
    adam: Literal["auto", "torch", "cpu_adam"] = Field(
        "auto",
        description="who steps an offloaded AdamW; auto: DeepSpeed's cpu_adam where `lsi doctor --build` has compiled it ahead, else torch",
    )
    group: int = Field(
        1,
        ge=1,
        description="processes that train a block together, each with its part of every batch, and with engine deepspeed with its part of "
        "every tensor: so many actors are one worker",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="products in training; auto: bfloat16 where the hardware multiplies it natively"
    )
    threads: int = Field(1, ge=1, description="CPU threads of each actor")
    recompute: bool | None = Field(
        None,
        description="compute what quantizes a weight again in the backward pass: one linear at a time in memory; "
        "null: linears of 16 million weights and more",
    )
    checkpoint: bool = Field(
        False,
        description="run attention and feed-forward part again in the backward pass: less memory for long sequences",
    )
    micro_batch: int | None = Field(
        None, ge=1, description="sequences at once within a step, their gradients added up; null: the whole batch"
    )

    @property
    def partitions(self) -> bool:
        """Whether the members of a group each hold a part of a block."""
        return self.engine == "deepspeed" and self.group > 1

    @property
    def offloads_parameters(self) -> bool:
        """Whether a block's tensors are kept in host memory."""
        return self.engine == "deepspeed" and self.offload in (None, "parameters", "all")

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state is, and stepped there."""
        return self.engine == "deepspeed" and self.offload in (None, "optimizer", "all")

    def address(self) -> dict[str, Any]:
        """What of it decides bytes."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in SAME_BYTES}


# As the paper's fine-tuning use has it.
FINETUNE_BLOCKS = 2


class FinetuneConfig(Section):
    """For `lsi finetune` alone: a packed checkpoint is trained on, on the text of `data`."""

    blocks: int | None = Field(
        None,
        ge=1,
        description="how many of the last blocks are trained; the others stay byte for byte (default there: 2)",
    )


class StorageConfig(Section):
    """Where activations, block artifacts and commit records live."""

    run: str = Field(min_length=1, description="the run directory: a local path or any fsspec URL")
    options: dict[str, Any] = Field(
        default={}, repr=False, description="fsspec options; prefer the environment for secrets. Never recorded"
    )
    chunk_samples: int = Field(8, ge=1, description="sequences in one activation object")
    cache_mib: int = Field(512, ge=0, description="activations that an actor keeps in memory")
    lease_seconds: float = Field(
        30,
        gt=0,
        le=600,
        description="how long a driver may be silent before another one takes the run over",
    )
    factors: str | None = Field(
        None,
        description="where singular vectors are kept, to be shared by several runs; null: in the run directory",
    )
    keep_activations: bool = Field(False, description="do not delete activations after their last reader")

    def chunks_of(self, samples: int) -> int:
        """How many of the first activation objects hold so many sequences."""
        return -(-samples // self.chunk_samples)


class OutputConfig(Section):
    checkpoint: str | None = Field(None, description="where the packed checkpoint goes; null: RUN/checkpoint")
    max_shard_mib: int = Field(4768, ge=1, description="largest safetensors file")


class EvaluationConfig(Section):
    """Perplexity before the merge; written to the model card."""

    texts: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")], str] = Field(
        default={}, description="name (letters, digits, _ . -): text file, or hub data set as id:subset:split"
    )
    column: str = Field("text", description="of tables and data sets, the column that holds the text")
    windows: int = Field(16, ge=1, description="of each text, from its start, without overlap")
    length: int = Field(512, ge=2, description="tokens in each")
    baselines: list[Literal["full_precision", "round_to_nearest"]] = Field(
        default=["full_precision", "round_to_nearest"], description="what the result is compared with"
    )
