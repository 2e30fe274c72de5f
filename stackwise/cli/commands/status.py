"""`stackwise status`."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from stackwise.cli.options import as_json, find_run, run_option
from stackwise.cli.output import console, is_live, plain, print_json, state, table
from stackwise.report import words

if TYPE_CHECKING:
    from rich.console import Group

    from stackwise.pipeline.run import RunDirectory

SECONDS = 1.0
"""Between two looks of --watch."""


@click.command(short_help="How a run stands.")
@run_option
@click.option("--watch", is_flag=True, help="Look again every second, until the run has ended.")
@as_json
def status(run: str | None, watch: bool, as_json: bool) -> None:
    """How a run stands: each stage's state, step, loss, and why."""
    from stackwise.pipeline.run import status as state_of

    found = find_run(run)
    if watch:
        _watch(found, as_json)
    elif as_json:
        print_json(state_of(found))
    else:
        console().print(rendered(state_of(found)))


def rendered(value: dict[str, Any]) -> Group:
    """A run's state as a table under a line."""
    from rich.console import Group
    from rich.text import Text

    stages = value["stages"]
    done = sum(stage["state"] == "done" for stage in stages)
    line = f"{plain(value['run'])}  {state(value['state'])}  {done} of {words.plural(len(stages), 'stage')} done"
    shown = table("stage", "blocks", "state", "step", "loss", "wait", "memory", "why", right=(0, 3, 4, 5, 6))
    for stage in stages:
        loss, wait, memory = stage["loss"], stage["wait_fraction"], stage["peak_memory_bytes"]
        shown.add_row(
            str(stage["depth"]),
            words.span(*stage["blocks"]),
            state(stage["state"]),
            f"{stage['step'] or 0:,}/{stage['steps']:,}",
            f"{loss:.3f}" if loss is not None else "",
            words.percent(wait) if wait is not None else "",
            words.size(memory) if memory is not None else "",
            plain(stage["reason"] or ""),
        )
    return Group(Text.from_markup(line), shown)


def _watch(run: RunDirectory, as_json: bool) -> None:
    """Show the state whenever it has changed, until nothing works on the run any more."""
    from stackwise.pipeline.run import status as state_of

    if not as_json and is_live(sys.stdout):
        from rich.live import Live

        value = state_of(run)
        with Live(rendered(value), console=console(), auto_refresh=False) as live:
            while value["state"] == "running":
                time.sleep(SECONDS)
                value = state_of(run)
                live.update(rendered(value), refresh=True)
        return
    before: dict[str, Any] | None = None
    while before is None or before["state"] == "running":
        value = state_of(run)
        if value != before:
            if as_json:
                click.echo(json.dumps(value, ensure_ascii=False))
            else:
                console().print(rendered(value))
            before = value
        if value["state"] == "running":
            time.sleep(SECONDS)
