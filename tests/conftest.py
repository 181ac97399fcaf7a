"""What several test folders share: a real S3 server on loopback, tiny models, real text."""

import os

# Before torch is imported, and for every child process: sums in one order, and two busy cores left alone.
os.environ["OMP_NUM_THREADS"] = "1"
# No test asks a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BUCKET = "lsi-tests"
ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The many short ones last: two processes that take file after file end together."""
    items.sort(key=lambda item: "lsi" in item.path.relative_to(ROOT).parts)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int, server: subprocess.Popen[bytes], seconds: float = 60) -> None:
    for _ in range(int(seconds / 0.05)):
        if server.poll() is not None:
            raise RuntimeError(f"moto_server ended with exit status {server.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"moto_server did not listen on port {port} within {seconds} s")


def s3_environment(endpoint: str) -> dict[str, str]:
    """All that a process needs to reach the server at a plain s3:// address, without options. s3fs and botocore read it."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A real S3 server in a process of its own, and the environment set for it and for child processes. Gives s3://bucket."""
    import s3fs

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, server)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in s3_environment(f"http://127.0.0.1:{port}").items():
                patch.setenv(name, value)
            s3fs.S3FileSystem().mkdir(BUCKET)
            yield f"s3://{BUCKET}"
        s3fs.S3FileSystem.clear_instance_cache()
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def s3_url(s3: str) -> str:
    """A folder of the server's bucket that no other test uses."""
    return f"{s3}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of the quickstart's model and texts, downloaded if it is not there yet."""
    from pipeline.sample_material import fetch

    fetch(ROOT / "assets", lambda line: None)
    return ROOT / "assets"


@pytest.fixture(scope="session")
def text_file(assets: Path) -> Path:
    """360 kB of English news."""
    return assets / "news.txt"


@pytest.fixture(scope="session")
def tiny_tokenizer(text_file: Path) -> Any:
    """A byte-level BPE tokenizer of 320 tokens, trained on the news."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text_file.read_text()[:60_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


TinyModel = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: Any) -> TinyModel:
    """Saves a tiny random Llama with its tokenizer into a folder, and returns the folder. Equal arguments give equal bytes.

    `config` takes the place of the Llama; `max_shard_size` (such as "50KB") makes several shards with an index.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

    def save(
        folder: Path,
        *,
        blocks: int = 2,
        tied: bool = True,
        dtype: str = "float32",
        max_shard_size: str = "1GB",
        seed: int = 0,
        config: PretrainedConfig | None = None,
    ) -> Path:
        config = config or LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tiny_tokenizer),
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=tiny_tokenizer.eos_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
            # Fresh biases and norms are all zeros and ones, and small matrices leave the residual stream as it is.
            for parameter in model.parameters():
                parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.data if parameter.ndim == 1 else 0)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save
