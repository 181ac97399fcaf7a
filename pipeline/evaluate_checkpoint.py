"""`lsi eval`: perplexity of any checkpoint, through transformers' own loader and nothing of ours."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data import evaluation_tokens
from pipeline.errors import UserError
from pipeline.perplexity import model_perplexity, take_windows
from pipeline.skeleton import longest_sequence


def load(checkpoint: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer. Raises UserError if transformers cannot load them."""
    if checkpoint.startswith((".", "/")) and not (Path(checkpoint) / "config.json").exists():
        raise UserError(f"{checkpoint}: no transformers checkpoint there (no config.json)")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint)
        model.to(device)  # type: ignore[arg-type]
        return model.eval(), AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{checkpoint}: transformers cannot load it: {str(error).splitlines()[0]}") from error


def _advance(progress: Progress, bar: TaskID, done: int) -> None:
    progress.update(bar, completed=done)


def evaluate_checkpoint(
    checkpoint: str, texts: list[str], windows: int, length: int, device: str, *, show: bool
) -> dict[str, float]:
    """Perplexity by text, in the checkpoint's own dtype."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    model, tokenizer = load(checkpoint, device)
    if (limit := longest_sequence(model)) is not None and length > limit:
        raise UserError(
            f"--length {length} is beyond the {limit} positions that the model has learned: use {limit} or less"
        )
    cut = {
        text: take_windows(evaluation_tokens(tokenizer, text, windows * length), windows, length, text)
        for text in texts
    }
    found = {}
    with Progress(console=Console(stderr=True), disable=not show) as progress:
        for text, tokens in cut.items():
            bar = progress.add_task(text, total=windows)
            found[text] = model_perplexity(model, tokens, partial(_advance, progress, bar))
    return found
