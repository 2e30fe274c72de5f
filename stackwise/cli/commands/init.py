"""`stackwise init`."""

from __future__ import annotations

import re
from pathlib import Path

import click

from stackwise.cli.options import DEFAULT_PRESET, preset_option
from stackwise.cli.output import say
from stackwise.errors import UsageError
from stackwise.files import expanded

FILE = "stackwise.yaml"


@click.command(short_help="Write a commented stackwise.yaml.")
@click.argument("directory", default=".", metavar="[DIR]")
@preset_option
@click.option("--force", is_flag=True, help=f"Replace a {FILE} that is there.")
def init(directory: str, preset: str | None, force: bool) -> None:
    """Write a commented stackwise.yaml into DIR (made if missing; default: here).

    Every setting is in it with its meaning; those that the preset leaves alone are commented out.
    """
    from stackwise import durable
    from stackwise.config.presets import commented

    folder, preset = expanded(directory), preset or DEFAULT_PRESET
    path = folder / FILE
    text = commented(preset, name=_name(folder, preset))
    if path.exists() and not force:
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
