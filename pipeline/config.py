"""A run's configuration, the whole file, and what of its sections goes together (read by `config_file.py`)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from pipeline.config_sections import (
    ClusterConfig,
    ComputeConfig,
    DataConfig,
    EndToEndConfig,
    EvaluationConfig,
    FinetuneConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ScheduleConfig,
    SchemeConfig,
    Section,
    StorageConfig,
)


def check_stages(method: MethodConfig, optimizer: OptimizerConfig) -> None:
    """Refuse a staged start of which one stage trains nothing. Raises ValueError."""
    warm, epochs = optimizer.warm_epochs, optimizer.epochs
    if not warm:
        return
    if warm >= epochs:
        raise ValueError(
            f"optimizer.warm_epochs {warm} leaves none of optimizer.epochs {epochs} to increment and rounding: "
            + (
                f"set it to {epochs - 1}{' or less' if epochs > 1 else ''}, or train longer"
                if epochs
                else "set it to 0"
            )
        )
    if method.increment == method.rounding == "none":
        raise ValueError(
            f"optimizer.warm_epochs is {warm}, but method.increment and method.rounding are none, so nothing joins after the warm "
            "epochs: set optimizer.warm_epochs to 0, or choose one of them"
        )
    if method.clipping == "none" and not method.equivalence:
        raise ValueError(
            f"optimizer.warm_epochs is {warm}, but method.clipping is none and method.equivalence is empty, so the warm epochs train "
            "nothing: set optimizer.warm_epochs to 0, or choose one of them"
        )


def check_rank(method: MethodConfig) -> None:
    """Refuse a corner or a band between fewer singular vectors than it takes. Raises ValueError."""
    if method.increment == "band" and method.rank is not None and method.band >= method.rank:
        raise ValueError(
            f"method.band {method.band} reaches past method.rank {method.rank}, the singular values that are kept: set "
            f"method.band to {method.rank - 1} or less, or method.rank to {method.band + 1} or more, or to null for all"
        )
    if method.increment == "corner" and method.rank is not None and method.corner > method.rank:
        raise ValueError(
            f"method.corner {method.corner} is larger than method.rank {method.rank}, the singular values that are kept: set "
            f"method.corner to {method.rank} or less, or method.rank to {method.corner} or more, or to null for all"
        )


class RunConfig(Section):
    """The whole file."""

    preset: str | None = Field(
        None,
        description="fast, best or paper (configs/presets): method, optimizer, schedule and end_to_end for the scheme; keys given here win",
    )
    model: ModelConfig
    data: DataConfig
    scheme: SchemeConfig = SchemeConfig()
    method: MethodConfig = MethodConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    end_to_end: EndToEndConfig = EndToEndConfig()
    compute: ComputeConfig = ComputeConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig
    outputs: OutputConfig = OutputConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.optimizer.batch_size > self.storage.chunk_samples:
            raise ValueError(
                f"optimizer.batch_size {self.optimizer.batch_size} is larger than storage.chunk_samples {self.storage.chunk_samples}: "
                f"a batch is taken from one chunk; set storage.chunk_samples to {self.optimizer.batch_size} or more"
            )
        if (self.compute.micro_batch or 1) > self.optimizer.batch_size:
            raise ValueError(
                f"compute.micro_batch {self.compute.micro_batch} is larger than optimizer.batch_size {self.optimizer.batch_size}: "
                "a micro-batch is a part of a batch; set it to null for the whole"
            )
        if self.compute.device == "cuda" and not self.cluster.gpus_per_worker:
            raise ValueError(
                "compute.device is cuda, but cluster.gpus_per_worker is 0, so that every worker would share the first GPU: "
                "set cluster.gpus_per_worker to 1, or to a part of one"
            )
        self._check_engine()
        self._check_group()
        self._check_schedule()
        method = self.method
        if method.shifts and not method.equivalence:
            raise ValueError(
                "method.shifts means nothing without method.equivalence: set that to auto, or leave it out"
            )
        check_rank(method)
        check_stages(method, self.optimizer)
        nothing = method.clipping == method.increment == method.rounding == "none" and not method.equivalence
        if self.optimizer.epochs and nothing:
            raise ValueError(
                f"optimizer.epochs is {self.optimizer.epochs}, but method.clipping, method.increment and method.rounding are all none and "
                "method.equivalence is empty, so nothing is trained: choose what to learn"
                + ("" if self.is_finetune else ", or set optimizer.epochs to 0 for round-to-nearest")
            )
        return self

    def _check_schedule(self) -> None:
        schedule = self.schedule
        for name, value, plain in (("lead", schedule.lead, 0), ("parts", schedule.parts, 1)):
            if value != plain and schedule.kind != "wave":
                raise ValueError(
                    f"schedule.{name} {value} means nothing for {schedule.kind}: set schedule.kind to wave"
                )
        if schedule.refresh_every != 1 and schedule.kind == "sequential":
            raise ValueError(
                f"schedule.refresh_every {schedule.refresh_every} means nothing for sequential: set schedule.kind to parallel or wave"
            )
        if schedule.parts > 1 and schedule.refresh_every != 1:
            raise ValueError(
                f"schedule.parts {schedule.parts} renews inputs with every part, and schedule.refresh_every is {schedule.refresh_every}: "
                "set it to 1, or schedule.parts to 1"
            )
        chunks = self.storage.chunks_of(self.data.samples)
        if schedule.parts > chunks:
            raise ValueError(
                f"schedule.parts {schedule.parts} is more than the {chunks} chunks of {self.storage.chunk_samples} samples (storage.chunk_samples) "
                f"that data.samples {self.data.samples} make: set schedule.parts to {chunks} or less, or storage.chunk_samples smaller"
            )

    def _check_engine(self) -> None:
        compute = self.compute
        if compute.engine == "torch" and compute.offload not in (None, "none"):
            raise ValueError(
                f"compute.offload {compute.offload} means nothing for plain torch, which offloads nothing: "
                "set compute.engine to deepspeed, or leave it out"
            )
        if compute.adam == "cpu_adam" and not (compute.offloads_optimizer and self.optimizer.steps == "adamw"):
            raise ValueError(
                "compute.adam is cpu_adam, which steps an AdamW that DeepSpeed keeps in host memory, and there is none: "
                "leave it out, or set compute.engine to deepspeed, compute.offload to all and optimizer.steps to adamw"
            )
        if compute.engine == "deepspeed" and compute.checkpoint:
            raise ValueError(
                "compute.checkpoint runs parts of a block again in the backward pass, where compute.engine deepspeed has taken their "
                "tensors away: set compute.checkpoint to false, or compute.engine to torch"
            )
        if compute.engine == "deepspeed" and self.method.equivalence:
            raise ValueError(
                "method.equivalence changes a block's weights as a whole, and compute.engine deepspeed holds one linear at a time: "
                "set method.equivalence to [], or compute.engine to torch"
            )

    def _check_group(self) -> None:
        group = self.compute.group
        key, samples = self.fewest_samples
        if group > samples:
            raise ValueError(
                f"compute.group {group} has more members than a batch has samples ({samples}, by {key}): "
                f"set compute.group to {samples} or less, or {key} to {group} or more"
            )

    @property
    def fewest_samples(self) -> tuple[str, int]:
        """What bounds the samples of a batch that is not cut short, and how many these are."""
        sizes = {
            "optimizer.batch_size": self.optimizer.batch_size,
            "storage.chunk_samples": self.storage.chunk_samples,
            "data.samples": self.data.samples,
        }
        return min(sizes.items(), key=lambda item: item[1])

    @property
    def samples_of_a_step(self) -> int:
        """Of a batch, the most that one process computes: a group shares it."""
        return -(-self.optimizer.batch_size // self.compute.group)

    @property
    def is_finetune(self) -> bool:
        """Whether it is `lsi finetune`'s."""
        return self.finetune.blocks is not None

    def recipe(self) -> dict[str, Any]:
        """All that decides the weights' bytes; where it runs, where it is stored and what it is measured on are left out."""
        whole = self.model_dump(mode="json")
        # A preset's name says nothing that its values, which are in the sections, do not say.
        del whole["preset"], whole["cluster"], whole["outputs"], whole["evaluation"]
        if not self.is_finetune:
            del whole["finetune"]
        whole["compute"] = self.compute.address()
        whole["end_to_end"] = self.end_to_end.address()
        whole["storage"] = {"chunk_samples": self.storage.chunk_samples}
        return whole
