"""`lsi eval`: perplexity of any checkpoint, through transformers' own loader and nothing of ours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data import evaluation_tokens
from pipeline.errors import UserError
from pipeline.perplexity import model_perplexity, take_windows
from pipeline.skeleton import check_known, check_length, longest_sequence


def load(checkpoint: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer. Raises UserError if transformers cannot load them, or would fill in weights at random."""
    if checkpoint.startswith((".", "/")) and not (Path(checkpoint) / "config.json").exists():
        raise UserError(f"{checkpoint}: no transformers checkpoint there (no config.json)")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # whatever its readers and quantizers raise
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{checkpoint}: transformers cannot load it: {type(error).__name__}: {reason}") from error
    model, found = loaded
    if missing := sorted([*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])]):
        raise UserError(
            f"{checkpoint}: {len(missing)} tensors that its configuration asks for are missing or of another shape, such as {missing[0]}: "
            "get the checkpoint again"
        )
    return model.to(device).eval(), tokenizer


def _advance(progress: Progress, bar: TaskID, done: int) -> None:
    progress.update(bar, completed=done)


def evaluate_checkpoint(
    checkpoint: str, texts: list[str], windows: int, length: int, device: str, *, show: bool, column: str = "text"
) -> dict[str, float]:
    """Perplexity by text, in the checkpoint's own dtype."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: it is cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    model, tokenizer = load(checkpoint, device)
    check_length("--length", length, longest_sequence(model))
    cut = {
        text: take_windows(evaluation_tokens(tokenizer, text, windows * length, column), windows, length, text)
        for text in texts
    }
    for tokens in cut.values():
        check_known(tokens, model, checkpoint)
    found = {}
    with Progress(console=Console(stderr=True), disable=not show) as progress:
        for text, tokens in cut.items():
            bar = progress.add_task(text, total=windows)
            found[text] = model_perplexity(model, tokens, partial(_advance, progress, bar))
    return found
