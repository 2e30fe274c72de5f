"""`python -m benchmarks`: every benchmark at its default settings, each in a process of its own, tables written.

The tables go into docs/benchmarks.md. `python -m benchmarks NAME …` runs those alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.common import say

ALL = (
    *("stage", "feed", "depth", "demo", "pipeline", "checkpoint", "swap", "capture", "tune", "pretrained", "adapters"),
    *("scaling", "plan"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them one after another; the exit code is that of the first that failed."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description="Run benchmarks and write their tables.")
    made.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ALL)}; default: all of them")
    names = made.parse_args(arguments).names
    for name in names:
        if name not in ALL:
            made.error(f"there is no benchmark {name!r}; there are {', '.join(ALL)}")
    codes = []
    for name in names or ALL:
        say(f"python -m benchmarks.{name} --write")
        codes.append(subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--write"], check=False).returncode)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
