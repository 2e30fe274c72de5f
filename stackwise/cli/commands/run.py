"""`stackwise run`, and `stackwise stage run` and `stage list`."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from stackwise.cli.app import Subcommands, stopped_after_saving
from stackwise.cli.drawing import show
from stackwise.cli.options import (
    INDEX,
    Choice,
    as_json,
    choose,
    configuration,
    find_run,
    is_run,
    max_time_option,
    watch_option,
)
from stackwise.cli.output import Line, Styled, keep_going_without_output, print_event, print_json, say, say_all
from stackwise.cli.tables import held_out_table, job_name, listing, passage, schedule_table
from stackwise.cli.views import Lines, RunView, watcher
from stackwise.errors import StackWiseError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stackwise.config import StackWiseConfig
    from stackwise.pipeline.batch.resources import BatchSystem
    from stackwise.pipeline.runner.hosts import Hosts


@click.command()
@configuration
@click.option(
    "--engine",
    type=click.Choice(["here", "torchrun", "slurm", "ray", "local"]),
    default="here",
    show_default=True,
    help="torchrun: --ranks processes on this machine train each stage; slurm: a job a stage (slurm.* says what it "
    "asks for); ray: the same as tasks of a Ray cluster; local: the same jobs on this machine.",
)
@click.option(
    "--ranks", type=click.IntRange(1, 1024), metavar="N", help="With --engine torchrun; by default those of parallel.*"
)
@max_time_option
@click.option("--dry-run", "dry", is_flag=True, help="Say what is reused or trained, why, what it takes, and stop.")
@as_json
def run(engine: str, ranks: int | None, max_time: float | None, dry: bool, as_json: bool, **named: Any) -> None:
    """Train every stage, evaluate on held-out text, write report.html.

    What is committed is not trained again; what was interrupted resumes. With neither CONFIG nor --preset: the
    configuration of the run that --run names, where there is one, else the preset demo.
    """
    choice, command = choose(**named), "stackwise run"
    if ranks is not None:
        if engine != "torchrun":
            raise UsageError("--ranks is for --engine torchrun", hint="or set parallel.data")
        _spread(choice.config, ranks, _asked(named["overrides"]))
        command += f" --engine torchrun --ranks {ranks}"
    if dry:  # before the engine: a preview submits nothing
        _preview(choice, as_json)
    elif engine in ("here", "torchrun"):
        with _among(choice) as hosts:
            carry_out(choice, as_json=as_json, command=command, max_time=max_time, hosts=hosts)
    elif max_time is not None:
        raise UsageError("--max-time is for a run here", hint="slurm.minutes limits a job, which saves and comes back")
    else:
        _submit(choice, engine, as_json)


def _asked(overrides: tuple[str, ...]) -> int | None:
    """What `-o` says of `parallel.data`; None: nothing."""
    from stackwise.config.loading import parse_overrides

    value = parse_overrides(overrides).get("parallel.data")
    return value if isinstance(value, int) else None


def _spread(config: StackWiseConfig, ranks: int, requested: int | None = None, by: str = "--ranks") -> None:
    """Let a run have so many ranks: as many share the rows as the other kinds of `parallel` leave.

    Args:
        requested: What the same command says `parallel.data` is; None: it says nothing, and the number of ranks counts.
        by: Who says so.

    Raises:
        UsageError: It does not divide, or the command says both, and not the same.
    """
    parallel = config.parallel
    others = parallel.ranks // parallel.data
    if requested is not None and requested * others != ranks:
        raise UsageError(
            f"{by} {ranks} and -o parallel.data={requested} are two numbers of ranks", hint="give one of them"
        )
    if ranks % others:
        near = f"{ranks - ranks % others or others} and {ranks - ranks % others + others}"
        raise UsageError(
            f"{by} {ranks}: parallel.shard, tensor and pipeline take {others} together, which do not divide it",
            hint=f"nearest that do: {near}",
        )
    if parallel.data not in (1, ranks // others):
        say(f"parallel.data is {ranks // others} by {by}, not {parallel.data} as configured")
    parallel.data = ranks // others
    config.validate()  # what was checked had other ranks


@contextlib.contextmanager
def _among(choice: Choice) -> Iterator[Hosts | None]:
    """The other processes of a launcher (torchrun, srun, mpirun), where there are some and this is rank 0.

    Any other rank serves it, and leaves as rank 0 does.

    Raises:
        SystemExit: This was another rank, and its part is done.
    """
    from stackwise.pipeline.runner.hosts import Hosts, exit_code, serve
    from stackwise.pipeline.runner.launch import launched

    launch = launched(choice.config.parallel.port)
    if launch is None:
        yield None
        return
    if launch.rank:
        raise SystemExit(serve(launch, choice.config))
    hosts = Hosts(launch, choice.config)
    code = 0
    try:
        overrides = [choice.arguments[i + 1] for i, argument in enumerate(choice.arguments) if argument == "-o"]
        _spread(choice.config, launch.size, _asked(tuple(overrides)), launch.launcher)
        if len(names := set(hosts.names)) > 1 and "{" not in (choice.config.store.path or ""):
            raise UsageError(
                f"store.path: the ranks are on {len(names)} hosts ({', '.join(sorted(names))}), and a store is on one",
                hint="give each host its own: a path with {host} or {rank} in it, on a local disk of every host",
            )
        yield hosts
    except BaseException as error:
        code = exit_code(error)
        raise
    finally:
        hosts.close(code)


def _preview(choice: Choice, as_json: bool) -> None:
    """Show what a run would do."""
    from stackwise.pipeline.runner.runner import Runner

    view = RunView(choice.config, str(choice.run.path))
    observe = print_event if as_json else Lines(view, view.config.training.log_every)
    Runner(choice.config, choice.run, observe).run(dry=True)
    if not as_json:
        say("dry run: nothing was trained")


def _submit(choice: Choice, engine: str, as_json: bool) -> None:
    from stackwise.pipeline.batch.cluster import submit
    from stackwise.pipeline.batch.resources import unused_resources

    system = cast("BatchSystem", engine)
    if (line := unused_resources(choice.config, system)) is not None:
        say(line)
    jobs = submit(choice.config, choice.run, system)
    if as_json:
        print_json({"run": str(choice.run.path), "jobs": jobs})
        return
    for job in jobs:
        say(f"{engine} job {job['job']}: {job_name(job)}")
    say(f"show their state: stackwise status --run {shlex.quote(str(choice.run.path))}")


def carry_out(
    choice: Choice,
    *,
    as_json: bool,
    command: str,
    only: int | None = None,
    window: int | None = None,
    max_time: float | None = None,
    hosts: Hosts | None = None,
) -> None:
    """Run a configuration, or one stage of it, and show it.

    Args:
        choice: The configuration and the run.
        as_json: One event a line instead of a view.
        command: What was typed, for the line that says how to go on.
        only: One stage alone.
        window: Of its windows that one; None: the next to train.
        max_time: Seconds after which it has to be over; None: no limit.
        hosts: The other processes of a launcher; None: this one was started alone.
    """
    from stackwise import report
    from stackwise.pipeline.run import status
    from stackwise.pipeline.runner.runner import Runner

    keep_going_without_output()  # hours of work do not end because a log is full
    limit = [] if max_time is None else ["--max-time", f"{max_time:g}s"]
    again = shlex.join([*command.split(), *choice.arguments, *limit])
    earlier = status(choice.run)["stages"] if is_run(choice.run.path) else []
    view = RunView(choice.config, str(choice.run.path), earlier)
    try:
        with watcher(view, as_json) as observe:
            runner = Runner(choice.config, choice.run, observe, resume_command=again, max_time=max_time, hosts=hosts)
            runner.run(only, window=window)
        page = report.write(choice.run)  # for a stage alone as well: the page shows any state
    except (KeyboardInterrupt, BrokenPipeError) as error:  # a broken pipe: whoever read this is gone, the worker saves
        if isinstance(error, KeyboardInterrupt) and not view.saved:
            raise
        raise stopped_after_saving(again) from None
    except StackWiseError:
        if view.saved:  # as far as it went
            with contextlib.suppress(StackWiseError, OSError):
                report.write(choice.run)
        raise
    if not as_json:
        _conclude(view)
        say(f"report: {page}")


def _conclude(view: RunView) -> None:
    if view.evaluation:
        say_all([[], *held_out_table(view.evaluation)])
    if view.fill is not None:
        holes = "[MASK]" in view.fill["before"]
        title = "with holes, and as the rack filled them" if holes else "a prompt, and its continuation"
        say_all([[], [Styled(f"a held-out passage: {title}", "bold")], *passage(view.fill)])


@click.group(cls=Subcommands)
def stage() -> None:
    """One stage alone; the schedule."""


@stage.command(name="run")
@click.option("--depth", type=INDEX, required=True, metavar="K", help="The stage, from 0.")
@click.option("--window", type=INDEX, metavar="W", help="Its window; by default the next to train.")
@configuration
@max_time_option
@as_json
def run_stage(depth: int, window: int | None, max_time: float | None, as_json: bool, **named: Any) -> None:
    """Train stage K alone; what is below it must be committed (exit code 2 otherwise).

    Where the corpus is trained in windows: in its next one. What comes before it, each stage below and the windows
    before at every stage, must be committed.

    Without CONFIG and --preset the run's own configuration counts.
    """
    choice = _choice(**named)
    command = f"stackwise stage run --depth {depth}" + ("" if window is None else f" --window {window}")
    with _among(choice) as hosts:
        carry_out(choice, as_json=as_json, command=command, only=depth, window=window, max_time=max_time, hosts=hosts)


@stage.command(name="list")
@configuration
@watch_option
@as_json
def list_stages(watch: bool, as_json: bool, **named: Any) -> None:
    """The schedule: what each stage holds, reads and trains; with a run, each stage's state.

    Without CONFIG, --preset and --run: the latest run under runs/, else the preset demo.
    """
    from stackwise.config.unused import unused_settings
    from stackwise.pipeline.run import held_by_live_process, status

    choice = _choice(must_exist=False, **named)
    _settle_block_size(choice)
    stages, notes = listing(choice.config), unused_settings(choice.config)

    def look() -> dict[str, Any]:
        recorded = status(choice.run)["stages"] if is_run(choice.run.path) else []
        by_place = {(stage["depth"], stage["window"]): stage for stage in recorded}
        rows = [row | _state_of(row, by_place.get((row["depth"], row["window"]))) for row in stages]
        return {"source": choice.source, "stages": rows, "notes": notes}

    def lines(value: dict[str, Any]) -> list[Line]:
        return schedule_table(choice.config, choice.source, value["stages"], notes)

    show(look, lines, (lambda: held_by_live_process(choice.run)) if watch else None, as_json=as_json)


def _state_of(row: dict[str, Any], recorded: dict[str, Any] | None) -> dict[str, Any]:
    """The state of a stage of the schedule; nothing where the run's stage there has other blocks."""
    if recorded is None or recorded["blocks"] != row["blocks"]:
        return {}
    state = {key: recorded[key] for key in ("state", "step", "loss", "reason")}
    return {"steps": row["steps"] or recorded["steps"], **state}


def _settle_block_size(choice: Choice) -> None:
    """With `block_size: auto`, the size that the run has found."""
    training = choice.config.training
    if choice.config.finds_block_size:
        earlier = choice.run.earlier_config() if is_run(choice.run.path) else None
        if earlier is None or earlier.finds_block_size:  # the run has not come as far as its trial
            raise UsageError(
                "training.block_size: auto is found by trial, and no run has found it yet",
                hint="`stackwise run --dry-run` finds it and shows the schedule; or give a number",
            )
        training.block_size = earlier.training.block_size


def _choice(
    config: str | None,
    preset: str | None,
    run: str | None,
    overrides: tuple[str, ...],
    init: str | None,
    *,
    must_exist: bool = True,
) -> Choice:
    """As `choose`, but without a configuration it takes the run's own: the latest run's where none is named."""
    if config is None and preset is None and (init is None or run is not None):
        # `stage list` shows a preset before any run.
        if run is None and (must_exist or any(is_run(path) for path in Path("runs").glob("*"))):
            run = str(find_run(None).path)
        elif run is not None and must_exist:
            find_run(run)
    return choose(config, preset, run, overrides, init)
