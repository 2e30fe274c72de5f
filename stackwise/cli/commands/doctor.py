"""`stackwise doctor`."""

from __future__ import annotations

import click

from stackwise.cli.options import as_json
from stackwise.cli.output import console, plain, print_json, table
from stackwise.errors import StackWiseError
from stackwise.report import words

MARKS = {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "optional": "[dim]optional[/]", "note": "[yellow]note[/]"}


@click.command(short_help="What this machine has, and what is missing.")
@as_json
def doctor(as_json: bool) -> None:
    """What this machine has, and what is missing: packages, devices, memory, disk. Exit code 1 where it will not do."""
    from stackwise.cli.machine import examine

    checks = examine()
    missing = [check for check in checks if check.state == "missing"]
    if as_json:
        print_json({"ok": not missing, "checks": [check.plain() for check in checks]})
    else:
        shown = table("", "", "", "")
        shown.show_header = False
        for check in checks:
            hint = f"  [dim]{plain(check.hint)}[/]" if check.hint else ""
            shown.add_row(MARKS[check.state], check.name, plain(check.found) + hint)
        console().print(shown)
    if missing:
        names = ", ".join(check.name for check in missing)
        raise StackWiseError(
            f"{words.plural(len(missing), 'thing')} that StackWise needs: {names}", hint=missing[0].hint
        )
