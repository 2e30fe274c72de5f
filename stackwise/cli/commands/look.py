"""Commands that look at a run: `stackwise status`, `report`."""

from __future__ import annotations

import click

from stackwise.cli.drawing import show
from stackwise.cli.options import as_json, find_run, run_option, watch_option
from stackwise.cli.output import say
from stackwise.cli.tables import status_table


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
