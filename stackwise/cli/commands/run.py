"""`stackwise run`."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from stackwise.cli.failure import stopped_after_saving
from stackwise.cli.options import Choice, as_json, choose, configuration, is_run, max_time_option
from stackwise.cli.output import console, is_live, plain, print_json
from stackwise.errors import StackWiseError, UsageError

if TYPE_CHECKING:
    from stackwise.cli.views.state import RunView

Event = dict[str, Any]


@click.command(short_help="Train every stage, evaluate, report; resumes by itself.")
@configuration
@click.option(
    "--engine",
    type=click.Choice(["here", "slurm", "local"]),
    default="here",
    show_default=True,
    help="slurm: a job a stage (slurm.* says what it asks for); local: the same jobs on this machine.",
)
@max_time_option
@click.option("--dry-run", "dry", is_flag=True, help="Say what is reused or trained, why, what it takes, and stop.")
@as_json
def run(
    config: str | None,
    preset: str | None,
    run: str | None,
    overrides: tuple[str, ...],
    engine: str,
    max_time: float | None,
    dry: bool,
    as_json: bool,
) -> None:
    """Train every stage, evaluate on held-out text, write report.html.

    What is committed is not trained again; what was interrupted goes on. With neither CONFIG nor --preset: the
    configuration of the run that --run names, where there is one, else the preset demo.
    """
    choice = choose(config, preset, run, overrides)
    if dry:
        _foretell(choice, as_json)
    elif engine == "here":
        carry_out(choice, as_json=as_json, command="stackwise run", max_time=max_time)
    elif max_time is not None:
        raise UsageError("--max-time is for a run here", hint="slurm.minutes limits a job, which saves and comes back")
    else:
        _submit(choice, engine, as_json)


def _foretell(choice: Choice, as_json: bool) -> None:
    """Show what a run would do."""
    from stackwise.cli.views.lines import Lines
    from stackwise.cli.views.state import RunView
    from stackwise.pipeline.runner.runner import Runner

    view = RunView(choice.config, str(choice.run.path))
    observe = print_event if as_json else Lines(view, view.config.training.log_every)
    Runner(choice.config, choice.run, observe).run(dry=True)
    if not as_json:
        click.echo("dry run: nothing was trained")


def _submit(choice: Choice, engine: str, as_json: bool) -> None:
    from stackwise.pipeline.batch.cluster import submit

    jobs = submit(choice.config, choice.run, "slurm" if engine == "slurm" else "local")
    if as_json:
        print_json({"run": str(choice.run.path), "jobs": jobs})
        return
    for job in jobs:
        what = "evaluation, report" if job["stage"] is None else f"stage {job['stage']}"
        what += f", window {job['window']}" if job.get("window") is not None else ""
        click.echo(f"{engine} job {job['job']}: {what}")
    click.echo(f"how they stand: stackwise status --run {shlex.quote(str(choice.run.path))}")


def carry_out(
    choice: Choice,
    *,
    as_json: bool,
    command: str,
    only: int | None = None,
    window: int | None = None,
    max_time: float | None = None,
) -> None:
    """Run a configuration, or one stage of it, and show it.

    Args:
        choice: The configuration and the run.
        as_json: One event a line instead of a view.
        command: What was typed, for the line that says how to go on.
        only: One stage alone.
        window: Of its windows that one; None: the next to train.
        max_time: Seconds after which it has to be over; None: no limit.
    """
    from stackwise import report
    from stackwise.cli.views.state import RunView
    from stackwise.pipeline.run import status
    from stackwise.pipeline.runner.runner import Runner

    limit = [] if max_time is None else ["--max-time", f"{max_time:g}s"]
    again = shlex.join([*command.split(), *choice.arguments, *limit])
    known = status(choice.run)["stages"] if is_run(choice.run.path) else []
    view = RunView(choice.config, str(choice.run.path), known)
    try:
        with watcher(view, as_json) as observe:
            runner = Runner(choice.config, choice.run, observe, resume_command=again, max_time=max_time)
            runner.run(only, window=window)
        page = report.write(choice.run)
    except KeyboardInterrupt:
        if not view.saved:
            raise
        raise stopped_after_saving(again) from None
    except BrokenPipeError:  # whoever read this is gone: the worker saves and ends
        raise stopped_after_saving(again) from None
    except StackWiseError:
        if view.saved:  # as far as it went
            with contextlib.suppress(StackWiseError, OSError):
                report.write(choice.run)
        raise
    if not as_json:
        _conclude(view)
        click.echo(f"report: {page}")


def watcher(view: RunView, as_json: bool) -> contextlib.AbstractContextManager[Callable[[Event], None]]:
    """Who shows the events: JSON lines, a live view where the terminal can be drawn on, plain lines otherwise."""
    if as_json:
        return contextlib.nullcontext(print_event)
    if is_live(sys.stdout):
        from stackwise.cli.views.live import Live

        return Live(view, console())
    from stackwise.cli.views.lines import Lines

    return Lines(view, view.config.training.log_every)


def print_event(event: Event) -> None:
    """An event as a line of JSON."""
    sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _conclude(view: RunView) -> None:
    from stackwise.cli.views.results import held_out, passage

    out = console()
    if view.evaluation:
        out.print()
        out.print(held_out(view.evaluation))
    if view.fill is not None:
        out.print()
        causal = view.evaluation is not None and view.evaluation.get("likelihood") == "exact"
        title = "a prompt, and how the rack goes on" if causal else "with holes, and as the rack filled them"
        out.print(plain(f"a held-out passage: {title}"), style="bold")
        passage(out, view.fill)
