"""Factors in the store: found once for each content, whoever asks, and made again when they are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import Silent, checkpoint_hashes, run, tiny_config
from torch import Tensor

from pipeline import factors as module
from pipeline.config_sections import ComputeConfig
from pipeline.errors import UserError
from pipeline.factors import KIND, factors_artifact, stored_factors
from pipeline.prepare import prepare
from pipeline.store import Store, open_store

COMPUTE = ComputeConfig()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that are factored while a test runs."""
    shapes: list[tuple[int, ...]] = []
    real = module.factors_of

    def counted(weight: Tensor, rank: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shapes.append(tuple(weight.shape))
        return real(weight, rank, dtype)

    monkeypatch.setattr(module, "factors_of", counted)
    return shapes


def weight(seed: int = 0) -> Tensor:
    return torch.randn(24, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_time_they_are_read(store: Store, asked: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    first = stored_factors(store, COMPUTE)(weight(), 4, dtype)
    again = stored_factors(store, COMPUTE)(weight(), 4, dtype)
    assert len(asked) == 1
    assert all(torch.equal(one, other) and one.dtype == dtype for one, other in zip(first, again, strict=True))


def test_the_address_is_all_that_decides_their_bits() -> None:
    def key(seed: int = 0, rank: int | None = 4, dtype: torch.dtype = torch.float32, threads: int = 1) -> str:
        return factors_artifact(weight(seed), rank, dtype, ComputeConfig(threads=threads)).key

    assert key() == key()
    assert len({key(), key(seed=1), key(rank=None), key(dtype=torch.bfloat16), key(threads=2)}) == 5


def test_damaged_factors_are_made_again(store: Store, asked: list[tuple[int, ...]]) -> None:
    factors = stored_factors(store, COMPUTE)
    first = factors(weight(), 4, torch.float32)
    [file] = [key for key in store.list(KIND) if key.endswith(".safetensors")]
    data = bytearray(store.get(file))
    data[-1] ^= 1
    store.put(file, bytes(data))
    for _ in range(2):
        again = factors(weight(), 4, torch.float32)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len(asked) == 2


def test_another_run_reads_what_the_first_one_found(
    tiny_model: object, short_text: Path, tmp_path: Path, asked: list[tuple[int, ...]]
) -> None:
    """Fourteen linears in two blocks; each epoch begins anew where another worker had the block."""
    model = tiny_model(tmp_path / "model")  # type: ignore[operator]
    shared = str(tmp_path / "factors")
    hashes = []
    for name in ("first", "second"):
        config = tiny_config(
            model, short_text, tmp_path / name, method={"increment": "diagonal"}, storage={"factors": shared}
        )
        finished, _ = run(config)
        hashes.append(checkpoint_hashes(finished.prepared.checkpoint)["model.safetensors"])
        assert len(asked) == 14
        assert not finished.prepared.store.list(KIND)
    assert hashes[0] == hashes[1]


def test_they_outlive_the_run_in_its_own_directory(
    tiny_model: object, short_text: Path, tmp_path: Path, asked: list[tuple[int, ...]]
) -> None:
    model = tiny_model(tmp_path / "model")  # type: ignore[operator]
    config = tiny_config(model, short_text, tmp_path / "run", method={"increment": "diagonal"})
    finished, _ = run(config)
    store = finished.prepared.store
    assert len(asked) == 14
    store.delete_all("quantized")
    run(config)
    assert len(asked) == 14


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    tiny_model: object, short_text: Path, tmp_path: Path
) -> None:
    model = tiny_model(tmp_path / "model")  # type: ignore[operator]
    (tmp_path / "file").write_text("no folder")
    config = tiny_config(model, short_text, tmp_path / "run", storage={"factors": str(tmp_path / "file" / "factors")})
    with pytest.raises(UserError, match=r"file/factors: cannot write there .*choose another storage\.factors"):
        run(config)
    assert not (tmp_path / "run" / "run.json").exists()


def test_workers_are_told_a_place_that_no_working_directory_changes(
    tiny_model: object, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "model")  # type: ignore[operator]
    monkeypatch.chdir(tmp_path)
    prepared = prepare(tiny_config(model, short_text, "run", storage={"factors": "shared"}), Silent())
    assert prepared.context.config.storage.factors == str(tmp_path / "shared")
