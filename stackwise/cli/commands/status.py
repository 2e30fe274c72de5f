"""`stackwise status`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from stackwise.cli.options import as_json, find_run, run_option
from stackwise.cli.output import plain, state, table
from stackwise.cli.views.schedule import label
from stackwise.cli.views.wording import PHASES
from stackwise.cli.watching import show, watch_option
from stackwise.report import words

if TYPE_CHECKING:
    from rich.console import Group


@click.command(short_help="How a run stands.")
@run_option
@watch_option
@as_json
def status(run: str | None, watch: bool, as_json: bool) -> None:
    """How a run stands: each stage's state, step, loss, and why."""
    from stackwise.pipeline.run import held_by_live_process
    from stackwise.pipeline.run import status as state_of

    found = find_run(run)
    going_on = (lambda: held_by_live_process(found)) if watch else None
    show(lambda: state_of(found), rendered, going_on, as_json=as_json)


def rendered(value: dict[str, Any]) -> Group:
    """A run's state as a table under a line."""
    from rich.console import Group
    from rich.text import Text

    stages = value["stages"]
    done = sum(stage["state"] == "done" for stage in stages)
    line = f"{plain(value['run'])}  {state(value['state'])}"
    if "preparing" in value:
        line += f"  {plain(getting_ready(value['state'], **value['preparing']))}"
        if not stages:
            return Group(Text.from_markup(line))
    line += f"  {done} of {words.plural(len(stages), 'stage')} done"
    shown = table("stage", "blocks", "state", "step", "loss", "wait", "memory", "why", right=(0, 3, 4, 5, 6))
    for stage in stages:
        loss, wait, memory = stage["loss"], stage["wait_fraction"], stage["peak_memory_bytes"]
        shown.add_row(
            label(stage, stages),
            words.span(*stage["blocks"]),
            state(stage["state"]),
            f"{stage['step'] or 0:,}/{stage['steps']:,}",
            f"{loss:.3f}" if loss is not None else "",
            words.percent(wait) if wait is not None else "",
            words.size(memory) if memory is not None else "",
            plain(stage["reason"] or ""),
        )
    jobs = value.get("jobs", [])
    if not jobs:
        return Group(Text.from_markup(line), shown)
    named = table("job", "of", "state")
    for job in jobs:
        of = "evaluation" if job["stage"] is None else f"stage {job['stage']}"
        of += f", window {job['window']}" if job.get("window") is not None else ""
        named.add_row(f"{job['engine']} {plain(job['job'])}", of, state(job["state"]))
    return Group(Text.from_markup(line), shown, Text(), named)


def getting_ready(state: str, phase: str, done: int, total: int | None, failed: str = "") -> str:
    """What a run without a plan does, or did last."""
    what = PHASES.get(phase, phase) + (f", {words.percent(done / total)}" if total else "")
    return what if state == "running" else f"while {what}" + (f": {failed}" if failed else "")
