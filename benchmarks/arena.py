"""What trials share: a tiny model and text, a store on disk or on S3, the command as a process, and what storage shows of it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from pipeline.artifacts import RECORD, Artifact, intact
from pipeline.config_file import parse_config, valid_keys
from pipeline.graph import KINDS
from pipeline.prepare import prepare
from pipeline.report import publish_checkpoint
from pipeline.reporter import Reporter
from pipeline.run import inline_workers, run_to_goals
from pipeline.store import Store, open_store

ROOT = Path(__file__).parent.parent
BUCKET = "trials"
WATCHED = (*KINDS, "inspect")


def tiny_model(folder: Path, blocks: int = 4) -> Path:
    """A random Llama of 64 channels with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "<eos>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(letters) + 1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=len(letters),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.data if parameter.ndim == 1 else 0)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def tree_for(model: Path, text: Path, run: str, extra: dict[str, Any]) -> dict[str, Any]:
    """A run of some seconds on two actors. `extra`: dotted keys."""
    tree: dict[str, Any] = {
        "model": {"source": str(model)},
        "data": {"source": str(text), "samples": 24, "sequence_length": 64},
        "scheme": {"bits": 3, "group_size": 32},
        "method": {"increment": "dense"},
        "optimizer": {"epochs": 3},
        "schedule": {"kind": "parallel"},
        "compute": {"dtype": "float32"},
        "cluster": {"workers": 2},
        "storage": {"run": run, "chunk_samples": 4},
        "evaluation": {"texts": {"news": str(text)}, "windows": 2, "length": 16},
    }
    for key, value in extra.items():
        section, _, leaf = key.partition(".")
        tree[section][leaf] = value
    return tree


class Quiet:
    """A reporter for runs that only their result matters of."""

    def message(self, text: str) -> None: ...

    def begin(self, stage_totals: dict[str, tuple[int, int]]) -> None: ...

    def finished(self, node: Any, result: dict[str, Any]) -> None: ...

    def event(self, event: object) -> None: ...


def hashes(store: Store) -> dict[str, str]:
    """sha256 of every file."""
    return {key: hashlib.sha256(store.get(key)).hexdigest() for key in store.list()}


def undisturbed(model: Path, text: Path, run: Path) -> dict[str, str]:
    """The checkpoint of a run in this process, without Ray."""
    report: Reporter = Quiet()
    finished = run_to_goals(prepare(parse_config(tree_for(model, text, str(run), {})), report), report, inline_workers)
    publish_checkpoint(finished)
    return hashes(finished.prepared.checkpoint)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def s3_environment(port: int) -> dict[str, str]:
    """All that a process needs for a server at a plain s3:// address."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "trials",
        "AWS_SECRET_ACCESS_KEY": "trials",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
    }


@contextmanager
def s3_server(rate: float, seed: int) -> Iterator[tuple[int, int]]:
    """Ports of the honest and of the faulty door; this process is set up to use the honest one."""
    import s3fs

    ports = free_port(), free_port()
    command = [sys.executable, str(Path(__file__).with_name("faulty_s3.py")), *map(str, ports), str(rate), str(seed)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = dict(os.environ)
    try:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", ports[0])) == 0, 60, "the S3 server listens")
        os.environ.update(s3_environment(ports[0]))
        # Instances are kept by their arguments, and the server's address is none of them.
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)
        yield ports
    finally:
        server.terminate()
        server.wait()
        os.environ.clear()
        os.environ.update(before)
        s3fs.S3FileSystem.clear_instance_cache()


def until(condition: Any, seconds: float, what: str, pause: float = 0.1) -> None:
    """Wait for a condition. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(pause)


@dataclass
class Trial:
    """One run that something is done to. `seen`: every state of every commit record that was observed."""

    number: int
    fault: str
    folder: Path
    store: Store
    config: Path
    environment: dict[str, str]
    draw: random.Random
    seen: dict[str, list[str]] = field(default_factory=dict)
    drivers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    cluster: Any = None  # where the fault is laid around a cluster of several nodes
    second_node: Any = None

    def start(self) -> subprocess.Popen[bytes]:
        """The command, as a user would give it."""
        log = (self.folder / f"driver-{len(self.drivers)}.log").open("wb")
        command = [sys.executable, "-m", "pipeline.cli", "quantize", str(self.config)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | self.environment
        driver = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=self.folder
        )
        self.drivers.append(driver)
        return driver

    def observe(self) -> int:
        """Look at the commit records; returns how many artifacts were ever seen committed."""
        self.store.fs.invalidate_cache()
        for kind in WATCHED:
            with suppress(FileNotFoundError):  # deleted while it was listed
                found = self.store.fs.find(f"{self.store.root}/{kind}", detail=True)
                for path, info in found.items():
                    if path.endswith(f"/{RECORD}"):
                        self._note(path[len(self.store.root) + 1 : -len(RECORD) - 1], info)
        return len(self.seen)

    def _note(self, artifact: str, info: dict[str, Any]) -> None:
        mark = str(info.get("mtime") or f"{info.get('LastModified')} {info.get('ETag')}")
        history = self.seen.setdefault(artifact, [])
        if mark not in history:
            history.append(mark)

    def wait_for_commits(self, count: int, driver: subprocess.Popen[bytes]) -> None:
        """Until so many artifacts were committed, or the driver is done."""
        until(lambda: self.observe() >= count or driver.poll() is not None, 180, f"{count} commits are there")

    def wait(self, driver: subprocess.Popen[bytes], seconds: float = 240) -> int:
        """The driver's exit code, storage being watched meanwhile."""
        until(lambda: (self.observe(), driver.poll() is not None)[1], seconds, "the driver ends", 0.2)
        self.observe()
        return driver.wait()

    def actors(self, driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """The driver's actors, by what Ray calls their processes."""
        found: list[psutil.Process] = []

        def look() -> bool:
            found[:] = [process for process in family(driver.pid) if is_actor(process)]
            return bool(found) or driver.poll() is not None

        until(look, 30, "an actor is there")
        return found

    def redone(self) -> list[str]:
        """Artifacts that were committed more than once."""
        return sorted(path for path, history in self.seen.items() if len(history) > 1)

    def missing(self) -> list[str]:
        """Results that the plan names and storage does not hold."""
        plan = json.loads(self.store.get("plan.json"))
        makes = [path for node in plan["nodes"] for path in node["makes"]]
        wanted = {*plan["goals"], *(path for path in makes if path.startswith("quantized/"))}
        return sorted(path for path in wanted if intact(self.store, Artifact.parse(path)) is None)

    def end(self) -> None:
        """Nothing of the trial goes on."""
        for driver in self.drivers:
            if driver.poll() is None:
                kill([*family(driver.pid), psutil.Process(driver.pid)])
                driver.wait()


def is_actor(process: psutil.Process) -> bool:
    """By its title: Ray's agents and its spare workers have telling ones."""
    with suppress(psutil.Error):
        title = " ".join(process.cmdline()).strip()  # padded to what it replaced
        return title.startswith("ray::") and "IDLE" not in title and not title.endswith("Agent")
    return False


def family(pid: int) -> list[psutil.Process]:
    """All processes below one."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to all of them."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def has_key(key: str | None) -> bool:
    """Whether this version's configuration knows a key."""
    return key is None or key in valid_keys()


def new_trial(
    number: int, fault: str, folder: Path, run: str, tree: dict[str, Any], environment: dict[str, str], seed: int
) -> Trial:
    folder.mkdir(parents=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    draw = random.Random(f"{seed} {number} {fault}")
    return Trial(number, fault, folder, open_store(run), config, environment, draw)
