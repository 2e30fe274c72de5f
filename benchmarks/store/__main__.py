"""`python -m benchmarks.store [read] [write] [lookup] [scale]`: tables in Markdown on standard output."""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

import psutil
import torch

from benchmarks.store import lookups, reading, scaling, writing


def main() -> None:
    """Run what is asked for, by default all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("what", nargs="*", choices=[[], "read", "write", "lookup", "scale"], default=[])
    parser.add_argument("--mib", type=int, default=1024, help="MiB to read and to write (more than memory: cold)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--keys", type=int, nargs="*", default=[10**4, 10**6, 10**7], help="keys to look up among")
    parser.add_argument("--rows", type=int, default=2000, help="rows of the smallest of three sizes")
    parser.add_argument("--dir", type=Path, default=None, help="where to write (by default the temporary directory)")
    given = parser.parse_args()
    what = given.what or ["read", "write", "lookup", "scale"]
    torch.set_num_threads(1)
    memory = psutil.virtual_memory().total / 2**30
    print(f"{psutil.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()} {platform.machine()}\n")
    for name in what:
        with tempfile.TemporaryDirectory(dir=given.dir) as directory:
            path = Path(directory)
            if name == "read":
                print(reading.run(path, mib=given.mib, rounds=given.rounds), "\n")
            elif name == "write":
                print(writing.run(path, mib=given.mib, rounds=given.rounds), "\n")
            elif name == "lookup":
                print(lookups.run(path, keys=given.keys, rounds=given.rounds), "\n")
            else:
                print(scaling.run(path, rows=given.rows), "\n")
                print(scaling.overlap(path / "overlap"), "\n")


if __name__ == "__main__":
    main()
