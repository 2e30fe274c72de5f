"""`stackwise stage list` and `stackwise stage run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stackwise.cli.app import Subcommands
from stackwise.cli.commands.status import label
from stackwise.cli.options import Choice, as_json, choose, configuration, find_run, is_run, max_time_option
from stackwise.cli.output import plain, state, table
from stackwise.cli.watching import show, watch_option
from stackwise.config import AUTO
from stackwise.errors import UsageError
from stackwise.report import words

if TYPE_CHECKING:
    from rich.console import Group

    from stackwise.config import StackWiseConfig


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
    stages = listing(choice.config)

    def look() -> dict[str, Any]:
        states = _states(choice, stages)
        rows = [row | states.get((row["depth"], row["window"]), {}) for row in stages]
        return {"source": choice.source, "stages": rows}

    going_on = (lambda: held_by_live_process(choice.run)) if watch else None
    show(look, lambda value: _rendered(choice, value["stages"]), going_on, as_json=as_json)


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


def _rendered(choice: Choice, stages: list[dict[str, Any]]) -> Group:
    from rich.console import Group
    from rich.text import Text

    shown = table("stage", "blocks", "reads", "trains", "steps", "rate", "state", "step", "loss", right=(0, 4, 5, 7, 8))
    for row in stages:
        loss = row.get("loss")
        shown.add_row(
            label(row, stages),
            words.span(*row["blocks"]),
            row["reads"],
            _parts(row["trains"]) + ("" if row["causal_from"] is None else ", to be causal"),
            f"{row['steps']:,}" if row["steps"] else "by data",
            words.rate(row["learning_rate"]),
            state(row.get("state", "–")),
            f"{row['step']:,}" if row.get("step") else "",
            f"{loss:.3f}" if loss is not None else "",
        )
    config = choice.config
    title = f"{config.name}: {words.plural(config.n_stages, 'stage')}"
    if config.windows > 1:
        title += f" in {words.plural(config.windows, 'window')}"
    elif config.has_windows and config.training.windows == AUTO:
        title += ", windows: auto"
    title = plain(f"{title} ({choice.source})")
    return Group(Text.from_markup(f"[bold]{title}[/]"), shown)


def listing(config: StackWiseConfig) -> list[dict[str, Any]]:
    """The schedule as plain data. `steps` is null where it follows from the amount of data."""
    from stackwise.pipeline.schedule import schedule

    rows = []
    for stage in schedule(config):
        settings = config.stage_training(stage.depth)
        rows.append(
            {
                "depth": stage.depth,
                "window": stage.window,
                "blocks": [stage.first, stage.last],
                "reads": f"boundary {stage.depth}" if stage.reads_boundary else "tokens",
                "trains": list(stage.trains),
                "precisions": stage.precisions(stage.holds),
                "steps": settings.steps if config.windows == 1 else None,
                "causal_from": stage.causal_from,
                "learning_rate": settings.learning_rate,
            }
        )
    return rows


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


def _parts(trains: list[str]) -> str:
    """What trains, in few words: front, blocks 0–1, head."""
    adapters = [int(part.rpartition(".")[2]) for part in trains if part.startswith("adapter.")]
    trains = [part for part in trains if not part.startswith("adapter.")]
    runs: dict[str, list[int]] = {}
    begun = ""
    for part in trains:
        if not part.startswith("block."):
            continue
        index = int(part.partition(".")[2])
        if not begun or runs[begun][-1] + 1 != index:
            begun = part
        runs.setdefault(begun, []).append(index)
    names = {part: f"block{'s' if len(run) > 1 else ''} {words.span(run[0], run[-1])}" for part, run in runs.items()}
    shown = [names.get(part, part) for part in trains if part in names or not part.startswith("block.")]
    if adapters:
        shown.insert(-1, f"adapters {words.span(min(adapters), max(adapters))}")
    return ", ".join(shown)
