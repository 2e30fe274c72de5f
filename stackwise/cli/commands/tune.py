"""`stackwise tune`, and a search while it goes: a table of its trials redrawn in place, or plain lines for logs."""

from __future__ import annotations

import contextlib
import shlex
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from stackwise import words
from stackwise.cli.drawing import Table, drawn, phases, state
from stackwise.cli.options import COUNT, RUNS, SEED, as_json, config_argument, load, max_time_option, preset_option
from stackwise.cli.output import Line, Styled, is_live, keep_going_without_output, note, print_json, say, say_all
from stackwise.config.tune import SAMPLERS
from stackwise.errors import BusyError, StackWiseError, UsageError
from stackwise.pipeline.batch.grid import label, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from stackwise.pipeline.events import Event
    from stackwise.pipeline.search.record import Trial
    from stackwise.pipeline.search.study import Study


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
    from stackwise.cli.commands.tune import watcher
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
    from stackwise.cli.commands.tune import figure, settings_of
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


SECONDS = 5.0
"""Between two lines of progress of a trial."""
ROWS = 16
"""Trials shown at once: the best one, and the newest."""


def watcher(study: Study) -> contextlib.AbstractContextManager[Callable[[Trial, Event], None]]:
    """Who shows the trials' events: a live view where the terminal can be drawn on, plain lines otherwise."""
    if is_live(sys.stdout):
        from rich.console import Console

        return Live(study, Console(highlight=False))
    return contextlib.nullcontext(Lines(study))


def figure(name: str, value: float) -> str:
    """An objective's value, as people read it."""
    return words.size(value) if name == "memory" else words.duration(value) if name == "seconds" else f"{value:.4f}"


def settings_of(trial: Trial) -> str:
    """A trial's settings, in a few words."""
    return ", ".join(f"{label(key)} {shown(value)}" for key, value in trial.settings.items())


def outcome(study: Study, trial: Trial) -> str:
    """What a trial came to, in a line."""
    if trial.values is not None:
        named = zip(study.search.objectives, trial.values, strict=True)
        came = ", ".join(f"{name} {figure(name, value)}" for name, value in named)
        came += " (the best so far)" if study.best is trial else ""
    else:
        came = trial.state if trial.failure is None else f"failed: {trial.failure.splitlines()[0]}"
    stages = f"{words.plural(trial.trained, 'stage')} trained, {trial.reused} reused"
    of = f"trial {trial.number} ({trial.number + 1} of {study.search.trials})"
    return f"{of}: {came}; {settings_of(trial)}; {stages}"


def remark(trial: Trial, event: Event) -> str | None:
    """What an event says that is worth a line of its own; None: nothing."""
    if event["event"] not in ("warning", "waiting") or trial.state != "running":
        return None
    stage = event.get("stage")
    return f"trial {trial.number}: {'' if stage is None else f'stage {stage} '}{event['text']}"


class Lines:
    """Says when trials begin and end, and now and then how far they are."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._spoke = time.monotonic()
        self._begun: dict[int, float] = {}

    def __call__(self, trial: Trial, event: Event) -> None:
        """Say what an event of a trial says, where it is due."""
        kind, now = event["event"], time.monotonic()
        if kind == "trial_begun":
            self._begun[trial.number] = now
        elif kind == "trial_ended":
            self._say(f"{outcome(self._study, trial)}, {words.duration(now - self._begun[trial.number])}")
        elif (text := remark(trial, event)) is not None:
            self._say(text)
        elif kind == "step" and now - self._spoke >= SECONDS:
            loss = "" if event["loss"] is None else f", loss {event['loss']:.3f}"
            self._say(f"trial {trial.number}: stage {event['stage']}, step {event['step']:,}/{event['steps']:,}{loss}")

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        say(f"{time.strftime('%H:%M:%S')} {text}")
        sys.stdout.flush()  # into a pipe as well: somebody looks at it as it goes


@dataclass
class Going:
    """A trial that goes on: its stages so far, and the steps of the one in training."""

    stage: int = 0
    step: int = 0
    steps: int = 0
    trained: int = 0
    reused: int = 0


class Live:
    """Redraws the trials a few times a second; what should stay is printed above.

    Args:
        console: Where to draw.
    """

    def __init__(self, study: Study, console: Console) -> None:
        from rich.live import Live as Drawing

        self._study, self._console = study, console
        self._lock = threading.Lock()  # events come from the trials' threads, and it is drawn in another
        self._going: dict[int, Going] = {}
        self._begun, self._ended = time.monotonic(), 0
        self._drawing = Drawing(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)

    def __call__(self, trial: Trial, event: Event) -> None:
        """Take up an event of a trial."""
        with self._lock:
            going = self._going.setdefault(trial.number, Going())
            match event["event"]:
                case "step" | "training":
                    going.stage, going.step, going.steps = event["stage"], event.get("step", 0), event["steps"]
                case "committed":
                    going.trained += 1
                case "reused":
                    going.reused += 1
                case "trial_ended":
                    self._going.pop(trial.number)
                    self._ended += 1
        if (text := remark(trial, event)) is not None:
            self._console.print(drawn([[text]]))

    def __enter__(self) -> Self:
        self._drawing.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._drawing.stop()

    @property
    def seconds_left(self) -> float | None:
        """Until the last trial, at the pace of those that ended in this sitting."""
        if not self._ended:
            return None
        left = self._study.search.trials - sum(trial.state != "running" for trial in self._study.trials)
        return (time.monotonic() - self._begun) / self._ended * left

    def render(self) -> Text:
        """The trials as they stand."""
        study, names = self._study, list(self._study.search.objectives)
        with self._lock:
            going, trials, best = dict(self._going), list(study.trials), study.best
        newest = sorted({*([] if best is None else [best.number]), *(entry.number for entry in trials[-ROWS:])})[
            -ROWS - 1 :
        ]
        figures = range(2, 2 + len(names))
        table = Table("trial", "state", *names, "step", "trained", "shared", "settings", right=(0, *figures))
        for trial in (trials[number] for number in newest):
            at = going.get(trial.number) if trial.state == "running" else None
            values = [figure(name, value) for name, value in zip(names, trial.values or [], strict=False)]
            table.add_row(
                str(trial.number),
                state(trial.state),
                *values,
                *[""] * (len(names) - len(values)),
                f"stage {at.stage} {at.step:,}/{at.steps:,}" if at is not None and at.steps else "",
                str(trial.trained if at is None else at.trained),
                str(trial.reused if at is None else at.reused),
                settings_of(trial),
                style="bold" if trial is best else "",
            )
        over = [trial for trial in trials if trial.state != "running"]
        trained, reused = sum(trial.trained for trial in over), sum(trial.reused for trial in over)
        parts = [f"{len(over)} of {words.plural(study.search.trials, 'trial')}"]
        parts += [f"{words.plural(trained, 'stage')} trained, {reused} shared"]
        if best is not None and best.values is not None:
            parts.append(f"best {figure(names[0], best.values[0])}, trial {best.number}")
        if (left := self.seconds_left) is not None:
            parts.append(f"{words.clock(left)} left")
        lines: list[Line] = [[], *table.lines(self._console.width), [], ["  ".join(parts)]]
        return drawn(lines)
