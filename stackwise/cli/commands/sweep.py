"""`stackwise sweep`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stackwise import words
from stackwise.cli.commands.use import show_comparison
from stackwise.cli.drawing import Table, phases
from stackwise.cli.options import RUNS, as_json, config_argument, load, max_time_option, preset_option
from stackwise.cli.output import keep_going_without_output, print_event, print_json, say, say_all
from stackwise.cli.views import RunView, watcher
from stackwise.errors import StackWiseError

if TYPE_CHECKING:
    from stackwise.pipeline.batch.grid import Combination
    from stackwise.pipeline.batch.sweep import Member, Sweep
    from stackwise.pipeline.events import Event


@click.command()
@config_argument
@preset_option
@click.option(
    "-o", "axes", metavar="KEY=V1,V2,…", multiple=True, help="Values to try for a key; one value is for all runs."
)
@click.option("--dir", "directory", metavar="DIR", help="The sweep's directory. Default: runs/sweep-NAME.")
@click.option("--dry-run", is_flag=True, help="Say what each run would reuse and train; train nothing.")
@max_time_option
@as_json
def sweep(
    config: str | None,
    preset: str | None,
    axes: tuple[str, ...],
    directory: str | None,
    dry_run: bool,
    max_time: float | None,
    as_json: bool,
) -> None:
    """Train every combination of the values given with -o, a run each, over one store.

    \b
    stackwise sweep -o training.learning_rate=1e-3,3e-3 -o stages.3.training.weight_decay=0,0.1

    Stages that runs have in common are trained once. A combination that fails is in the table, and the others go on
    (exit code 1 at the end). The same command resumes an interrupted sweep. The table is kept as sweep.json and
    sweep.md.
    """
    from stackwise.pipeline.batch.grid import combinations, parse_axes
    from stackwise.pipeline.batch.sweep import Sweep

    # Every configuration is checked before anything is trained.
    combined = combinations(parse_axes(axes), lambda overrides: load(config, preset, overrides))
    place = Path(directory) if directory is not None else RUNS / f"sweep-{combined[0].config.name}"
    typed = ["stackwise", "sweep", *([config] if config else []), *(["--preset", preset] if preset else [])]
    placed = ["--dir", directory] if directory is not None else []
    limit = [] if max_time is None else ["--max-time", f"{max_time:g}s"]
    again = shlex.join([*typed, *placed, *(word for axis in axes for word in ("-o", axis)), *limit])
    chosen = Sweep(combined, place, again)
    if dry_run:
        with phases() as progress:
            order = chosen.preview(progress)
        _show_outlook(chosen, order, as_json)
        return
    keep_going_without_output()
    try:
        _carry_out(chosen, as_json, max_time)
    finally:
        if any(chosen.run_directory(member).config_file.exists() for member in chosen.members):
            with contextlib.suppress(BrokenPipeError):  # the table is in its files as well
                _show_results(chosen, as_json)
    failed = [member.combination.name for member in chosen.members if member.failure is not None]
    if failed:
        raise StackWiseError(
            f"{len(failed)} of {words.plural(len(chosen.members), 'combination')} failed: {', '.join(failed)}",
            hint="the same command tries them again, and reuses the others",
        )


def _carry_out(chosen: Sweep, as_json: bool, max_time: float | None) -> None:
    def show_event(event: Event) -> None:
        if as_json:
            print_event(event)
        elif event["event"] == "combination":
            done = " (reused: it is complete)" if event["reused"] else ""
            say(f"── {event['number']} of {event['of']}: {event['name']}{done}")
        elif event["event"] == "note":
            say(f"note: {event['text']}")
        elif event["event"] == "combination_ended" and event["failure"] is not None:
            say(f"   {event['name']} failed: {event['failure']}")

    @contextlib.contextmanager
    def watch(combination: Combination) -> Iterator[Callable[[Event], None]]:
        from stackwise import report
        from stackwise.pipeline.run import RunDirectory

        run = RunDirectory(chosen.directory / combination.name)
        try:
            if as_json:
                yield lambda event: print_event({"combination": combination.name, **event})
            else:
                with watcher(RunView(combination.config, str(run.path), []), as_json=False) as observe:
                    yield observe
        finally:
            with contextlib.suppress(StackWiseError, OSError):  # a run without a report is still a run
                report.write(run)

    chosen.run(watch, show_event, max_time)


def _show_results(chosen: Sweep, as_json: bool) -> None:
    from stackwise.report.compare import Entry, compare, write

    value = compare(
        [
            Entry(chosen.run_directory(member), member.combination.name, member.combination.values, member.failure)
            for member in chosen.members
        ]
    )
    page = write(chosen.directory, value)
    if as_json:
        print_event({"event": "sweep", **value})
        return
    say()
    show_comparison(value)
    say(f"table: {page}")


def _show_outlook(chosen: Sweep, order: list[Member], as_json: bool) -> None:
    sources = chosen.sources(order)
    if as_json:
        print_json(
            {
                "runs": [
                    {
                        "name": member.combination.name,
                        "values": member.combination.values,
                        "failure": member.failure,
                        "stages": sources[member.combination.name],
                    }
                    for member in order
                ],
                "notes": [chosen.no_room] if chosen.no_room else [],
            }
        )
        return
    # Combinations may differ in how many stages they have.
    longest = max((member.decisions for member in order), key=len, default=[])
    depth = len(longest)
    numbers = {member.combination.name: str(number) for number, member in enumerate(order, 1)}
    table = Table("", "run", *(f"stage {decision.stage.label}" for decision in longest), "", right=(0,))
    for member in order:
        name = member.combination.name
        stages = [f"as in {numbers[text]}" if text in numbers else text for text in sources[name]]
        blank = [""] * (depth - len(stages))
        table.add_row(numbers[name], name, *stages, *blank, member.failure or "")
    say_all(table.lines())
    every = [text for texts in sources.values() for text in texts]
    train, store, again = (every.count(name) for name in ("train", "store", "again"))
    counts = f"{train} to train, {store} in the store, {len(every) - train - store - again} shared"
    if again:
        counts += (
            f"; {again} to train again: weights of theirs are needed once more, and a later window's replaced them"
        )
    say(f"{words.plural(len(order), 'run')} of {words.plural(len(every), 'stage')} in all: {counts}")
    if chosen.no_room:
        say(f"note: {chosen.no_room}")
