"""docs/benchmarks.md: a text written by hand, and below it sections that the benchmarks write.

A section stands between two comment lines that name it. Whoever writes one replaces it alone; everything outside
the marks stays as it is.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import textwrap
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

PATH = Path(__file__).parent.parent / "docs" / "benchmarks.md"
"""Where the tables go; the environment's STACKWISE_BENCHMARKS_DOC names another file."""

VARIABLE = "STACKWISE_BENCHMARKS_DOC"


@dataclass(frozen=True)
class Section:
    """What a benchmark has to say.

    Args:
        key: Its section in docs/benchmarks.md.
        title: The section's heading.
        text: What was measured and how, above the table.
        body: The tables.
        device: What computed, in words.
        result: Everything, for `--json`.
    """

    key: str
    title: str
    text: str
    body: str
    device: str
    result: dict[str, Any]


def marks(key: str) -> tuple[str, str]:
    """The lines that a section stands between."""
    return f"<!-- {key}: written by its benchmark -->", f"<!-- end of {key} -->"


def write(section: Section, command: str, page: Path | None = None) -> Path:
    """Write a section, in its place or at the end.

    Args:
        section: What to write.
        command: The command that gave it.
        page: The page; None: docs/benchmarks.md, or what the environment names.

    Returns:
        The file written.
    """
    path = page or Path(os.environ.get(VARIABLE) or PATH)
    before = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    temporary = path.with_suffix(".new")
    temporary.write_text(_placed(before, section.key, rendered(section, command)), encoding="utf-8")
    temporary.replace(path)
    return path


def rendered(section: Section, command: str) -> str:
    """A section as Markdown, without its marks."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    facts = f"`{command}`\\\n{machine(section.device)}; {today}"
    text = textwrap.fill(section.text, 120, break_long_words=False, break_on_hyphens=False)
    return f"## {section.title}\n\n{facts}\n\n{section.body}\n\n{text}"


def _placed(document: str, key: str, text: str) -> str:
    first, last = marks(key)
    block = f"{first}\n\n{text}\n\n{last}"
    pattern = re.compile(re.escape(first) + ".*?" + re.escape(last), re.DOTALL)
    if pattern.search(document):
        return pattern.sub(lambda _: block, document, count=1)
    return f"{document.rstrip()}\n\n{block}\n"


def machine(device: str = "CPU") -> str:
    """The machine in a line: `2 cores, AMD EPYC, 24 GiB, Linux, torch 2.13.0, CPU`.

    Args:
        device: What computes, in words.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory().total / (1 << 30)
    torch = version("torch").removesuffix("+cpu")
    return f"{cores} cores, {_processor()}, {memory:.0f} GiB, {platform.system()}, torch {torch}, {device}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
