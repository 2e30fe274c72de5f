"""`--watch`: something that changes, shown until it does so no more."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from stackwise.cli.output import console, is_live, print_json

if TYPE_CHECKING:
    from rich.console import RenderableType

SECONDS = 1.0
"""Between two looks."""

watch_option = click.option("--watch", is_flag=True, help="Look again every second, until the run has ended.")


def show(
    look: Callable[[], dict[str, Any]],
    rendered: Callable[[dict[str, Any]], RenderableType],
    going_on: Callable[[], bool] | None,
    *,
    as_json: bool,
) -> None:
    """Show a value once, or whenever it has changed: drawn in place on a terminal, else one after another.

    Args:
        look: The value now, JSON-ready.
        rendered: How people read it.
        going_on: Whether it may still change; None: show it once.
        as_json: JSON instead: one document, or while watching one a line.
    """
    if going_on is None:
        if as_json:
            print_json(look())
        else:
            console().print(rendered(look()))
    elif not as_json and is_live(sys.stdout):
        from rich.live import Live

        with Live(rendered(look()), console=console(), auto_refresh=False) as live:
            for value in _looks(look, going_on):
                live.update(rendered(value), refresh=True)
    else:
        before: dict[str, Any] | None = None
        for value in _looks(look, going_on):
            if value != before:
                if as_json:
                    click.echo(json.dumps(value, ensure_ascii=False))
                else:
                    console().print(rendered(value))
                before = value


def _looks(look: Callable[[], dict[str, Any]], going_on: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The value from time to time, and once more after it has stopped to change."""
    while going_on():
        yield look()
        time.sleep(SECONDS)
    yield look()
