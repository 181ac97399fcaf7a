"""A model on any storage: configuration, tokenizer files and an index of its safetensors shards, read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from pipeline.config_sections import ModelConfig
from pipeline.errors import UserError
from pipeline.store import Store, open_store
from pipeline.tensors import TensorEntry, UnknownDtypeError, read_header, read_tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What a checkpoint needs beside its weights; everything else in a model folder is left behind.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass
class ModelSource:
    """A model folder. `index` maps a tensor's name to its shard and its place in it."""

    store: Store
    config: PretrainedConfig
    side_files: dict[str, bytes] = field(repr=False)
    index: dict[str, tuple[str, TensorEntry]] = field(repr=False)

    @property
    def shards(self) -> list[str]:
        return sorted({shard for shard, _ in self.index.values()})

    def read(self, name: str) -> Tensor:
        """One tensor, by a ranged read. Raises UserError if the shard has changed or vanished since it was opened."""
        return self.read_at(*self.index[name])

    def pieces(self, name: str) -> Mapping[str, Tensor]:
        """All that is stored of a tensor, by what its name is followed by: here the tensor itself."""
        return {"": self.read(name)}

    def read_at(self, shard: str, entry: TensorEntry) -> Tensor:
        """The tensor at a place of a shard. Raises UserError as `read` does."""
        try:
            return read_tensor(self.store, shard, entry)
        except (FileNotFoundError, EOFError) as error:
            raise UserError(
                f"{self.store.describe(shard)}: the shard vanished or shrank while it was read: {error}"
            ) from error

    def fingerprint(self) -> str:
        """Changes when any shard or the configuration is replaced; found without reading weights."""
        hasher = hashlib.sha256(self.side_files["config.json"])
        for shard in self.shards:
            hasher.update(f"{shard}:{self.store.stamp(shard)};".encode())
        return hasher.hexdigest()

    def dtype(self, wanted: str) -> torch.dtype:
        """The result's dtype; `auto` is the one that most of the stored elements have."""
        if wanted != "auto":
            return DTYPES[wanted]
        sizes: dict[torch.dtype, int] = {}
        for _, entry in self.index.values():
            if entry.dtype.is_floating_point:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.end - entry.start
        found = max(sizes, key=lambda dtype: sizes[dtype], default=None)
        if found is None or found not in DTYPES.values():
            raise UserError(
                f"{self.store.url}: most of its weights are {found or 'integers'}, and a result is in one of {', '.join(DTYPES)}: "
                "name one of these as model.dtype, or start from a checkpoint in one of them"
            )
        return found

    def tokenizer(self, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises UserError if it has none."""
        with tempfile.TemporaryDirectory() as folder:
            _write_side_files(self.side_files, Path(folder))
            try:
                return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{self.store.url}: no usable tokenizer beside the weights: {' '.join(str(error).split())}"
                ) from error


def _write_side_files(files: dict[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def hub_url(source: str, revision: str | None) -> str:
    """The fsspec address of a hub id, at the commit that it is now: a push in mid-run must not mix two models."""
    try:
        commit = HfApi().model_info(source, revision=revision).sha
    except Exception as error:  # the hub's client raises its own errors and those of its transport
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"model.source {source}: no such local folder, and the hub does not give it: {reason}"
        ) from error
    return f"hf://{source}@{commit}"


def locate(model: ModelConfig, options: dict[str, Any]) -> Store:
    """The store that holds the model folder: an fsspec URL as it is, an existing path, or else a hub id."""
    source = os.path.expanduser(model.source)
    if "://" in source or "::" in source:
        return open_store(source, options)
    if Path(source).exists():
        return open_store(source)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return open_store(hub_url(source, model.revision))
    raise UserError(
        f"model.source {source}: there is no such folder; give a local folder, a hub id (org/name), an fsspec URL or a .gguf file"
    )


def read_side_files(store: Store, *, code: bool = False) -> dict[str, bytes]:
    """The small files beside the weights; with `code` the modules that a trusted model brings, too."""
    files = {}
    modules = [key for key in store.list() if key.endswith(".py") and "/" not in key] if code else []
    for name in (*SIDE_FILES, *modules):
        try:
            files[name] = store.get(name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{store.describe(name)}: cannot be read: {error}") from error
    if "config.json" not in files:
        raise UserError(
            f"{store.url}: there is no config.json, so this is no transformers model folder (or it cannot be reached)"
        )
    return files


def parse_model_config(files: dict[str, bytes], where: str, *, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration through transformers' own registry. Raises UserError for an unknown architecture."""
    try:
        raw = json.loads(files["config.json"])
    except ValueError as error:
        raise UserError(f"{where}/config.json: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{where}/config.json: not a JSON object but {type(raw).__name__}")
    if found := raw.get("quantization_config"):
        method = found.get("quant_method", "unknown method") if isinstance(found, dict) else found
        raise UserError(
            f"{where}: the model is already quantized ({method}); start from its full-precision weights, or train on with lsi finetune"
        )
    with tempfile.TemporaryDirectory() as folder:
        _write_side_files(files, Path(folder))
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError, OSError, StrictDataclassError) as error:
            kind = raw.get("model_type")
            if kind in CONFIG_MAPPING:
                reason = " ".join(str(error).split())
                raise UserError(f"{where}/config.json: not a configuration that {kind} takes: {reason}") from error
            raise UserError(
                f"{where}/config.json: transformers does not know the architecture {kind!r}; upgrade transformers, or set "
                "model.trust_remote_code if the model brings its own code and you trust it"
            ) from error


def _shard_of_each(store: Store) -> dict[str, str] | None:
    """The weight map of an indexed checkpoint; None for a single file."""
    try:
        raw = json.loads(store.get(INDEX))
        weight_map = {name: str(shard) for name, shard in raw["weight_map"].items()}
        if not weight_map:
            raise ValueError("it names no tensors")
        return weight_map
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{store.describe(INDEX)}: not a valid index: {error}") from error


def _header(store: Store, shard: str) -> dict[str, TensorEntry]:
    try:
        return read_header(store, shard)
    except FileNotFoundError as error:
        raise UserError(
            f"{store.describe(shard)}: this shard is missing; download the model again or restore the file's name"
        ) from error
    except UnknownDtypeError as error:
        raise UserError(f"{error}; start from a checkpoint in bfloat16, float16 or float32") from error
    except (ValueError, EOFError) as error:  # TensorFileError, or a name that leaves the folder
        raise UserError(f"{error}; download the shard again") from error


def read_index(store: Store) -> dict[str, tuple[str, TensorEntry]]:
    """Every tensor's shard and place, single-file or indexed. Raises UserError if shards are missing, truncated or disagree."""
    weight_map = _shard_of_each(store)
    if weight_map is None:
        if not store.exists(SINGLE):
            raise UserError(f"{store.url}: there is neither {SINGLE} nor {INDEX}; only safetensors weights are read")
        return {name: (SINGLE, entry) for name, entry in _header(store, SINGLE).items()}
    index: dict[str, tuple[str, TensorEntry]] = {}
    for shard in sorted(set(weight_map.values())):
        entries = _header(store, shard)
        claimed = {name for name, where in weight_map.items() if where == shard}
        if claimed != set(entries):
            odd = sorted(claimed ^ set(entries))[0]
            side = (
                "the index names it, the shard does not hold it"
                if odd in claimed
                else "the shard holds it, the index does not name it"
            )
            raise UserError(
                f"{store.describe(shard)}: index and shard disagree on {odd}: {side}; download the model again"
            )
        index |= {name: (shard, entry) for name, entry in entries.items()}
    return index


def open_model(store: Store, *, trust_remote_code: bool = False) -> ModelSource:
    """Open a model folder: configuration, side files and shard headers; no weights are read."""
    files = read_side_files(store, code=trust_remote_code)
    config = parse_model_config(files, store.url, trust_remote_code=trust_remote_code)
    return ModelSource(store, config, files, read_index(store))
