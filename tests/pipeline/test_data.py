"""Texts become windows of tokens: which files are read, which windows are taken, what is refused."""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipeline.config_sections import DataConfig
from pipeline.data import SEPARATOR, calibration_tokens, evaluation_tokens, is_file, iter_documents, read_text
from pipeline.errors import UserError
from pipeline.store import open_store


@pytest.fixture(scope="session")
def news(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 30 kB, which are tokenized in a moment."""
    path = tmp_path_factory.mktemp("data") / "news.txt"
    path.write_text(text_file.read_text()[:30_000])
    return path


@pytest.fixture(scope="session")
def documents(text_file: Path) -> list[str]:
    """The first hundred news articles."""
    return [line for line in text_file.read_text().splitlines() if line.strip()][:100]


def write_jsonl(path: Path, documents: list[str], column: str) -> None:
    path.write_text("".join(json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(documents)))


def write_json(path: Path, documents: list[str], column: str) -> None:
    path.write_text(json.dumps([{"id": n, column: text} for n, text in enumerate(documents)]))


def write_parquet(path: Path, documents: list[str], column: str) -> None:
    pq.write_table(pa.table({"id": list(range(len(documents))), column: documents}), path)


WRITERS: dict[str, Callable[[Path, list[str], str], None]] = {
    "x.jsonl": write_jsonl,
    "x.json": write_json,
    "x.parquet": write_parquet,
}


def data(source: Path | str, **more: Any) -> DataConfig:
    return DataConfig(**{"source": str(source), "samples": 4, "sequence_length": 32} | more)


def rows(windows: Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in windows.tolist()}


# --- kinds of files --------------------------------------------------------------------------------------------------


def test_news(tiny_tokenizer: Any, news: Path) -> None:
    windows = calibration_tokens(tiny_tokenizer, data(news))
    assert (windows.shape, windows.dtype) == ((4, 32), torch.int32)
    text = news.read_text()
    assert all(tiny_tokenizer.decode(row) in text for row in windows)


@pytest.mark.parametrize("column", ["text", "article"])
@pytest.mark.parametrize("name", WRITERS)
def test_tables_give_the_documents(tmp_path: Path, documents: list[str], name: str, column: str) -> None:
    WRITERS[name](tmp_path / name, documents, column)
    assert list(iter_documents(data(tmp_path / name, column=column))) == documents


@pytest.mark.parametrize("name", WRITERS)
def test_tables_give_the_tokens_of_the_joined_text(
    tiny_tokenizer: Any, tmp_path: Path, documents: list[str], name: str
) -> None:
    WRITERS[name](tmp_path / name, documents, "text")
    (tmp_path / "x.txt").write_text(SEPARATOR.join(documents))
    enough = 10**6
    table = evaluation_tokens(tiny_tokenizer, str(tmp_path / name), enough)
    assert torch.equal(table, evaluation_tokens(tiny_tokenizer, str(tmp_path / "x.txt"), enough))


def test_evaluation_tables_may_have_the_text_in_any_column(
    tiny_tokenizer: Any, tmp_path: Path, documents: list[str]
) -> None:
    WRITERS["x.jsonl"](tmp_path / "text.jsonl", documents, "text")
    WRITERS["x.jsonl"](tmp_path / "body.jsonl", documents, "body")
    expected = evaluation_tokens(tiny_tokenizer, str(tmp_path / "text.jsonl"), 64)
    assert torch.equal(evaluation_tokens(tiny_tokenizer, str(tmp_path / "body.jsonl"), 64, "body"), expected)


def test_a_table_is_read_no_further_than_needed(tiny_tokenizer: Any, tmp_path: Path, documents: list[str]) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents * 20))
    tokens = evaluation_tokens(tiny_tokenizer, str(tmp_path / "x.jsonl"), 100)
    every = tiny_tokenizer(SEPARATOR.join(documents)).input_ids
    assert 100 <= len(tokens) < 4000
    assert tokens.tolist() == every[: len(tokens)]


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    assert list(iter_documents(data(tmp_path / "x.jsonl"))) == ["one", "two"]


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.s3)])
def remote(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("s3_url") if request.param == "s3" else f"memory://{uuid.uuid4().hex}"


def test_text_at_an_fsspec_address(tiny_tokenizer: Any, news: Path, remote: str) -> None:
    open_store(remote).put("texts/x.txt", news.read_bytes())
    found = calibration_tokens(tiny_tokenizer, data(f"{remote}/texts/x.txt"))
    assert torch.equal(found, calibration_tokens(tiny_tokenizer, data(news)))


@pytest.mark.parametrize("name", WRITERS)
def test_tables_at_an_fsspec_address(tmp_path: Path, documents: list[str], remote: str, name: str) -> None:
    WRITERS[name](tmp_path / name, documents, "text")
    open_store(remote).put(name, (tmp_path / name).read_bytes())
    assert list(iter_documents(data(f"{remote}/{name}"))) == documents


def test_what_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    files = ["s3://b/x", "no/such.txt", "x.parquet", "x.jsonl", str(tmp_path / "plain")]
    assert all(is_file(source) for source in files)
    assert not any(is_file(source) for source in ["wikitext", "org/name", "wikitext:wikitext-2-raw-v1:test"])


def test_text_is_unchanged(tmp_path: Path) -> None:
    text = "Ünïcode, “quotes”\r\n\r\n\ttabs and 日本語\n"
    (tmp_path / "x.txt").write_bytes(text.encode())
    assert read_text(str(tmp_path / "x.txt")) == text


def test_text_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert read_text("x.txt") == "here"


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_missing_column_names_those_there_are(tmp_path: Path, documents: list[str], name: str) -> None:
    WRITERS[name](tmp_path / name, documents, "body")
    with pytest.raises(
        UserError, match=r"^column 'text': .*x\..* has the columns id, body; name one of these as data\.column"
    ):
        list(iter_documents(data(tmp_path / name)))


def test_too_short_says_the_numbers(tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a" * 100)
    count = len(tiny_tokenizer("a" * 100).input_ids)
    with pytest.raises(UserError) as caught:
        calibration_tokens(tiny_tokenizer, data(tmp_path / "x.txt", samples=50, sequence_length=16))
    message = str(caught.value)
    assert (
        f"50 samples × 16 tokens need 800 tokens, {tmp_path / 'x.txt'} has {count} ({count // 16} whole windows)"
        in message
    )


def test_just_long_enough(tiny_tokenizer: Any, tmp_path: Path, news: Path) -> None:
    text = news.read_text()[:2000]
    (tmp_path / "x.txt").write_text(text)
    windows = len(tiny_tokenizer(text).input_ids) // 16
    calibration_tokens(tiny_tokenizer, data(tmp_path / "x.txt", samples=windows, sequence_length=16))
    with pytest.raises(UserError, match=f"{windows} whole windows"):
        calibration_tokens(tiny_tokenizer, data(tmp_path / "x.txt", samples=windows + 1, sequence_length=16))


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet"])
def test_missing_file(tmp_path: Path, tiny_tokenizer: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: "):
        calibration_tokens(tiny_tokenizer, data(tmp_path / name))


def test_missing_remote_file(tiny_tokenizer: Any, remote: str) -> None:
    with pytest.raises(UserError, match=r"x\.txt: no such text file"):
        calibration_tokens(tiny_tokenizer, data(f"{remote}/x.txt"))


def test_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_text(str(tmp_path))


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"not UTF-8 text \(invalid continuation byte at byte 3\)"):
        read_text(str(tmp_path / "x.txt"))


@pytest.mark.parametrize(("name", "text"), [("x.jsonl", '{"text": "a"}\n{"te'), ("x.json", "{"), ("x.parquet", "PAR1")])
def test_broken_tables(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}: neither a readable file nor a data set that can be reached"):
        list(iter_documents(data(tmp_path / name)))


# --- windows ---------------------------------------------------------------------------------------------------------


def test_same_seed_same_windows_other_seed_others(tiny_tokenizer: Any, news: Path) -> None:
    first = calibration_tokens(tiny_tokenizer, data(news))
    assert torch.equal(first, calibration_tokens(tiny_tokenizer, data(news)))
    assert rows(first) != rows(calibration_tokens(tiny_tokenizer, data(news, seed=1)))


def test_seed_does_not_touch_the_process_s_generator(tiny_tokenizer: Any, news: Path) -> None:
    before = torch.random.get_rng_state()
    calibration_tokens(tiny_tokenizer, data(news))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_windows_do_not_overlap(tiny_tokenizer: Any, tmp_path: Path, news: Path) -> None:
    """All of them together, put back in order, are the text."""
    text = news.read_text()[:3000]
    (tmp_path / "x.txt").write_text(text)
    tokens = tiny_tokenizer(text).input_ids
    count = len(tokens) // 16
    windows = calibration_tokens(tiny_tokenizer, data(tmp_path / "x.txt", samples=count, sequence_length=16))
    assert rows(windows) == {tuple(tokens[16 * n : 16 * n + 16]) for n in range(count)}
    assert len(rows(windows)) == count
    assert [tuple(row) for row in windows.tolist()] != [tuple(tokens[16 * n : 16 * n + 16]) for n in range(count)]


def test_more_samples_begin_with_the_same_windows(tiny_tokenizer: Any, news: Path) -> None:
    few = calibration_tokens(tiny_tokenizer, data(news, samples=3))
    many = calibration_tokens(tiny_tokenizer, data(news, samples=9))
    assert torch.equal(many[:3], few)


def test_evaluation_begins_at_the_text_s_start(tiny_tokenizer: Any, news: Path) -> None:
    tokens = evaluation_tokens(tiny_tokenizer, str(news), 64)
    assert len(tokens) >= 64
    assert tokens[:64].tolist() == tiny_tokenizer(news.read_text()[:1000]).input_ids[:64]


def test_unknown_data_set_is_a_user_error(tiny_tokenizer: Any) -> None:
    """Without a network; the name is looked up as a data set, its subset and split."""
    with pytest.raises(UserError, match=r"nobody/nothing: neither a readable file nor a data set"):
        evaluation_tokens(tiny_tokenizer, "nobody/nothing:subset:test", 64)
