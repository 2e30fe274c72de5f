"""`stackwise stage list` and `stackwise stage run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stackwise.cli.app import Subcommands
from stackwise.cli.options import Choice, as_json, choose, configuration, find_run, is_run, max_time_option
from stackwise.cli.views.schedule import listing, rendered
from stackwise.cli.watching import show, watch_option
from stackwise.config.notes import notes
from stackwise.errors import UsageError


@click.group(cls=Subcommands, short_help="One stage alone; the schedule.")
def stage() -> None:
    """One stage alone; the schedule."""


@stage.command(name="run")
@click.option("--depth", type=click.IntRange(min=0), required=True, metavar="K", help="The stage, from 0.")
@click.option("--window", type=click.IntRange(min=0), metavar="W", help="Its window; by default the next to train.")
@configuration
@max_time_option
@as_json
def run_stage(
    depth: int,
    window: int | None,
    config: str | None,
    preset: str | None,
    run: str | None,
    overrides: tuple[str, ...],
    max_time: float | None,
    as_json: bool,
) -> None:
    """Train stage K alone; what is below it must be committed (exit code 2 otherwise).

    Where the corpus is trained in windows: in its next one. What comes before it, each stage below and the windows
    before at every stage, must be committed.

    Without CONFIG and --preset the run's own configuration counts.
    """
    from stackwise.cli.commands.run import carry_out

    choice = _choice(config, preset, run, overrides)
    command = f"stackwise stage run --depth {depth}" + ("" if window is None else f" --window {window}")
    carry_out(choice, as_json=as_json, command=command, only=depth, window=window, max_time=max_time)


@stage.command(name="list")
@configuration
@watch_option
@as_json
def list_stages(
    config: str | None, preset: str | None, run: str | None, overrides: tuple[str, ...], watch: bool, as_json: bool
) -> None:
    """The schedule: what each stage holds, reads and trains; with a run, how each stands.

    Without CONFIG, --preset and --run: the latest run under runs/, else the preset demo.
    """
    from stackwise.pipeline.run import held_by_live_process

    choice = _choice(config, preset, run, overrides, must_exist=False)
    _settled(choice)
    stages, said = listing(choice.config), notes(choice.config)

    def look() -> dict[str, Any]:
        states = _states(choice, stages)
        rows = [row | states.get((row["depth"], row["window"]), {}) for row in stages]
        return {"source": choice.source, "stages": rows, "notes": said}

    going_on = (lambda: held_by_live_process(choice.run)) if watch else None
    show(look, lambda value: rendered(choice.config, choice.source, value["stages"], said), going_on, as_json=as_json)


def _settled(choice: Choice) -> None:
    """With `block_size: auto`, the size that the run has found."""
    training = choice.config.training
    if choice.config.finds_block_size:
        earlier = choice.run.earlier_config() if is_run(choice.run.path) else None
        if earlier is None or earlier.finds_block_size:
            raise UsageError(
                "training.block_size: auto is found by trial, and no run has found it yet",
                hint="`stackwise run --dry-run` finds it and shows the schedule; or give a number",
            )
        training.block_size = earlier.training.block_size


def _choice(
    config: str | None, preset: str | None, run: str | None, overrides: tuple[str, ...], *, must_exist: bool = True
) -> Choice:
    """As `choose`, but with no configuration named the run's own is meant: the latest run's where none is named."""
    if config is None and preset is None:
        if run is None and (must_exist or any(is_run(path) for path in Path("runs").glob("*"))):
            run = str(find_run(None).path)
        elif run is not None and must_exist:
            find_run(run)
    return choose(config, preset, run, overrides)


def _states(choice: Choice, stages: list[dict[str, Any]]) -> dict[tuple[int, int], dict[str, Any]]:
    """How the stages of the run stand, by depth and window; those of a schedule with other blocks are left out."""
    from stackwise.pipeline.run import status

    if not is_run(choice.run.path):
        return {}
    known = {(row["depth"], row["window"]): row for row in status(choice.run)["stages"]}
    keys = ("state", "step", "loss", "reason")
    return {
        where: {"steps": row["steps"] or own["steps"], **{key: own[key] for key in keys}}
        for row in stages
        if (own := known.get(where := (row["depth"], row["window"]))) is not None and own["blocks"] == row["blocks"]
    }
