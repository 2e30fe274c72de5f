"""Seconds and megabytes of `stackwise run` on the demo, by phase: the first run, and the same command again.

    python -m benchmarks.demo [--preset demo]

Both are real processes, the first with an empty cache directory: it prepares the data and trains the tokenizer. Their
events are stamped as they are printed; sizes are looked at while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import Result, parser, refuse, run_command, table
from benchmarks.document import Section
from stackwise import words
from stackwise.report.facts import PHASES, read_history

LOOK_SECONDS = 0.2
"""How often sizes are looked at."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("demo", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("demo", __doc__)
    made.add_argument("--preset", metavar="NAME", default="demo", help="what is run; default: demo")
    made.add_argument("--dir", metavar="DIR", help="where it runs; default: the system's temporary directory")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Run it twice."""
    with tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=options.dir) as name:
        here = Path(name)
        command = [sys.executable, "-m", "stackwise", "run", "--preset", options.preset, "--run", str(here / "run")]
        for item in options.overrides:
            command += ["-o", item]
        runs = [_run([*command, "--json"], here, number) for number in ("first", "second")]
        store = here / "run" / "store"
        boundaries = {path.name: size_of(path) for path in (store / "boundaries").iterdir()}
        history = read_history(here / "first.jsonl")
        sizes = {
            "boundaries": [
                {"depth": written.depth, "bytes": boundaries.get(key, 0)}
                for key, written in sorted(history.boundaries.items(), key=lambda item: item[1].depth)
            ],
            "stages": size_of(store / "stages"),
            "index": size_of(store / "index"),
            "prepared": size_of(here / "cache"),
            "run": size_of(here / "run"),
        }
    device = history.device or {}
    return {
        "preset": options.preset,
        "device": device.get("name"),
        "device_type": device.get("device"),
        "first": runs[0],
        "second": runs[1],
        "bytes": sizes,
    }


def _run(command: list[str], here: Path, name: str) -> Result:
    """Run a command to its end; its events go into a log of their own, with the time of their arrival."""
    environment = os.environ | {"XDG_CACHE_HOME": str(here / "cache")}
    log = here / f"{name}.jsonl"
    begun = time.perf_counter()
    with (here / "errors").open("w+") as errors, log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        watch = _Watch(process.pid, here / "run" / "checkpoints")
        assert process.stdout is not None
        with process.stdout:
            kinds = [_stamp(line, out) for line in process.stdout]
        _, state, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(state)
        seconds = time.perf_counter() - begun
        watch.end()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode != 0:
        raise refuse(f"the run ended with code {process.returncode}", said[-1] if said else "it said nothing")
    phases = read_history(log).phases
    return {
        "seconds": seconds,
        "phases": phases,
        "outside_phases": seconds - sum(phases.values()),
        "stages_trained": kinds.count("training"),
        "stages_reused": kinds.count("reused"),
        "largest_process_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "all_processes_bytes": watch.memory,
        "checkpoint_bytes": watch.checkpoints,
    }


def _stamp(line: str, out: Any) -> str:
    event = json.loads(line)
    out.write(json.dumps({"time": time.time(), **event}) + "\n")
    return str(event["event"])


class _Watch:
    """Looks, while a process runs, at the memory that it and its children hold and at the size of a directory."""

    def __init__(self, pid: int, directory: Path) -> None:
        self.memory = self.checkpoints = 0
        self._pid, self._directory = pid, directory
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop looking."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.memory = max(self.memory, _memory(self._pid))
            self.checkpoints = max(self.checkpoints, size_of(self._directory))


def _memory(pid: int) -> int:
    """Resident bytes of a process and its children; what they share counts for each."""
    total = 0
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def size_of(directory: Path) -> int:
    """Bytes of the files under a directory; what vanishes meanwhile counts nothing."""
    total = 0
    for path, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(Path(path) / name).st_blocks * 512
            except OSError:
                continue
    return total


def _section(result: Result) -> Section:
    runs = [result["first"], result["second"]]
    rows = [[phase, *(words.duration(run["phases"][phase]) for run in runs)] for phase in PHASES]
    rows.append(["interpreter, imports, report", *(words.duration(run["outside_phases"]) for run in runs)])
    rows.append(["total", *(words.duration(run["seconds"]) for run in runs)])
    rows.append(["stages trained, reused", *(f"{run['stages_trained']}, {run['stages_reused']}" for run in runs)])
    rows.append(["largest process", *(words.size(run["largest_process_bytes"]) for run in runs)])
    rows.append(["all processes at once", *(words.size(run["all_processes_bytes"]) for run in runs)])
    sizes = result["bytes"]
    disk = [[f"boundary {one['depth']}", words.size(one["bytes"])] for one in sizes["boundaries"]]
    disk += [
        ["committed stages", words.size(sizes["stages"])],
        ["checkpoints, at most at once", words.size(result["first"]["checkpoint_bytes"])],
        ["index: masks, rows, digests", words.size(sizes["index"])],
        ["the run's directory at the end, all in all", words.size(sizes["run"])],
        ["prepared data and tokenizer, in the cache", words.size(sizes["prepared"])],
    ]
    text = (
        "One run of each, so absolute times of this machine on that day. Memory is resident; what processes share "
        f"counts for each of them, and all of them are looked at every {LOOK_SECONDS:g} s, as checkpoints are, which "
        "are gone when their stage is committed. Disk is what the files occupy."
    )
    body = f"{table(['phase', 'first run', 'again'], rows)}\n\n{table(['on disk', 'bytes'], disk)}"
    title = f"The preset {result['preset']}, by phase"
    gpu = result["device_type"] not in (None, "cpu")
    return Section("demo", title, text, body, str(result["device"]) if gpu else "CPU", result)


if __name__ == "__main__":
    sys.exit(main())
