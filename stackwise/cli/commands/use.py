"""`stackwise eval`, `generate`, `export`: what is done with a run's committed weights."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import Any

import click

from stackwise import words
from stackwise.cli.drawing import progress
from stackwise.cli.options import (
    COUNT,
    SEED,
    Bytes,
    Finite,
    as_json,
    device_option,
    find_run,
    naming_options,
    run_option,
)
from stackwise.cli.output import is_live, note, print_json, say, say_all
from stackwise.cli.tables import held_out_table, passage
from stackwise.errors import UsageError
from stackwise.files import expanded

LONGEST = 1 << 24
"""Characters of a text that are read at most: a device has no end."""


@click.command(name="eval")
@run_option
@click.option("--data", multiple=True, metavar="PATH", help="Other text than the held-out; repeat it for more.")
@device_option
@as_json
def evaluate(run: str | None, data: tuple[str, ...], device: str, as_json: bool) -> None:
    """Held-out bits per byte, loss and accuracy by depth, beside baselines.

    Bits per byte is a bound on the likelihood (the likelihood itself for a causal rack); losses are in nats a
    masked token, at each masked fraction.
    """
    run_directory = find_run(run)
    from stackwise.pipeline.committed.use import evaluate_run

    with naming_options("data", paths="--data"):
        result = evaluate_run(run_directory, data=list(data) or None, device=device)
    print_json(result) if as_json else say_all(held_out_table(result))


@click.command()
@run_option
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
def generate(run: str | None, text: str | None, file: str | None, device: str, as_json: bool, **how: Any) -> None:
    """Go on from TEXT, or fill in its holes, the most certain places first.

    Holes in TEXT are written [MASK], or [MASK*12] for twelve tokens. A text without holes gets masked positions
    behind it; a causal rack adds one token after another. Without TEXT a held-out passage is masked and filled in.
    """
    run_directory = find_run(run)
    given = _text(text, file)
    from stackwise.pipeline.committed.generate import Sampling
    from stackwise.pipeline.committed.generate import generate as make_text
    from stackwise.pipeline.committed.load import load_rack
    from stackwise.pipeline.device import resolve_device

    sampling = Sampling(**how)
    with progress("filling in") as update:
        made = 0

        def on_step(_: str) -> None:
            nonlocal made
            made += 1
            update(made, sampling.steps)

        rack = load_rack(run_directory, resolve_device(device))  # refuses a run that is not finished
        result = make_text(rack, given, sampling, on_step=on_step)
    for line in result["notes"]:
        note(f"note: {line}")
    if as_json:
        print_json(result)
    elif given is not None and not is_live(sys.stdout):  # a pipe gets the text alone
        say(result["after"])
    else:
        say_all(passage(result))


@click.command()
@run_option
@click.option("--out", required=True, metavar="DIR", help="Where it goes; a new folder.")
@click.option("--force", is_flag=True, help="Replace an export that is there.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["hf", "native", "compressed"]),
    default="hf",
    show_default=True,
    help="hf: as transformers loads it, where one of its architectures is the rack's; native: StackWise's own names; "
    "compressed: hf, with blocks trained for integers as compressed-tensors packs them.",
)
@click.option("--shard-size", type=Bytes(), default="5GB", show_default=True, help="Weights in one file, at most.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights. Default: as they are."
)
@as_json
def export(
    run: str | None, out: str, force: bool, layout: str, shard_size: int, dtype: str | None, as_json: bool
) -> None:
    """The fused rack as safetensors with config.json and tokenizer.json, for transformers or for StackWise."""
    run_directory = find_run(run)
    target = expanded(out)
    if not force and target.is_dir() and any(target.iterdir()):  # before anything is loaded
        raise UsageError(
            f"{target} is not empty", hint="--force replaces an export that is there; or name another --out"
        )
    import torch

    from stackwise.pipeline.committed.load import load_rack
    from stackwise.pipeline.committed.use import export_rack
    from stackwise.pipeline.device import resolve_device
    from stackwise.pretrained.writing import ExportOptions

    narrow = None if dtype is None else getattr(torch, dtype)
    options = ExportOptions(dtype=narrow, shard_bytes=shard_size, overwrite=force)
    options = dataclasses.replace(options, native=layout == "native", compressed=layout == "compressed")
    exported = export_rack(load_rack(run_directory, resolve_device("cpu")), target, options)
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
            given = source.read(LONGEST)
    except FileNotFoundError:
        raise UsageError(f"{file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read as text: {error}") from None
    if len(given) == LONGEST:  # there is more, which would be left out in silence
        raise UsageError(f"{file}: longer than any rack takes", hint="give a shorter text")
    return given
