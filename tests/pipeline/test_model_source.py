"""Model folders, whole and damaged, and GGUF files, through the same tensors as transformers reads."""

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from running import Silent, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.config_sections import ModelConfig
from pipeline.errors import UserError
from pipeline.gguf_import import import_gguf
from pipeline.model_source import INDEX, SINGLE, ModelSource, hub_url, locate, open_model
from pipeline.prepare import prepare
from pipeline.store import Store, open_store

TinyModel = Callable[..., Path]


@pytest.fixture(scope="session")
def originals(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model, as a single file and in shards. Not to be changed."""
    folder = tmp_path_factory.mktemp("model-source")
    return {
        "single": tiny_model(folder / "single"),
        "sharded": tiny_model(folder / "sharded", max_shard_size="100KB"),
    }


@pytest.fixture
def single(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["single"], tmp_path / "single"))


@pytest.fixture
def sharded(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["sharded"], tmp_path / "sharded"))


def source_of(folder: Path) -> ModelSource:
    return open_model(open_store(str(folder)))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        source_of(folder)
    return str(caught.value)


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_every_tensor_is_the_stored_one(originals: dict[str, Path], kind: str) -> None:
    source = source_of(originals[kind])
    stored = load_file(originals["single"] / SINGLE)
    assert source.index.keys() == stored.keys()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in stored.items())
    assert len(source.shards) == {"single": 1, "sharded": len(shards_of(originals["sharded"]))}[kind]
    assert len(shards_of(originals["sharded"])) > 2


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.s3)])
def remote(request: pytest.FixtureRequest, originals: dict[str, Path]) -> str:
    """The sharded model at another fsspec address."""
    url = request.getfixturevalue("s3_url") if request.param == "s3" else f"memory://{uuid.uuid4().hex}"
    store = open_store(f"{url}/model")
    for file in originals["sharded"].iterdir():
        store.put(file.name, file.read_bytes())
    return f"{url}/model"


def test_a_model_at_an_fsspec_address(remote: str, originals: dict[str, Path]) -> None:
    source = open_model(locate(ModelConfig(source=remote, revision=None), {}))
    stored = load_file(originals["single"] / SINGLE)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in stored.items())
    assert (
        source.tokenizer()("some text").input_ids == source_of(originals["single"]).tokenizer()("some text").input_ids
    )


class CountingStore(Store):
    bytes_read = 0

    def read_range(self, key: str, start: int, end: int) -> bytes:
        self.bytes_read += end - start
        return super().read_range(key, start, end)


def test_opening_reads_no_weights(originals: dict[str, Path]) -> None:
    store = CountingStore(str(originals["sharded"]))
    source = open_model(store)
    assert store.bytes_read < 10_000
    before = store.bytes_read
    source.read("model.norm.weight")
    assert store.bytes_read - before == 64 * 4


def test_auto_dtype_is_that_of_most_elements(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, blocks=1, dtype="bfloat16")
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, folder / SINGLE)
    source = source_of(folder)
    assert source.dtype("auto") == torch.bfloat16
    assert source.dtype("float16") == torch.float16


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float64, r"most of its weights are torch\.float64, .* name one of these as model\.dtype"),
        (torch.int8, "most of its weights are integers"),
    ],
)
def test_auto_dtype_of_what_no_result_is_in(single: Path, dtype: torch.dtype, words: str) -> None:
    file = single / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    source = open_model(open_store(str(single)))
    with pytest.raises(UserError, match=words):
        source.dtype("auto")
    assert source.dtype("bfloat16") is torch.bfloat16


def test_weights_of_eight_bits_are_named(single: Path) -> None:
    file = single / "model.safetensors"
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"is F8_E4M3, and only F32, .* are read; start from a checkpoint in bfloat16"):
        open_model(open_store(str(single)))


def test_fingerprint_changes_with_weights_and_configuration(sharded: Path) -> None:
    first = source_of(sharded).fingerprint()
    assert source_of(sharded).fingerprint() == first
    shard = shards_of(sharded)[1]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard)
    second = source_of(sharded).fingerprint()
    change_json(sharded / "config.json", rms_norm_eps=1e-3)
    assert len({first, second, source_of(sharded).fingerprint()}) == 3


# --- where a model is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["nowhere", "./no/where", "/no/where", "a/b/c", "../x/y"])
def test_no_such_folder(source: str) -> None:
    with pytest.raises(UserError, match=r"there is no such folder; give a local folder, a hub id \(org/name\)"):
        locate(ModelConfig(source=source, revision=None), {})


def test_hub_id_is_an_fsspec_address_at_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself cannot be had in tests; its answer is all that is replaced."""
    commits = {None: "c0ffee", "v1": "decade"}

    class Info:
        def __init__(self, sha: str) -> None:
            self.sha = sha

    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda self, repo_id, *, revision=None: Info(commits[revision])
    )
    assert hub_url("org/name", None) == "hf://org/name@c0ffee"
    assert hub_url("org/name", "v1") == "hf://org/name@decade"


def test_a_hub_that_does_not_answer_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"model\.source org/name: no such local folder, and the hub does not give it"):
        hub_url("org/name", None)


def test_a_file_is_no_model_folder(single: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        open_model(locate(ModelConfig(source=str(single / SINGLE), revision=None), {}))


# --- configuration ---------------------------------------------------------------------------------------------------


def test_no_config(single: Path) -> None:
    (single / "config.json").unlink()
    assert "there is no config.json, so this is no transformers model folder" in refusal(single)


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "not valid JSON"), ("[]", "not a JSON object but list"), ("{}", "architecture None")]
)
def test_broken_config(single: Path, text: str, reason: str) -> None:
    (single / "config.json").write_text(text)
    assert reason in refusal(single)


def test_unknown_architecture(single: Path) -> None:
    change_json(single / "config.json", model_type="llama-of-tomorrow")
    assert "transformers does not know the architecture 'llama-of-tomorrow'; upgrade transformers" in refusal(single)


def test_config_that_its_architecture_refuses_is_not_called_unknown(single: Path) -> None:
    change_json(single / "config.json", hidden_size=65)
    message = refusal(single)
    assert "not a configuration that llama takes: " in message
    assert "65" in message
    assert "\n" not in message


@pytest.mark.parametrize(("found", "named"), [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"bits": 4}, "unknown")])
def test_quantized_model(single: Path, found: dict[str, Any], named: str) -> None:
    change_json(single / "config.json", quantization_config=found)
    assert f"the model is already quantized ({named}" in refusal(single)


def test_no_tokenizer(single: Path) -> None:
    for file in single.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no usable tokenizer beside the weights"):
        source_of(single).tokenizer()


# --- damaged weights -------------------------------------------------------------------------------------------------


def test_only_pickled_weights(single: Path) -> None:
    (single / SINGLE).rename(single / "pytorch_model.bin")
    assert f"there is neither {SINGLE} nor {INDEX}; only safetensors weights are read" in refusal(single)


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("how", ["missing", "renamed"])
def test_missing_and_renamed_shard(sharded: Path, number: int, how: str) -> None:
    shard = shards_of(sharded)[number]
    if how == "missing":
        shard.unlink()
    else:
        shard.rename(shard.with_name("model-a.safetensors"))
    message = refusal(sharded)
    assert f"{shard}: this shard is missing; download the model again or restore the file's name" in message


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(sharded: Path, keep: int) -> None:
    shard = shards_of(sharded)[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    message = refusal(sharded)
    assert message.startswith(str(shard))
    assert message.endswith("download the shard again")


def test_shard_that_is_a_web_page(single: Path) -> None:
    (single / SINGLE).write_text("<!DOCTYPE html><html>Please log in</html>")
    assert "truncated or not safetensors; download the shard again" in refusal(single)


def test_index_names_what_the_shard_lacks(sharded: Path) -> None:
    shard = shards_of(sharded)[0]
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost} | {"x": torch.ones(1)}, shard)
    index = json.loads((sharded / INDEX).read_text())
    change_json(sharded / INDEX, weight_map=index["weight_map"] | {"x": shard.name})
    message = refusal(sharded)
    assert f"index and shard disagree on {lost}: the index names it, the shard does not hold it" in message


def test_shard_holds_what_the_index_does_not_name(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    name = sorted(weight_map)[3]
    del weight_map[name]
    change_json(sharded / INDEX, weight_map=weight_map)
    message = refusal(sharded)
    assert f"index and shard disagree on {name}: the shard holds it, the index does not name it" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}', '{"weight_map": {}}'])
def test_broken_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    assert f"{sharded / INDEX}: not a valid index" in refusal(sharded)


def test_index_cannot_point_outside_the_folder(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    change_json(sharded / INDEX, weight_map=dict.fromkeys(weight_map, "../../secret.safetensors"))
    assert "unsafe storage key '../../secret.safetensors'" in refusal(sharded)


@pytest.mark.parametrize("how", ["vanished", "shrank"])
def test_shard_that_changes_while_it_is_read(single: Path, how: str) -> None:
    source = source_of(single)
    if how == "vanished":
        (single / SINGLE).unlink()
    else:
        (single / SINGLE).write_bytes(b"")
    with pytest.raises(UserError, match="vanished or shrank while it was read"):
        source.read("model.norm.weight")


# --- GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf(folder: Path, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """The model folder as llama.cpp's converter writes it: other names, query and key rows permuted for its rotary."""
    config = json.loads((folder / "config.json").read_text())
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config["hidden_size"] // heads["q"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__))
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (config["vocab_size"] - 1))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / SINGLE).items():
        if ".q_proj." in name or ".k_proj." in name:
            count = heads[name.split(".")[-2][0]]
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        data, raw = tensor.contiguous().numpy(), gguf.GGMLQuantizationType.F32
        if tensor.ndim == 2:
            data, raw = gguf.quantize(data, kind), kind
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session", params=["tied", "untied"])
def llama(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("gguf") / request.param, tied=request.param == "tied")


def test_gguf_becomes_the_model_that_it_was_made_from(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "x.gguf", gguf.GGMLQuantizationType.F32)
    import_gguf(str(tmp_path / "x.gguf"), {}, open_store(str(tmp_path / "out")), torch.float32, shard_bytes=100_000)
    source, original = source_of(tmp_path / "out"), source_of(llama)
    assert len(source.shards) > 2
    assert source.index.keys() == original.index.keys()
    assert all(torch.equal(source.read(name), original.read(name)) for name in original.index)
    assert source.tokenizer()("Some text, 3.").input_ids == original.tokenizer()("Some text, 3.").input_ids
    loaded, wanted = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tmp_path / "out", llama))
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, wanted(tokens).logits)


def test_quantized_gguf_is_dequantized_and_no_longer_called_quantized(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "x.gguf", gguf.GGMLQuantizationType.Q8_0)
    import_gguf(str(tmp_path / "x.gguf"), {}, open_store(str(tmp_path / "out")), torch.bfloat16)
    source, original = source_of(tmp_path / "out"), source_of(llama)
    assert source.dtype("auto") == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name in original.index:
        weight = original.read(name)
        # Half a step of 127 levels a side, and half a unit in bfloat16's last place.
        error = weight.abs().max() * (0.5 / 127 + 2**-9) + 1e-6
        assert (source.read(name).float() - weight).abs().max() <= error, name


def test_what_a_gguf_model_cannot_give_is_refused_before_it_is_converted(
    llama: Path, short_text: Path, tmp_path: Path
) -> None:
    write_gguf(llama, tmp_path / "x.gguf", gguf.GGMLQuantizationType.F32)
    config = tiny_config(tmp_path / "x.gguf", short_text, tmp_path / "run", scheme={"group_size": 48})
    with pytest.raises(UserError, match="group_size 48 does not divide"):
        prepare(config, Silent())
    assert not (tmp_path / "run" / "model").exists()


def test_gguf_import_that_is_cut_short_leaves_no_config(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(llama, tmp_path / "x.gguf", gguf.GGMLQuantizationType.F32)
    target = open_store(str(tmp_path / "out"))
    written: list[str] = []
    monkeypatch.setattr(target, "put", lambda key, data: written.append(key))
    import_gguf(str(tmp_path / "x.gguf"), {}, target, torch.float32, shard_bytes=100_000)
    assert written[-1] == "config.json"
    assert INDEX in written


def test_gguf_at_an_fsspec_address(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "x.gguf", gguf.GGMLQuantizationType.F32)
    remote = open_store(f"memory://{uuid.uuid4().hex}")
    remote.put("m.gguf", (tmp_path / "x.gguf").read_bytes())
    import_gguf(remote.describe("m.gguf"), {}, remote.child("out"), torch.float32)
    source, original = open_model(remote.child("out")), source_of(llama)
    assert all(torch.equal(source.read(name), original.read(name)) for name in original.index)


@pytest.mark.parametrize("data", [None, b"", b"GGUF", b"no such model"], ids=["missing", "empty", "torn", "text"])
def test_broken_gguf(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "x.gguf"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.gguf: "):
        import_gguf(str(path), {}, open_store(str(tmp_path / "out")), torch.float32)
    assert open_store(str(tmp_path / "out")).list() == {}


def test_truncated_gguf(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(llama, path, gguf.GGMLQuantizationType.F32)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"x\.gguf: "):
        import_gguf(str(path), {}, open_store(str(tmp_path / "out")), torch.float32)
    assert not (tmp_path / "out" / "config.json").exists()


def test_missing_remote_gguf(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"memory://nowhere/x\.gguf: there is no such file"):
        import_gguf("memory://nowhere/x.gguf", {}, open_store(str(tmp_path / "out")), torch.float32)
