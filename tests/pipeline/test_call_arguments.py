"""What blocks are called with, without reading weights: to the last bit what the whole model gives, in every family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_skeleton import FAMILIES, open_folder
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pipeline.call_arguments import call_arguments, same
from pipeline.model_source import ModelSource
from pipeline.skeleton import load_surroundings

TinyModel = Callable[..., Path]


class ReadingError(AssertionError):
    pass


def refuse(self: ModelSource, name: str) -> Tensor:
    raise ReadingError(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_the_whole_model(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str
) -> None:
    source, skeleton = open_folder(tiny_model(tmp_path, config=FAMILIES[family](), dtype=dtype))
    expected = load_surroundings(skeleton, source, getattr(torch, dtype)).arguments(24)
    monkeypatch.setattr(ModelSource, "read", refuse)
    assert same(call_arguments(skeleton, source, 24, getattr(torch, dtype)), expected)


def test_arguments_that_follow_the_weights_have_the_weights_read(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LlamaRotaryEmbedding.forward

    def forward(self: LlamaRotaryEmbedding, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = plain(self, hidden, position_ids)
        return cos + hidden.mean(), sin

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    source, skeleton = open_folder(tiny_model(tmp_path))
    expected = load_surroundings(skeleton, source, torch.float32).arguments(8)
    assert same(call_arguments(skeleton, source, 8, torch.float32), expected)


def test_a_buffer_that_the_checkpoint_holds_is_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, skeleton = open_folder(tiny_model(tmp_path))
    skeleton.model.model.register_buffer("table", torch.zeros(2))
    with pytest.raises(Exception, match=r"no shard holds model\.table"):
        call_arguments(skeleton, source, 8, torch.float32)


def test_what_differs_anywhere_is_not_the_same() -> None:
    one = [{"mask": torch.ones(2), "pair": (1, torch.zeros(1)), "none": None}]
    assert same(one, [{"mask": torch.ones(2), "pair": (1, torch.zeros(1)), "none": None}])
    assert not same(one, [{"mask": torch.ones(2), "pair": (2, torch.zeros(1)), "none": None}])
    assert not same(one, [{"mask": torch.ones(2).double(), "pair": (1, torch.zeros(1)), "none": None}])
    assert not same(one, [{"mask": None, "pair": (1, torch.zeros(1)), "none": None}])
    assert not same(one, one * 2)
