"""`stackwise report`."""

from __future__ import annotations

import click

from stackwise.cli.options import find_run, run_option


@click.command(short_help="Write a run's report.html again.")
@run_option
def report(run: str | None) -> None:
    """Write report.html into the run's directory: one file that opens offline. Any state of a run will do."""
    from stackwise import report as reports

    click.echo(str(reports.write(find_run(run))))
