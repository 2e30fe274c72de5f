"""Commands on runs: `status`, `report`, `compare` look at them; `eval`, `generate`, `export` use committed weights."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stackwise import words
from stackwise.cli.drawing import Table, progress, show, state
from stackwise.cli.options import (
    COUNT,
    SEED,
    Bytes,
    Finite,
    as_json,
    check_one,
    device_option,
    find_run,
    model_option,
    naming_options,
    run_option,
    watch_option,
)
from stackwise.cli.output import Styled, is_live, note, print_json, say, say_all
from stackwise.cli.tables import held_out_table, passage, status_table, suite_tables
from stackwise.errors import NotFound, UsageError
from stackwise.files import expanded

if TYPE_CHECKING:
    from stackwise.pipeline.run import RunDirectory


@click.command()
@run_option
@watch_option
@as_json
def status(run: str | None, watch: bool, as_json: bool) -> None:
    """Show run status: each stage's state, step and loss, and why it trains or is reused."""
    from stackwise.pipeline.run import held_by_live_process
    from stackwise.pipeline.run import status as state_of

    directory = find_run(run)
    still_changing = (lambda: held_by_live_process(directory)) if watch else None
    show(lambda: state_of(directory), status_table, still_changing, as_json=as_json)


@click.command()
@run_option
def report(run: str | None) -> None:
    """Write report.html into the run's directory: one file that opens offline. Any state of a run will do."""
    from stackwise import report as reports

    say(reports.write(find_run(run)))


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN…")
@click.option("--plot", metavar="FILE", help="Draw the held-out figures and their intervals, as SVG.")
@as_json
def compare(runs: tuple[str, ...], plot: str | None, as_json: bool) -> None:
    """A table of runs: the settings that differ, loss by stage, held-out bits a byte, time, stages reused.

    Runs that differ by no more than their seed are one figure with its 95% interval, and its difference from the first
    one's by a paired bootstrap over seeds and held-out samples.
    """
    from stackwise import durable
    from stackwise.report.compare import Entry
    from stackwise.report.compare import compare as comparison
    from stackwise.report.groups import plot as drawn

    value = comparison([Entry(find_run(run)) for run in runs])
    if plot is not None:
        file = expanded(plot)
        if not file.parent.is_dir():
            raise NotFound(f"--plot {plot}: there is no folder {file.parent}")
        durable.write_bytes(file, drawn(value["groups"]).encode())
    print_json(value) if as_json else show_comparison(value)


def show_comparison(value: dict[str, Any]) -> None:
    """The table of a comparison, and under it what failed."""
    from stackwise.report.compare import best, cells, summary
    from stackwise.report.groups import group_cells

    columns, rows = cells(value)
    at = columns.index("state")
    table = Table(*columns, right=range(at + 2, len(columns)))
    for number, row in enumerate(rows):
        # The best one stands out.
        table.add_row(*row[:at], state(row[at]), *row[at + 1 :], style="bold" if number == best(value) else "")
    say_all(table.lines())
    if value["groups"]:
        columns, rows = group_cells(value["groups"])
        table = Table(*columns, right=range(1, 2))
        for row in rows:
            table.add_row(*row)
        say_all(["", *table.lines()])
    for run in value["runs"]:
        if run["failure"]:
            say(Styled(f"{run['name']}: {run['failure']}", "red"))
    say(Styled(summary(value), "dim"))


LONGEST = 1 << 24
"""Characters of a text that are read at most: a device has no end."""


@click.command(name="eval")
@run_option
@model_option
@click.option("--data", multiple=True, metavar="PATH", help="Other text than the held-out; repeat it for more.")
@click.option(
    "--suite",
    "suites",
    multiple=True,
    type=click.Choice(["lm", "reasoning", "glue", "all"]),
    help="Tasks instead: lm (perplexity by document), reasoning (lm-evaluation-harness), glue; repeat it for more.",
)
@click.option("--tasks", metavar="A,B", help="Suites reasoning and glue: these tasks alone.")
@click.option("--task-path", type=click.Path(path_type=Path), metavar="DIR", help="The tasks' files; GLUE's folder.")
@click.option("--stride", type=COUNT, metavar="N", help="Suite lm: tokens between windows; by default half a row.")
@click.option("--limit", type=COUNT, metavar="N", help="Suites lm and reasoning: documents or rows, at most.")
@click.option("--seeds", type=COUNT, default=1, metavar="N", help="Suite glue: runs of each task.")
@click.option("-o", "overrides", metavar="KEY=VALUE", multiple=True, help="Suite glue: a setting of its runs.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Suite glue: where its runs go.")
@device_option
@as_json
def evaluate(
    run: str | None,
    model: str | None,
    data: tuple[str, ...],
    device: str,
    as_json: bool,
    suites: tuple[str, ...],
    **how: Any,
) -> None:
    """Held-out bits per byte, loss and accuracy by depth, beside baselines; or suites of tasks.

    Bits per byte is a bound on the likelihood (the likelihood itself for a causal rack); losses are in nats a
    masked token, at each masked fraction.
    """
    check_one(run, model)
    if model is not None and not data and (not suites or "lm" in suites or "all" in suites):
        raise UsageError("--model: a model brings no text to be scored on", hint="name some: --data PATH")
    unused = [name for name, value in how.items() if value and not (name == "seeds" and value == 1)]
    if unused and not suites:
        option = "-o" if unused[0] == "overrides" else f"--{unused[0].replace('_', '-')}"
        raise UsageError(f"{option} is for suites of tasks", hint="name one: --suite lm, reasoning or glue")
    run_directory = find_run(run) if model is None else None
    if suites:
        _evaluate_suites(run_directory, model, suites, data, device, how, as_json)
        return
    from stackwise.pipeline.committed.use import evaluate_model, evaluate_run

    with naming_options("data", paths="--data"):
        if run_directory is not None:
            result = evaluate_run(run_directory, data=list(data) or None, device=device)
        else:
            result = evaluate_model(str(model), list(data), lambda line: note(f"note: {line}"), device=device)
    print_json(result) if as_json else say_all(held_out_table(result))


def _evaluate_suites(
    run: RunDirectory | None,
    model: str | None,
    suites: tuple[str, ...],
    data: tuple[str, ...],
    device: str,
    how: dict[str, Any],
    as_json: bool,
) -> None:
    from stackwise.config.loading import parse_overrides
    from stackwise.pipeline.suites import SUITES, SuiteOptions, run_suites

    options = SuiteOptions(
        suites=SUITES if "all" in suites else tuple(dict.fromkeys(suites)),
        data=data,
        tasks=tuple(filter(None, (how["tasks"] or "").split(","))),
        task_path=how["task_path"],
        stride=how["stride"],
        limit=how["limit"],
        seeds=how["seeds"],
        settings=parse_overrides(how["overrides"]),
        out=how["out"],
        device=device,
    )
    with naming_options("data", paths="--data"):
        result = run_suites(run, model, options, note)
    print_json(result) if as_json else say_all(suite_tables(result))


@click.command()
@run_option
@model_option
@click.argument("text", required=False)
@click.option(
    "--file", "file", type=click.Path(dir_okay=False), metavar="F", help="Read TEXT from a file; - is standard input."
)
@click.option("--length", type=COUNT, metavar="N", help="Tokens to add behind TEXT.")
@click.option("--steps", type=COUNT, metavar="N", help="Rounds of unmasking; else one a token.")
@click.option(
    "--order",
    type=click.Choice(["confidence", "random"]),
    default="confidence",
    help="Which tokens a round keeps: the most certain, or random ones.",
)
@click.option("--block", type=COUNT, metavar="N", help="Finish N tokens before the next, from the left.")
@click.option("--temperature", type=Finite(min=0.0), default=0.0, metavar="T", help="0: the likeliest.")
@click.option(
    "--seed",
    type=SEED,
    default=0,
    metavar="N",
    help="Of what is drawn: tokens where the temperature is above 0, places where the order is random.",
)
@click.option(
    "--exit",
    type=click.Choice(["auto", "last"]),
    help="auto (as without it): leave at the stage that trained on the masked share (time as depth).",
)
@click.option("--causal", is_flag=True, help="Token by token, for a rack trained so; others are refused.")
@device_option
@as_json
def generate(
    run: str | None,
    model: str | None,
    text: str | None,
    file: str | None,
    device: str,
    as_json: bool,
    **how: Any,
) -> None:
    """Go on from TEXT, or fill in its holes, the most certain places first.

    Holes in TEXT are written [MASK], or [MASK*12] for twelve tokens. A text without holes gets masked positions
    behind it; a causal rack adds one token after another. Without TEXT a held-out passage is masked and filled in.
    """
    check_one(run, model)
    run_directory = find_run(run) if model is None else None
    prompt = _text(text, file)
    if model is not None and prompt is None:
        raise UsageError("--model: a model brings no held-out text to fill in", hint="give a TEXT, or --file")
    from stackwise.pipeline.committed.generate import Sampling
    from stackwise.pipeline.committed.generate import generate as make_text
    from stackwise.pipeline.committed.load import load_model, load_rack
    from stackwise.pipeline.device import resolve_device

    sampling = Sampling(**how)
    with progress("filling in") as update:
        written = 0

        def on_step(_: str) -> None:
            nonlocal written
            written += 1
            update(written, sampling.steps)

        if run_directory is not None:
            rack = load_rack(run_directory, resolve_device(device))  # refuses a run that is not finished
        else:
            rack = load_model(str(model), resolve_device(device), lambda line: note(f"note: {line}"))
        result = make_text(rack, prompt, sampling, on_step=on_step)
    for line in result["notes"]:
        note(f"note: {line}")
    if as_json:
        print_json(result)
    elif prompt is not None and not is_live(sys.stdout):  # a pipe gets the text alone
        say(result["after"])
    else:
        say_all(passage(result))


@click.command()
@run_option
@model_option
@click.option("--out", required=True, metavar="DIR", help="Where it goes; a new folder.")
@click.option("--force", is_flag=True, help="Replace an export that is there.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["hf", "native", "compressed", "hf-adapters"]),
    default="hf",
    show_default=True,
    help="hf: as transformers loads it, where one of its architectures is the rack's; native: StackWise's own names; "
    "compressed: hf, with blocks trained for integers as compressed-tensors packs them; hf-adapters: what "
    "training.adapters trained, as peft loads it over the model.",
)
@click.option("--shard-size", type=Bytes(), default="5GB", show_default=True, help="Weights in one file, at most.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights. Default: as they are."
)
@as_json
def export(run: str | None, model: str | None, out: str, force: bool, as_json: bool, **how: Any) -> None:
    """The fused rack as safetensors with config.json and tokenizer.json, for transformers or for StackWise."""
    check_one(run, model)
    run_directory = find_run(run) if model is None else None
    target = expanded(out)
    if not force and target.is_dir() and any(target.iterdir()):  # before anything is loaded
        raise UsageError(
            f"{target} is not empty", hint="--force replaces an export that is there; or name another --out"
        )
    import torch

    from stackwise.pipeline.committed.load import load_rack
    from stackwise.pipeline.committed.use import export_model, export_rack, export_run_adapters
    from stackwise.pipeline.device import resolve_device
    from stackwise.pretrained.writing import ExportOptions

    narrow = None if how["dtype"] is None else getattr(torch, how["dtype"])
    layout = how["layout"]
    options = ExportOptions(dtype=narrow, shard_bytes=how["shard_size"], overwrite=force)
    options = dataclasses.replace(options, native=layout == "native", compressed=layout == "compressed")
    if layout == "hf-adapters" and model is not None:
        raise UsageError("--format hf-adapters: a model has no adapters beside it", hint="name a run: --run DIR")
    if run_directory is not None:
        write = export_run_adapters if layout == "hf-adapters" else export_rack
        exported = write(load_rack(run_directory, resolve_device("cpu")), target, options)
    else:
        exported = export_model(str(model), target, options, lambda line: note(f"note: {line}"))
    if exported.family == "stackwise" and layout != "native":
        note("note: transformers has no architecture for this rack; it keeps StackWise's own format")
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir()) if path.is_file()}
    if as_json:
        print_json({"directory": str(target), "architecture": exported.family, "files": files})
        return
    say(f"exported to {target}")
    for name, size in files.items():
        say(f"  {name}  {words.size(size)}")


def _text(text: str | None, file: str | None) -> str | None:
    if text is not None and file is not None:
        raise UsageError("TEXT and --file are two texts; give one")
    if file is None:
        return text
    try:
        with contextlib.nullcontext(sys.stdin) if file == "-" else open(file, encoding="utf-8") as source:
            content = source.read(LONGEST)
    except FileNotFoundError:
        raise UsageError(f"{file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read as text: {error}") from None
    if len(content) == LONGEST:  # there is more, which would be left out in silence
        raise UsageError(f"{file}: longer than any rack takes", hint="give a shorter text")
    return content
