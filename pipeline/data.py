"""Texts to tokens: files of any fsspec address and hub data sets, through `datasets`."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import load_dataset
from fsspec.core import url_to_fs
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config_sections import DataConfig
from pipeline.errors import UserError

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Documents are joined as the usual WikiText perplexity does, so that paragraph ends look the same everywhere.
SEPARATOR = "\n\n"
# A streamed data set is read until it holds this many times the tokens asked for: enough to choose windows from.
OVERSAMPLING = 4


def is_file(source: str) -> bool:
    """Whether a source is a file and not a data set's name."""
    return "://" in source or Path(source).exists() or Path(source).suffix in (".txt", ".cor", ".md", *LOADERS)


def read_text(source: str, end: int | None = None) -> str:
    """A text file at any fsspec address, whole or its first `end` bytes. Raises UserError."""
    try:
        files, path = url_to_fs(source)
        # A cut in the middle of a character is none of the file's faults.
        return codecs.getincrementaldecoder("utf-8")().decode(files.cat_file(path, end=end), final=end is None)
    except FileNotFoundError as error:
        raise UserError(f"{source}: no such text file") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source}: not UTF-8 text ({error.reason} at byte {error.start}); for tables use .jsonl or .parquet"
        ) from error
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{source}: cannot be read: {error}") from error


def iter_documents(data: DataConfig) -> Iterator[str]:
    """The documents of a table or data set, streamed. Raises UserError."""
    loader = LOADERS.get(Path(data.source).suffix) if is_file(data.source) else None
    try:
        if loader:
            table = load_dataset(loader, data_files=data.source, split="train", streaming=True)
        else:
            table = load_dataset(data.source, data.subset, split=data.split, streaming=True)
        for row in table:
            if data.column not in row:
                raise UserError(
                    f"column {data.column!r}: {data.source} has the columns {', '.join(row)}; name one of these as data.column, "
                    "of an evaluation text as evaluation.column (lsi eval: --column)"
                )
            if row[data.column] is not None:
                yield str(row[data.column])
    except UserError:
        raise
    except Exception as error:  # `datasets` raises whatever its readers raise
        raise UserError(
            f"{data.source}: neither a readable file nor a data set that can be reached: {type(error).__name__}: {error}"
        ) from error


def tokenize_all(tokenizer: PreTrainedTokenizerBase, text: str) -> Int[Tensor, " tokens"]:
    """All tokens of a text; the tokenizer's warning about its model's length does not apply, windows are cut later."""
    return torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int32)


def corpus_tokens(tokenizer: PreTrainedTokenizerBase, data: DataConfig, enough: int) -> Int[Tensor, " tokens"]:
    """The tokens of a text file, or of as many documents as give `enough` tokens."""
    if is_file(data.source) and Path(data.source).suffix not in LOADERS:
        return tokenize_all(tokenizer, read_text(data.source))
    texts: list[str] = []
    characters = 0
    for document in iter_documents(data):
        texts.append(document)
        characters += len(document)
        # Eight characters a token are more than text has in any usual vocabulary.
        if characters >= 8 * enough:
            break
    return tokenize_all(tokenizer, SEPARATOR.join(texts))


def calibration_tokens(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Int[Tensor, "samples sequence"]:
    """Random non-overlapping windows, chosen by the seed. Raises UserError if the corpus is too short."""
    need = data.samples * data.sequence_length
    tokens = corpus_tokens(tokenizer, data, OVERSAMPLING * need)
    windows = len(tokens) // data.sequence_length
    if windows < data.samples:
        raise UserError(
            f"data: {data.samples} samples × {data.sequence_length} tokens need {need} tokens, {data.source} has {len(tokens)} "
            f"({windows} whole windows); lower data.samples or data.sequence_length, or give more text"
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(data.seed))[: data.samples]
    return tokens[: windows * data.sequence_length].view(windows, -1)[chosen].contiguous()


def evaluation_tokens(
    tokenizer: PreTrainedTokenizerBase, source: str, enough: int, column: str = "text"
) -> Int[Tensor, " tokens"]:
    """The tokens of an evaluation text from its start: a file, or a data set as `id`, `id:subset` or `id:subset:split`."""
    return corpus_tokens(tokenizer, evaluation_data(source, column), enough)


def evaluation_data(source: str, column: str = "text") -> DataConfig:
    """An evaluation text in the terms of calibration text."""
    if not source:
        raise UserError("an evaluation text has no name: give a file or a data set")
    if is_file(source):
        return DataConfig(source=source, column=column)
    name, subset, split = [*source.split(":"), None, None][:3]
    return DataConfig(source=str(name), subset=subset, split=split or "test", column=column)


def read_beginning(data: DataConfig) -> str:
    """A page of a text file, or a table's or data set's first document. Raises UserError where nothing can be read."""
    if is_file(data.source) and Path(data.source).suffix not in LOADERS:
        return read_text(data.source, end=4096)
    return next(iter_documents(data), "")
