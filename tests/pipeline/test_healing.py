"""What a crash or a change leaves behind: torn small files, stale shards, replaced texts. A run goes on or says why not."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from running import Silent, checkpoint_hashes, run, tiny_config

from pipeline.artifacts import RECORD, Artifact, digest
from pipeline.driver import StoppedError
from pipeline.errors import UserError
from pipeline.graph import Node
from pipeline.model_source import open_model
from pipeline.report import block_reports
from pipeline.run import ray_workers
from pipeline.skeleton import make_skeleton
from pipeline.status import read_status
from pipeline.store import Store, open_store
from pipeline.worker import make_handler


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


def flip_a_bit(store: Store, key: str) -> None:
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 4
    store.put(key, bytes(data))


class Flips(Silent):
    """Flips a bit of the first artifact of a kind as soon as it is committed."""

    def __init__(self, store: Store, kind: str, part: str) -> None:
        super().__init__()
        self.store, self.kind, self.part = store, kind, part
        self.flipped = False

    def finished(self, node: Node, result: dict[str, Any]) -> None:
        super().finished(node, result)
        made = [artifact for artifact in node.makes if artifact.kind == self.kind]
        if made and not self.flipped:
            self.flipped = True
            flip_a_bit(self.store, self._victim(made[0]))

    def _victim(self, artifact: Artifact) -> str:
        if self.part == "file":
            return "checkpoint/model.safetensors"
        keys = self.store.list(artifact.path)
        return next(key for key in keys if key.endswith(RECORD) is (self.part == "record"))


@pytest.fixture(scope="module")
def undisturbed(
    tiny_model: Callable[..., Path], short_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """A model of two blocks and the hashes of its checkpoint."""
    folder = tmp_path_factory.mktemp("healing")
    model = tiny_model(folder / "model", blocks=2)
    finished, _ = run(tiny_config(model, short_text, folder / "run"))
    return model, checkpoint_hashes(finished.prepared.checkpoint)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        *((kind, part) for kind in ("hidden", "stream", "state", "quantized") for part in ("data", "record")),
        ("evaluation", "record"),
        ("inspect", "record"),
        ("shard", "record"),
        ("shard", "file"),
    ],
)
def test_a_flipped_bit_is_found_said_and_redone_from_what_is_still_there(
    undisturbed: tuple[Path, dict[str, str]], short_text: Path, tmp_path: Path, kind: str, part: str
) -> None:
    """The driver stops soon after; who reads it next has nothing in memory and must find out."""
    model, expected = undisturbed
    config = tiny_config(model, short_text, tmp_path / "run", storage={"keep_activations": True})
    report, again = Flips(open_store(str(tmp_path / "run")), kind, part), Silent()
    with suppress(StoppedError):  # a flip in the last unit comes when nothing is left to stop
        run(config, report, should_stop=lambda: report.flipped)
    assert report.flipped
    unread = (kind, part) == ("state", "data")
    if unread:  # the worker still held that state; another one would have to read it
        report.store.delete_all("quantized")
    finished, _ = run(config, again)
    assert checkpoint_hashes(finished.prepared.checkpoint) == expected
    assert any("damaged, will be redone" in message for message in [*report.messages, *again.messages])
    units = [*report.units, *again.units]
    assert len(units) == len(set(units)) + 1 + unread, "the damaged one is redone, and nothing else"


@pytest.mark.parametrize("loss", ["flipped", "gone"])
def test_a_result_that_only_the_report_reads_is_made_again(
    undisturbed: tuple[Path, dict[str, str]], short_text: Path, tmp_path: Path, loss: str
) -> None:
    """Everything after it is committed, so no unit of the plan would look at it."""
    model, expected = undisturbed
    config = tiny_config(model, short_text, tmp_path / "run")
    store = run(config)[0].prepared.store
    record = next(key for key in store.list("quantized") if key.endswith(RECORD))
    flip_a_bit(store, record) if loss == "flipped" else store.delete(record)
    store.delete("checkpoint/config.json")
    finished, _ = run(config)
    assert checkpoint_hashes(finished.prepared.checkpoint) == expected
    assert len(block_reports(finished)) == 2


def test_flipped_bits_in_tokens_are_said_and_written_again(
    undisturbed: tuple[Path, dict[str, str]], short_text: Path, tmp_path: Path
) -> None:
    model, expected = undisturbed
    config = tiny_config(model, short_text, tmp_path / "run")
    store = open_store(str(tmp_path / "run"))
    report, again = Silent(), Silent()
    with pytest.raises(StoppedError):
        run(config, report, should_stop=lambda: len(report.units) > 3)
    for key in store.list("tokens"):
        flip_a_bit(store, key)
    finished, _ = run(config, again)
    assert checkpoint_hashes(finished.prepared.checkpoint) == expected
    assert sum("damaged, written again" in message for message in again.messages) == 2


def test_garbage_of_a_dead_driver_is_gone_after_the_next(
    undisturbed: tuple[Path, dict[str, str]], short_text: Path, tmp_path: Path
) -> None:
    model, _ = undisturbed
    config = tiny_config(model, short_text, tmp_path / "run")
    store = open_store(str(tmp_path / "run"))
    store.put("hidden/boundary-000-chunk-00000-0123456789abcdef/0123456789abcdef/hidden.safetensors", bytes(3000))
    report = Silent()
    run(config, report)
    assert "removed 2.9 KiB that attempts left which never committed" in report.messages
    kept = set(store.list())
    for kind in ("quantized", "tokens"):
        folder = next(key for key in kept if key.startswith(kind)).split("/")[1]
        store.put(f"{kind}/{folder}/fedcba9876543210/left.bin", b"torn")
    run(config)
    assert {key for key in store.list() if not key.startswith("driver/")} == {
        key for key in kept if not key.startswith("driver/")
    }


@pytest.mark.parametrize("file", ["../../x.safetensors", "/etc/passwd", "..\\x", "commit.json", None])
def test_a_shard_record_that_points_elsewhere_is_redone(
    undisturbed: tuple[Path, dict[str, str]], short_text: Path, tmp_path: Path, file: object
) -> None:
    model, expected = undisturbed
    config = tiny_config(model, short_text, tmp_path / "run")
    finished, _ = run(config)
    store = finished.prepared.store
    key = next(key for key in store.list("shard") if key.endswith(RECORD))
    body = json.loads(store.get(key))["body"]
    body["meta"]["file"] = file
    store.put(key, json.dumps({"body": body, "checksum": digest(body)}).encode())
    report = Silent()
    finished, _ = run(config, report)
    assert report.units == ["merge/model.safetensors"]
    assert checkpoint_hashes(finished.prepared.checkpoint) == expected


def test_a_merge_done_twice_leaves_the_shard_alone(
    undisturbed: tuple[Path, dict[str, str]], short_text: Path, tmp_path: Path
) -> None:
    """A worker that wakes up late would tear what is published for as long as it writes."""
    finished, _ = run(tiny_config(undisturbed[0], short_text, tmp_path / "run"))
    checkpoint, context = finished.prepared.checkpoint, finished.prepared.context
    before = checkpoint.stamp("model.safetensors")
    merge = next(node for node in finished.graph.nodes if node.stage == "merge")
    make_handler(context, "late")(merge.task)
    assert checkpoint.stamp("model.safetensors") == before
    assert checkpoint_hashes(checkpoint) == undisturbed[1]


def test_status_refuses_a_plan_that_names_other_places(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("run.json", b"{}")
    for path in ("../../etc/x-0123456789abcdef", "/etc/x-0123456789abcdef", "a\\b"):
        store.put("plan.json", json.dumps({"goals": [path], "nodes": []}).encode())
        with pytest.raises(UserError, match=r"plan\.json: damaged"):
            read_status(store)


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
    with pytest.raises(UserError, match=r"host .* does not see .*storage\.run must be one place for all workers"):
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
    skeleton = make_skeleton(open_model(open_store(str(model))).config)
    monkeypatch.setattr(module, "open_skeleton", lambda config: (skeleton, None))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"one")
    config = tiny_config(file, short_text, tmp_path / "run", optimizer={"epochs": 0})
    run(config)
    run(config)
    assert len(conversions) == 1
    file.write_bytes(b"other")
    run(config)
    assert len(set(conversions)) == 2
