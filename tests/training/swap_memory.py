"""Two swapped steps of a rack of some depth; prints the bytes that they added to the largest resident size.

python -m tests.training.swap_memory DIRECTORY DEPTH
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.training.swapping import RackParts, batch, engine

WIDTH = 192


def main() -> None:
    """Take the steps."""
    directory, depth = Path(sys.argv[1]), int(sys.argv[2])
    one = engine(RackParts(depth, width=WIDTH), directory, groups=depth)
    before = largest_resident_size()
    for step in range(2):
        one.step([batch(2 * step), batch(2 * step + 1)], step, 1e-3)
    one.close()
    print(largest_resident_size() - before)


def largest_resident_size() -> int:
    """Bytes that this program has held at most. `getrusage` would count the program that started it, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()
