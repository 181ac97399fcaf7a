"""What a crash or a change leaves behind: torn small files, stale shards, replaced texts. A run goes on or says why not."""

from collections.abc import Callable
from pathlib import Path

import pytest
from running import Silent, checkpoint_hashes, run, tiny_config

from pipeline.driver import StoppedError
from pipeline.run import ray_workers
from pipeline.store import Store, open_store


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model", blocks=2)


def tear(store: Store, key: str) -> None:
    """What a SIGKILL in the middle of a write leaves."""
    store.put(key, store.get(key)[:-10])


@pytest.mark.parametrize(
    "key", ["run.json", "model.json", "plan.json", "checkpoint/lsi_manifest.json", "checkpoint/config.json"]
)
def test_a_torn_small_file_is_written_again(model: Path, short_text: Path, tmp_path: Path, key: str) -> None:
    config = tiny_config(model, short_text, tmp_path / "run")
    finished, _ = run(config)
    before = checkpoint_hashes(finished.prepared.checkpoint)
    store = finished.prepared.store
    tear(store, key)
    if key == "checkpoint/lsi_manifest.json":
        # Written before config.json, so a crash there leaves no visible checkpoint.
        store.delete("checkpoint/config.json")
    report = Silent()
    finished, _ = run(config, report)
    assert report.units == []
    assert checkpoint_hashes(finished.prepared.checkpoint) == before


def test_damaged_tokens_are_written_again_in_the_same_run(model: Path, short_text: Path, tmp_path: Path) -> None:
    config = tiny_config(model, short_text, tmp_path / "run")
    before = checkpoint_hashes(run(config)[0].prepared.checkpoint)
    store = open_store(str(tmp_path / "run"))
    for kind in ("quantized", "shard", "evaluation"):
        store.delete_all(kind)
    for key in store.list("tokens"):
        if key.endswith(".safetensors"):
            data = bytearray(store.get(key))
            data[-1] ^= 1
            store.put(key, bytes(data))
    assert checkpoint_hashes(run(config)[0].prepared.checkpoint) == before


def test_shards_of_another_layout_leave_the_checkpoint(model: Path, short_text: Path, tmp_path: Path) -> None:
    finished, _ = run(tiny_config(model, short_text, tmp_path / "run"))
    checkpoint = finished.prepared.checkpoint
    before = checkpoint_hashes(checkpoint)
    checkpoint.put("model-00001-of-00002.safetensors", b"stale")
    checkpoint.put("model.safetensors.index.json", b"{}")
    checkpoint.delete("config.json")
    run(tiny_config(model, short_text, tmp_path / "run"))
    assert checkpoint_hashes(checkpoint) == before


def test_a_text_added_later_is_evaluated_and_nothing_else_is_done(
    model: Path, short_text: Path, tmp_path: Path
) -> None:
    run(tiny_config(model, short_text, tmp_path / "run"))
    other = tmp_path / "other.txt"
    other.write_text(short_text.read_text()[5000:])
    evaluation = {"texts": {"news": str(short_text), "other": str(other)}, "windows": 2, "length": 16}
    report = Silent()
    _, result = run(tiny_config(model, short_text, tmp_path / "run", evaluation=evaluation), report)
    assert {unit.rpartition("/")[2] for unit in report.units} == {"other"}
    assert set(result["perplexity"]["quantized"]) == {"news", "other"}


@pytest.mark.ray
def test_workers_that_write_elsewhere_are_found_out(model: Path, short_text: Path) -> None:
    """Memory is not shared between processes, as a local disk is not between machines."""
    config = tiny_config(model, short_text, "memory://apart/run", cluster={"workers": 1})
    with pytest.raises(StoppedError, match=r"storage\.run must be one place for all workers"):
        run(config, workers=ray_workers)


def test_a_gguf_file_that_was_replaced_is_converted_again(
    tmp_path: Path, short_text: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    """The conversion itself has its own test; here it is a copy of a model folder, counted."""
    from pipeline import prepare as module

    conversions: list[str] = []

    def convert(source: str, options: object, target: Store, dtype: object) -> None:
        conversions.append(target.url)
        for file in model.iterdir():
            target.put(file.name, file.read_bytes())

    monkeypatch.setattr(module, "import_gguf", convert)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"one")
    config = tiny_config(file, short_text, tmp_path / "run", optimizer={"epochs": 0})
    run(config)
    run(config)
    assert len(conversions) == 1
    file.write_bytes(b"other")
    run(config)
    assert len(set(conversions)) == 2
