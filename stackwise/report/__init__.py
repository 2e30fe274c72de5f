"""The report of a run: one self-contained HTML file that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stackwise.pipeline.run import RunDirectory


def write(run: RunDirectory) -> Path:
    """Write the run's report.html, whatever state the run is in.

    Args:
        run: The run.

    Returns:
        The file.

    Raises:
        NotFound: There is no run there.
        NoSpaceError: The disk is full.
    """
    from stackwise import durable
    from stackwise.report.facts import collect
    from stackwise.report.page import page
    from stackwise.text import printable

    # Escaping covers what HTML obeys; this what an editor or a terminal that shows the file would.
    durable.write_bytes(run.report_file, printable(page(collect(run)), lines=True).encode())
    return run.report_file


__all__ = ["write"]
