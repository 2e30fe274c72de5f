"""`python -m benchmarks.store [read] [write] [lookup] [scale] [codecs] [beyond] [profile] [large]`: Markdown tables."""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

import psutil
import torch

from benchmarks.store import beyond, codecs, large, lookups, profiling, reading, scaling, writing

WHAT = ["read", "write", "lookup", "scale", "codecs", "beyond", "profile", "large"]


def main() -> None:
    """Run what is asked for, by default all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("what", nargs="*", choices=[[], *WHAT], default=[])
    parser.add_argument("--mib", type=int, default=1024, help="MiB to read and to write (more than memory: cold)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--keys", type=int, nargs="*", default=[10**4, 10**6, 10**7], help="keys to look up among")
    parser.add_argument("--rows", type=int, default=2000, help="rows of the smallest of three sizes")
    parser.add_argument("--dir", type=Path, default=None, help="where to write (by default the temporary directory)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of `codecs`")
    parser.add_argument("--steps", type=int, default=400, help="steps a stage of `codecs`")
    parser.add_argument("--limit", type=int, default=1024, help="MiB of memory, page cache included, of `beyond`")
    given = parser.parse_args()
    what = given.what or WHAT
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
            elif name == "codecs":
                mib = min(given.mib, 128)
                print(codecs.run(path, mib=mib, rounds=given.rounds, seeds=given.seeds, steps=given.steps), "\n")
            elif name == "beyond":
                print(beyond.run(path, mib=4 * given.limit, limit=given.limit, rounds=given.rounds), "\n")
            elif name == "large":
                print(large.run(path, rows=max(8, given.mib // 32), rounds=given.rounds), "\n")
            elif name == "profile":
                print(profiling.run(path, mib=given.mib, rounds=given.rounds), "\n")
            else:
                print(scaling.run(path, rows=given.rows), "\n")
                print(scaling.overlap(path / "overlap"), "\n")


if __name__ == "__main__":
    main()
