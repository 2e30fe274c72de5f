"""What comes before a run: `stackwise init` and `stackwise data prepare`."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stackwise import words
from stackwise.cli.app import Subcommands
from stackwise.cli.drawing import phases
from stackwise.cli.options import COUNT, as_json, naming_options, preset_option
from stackwise.cli.output import note, print_json, say
from stackwise.errors import UsageError
from stackwise.files import expanded
from stackwise.presets import DEFAULT_PRESET

if TYPE_CHECKING:
    from stackwise.config import DataConfig

FILE = "stackwise.yaml"


@click.group(cls=Subcommands, short_help="Prepare text for training.")
def data() -> None:
    """Prepare text for training."""


@data.command()
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option("--task", "tasks", multiple=True, metavar="NAME=PATH", help="A task and text of it; repeatable.")
@click.option("--out", required=True, metavar="DIR", help="Where the prepared data set goes; a new folder.")
@click.option("--tokenizer", default="bpe", show_default=True, help="bpe, bytes, or the path of a tokenizer.json.")
@click.option("--vocab-size", type=COUNT, metavar="N", help="Size that bpe is trained to.  [default: 4096]")
@click.option("--held-out", type=float, metavar="F", help="Share of the documents held out.  [default: 0.05]")
@click.option(
    "--text-column", metavar="C", help="Column of rows that holds the text; doc.text: within doc.  [default: text]"
)
@click.option("--column", "columns", multiple=True, metavar="C", help="Keep this column of rows of tokens; repeatable.")
@click.option("--follow-links", is_flag=True, default=None, help="Follow links that lead out of a folder.")
@click.option("--max-bytes", type=int, metavar="N", help="Read at most so many bytes of text.")
@as_json
def prepare(as_json: bool, out: str, **options: Any) -> None:
    """Tokenize text files and folders, jsonl, json, parquet and Hugging Face data sets into a prepared data set.

    `data.paths` accepts the folder that is made. Text is streamed: a corpus may be larger than memory.
    """
    import yaml

    from stackwise.data import WAITING
    from stackwise.data import prepare as prepare_data
    from stackwise.pipeline.events import PHASES

    begun = time.perf_counter()
    with (
        naming_options("data", paths="PATH"),
        phases(unit=lambda phase, value: "" if phase.startswith(WAITING) else words.size(value)) as report,
    ):
        waiting_for = ""

        def progress(phase: str, done: int, total: int | None) -> None:
            nonlocal waiting_for
            if phase.startswith(WAITING) and phase != waiting_for:  # also where there is no progress bar
                waiting_for = phase
                note(f"{phase}, which prepares {out}")
            report(PHASES.get(phase, phase), done, total)

        config = _config(options)
        prepared, reused = prepare_data(config, out=expanded(out), progress=progress)
    summary = prepared.summary()
    if as_json:
        print_json({**summary, "reused": reused})
        return
    seconds = time.perf_counter() - begun
    say(f"{prepared.directory}: " + ("was there already, unchanged" if reused else words.duration(seconds)))
    for name, split in (("training", summary["train"]), ("held out", summary["held_out"])):
        size = f", {words.size(split['bytes'])}" if split["bytes"] else ""
        documents = words.plural(split["documents"], "document")
        say(f"  {name}: {documents}, {words.count(split['tokens'])} tokens{size}")
    tokenizer = summary["tokenizer"]
    say(f"  tokenizer: {tokenizer['name']}, {tokenizer['vocab_size']:,} ids")
    for number, name in enumerate(prepared.train.tasks):
        sizes = (words.count(split.task_tokens[number]) for split in (prepared.train, prepared.held_out))
        say("  task {}: {} tokens, {} held out".format(name, *sizes))
    for line in (*_skipped(summary["skipped"]), *summary["notes"]):
        note(f"  {line}")
    # A name with commas or brackets needs quotes.
    paths = yaml.safe_dump([str(prepared.directory)], default_flow_style=True, width=10**6).strip()
    say("use it with:\n  stackwise run -o " + shlex.quote(f"data.paths={paths}"))


def _skipped(summary: dict[str, Any]) -> Iterator[str]:
    """What was not read: a line a reason, and the first of the files."""
    for reason, number in summary.get("reasons", {}).items():
        yield f"skipped: {words.plural(number, 'file')}: {reason}"
    for item in summary.get("files", [])[:5]:
        yield f"  {item['path']}: {item['why']}"


def _config(options: dict[str, Any]) -> DataConfig:
    """The `data` section that the options come to, checked like any other."""
    from stackwise.config import StackWiseConfig
    from stackwise.config.loading import build

    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    if not settings["paths"] and not settings["tasks"]:
        raise UsageError("PATH is missing: name text to prepare, or tasks with --task NAME=PATH")
    paths_of: dict[str, list[str]] = {}
    for task in settings.pop("tasks"):
        name, equals, path = task.partition("=")
        if not equals or not name or not path:
            raise UsageError(f"--task {task}: is not NAME=PATH", hint="such as --task english=texts/en")
        paths_of.setdefault(name, []).append(path)
    if paths_of:
        settings["tasks"] = [{"name": name, "paths": paths} for name, paths in paths_of.items()]
    settings = {key: value for key, value in settings.items() if value is not None}  # the others keep their defaults
    return build(StackWiseConfig, {"data": settings}, source="data prepare").data


@click.command(short_help="Write a commented stackwise.yaml.")
@click.argument("directory", default=".", metavar="[DIR]")
@preset_option
@click.option("--force", is_flag=True, help=f"Replace a {FILE} that is there.")
def init(directory: str, preset: str | None, force: bool) -> None:
    """Write a commented stackwise.yaml into DIR (made if missing; default: here).

    Every setting is in it with its meaning; those that the preset leaves alone are commented out.
    """
    from stackwise import durable
    from stackwise.config.yaml_files import commented

    folder, preset = expanded(directory), preset or DEFAULT_PRESET
    path = folder / FILE
    text = commented(preset, name=_name(folder, preset))
    if path.exists() and not force:  # somebody has edited it
        raise UsageError(f"{path} exists; it was left as it is", hint="--force replaces it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(path, text.encode())
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    say(f"wrote {path} (preset {preset})")
    say(f"  edit it, then: stackwise run {path}")


def _name(folder: Path, preset: str) -> str:
    """The name of the runs of a file: the folder's where it can be one, else the preset's."""
    name = folder.absolute().name
    return name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) else preset
