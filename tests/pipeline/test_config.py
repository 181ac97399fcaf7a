"""The configuration: what is refused, in which words, and what a run is recognised by."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import RunConfig
from pipeline.config_file import (
    apply_overrides,
    differing_keys,
    load_config,
    load_finetune,
    parse_config,
    parse_override,
    read_yaml,
    valid_keys,
)
from pipeline.errors import UserError
from pipeline.identity import RUN_FILE, Resolved, claim, recorded_config, resolve
from pipeline.store import open_store

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))


def tree(**sections: Any) -> dict[str, Any]:
    return {"model": {"source": "m"}, "data": {"source": "d"}, "storage": {"run": "r"}} | sections


def refusal(**sections: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(tree(**sections), "x.yaml")
    return str(caught.value)


def write(folder: Path, text: str) -> str:
    (folder / "x.yaml").write_text(text)
    return str(folder / "x.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_parses(path: Path) -> None:
    fine_tunes = path.name.startswith("finetune-")
    config = load_finetune("CHECKPOINT", str(path), []) if fine_tunes else load_config(str(path), [])
    assert config.storage.run
    assert (config.finetune.blocks is not None) == fine_tunes
    assert RunConfig.model_validate(config.model_dump()) == config


def test_the_run_on_s3_is_the_quickstart_elsewhere() -> None:
    here, there = (load_config(str(CONFIGS[0].parent / f"{name}.yaml"), []) for name in ("quickstart", "s3"))
    assert there.storage.run.startswith("s3://")
    assert there.recipe() == here.recipe()
    assert (there.cluster, there.evaluation) == (here.cluster, here.evaluation)


def test_a_fine_tune_has_its_checkpoint_as_model_and_two_blocks_unless_told(tmp_path: Path) -> None:
    text = "data: {source: d}\nstorage: {run: r}\n"
    config = load_finetune("CHECKPOINT", write(tmp_path, text), [])
    assert (config.model.source, config.finetune.blocks) == ("CHECKPOINT", 2)
    assert load_finetune("CHECKPOINT", write(tmp_path, text), ["finetune.blocks=5"]).finetune.blocks == 5
    with pytest.raises(
        UserError, match=r"model.source is other, but a fine-tune's model is its checkpoint, CHECKPOINT"
    ):
        load_finetune("CHECKPOINT", write(tmp_path, text + "model: {source: other}\n"), [])
    assert "finetune" not in parse_config(tree()).recipe()
    assert config.recipe()["finetune"] == {"blocks": 2}


def test_there_are_shipped_configs() -> None:
    assert "quickstart.yaml" in [path.name for path in CONFIGS]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "key", "nearest"),
    [
        ({"schem": {"bits": 3}}, "schem", "scheme"),
        ({"output": {}}, "output", "outputs"),
        ({"bits": 3}, "bits", "scheme.bits"),
        ({"scheme": {"bit": 3}}, "scheme.bit", "scheme.bits"),
        ({"scheme": {"groupsize": 3}}, "scheme.groupsize", "scheme.group_size"),
        ({"optimizer": {"increment_lr": 1}}, "optimizer.increment_lr", "optimizer.increment_learning_rate"),
        ({"cluster": {"batch_size": 1}}, "cluster.batch_size", "optimizer.batch_size"),
    ],
)
def test_unknown_key_names_the_nearest(sections: dict[str, Any], key: str, nearest: str) -> None:
    assert refusal(**sections) == f"x.yaml: unknown key {key}; did you mean {nearest}?"


def test_unknown_key_like_no_other_lists_the_section() -> None:
    message = refusal(scheme={"zzz": 1})
    assert message == (
        "x.yaml: unknown key scheme.zzz; valid here: bits, group_size, symmetric, activation_bits, "
        "activation_symmetric, quantize_qkv, skip"
    )


def test_every_problem_has_its_line() -> None:
    message = refusal(scheme={"bits": 5, "grupsize": 1}, cluster={"workers": 0})
    assert len(message.splitlines()) == 3
    assert all(line.startswith("x.yaml: ") for line in message.splitlines())


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 9, 16, -3, 2.5, "four", None])
def test_bits_out_of_range(bits: Any) -> None:
    assert f"scheme.bits = {bits!r}: " in refusal(scheme={"bits": bits})


@pytest.mark.parametrize("bits", [5, 7])
def test_bits_between_the_packed_widths(bits: int) -> None:
    assert refusal(scheme={"bits": bits}) == f"x.yaml: scheme.bits = {bits}: bits must be 2, 3, 4, 6 or 8"


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_bits_in_range(bits: int) -> None:
    assert parse_config(tree(scheme={"bits": bits})).scheme.bits == bits


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("scheme", "group_size", 0),
        ("data", "samples", 0),
        ("data", "sequence_length", 1),
        ("optimizer", "epochs", -1),
        ("optimizer", "clipping_learning_rate", 0),
        ("storage", "chunk_samples", 0),
        ("cluster", "cpus_per_worker", 0),
        ("schedule", "kind", "random"),
        ("method", "increment", "spiral"),
        ("compute", "device", "tpu"),
        ("data", "samples", "many"),
    ],
)
def test_values_out_of_range_are_named(section: str, key: str, value: Any) -> None:
    given = tree()
    given[section] = given.get(section, {}) | {key: value}
    with pytest.raises(UserError, match=rf"x\.yaml: {section}\.{key} = {value!r}: "):
        parse_config(given, "x.yaml")


@pytest.mark.parametrize(
    ("sections", "told", "remedy"),
    [
        ({"compute": {"offload": "all"}}, "compute.offload all means nothing for plain torch", "engine to deepspeed"),
        ({"compute": {"adam": "cpu_adam"}}, "compute.adam is cpu_adam", "leave it out"),
        (
            {"compute": {"engine": "deepspeed", "adam": "cpu_adam"}, "optimizer": {"steps": "signed"}},
            "compute.adam is cpu_adam",
            "optimizer.steps to adamw",
        ),
        (
            {"compute": {"engine": "deepspeed"}, "method": {"equivalence": "auto"}},
            "compute.engine deepspeed holds one linear at a time",
            "method.equivalence to []",
        ),
        (
            {"compute": {"group": 3}, "optimizer": {"batch_size": 2}},
            "compute.group 3 has more members than a batch has samples (2, by optimizer.batch_size)",
            "set compute.group to 2 or less, or optimizer.batch_size to 3 or more",
        ),
        (
            {"compute": {"group": 2}, "data": {"source": "t", "samples": 1}},
            "samples (1, by data.samples)",
            "set compute.group to 1 or less",
        ),
        (
            {"schedule": {"kind": "parallel", "parts": 2}},
            "schedule.parts 2 means nothing for parallel",
            "schedule.kind to wave",
        ),
        (
            {"schedule": {"kind": "sequential", "lead": 1}},
            "schedule.lead 1 means nothing for sequential",
            "schedule.kind to wave",
        ),
        (
            {"schedule": {"kind": "sequential", "refresh_every": 0}},
            "schedule.refresh_every 0 means nothing for sequential",
            "schedule.kind to parallel or wave",
        ),
        (
            {"schedule": {"kind": "wave", "parts": 2, "refresh_every": 2}},
            "schedule.refresh_every is 2",
            "set it to 1, or schedule.parts to 1",
        ),
        (
            {"schedule": {"kind": "wave", "parts": 5}, "data": {"source": "t", "samples": 30}},
            "schedule.parts 5 is more than the 4 chunks of 8 samples (storage.chunk_samples) that data.samples 30 make",
            "schedule.parts to 4 or less, or storage.chunk_samples smaller",
        ),
        (
            {"compute": {"engine": "deepspeed", "checkpoint": True}},
            "compute.checkpoint runs parts of a block again",
            "compute.checkpoint to false",
        ),
    ],
)
def test_engines_that_do_not_fit_the_rest(sections: dict[str, Any], told: str, remedy: str) -> None:
    message = refusal(**sections)
    assert told in message
    assert remedy in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("compute", "parameters", "optimizer"),
    [
        ({}, False, False),
        ({"engine": "deepspeed"}, True, True),
        ({"engine": "deepspeed", "offload": "parameters"}, True, False),
        ({"engine": "deepspeed", "offload": "optimizer"}, False, True),
        ({"engine": "deepspeed", "offload": "none"}, False, False),
    ],
)
def test_what_is_offloaded(compute: dict[str, str], parameters: bool, optimizer: bool) -> None:
    found = parse_config(tree(compute=compute)).compute
    assert (found.offloads_parameters, found.offloads_optimizer) == (parameters, optimizer)


def test_who_steps_in_host_memory_is_found_once_for_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://test-config-adam")
    config = parse_config(tree(compute={"engine": "deepspeed"}))
    monkeypatch.setattr("pipeline.identity.is_built", lambda op: False)
    assert resolve(config, store).adam == "torch"
    claim(store, config, resolve(config, store))
    monkeypatch.setattr("pipeline.identity.is_built", lambda op: True)
    assert resolve(config, store).adam == "torch"
    assert resolve(config, open_store("memory://test-config-adam-new")).adam == "cpu_adam"
    assert resolve(parse_config(tree()), open_store("memory://test-config-adam-new")).adam == "torch"


def test_batch_larger_than_chunk() -> None:
    message = refusal(optimizer={"batch_size": 4}, storage={"run": "r", "chunk_samples": 3})
    assert "optimizer.batch_size 4 is larger than storage.chunk_samples 3" in message
    parse_config(tree(optimizer={"batch_size": 4}, storage={"run": "r", "chunk_samples": 4}))


def test_a_corner_that_is_larger_than_the_rank() -> None:
    words = "method.corner 100 is larger than method.rank 64"
    assert words in refusal(method={"increment": "corner", "rank": 64})
    assert parse_config(tree(method={"increment": "corner", "rank": 64, "corner": 64})).method.corner == 64
    assert parse_config(tree(method={"increment": "band", "rank": 64})).method.rank == 64
    assert "method.band 4 reaches past method.rank 4" in refusal(method={"increment": "band", "rank": 4, "band": 4})
    assert parse_config(tree(method={"increment": "band", "rank": 4, "band": 3})).method.band == 3


def test_a_rank_that_nothing_has_needs_no_weights_of_that_size() -> None:
    method = parse_config(tree(method={"increment": "none", "rank": 64})).method
    assert method.increments.smallest_rank == 1


def test_nothing_to_train() -> None:
    nothing = {"clipping": "none", "increment": "none"}
    assert "nothing is trained" in refusal(method=nothing, optimizer={"epochs": 2})
    parse_config(tree(method=nothing, optimizer={"epochs": 0}))
    parse_config(tree(method=nothing | {"clipping": "learned"}, optimizer={"epochs": 2}))


JOINS = {"clipping": "learned", "increment": "diagonal"}


@pytest.mark.parametrize(
    ("method", "warm", "epochs", "words"),
    [
        (
            JOINS,
            4,
            4,
            "optimizer.warm_epochs 4 leaves none of optimizer.epochs 4 to increment and rounding: set it to 3 or",
        ),
        (
            JOINS,
            1,
            0,
            "optimizer.warm_epochs 1 leaves none of optimizer.epochs 0 to increment and rounding: set it to 0",
        ),
        (
            JOINS | {"increment": "none"},
            1,
            4,
            "so nothing joins after the warm epochs: set optimizer.warm_epochs to 0, or",
        ),
        (JOINS | {"clipping": "none"}, 1, 4, "so the warm epochs train nothing: set optimizer.warm_epochs to 0, or"),
    ],
)
def test_a_stage_that_trains_nothing(method: dict[str, Any], warm: int, epochs: int, words: str) -> None:
    message = refusal(method=method, optimizer={"epochs": epochs, "warm_epochs": warm})
    assert words in message
    assert len(message.splitlines()) == 1
    parse_config(tree(method=JOINS, optimizer={"epochs": 4, "warm_epochs": 3}))


@pytest.mark.parametrize("value", [-1, 3, 1.5])
def test_look_ahead_out_of_range(value: Any) -> None:
    assert f"method.look_ahead = {value}: " in refusal(method={"look_ahead": value})


def test_required_keys() -> None:
    with pytest.raises(UserError) as caught:
        parse_config({"model": {}, "data": {"source": "d"}})
    assert str(caught.value).splitlines() == ["config: model.source is required", "config: storage is required"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such config file"):
        load_config(str(tmp_path / "nowhere.yaml"), [])
    with pytest.raises(UserError, match="no such config file"):
        load_config(str(tmp_path), [])


@pytest.mark.parametrize("data", [b"model: [", b"a: b: c", b"\xff\xfe\x00", b"\x00"])
def test_not_yaml(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.yaml").write_bytes(data)
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(str(tmp_path / "x.yaml"), [])


@pytest.mark.parametrize(("text", "found"), [("- model", "list"), ("just text", "str"), ("3", "int")])
def test_yaml_that_is_no_mapping(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(UserError, match=f"expected sections such as model:, data: and storage:, found {found}"):
        load_config(write(tmp_path, text), ["scheme.bits=3"])


def test_overrides_can_be_the_whole_config(tmp_path: Path) -> None:
    overrides = ["model.source=m", "data.source=d", "storage.run=r", "scheme.bits=3"]
    assert load_config(write(tmp_path, ""), overrides) == parse_config(tree(scheme={"bits": 3}))


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("scheme.bits=3", ["scheme", "bits"], 3),
        ("scheme.group_size=null", ["scheme", "group_size"], None),
        ("scheme.symmetric=true", ["scheme", "symmetric"], True),
        ("scheme.skip=[lm_head, '*.o_proj']", ["scheme", "skip"], ["lm_head", "*.o_proj"]),
        ("optimizer.increment_learning_rate=1.0e-3", ["optimizer", "increment_learning_rate"], 1e-3),
        ("model.source=s3://b/a=b", ["model", "source"], "s3://b/a=b"),
        ("storage.options={endpoint_url: 'http://h:1'}", ["storage", "options"], {"endpoint_url": "http://h:1"}),
        ("data.subset=", ["data", "subset"], None),
    ],
)
def test_override_values_are_yaml(text: str, path: list[str], value: Any) -> None:
    assert parse_override(text) == (path, value)


@pytest.mark.parametrize("text", ["scheme.bits", "=3", "", "scheme.skip=[a"])
def test_override_in_bad_syntax(text: str) -> None:
    with pytest.raises(UserError, match=r"override .*: (write it as section\.key=value|the value is not valid YAML)"):
        parse_override(text)


def test_learning_rate_as_people_write_it() -> None:
    """YAML 1.1 takes 1e-3 for text; the field's type makes it a number again."""
    config = parse_config(apply_overrides(tree(), ["optimizer.increment_learning_rate=1e-3"]))
    assert config.optimizer.increment_learning_rate == 1e-3


def test_override_replaces_and_adds(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(tree(scheme={"bits": 4, "symmetric": True})))
    config = load_config(path, ["scheme.bits=2", "optimizer.epochs=7", "scheme.bits=3"])
    assert (config.scheme.bits, config.scheme.symmetric, config.optimizer.epochs) == (3, True, 7)


def test_override_of_a_whole_section() -> None:
    config = parse_config(apply_overrides(tree(scheme={"bits": 2}), ["scheme={symmetric: true}"]))
    assert (config.scheme.bits, config.scheme.symmetric) == (4, True)


def test_override_through_a_value_is_refused() -> None:
    with pytest.raises(UserError, match="bits is a value, not a section"):
        apply_overrides(tree(scheme={"bits": 2}), ["scheme.bits.low=1"])


def test_override_of_an_unknown_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key scheme\.bit; did you mean scheme\.bits\?"):
        load_config(write(tmp_path, yaml.safe_dump(tree())), ["scheme.bit=3"])


def test_every_leaf_can_be_overridden() -> None:
    """By its own default, which must parse to itself."""
    config = parse_config(tree())
    leaves = [key for key in valid_keys() if "." in key]
    overrides = []
    for key in leaves:
        section, leaf = key.split(".")
        overrides.append(f"{key}={json.dumps(getattr(getattr(config, section), leaf))}")
    assert len(leaves) > 30
    assert parse_config(apply_overrides({}, overrides)) == config


# --- what a run is recognised by -------------------------------------------------------------------------------------


def test_where_it_runs_and_is_stored_is_not_in_the_recipe() -> None:
    here = parse_config(tree())
    there = parse_config(
        tree(
            cluster={"workers": 7, "address": "auto", "max_attempts": 9},
            outputs={"checkpoint": "s3://b/c", "max_shard_mib": 100},
            storage={"run": "s3://b/r", "options": {"key": "secret"}, "cache_mib": 1, "keep_activations": True},
        )
    )
    assert here.recipe() == there.recipe()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("scheme", "bits", 3),
        ("method", "increment", "dense"),
        ("optimizer", "seed", 1),
        ("schedule", "refresh_every", 2),
        ("data", "samples", 3),
        ("compute", "threads", 2),
        ("storage", "chunk_samples", 4),
    ],
)
def test_what_decides_the_bytes_is_in_the_recipe(section: str, key: str, value: Any) -> None:
    ours = parse_config(tree())
    given = tree()
    given[section] = given.get(section, {}) | {key: value}
    theirs = parse_config(given)
    was = getattr(getattr(ours, section), key)
    expected = [f"{section}.{key}: {value!r} there, {was!r} here"]
    assert differing_keys(ours.recipe(), theirs.recipe()) == expected


def test_differing_keys_of_equal_and_missing_values() -> None:
    assert differing_keys({"a": {"b": 1}}, {"a": {"b": 1}}) == []
    assert differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}) == ["a.c: None there, 2 here"]
    assert differing_keys({}, {"a": 1}) == ["a: 1 there, None here"]
    assert differing_keys({"a": [1, 2]}, {"a": [2, 1]}) == ["a: [2, 1] there, [1, 2] here"]


def test_recorded_run_holds_no_storage_options() -> None:
    options = {"key": "hunter2", "client_kwargs": {"token": "hunter2"}}
    config = parse_config(tree(storage={"run": "r", "options": options}))
    store = open_store("memory://test-config-recorded")
    claim(store, config, Resolved(None, "torch"))
    assert b"hunter2" not in store.get(RUN_FILE)
    assert b"options" not in store.get(RUN_FILE)
    assert recorded_config(store, options) == config


@pytest.mark.parametrize(
    ("given", "meant"), [("local", None), (None, None), ("auto", "auto"), ("head:6379", "head:6379")]
)
def test_a_local_cluster_is_this_machine(given: str | None, meant: str | None) -> None:
    assert parse_config(tree(cluster={"address": given})).cluster.address == meant


def test_a_section_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    """YAML would forget the first one."""
    (tmp_path / "x.yaml").write_text("scheme: {bits: 2}\ndata: {}\nscheme: {group_size: 64}\n")
    with pytest.raises(UserError, match=r"x\.yaml: not valid YAML in line 3: scheme stands there twice"):
        load_config(str(tmp_path / "x.yaml"), [])


def test_anchors_and_merges_are_read(tmp_path: Path) -> None:
    text = "a: {m: &o {bits: 2}, n: &p {<<: *o, group_size: 64}}\nscheme: {<<: *p, bits: 3}\n"
    assert read_yaml(text)["scheme"] == {"bits": 3, "group_size": 64}


@pytest.mark.parametrize("value", ["hunter2", "*hunter2", "!hunter2 x", '"hunter2'])
def test_a_yaml_error_does_not_show_the_line(tmp_path: Path, value: str) -> None:
    (tmp_path / "x.yaml").write_text(f"storage:\n  options: {{secret: {value}\n")
    with pytest.raises(UserError) as error:
        load_config(str(tmp_path / "x.yaml"), [])
    assert "hunter2" not in str(error.value)
    assert "\n" not in str(error.value)
