"""Model, run directory and checkpoint on a real S3 server, through Ray actors that find it by their environment."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.core import url_to_fs
from running import Silent, checkpoint_hashes, run, tiny_config

from pipeline.driver import StoppedError
from pipeline.run import ray_workers
from pipeline.store import Store, open_store

pytestmark = [pytest.mark.s3, pytest.mark.ray]


def upload(folder: Path, url: str) -> None:
    files, path = url_to_fs(url)
    files.put(str(folder) + "/", path + "/", recursive=True)


def without_names(store: Store) -> dict[str, str]:
    """Hashes of what does not repeat where the model came from."""
    return {k: v for k, v in checkpoint_hashes(store).items() if k not in ("README.md", "lsi_manifest.json")}


def test_everything_on_s3_gives_the_bytes_of_a_local_run(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path, s3_url: str
) -> None:
    model = tiny_model(tmp_path / "model", blocks=2, max_shard_size="100KB")
    local, _ = run(tiny_config(model, short_text, tmp_path / "run"))
    upload(model, f"{s3_url}/model")
    more: dict[str, Any] = {"cluster": {"workers": 2}, "outputs": {"checkpoint": f"{s3_url}/result"}}
    config = tiny_config(f"{s3_url}/model", short_text, f"{s3_url}/run", **more)
    remote, _ = run(config, workers=ray_workers)
    assert without_names(remote.prepared.checkpoint) == without_names(local.prepared.checkpoint)
    loads_from(remote.prepared.checkpoint, tmp_path / "down")


def loads_from(store: Store, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    for key in store.list():
        (folder / key).write_bytes(store.get(key))
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_stopped_run_on_s3_goes_on(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path: Path, s3_url: str
) -> None:
    model = tiny_model(tmp_path / "model", blocks=2)
    config = tiny_config(model, short_text, f"{s3_url}/run")
    first, second = Silent(), Silent()
    with pytest.raises(StoppedError):
        run(config, first, should_stop=lambda: len(first.units) > 8)
    finished, _ = run(config, second)
    assert not set(first.units) & set(second.units)
    assert open_store(f"{s3_url}/run").exists("checkpoint/config.json")
    for kind in ("hidden", "stream", "state"):
        assert finished.prepared.store.list(kind) == {}
