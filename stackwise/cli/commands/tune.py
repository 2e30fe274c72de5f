"""`stackwise tune`."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stackwise import words
from stackwise.cli.drawing import Table, phases, state
from stackwise.cli.options import COUNT, RUNS, SEED, as_json, config_argument, load, max_time_option, preset_option
from stackwise.cli.output import Styled, keep_going_without_output, note, print_json, say, say_all
from stackwise.config.tune import SAMPLERS
from stackwise.errors import BusyError, StackWiseError, UsageError

if TYPE_CHECKING:
    from stackwise.pipeline.search.record import Trial
    from stackwise.pipeline.search.study import Study

Event = dict[str, Any]


@click.command()
@config_argument
@preset_option
@click.option("--run", "run", metavar="DIR", help="The search's directory. Default: runs/tune-NAME.")
@click.option("--trials", type=COUNT, metavar="N", help="Runs in all. Default: of a grid all of it.")
@click.option("--sampler", type=click.Choice(SAMPLERS), help="What is tried next.  [default: tpe]")
@click.option("-s", "space", metavar="KEY=RANGE", multiple=True, help="1e-4..1e-2:log, 1..8, or a list 0,0.1.")
@click.option("-o", "overrides", metavar="KEY=VALUE", multiple=True, help="Set a key in all trials.")
@click.option(
    "--objective",
    "objectives",
    metavar="NAME",
    multiple=True,
    help="bits_per_byte, loss, memory, seconds, or MODULE:FUNCTION of a run's directory; several: the Pareto front.",
)
@click.option("--pruner", type=click.Choice(["none", "median", "hyperband"]), help="End trials early that are behind.")
@click.option("--jobs", type=click.IntRange(1, 256), metavar="N", help="Trials at the same time.  [default: 1]")
@click.option("--seed", type=SEED, help="Of the sampler. Default: the configuration's.")
@click.option(
    "--engine",
    type=click.Choice(["here", "slurm", "ray", "local"]),
    default="here",
    show_default=True,
    help="slurm: each trial is a job (slurm.* says what it asks for), --jobs of them at once; ray: the same as tasks "
    "of a Ray cluster; local: the same jobs on this machine.",
)
@max_time_option
@as_json
def tune(
    config: str | None,
    preset: str | None,
    run: str | None,
    overrides: tuple[str, ...],
    max_time: float | None,
    as_json: bool,
    **typed: Any,
) -> None:
    """Search settings: every trial is a run over one store, and a stage that trials have in common trains once.

    \b
    stackwise tune config.yaml -s training.learning_rate=1e-4..1e-2:log -s stages.2.training.weight_decay=0,0.1

    The same command goes on with a search that was interrupted, and with more --trials it goes further. The best
    configuration is kept as best.yaml, everything as tune.html.
    """
    from stackwise.cli.search_view import watcher
    from stackwise.config.loading import parse_overrides
    from stackwise.pipeline.batch.resources import unused_resources
    from stackwise.pipeline.search.begin import BASE, Typed, begin

    if config is None and preset is None and run is not None and (Path(run) / "study.json").is_file():
        config = str(Path(run) / BASE)  # a search that is there brings its configuration along
    fixed = parse_overrides(overrides)
    base = load(config, preset, fixed)
    place = Path(run) if run is not None else RUNS / f"tune-{base.name}"
    again = shlex.join(["stackwise", "tune", *_again(config, preset, run, overrides, max_time, typed)])
    if max_time is not None and typed["engine"] != "here":
        raise UsageError(
            "--max-time is for a search here", hint="slurm.minutes limits a job, which saves and comes back"
        )
    if twice := [key for key in fixed if any(item.partition("=")[0].strip() == key for item in typed["space"])]:
        raise UsageError(f"{twice[0]} is both fixed (-o) and searched (-s)", hint="give one of the two")
    with phases() as progress:
        study, ahead = begin(
            lambda settings: load(config, preset, {**fixed, **settings}), Typed(**typed), place, again, progress
        )
    keep_going_without_output()
    if not as_json:
        if typed["engine"] != "here" and (line := unused_resources(base, typed["engine"])) is not None:
            say(line)
        shared = f", {ahead.common} of them the same in all" if ahead.common else ""
        trials = words.plural(study.search.trials, "trial")
        say(f"{trials} of {words.plural(len(ahead.depths), 'stage')}{shared}, in {place}")
        if ahead.order is not None:
            say(Styled(ahead.order, "dim"))
    try:
        with contextlib.nullcontext(_unseen) if as_json else watcher(study) as observe:
            study.run(observe, max_time)
    except BusyError:  # the search is another process's: its table, too
        raise
    except BaseException:
        _show_results(study, as_json)
        raise
    _show_results(study, as_json)
    if study.best is None:
        why = next((trial for trial in study.trials if trial.failure is not None), None)
        first = "" if why is None else f"; trial {why.number}: {why.failure}"
        raise StackWiseError(f"no trial came to a value{first}", hint=f"each trial's failure and logs: {place}")


def _again(
    config: str | None,
    preset: str | None,
    run: str | None,
    overrides: tuple[str, ...],
    max_time: float | None,
    typed: dict[str, Any],
) -> list[str]:
    """The words that were typed."""
    arguments = [config] if config else []
    named = {"--preset": preset, "--run": run, "--max-time": None if max_time is None else f"{max_time:g}s"}
    named |= {f"--{name}": typed[name] for name in ("trials", "sampler", "pruner", "jobs", "seed")}
    named["--engine"] = None if typed["engine"] == "here" else typed["engine"]
    arguments += [word for name, value in named.items() if value is not None for word in (name, str(value))]
    several = {"-s": typed["space"], "-o": overrides, "--objective": typed["objectives"]}
    return arguments + [word for name, values in several.items() for value in values for word in (name, value)]


def _unseen(trial: Trial, event: Event) -> None:
    """Programs look at the result."""


def _show_results(study: Study, as_json: bool) -> None:
    from stackwise.cli.search_view import figure, settings_of
    from stackwise.report.tuning import result, write

    if not study.trials:
        return
    value = result(study)
    page = write(study)
    if as_json:
        print_json(value)
        return
    objectives = list(study.search.objectives)
    table = Table(
        "trial", *objectives, "state", "trained", "reused", "settings", right=(0, *range(1, len(objectives) + 1))
    )
    for trial in sorted(study.trials, key=lambda one: (one.values is None, one.values or [])):
        values = [figure(name, value) for name, value in zip(objectives, trial.values or [], strict=False)]
        values += [""] * (len(objectives) - len(values))
        style = "bold" if trial is study.best else ""
        table.add_row(
            str(trial.number),
            *values,
            state(trial.state),
            str(trial.trained),
            str(trial.reused),
            settings_of(trial),
            style=style,
        )
    say()
    say_all(table.lines())
    for trial in study.trials:
        if trial.failure is not None:
            note(f"trial {trial.number} failed: {trial.failure.splitlines()[0]}")
    if (sharing := value["sharing"])["trained"] and study.search.evolve is None:
        say(
            f"{words.plural(sharing['trained'], 'stage')} trained for {sharing['stages']} of all trials: "
            f"{sharing['stages'] / sharing['trained']:.1f} times fewer"
        )
    say(f"best: {study.directory / 'best.yaml'}, table: {page}") if study.best is not None else say(f"table: {page}")
