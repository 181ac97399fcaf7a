"""A GGUF file becomes a safetensors model folder, one tensor in memory at a time.

The names and the layouts (llama.cpp permutes some projections) are transformers' own tables; only the loop is here, because
transformers' loader keeps the whole model in memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from pipeline.errors import UserError
from pipeline.model_source import INDEX
from pipeline.skeleton import empty_model
from pipeline.store import Store
from pipeline.tensors import serialize


def local_copy(source: str, options: dict[str, Any], folder: Path) -> Path:
    """The file itself if it is local, or a download of it."""
    if "://" not in source:
        path = Path(source)
        if not path.is_file():
            raise UserError(f"model.source {source}: there is no such file")
        return path
    path = folder / source.rsplit("/", 1)[-1]
    try:
        with fsspec.open(source, "rb", **options) as remote, path.open("wb") as here:
            while piece := remote.read(1 << 24):
                here.write(piece)
    except FileNotFoundError as error:
        raise UserError(f"model.source {source}: there is no such file") from error
    return path


def read_config(path: Path) -> PretrainedConfig:
    """The configuration, without the mark that the weights are quantized: they are not any more."""
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # a torn file raises whatever its bytes happen to mean
        raise UserError(f"{path}: transformers cannot read this GGUF file: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def iter_tensors(path: Path, config: PretrainedConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its transformers name, dequantized."""
    reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(empty_model(config), processor)
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        result = processor.process(
            weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
        )
        if result.name in names:
            yield names[result.name], torch.from_numpy(np.array(result.weights)).to(dtype)


def import_gguf(
    source: str,
    options: dict[str, Any],
    target: Store,
    dtype: torch.dtype,
    shard_bytes: int = 64 << 20,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a model folder. `config.json` comes last: a folder that has it is whole."""
    with tempfile.TemporaryDirectory() as scratch:
        path = local_copy(source, options, Path(scratch))
        config = read_config(path)
        config.dtype = dtype
        _write_shards(iter_tensors(path, config, dtype), target, shard_bytes, progress)
        out = Path(scratch) / "side"
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)
        GenerationConfig.from_model_config(config).save_pretrained(out)
        config.save_pretrained(out)
        for file in sorted(out.iterdir(), key=lambda f: (f.name == "config.json", f.name)):
            target.put(file.name, file.read_bytes())


def _write_shards(
    tensors: Iterator[tuple[str, Tensor]], target: Store, limit: int, progress: Callable[[str], None]
) -> None:
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    count = 0

    def flush() -> None:
        nonlocal count
        name = f"model-{count:05d}.safetensors"
        target.put(name, partial(serialize, shard))
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        count += 1

    for name, tensor in tensors:
        progress(name)
        shard[name] = tensor
        if sum(t.nbytes for t in shard.values()) >= limit:
            flush()
    if shard:
        flush()
    target.put(INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1, sort_keys=True).encode())
