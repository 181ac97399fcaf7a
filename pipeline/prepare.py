"""A run before its units: everything that can be checked without work is checked, and the tokens are read."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline import finetune_plan
from pipeline.artifacts import Artifact, CorruptArtifactError, Writer, digest, discard, intact, read_file, read_record
from pipeline.capture import TOKENS_FILE
from pipeline.checks import check_run
from pipeline.config import RunConfig
from pipeline.config_sections import ComputeConfig
from pipeline.data import calibration_tokens, evaluation_tokens
from pipeline.errors import UserError
from pipeline.estimate import open_skeleton
from pipeline.fit import check_fit
from pipeline.gguf_import import import_gguf
from pipeline.identity import RUN_FILE, Resolved, check_claim, claim, read_json, resolve, run_identity
from pipeline.lease import Lease
from pipeline.merge import CHECKPOINT_MANIFEST, CONFIG_FILE, SHARD_NAME, unpublished
from pipeline.model_source import DTYPES, ModelSource, locate, open_model
from pipeline.packed_source import open_packed
from pipeline.perplexity import take_windows
from pipeline.reporter import Reporter
from pipeline.skeleton import Skeleton, check_known, check_tensors, make_skeleton
from pipeline.store import Store, absolute, open_store
from pipeline.tensors import tensor_bytes
from pipeline.worker import Context


@dataclass
class Prepared:
    """A run before its units: everything checked, nothing expensive done. `lease`: while this process is the run's driver."""

    config: RunConfig
    store: Store
    checkpoint: Store
    source: ModelSource
    skeleton: Skeleton
    context: Context
    tokens: Artifact
    texts: dict[str, Artifact]
    resolved: dict[str, Any]
    token_values: dict[Artifact, Tensor]
    lease: Lease | None = None


def checkpoint_url(config: RunConfig) -> str:
    return config.outputs.checkpoint or posixpath.join(config.storage.run, "checkpoint")


def open_source(config: RunConfig, store: Store, report: Reporter) -> tuple[ModelSource, dict[str, Any]]:
    """The model folder, and the fsspec options it is opened with. A GGUF file is converted into the run directory first."""
    options = config.storage.options
    if config.is_finetune:
        packed_store = locate(config.model, options)
        return open_packed(packed_store, trust_remote_code=config.model.trust_remote_code), packed_store.options
    if config.model.source.endswith(".gguf"):
        return open_model(converted(config, store, report)), options
    model_store = locate(config.model, options)
    source = open_model(model_store, trust_remote_code=config.model.trust_remote_code)
    return source, model_store.options


def converted(config: RunConfig, store: Store, report: Reporter) -> Store:
    """The folder of a GGUF file's conversion: an artifact like any other, named by the file and the dtype it came to."""
    source, options = config.model.source, config.storage.options
    dtype = DTYPES.get(config.model.dtype, torch.bfloat16)
    folder, _, name = os.path.expanduser(source).rpartition("/")
    try:
        stamp = open_store(folder or ".", options if "://" in source else None).stamp(name)
    except FileNotFoundError as error:
        raise UserError(f"model.source {source}: there is no such file") from error
    key = digest({"kind": "convert", "source": source, "stamp": stamp, "dtype": str(dtype)})
    artifact = Artifact("model", "converted", key)
    record = intact(store, artifact, report.message)
    if record is None:
        if "://" not in source:  # another one's header comes with the whole file
            check_run(config, open_skeleton(config)[0])
        report.message(f"converting {source} to safetensors")
        # A folder of this attempt's own: another driver may convert at the same moment.
        writer = Writer(store, artifact)
        import_gguf(source, options, store.child(writer.folder), dtype)
        record = writer.commit({"source": source, "folder": writer.token})
    folder = str(record.meta.get("folder"))
    if not re.fullmatch(r"[0-9a-f]{16}", folder):
        raise UserError(f"{store.describe(artifact.path)}: its record is not one of this version; delete that folder")
    return store.child(f"{artifact.path}/{folder}")


def checked_skeleton(config: RunConfig, source: ModelSource) -> Skeleton:
    """The model without weights, whose headers fit it and of which the run can have what it asks. Raises UserError."""
    skeleton = make_skeleton(source.config, trust_remote_code=config.model.trust_remote_code)
    check_tensors(skeleton, source)
    check_run(config, skeleton)
    return skeleton


def check_place(checkpoint: Store, store: Store, config: RunConfig, resolved: Resolved) -> None:
    """Refuse to overwrite a checkpoint that this run did not make, or weights of whatever else."""
    if absolute(checkpoint.url).rstrip("/") == absolute(store.url).rstrip("/"):
        raise UserError(f"outputs.checkpoint {checkpoint.url} is storage.run: give the checkpoint a folder of its own")
    held = [key for key in checkpoint.list() if key == CONFIG_FILE or SHARD_NAME.fullmatch(key)]
    manifest = read_json(checkpoint, CHECKPOINT_MANIFEST)
    # A manifest that is there and cannot be read was torn while this run published, unless that never began.
    torn = manifest is None and checkpoint.exists(CHECKPOINT_MANIFEST) and read_json(store, RUN_FILE) is not None
    if held and not torn and (manifest or {}).get("identity") != run_identity(config, resolved):
        raise UserError(
            f"{checkpoint.url} holds another checkpoint already ({held[0]}); choose another outputs.checkpoint"
        )


def claim_place(checkpoint: Store, config: RunConfig, resolved: Resolved) -> None:
    """Make a checkpoint's folder this run's, by a manifest that says so before there is more to say."""
    identity = run_identity(config, resolved)
    if (read_json(checkpoint, CHECKPOINT_MANIFEST) or {}).get("identity") != identity:
        checkpoint.put(CHECKPOINT_MANIFEST, json.dumps({"identity": identity}, indent=1, sort_keys=True).encode())


def tokens_artifact(name: str, tokens: Tensor) -> Artifact:
    """Tokens are named by what they are."""
    key = hashlib.sha256(str(list(tokens.shape)).encode() + bytes(tensor_bytes(tokens))).hexdigest()
    return Artifact("tokens", name, key)


def ensure_tokens(store: Store, values: dict[Artifact, Tensor], say: Callable[[str], None]) -> None:
    """Store tokens that are not there, or not any more: the driver has them, no unit makes them."""
    for artifact, tokens in values.items():
        try:
            record = read_record(store, artifact)
            if record is not None:
                read_file(store, artifact, TOKENS_FILE, record)
                continue
        except CorruptArtifactError as error:
            say(f"damaged, written again: {error}")
            discard(store, artifact)
        writer = Writer(store, artifact)
        writer.write_tensors(TOKENS_FILE, {"tokens": tokens})
        writer.commit({"shape": list(tokens.shape)})


def check_engine(compute: ComputeConfig) -> None:
    """Refuse DeepSpeed where it cannot be had."""
    if compute.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "compute.engine is deepspeed, but the package deepspeed is not installed here: install it, here and on the workers "
            "(pip install deepspeed), or set compute.engine to torch"
        )


def prepare(config: RunConfig, report: Reporter) -> Prepared:
    """Check everything that can be checked without work. The driver stores the tokens with its first plan."""
    if config.compute.device == "cuda" and config.cluster.address is None and not torch.cuda.is_available():
        raise UserError(
            "compute.device is cuda, but this machine has no CUDA device; set compute.device to cpu or give cluster.address"
        )
    check_engine(config.compute)
    if config.is_finetune:
        config = finetune_plan.resolve(config)
    store = open_store(config.storage.run, config.storage.options)
    store.check_writable()
    resolved = resolve(config, store)
    check_claim(store, config, resolved)
    if config.compute.offloads_optimizer and config.optimizer.steps == "adamw" and resolved.adam == "torch":
        report.message(
            "torch's AdamW steps in host memory: this run began without a cpu_adam built by `lsi doctor --build`"
        )
    checkpoint = open_store(checkpoint_url(config), config.storage.options)
    checkpoint.check_writable("outputs.checkpoint")
    if config.storage.factors is not None:
        open_store(config.storage.factors, config.storage.options).check_writable("storage.factors")
    check_place(checkpoint, store, config, resolved)
    source, model_options = open_source(config, store, report)
    skeleton = checked_skeleton(config, source)
    if not config.is_finetune:
        check_fit(config, skeleton, source.dtype(config.model.dtype), store, report)
    report.message(f"reading calibration text {config.data.source}")
    tokens, texts, values = read_tokens(config, source, skeleton)
    claim(store, config, resolved)
    if not unpublished(config, skeleton):
        claim_place(checkpoint, config, resolved)
    dtype = source.dtype(config.model.dtype)
    context = Context(
        config=anywhere(config),
        run_url=absolute(store.url),
        model_url=absolute(source.store.url),
        checkpoint_url=absolute(checkpoint.url),
        dtype=dtype,
        autocast=resolved.autocast,
        adam=resolved.adam,
        model_options=model_options,
    )
    recorded = {"dtype": str(dtype)} | resolved.record()
    return Prepared(config, store, checkpoint, source, skeleton, context, tokens, texts, recorded, values)


def anywhere(config: RunConfig) -> RunConfig:
    """The configuration as workers in any working directory can take it."""
    if config.storage.factors is None:
        return config
    storage = config.storage.model_copy(update={"factors": absolute(config.storage.factors)})
    return config.model_copy(update={"storage": storage})


def read_tokens(
    config: RunConfig, source: ModelSource, skeleton: Skeleton
) -> tuple[Artifact, dict[str, Artifact], dict[Artifact, Tensor]]:
    """Calibration tokens, evaluation tokens by text, and the values of both. Raises UserError for tokens that the model does not have."""
    tokenizer = source.tokenizer(trust_remote_code=config.model.trust_remote_code)
    windows, length = config.evaluation.windows, config.evaluation.length
    found = calibration_tokens(tokenizer, config.data)
    calibration = tokens_artifact("calibration", found)
    values = {calibration: found}
    texts = {}
    for name, text in config.evaluation.texts.items():
        cut = take_windows(
            evaluation_tokens(tokenizer, text, windows * length, config.evaluation.column), windows, length, text
        )
        texts[name] = tokens_artifact(f"text-{name}", cut)
        values[texts[name]] = cut
    for tokens in values.values():
        check_known(tokens, skeleton.model, source.store.url)
    return calibration, texts, values
