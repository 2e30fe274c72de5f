"""Commands that look at runs: `stackwise status`, `report`, `compare`."""

from __future__ import annotations

from typing import Any

import click

from stackwise.cli.drawing import Table, show, state
from stackwise.cli.options import as_json, find_run, run_option, watch_option
from stackwise.cli.output import Styled, print_json, say, say_all
from stackwise.cli.tables import status_table
from stackwise.errors import NotFound
from stackwise.files import expanded


@click.command()
@run_option
@watch_option
@as_json
def status(run: str | None, watch: bool, as_json: bool) -> None:
    """Show run status: each stage's state, step and loss, and why it trains or is reused."""
    from stackwise.pipeline.run import held_by_live_process
    from stackwise.pipeline.run import status as state_of

    directory = find_run(run)
    still_changing = (lambda: held_by_live_process(directory)) if watch else None
    show(lambda: state_of(directory), status_table, still_changing, as_json=as_json)


@click.command()
@run_option
def report(run: str | None) -> None:
    """Write report.html into the run's directory: one file that opens offline. Any state of a run will do."""
    from stackwise import report as reports

    say(reports.write(find_run(run)))


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN…")
@click.option("--plot", metavar="FILE", help="Draw the held-out figures and their intervals, as SVG.")
@as_json
def compare(runs: tuple[str, ...], plot: str | None, as_json: bool) -> None:
    """A table of runs: the settings that differ, loss by stage, held-out bits a byte, time, stages reused.

    Runs that differ by no more than their seed are one figure with its 95% interval, and its difference from the first
    one's by a paired bootstrap over seeds and held-out samples.
    """
    from stackwise import durable
    from stackwise.report.compare import Entry
    from stackwise.report.compare import compare as comparison
    from stackwise.report.groups import plot as drawn

    value = comparison([Entry(find_run(run)) for run in runs])
    if plot is not None:
        file = expanded(plot)
        if not file.parent.is_dir():
            raise NotFound(f"--plot {plot}: there is no folder {file.parent}")
        durable.write_bytes(file, drawn(value["groups"]).encode())
    print_json(value) if as_json else show_comparison(value)


def show_comparison(value: dict[str, Any]) -> None:
    """The table of a comparison, and under it what failed."""
    from stackwise.report.compare import best, cells, summary
    from stackwise.report.groups import group_cells

    columns, rows = cells(value)
    at = columns.index("state")
    table = Table(*columns, right=range(at + 2, len(columns)))
    for number, row in enumerate(rows):
        # The best one stands out.
        table.add_row(*row[:at], state(row[at]), *row[at + 1 :], style="bold" if number == best(value) else "")
    say_all(table.lines())
    if value["groups"]:
        columns, rows = group_cells(value["groups"])
        table = Table(*columns, right=range(1, 2))
        for row in rows:
            table.add_row(*row)
        say_all(["", *table.lines()])
    for run in value["runs"]:
        if run["failure"]:
            say(Styled(f"{run['name']}: {run['failure']}", "red"))
    say(Styled(summary(value), "dim"))
