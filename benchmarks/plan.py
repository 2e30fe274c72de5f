"""What `stackwise plan` says of runs, beside what they then take: memory and time of each stage.

    python -m benchmarks.plan [--cases smoke,wide,deep] [--device auto]

The machine is measured first (`stackwise doctor --measure`), in a cache of its own. Then each run is planned, and run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Result, parser, refuse, run_command, say, table
from benchmarks.document import Section
from stackwise import words

SHARED = {"model.n_heads": 4, "training.seq_len": 128, "training.accumulation": 2, "evaluation.samples": 8}
CASES: dict[str, dict[str, Any]] = {
    "smoke": {"training.steps": 12},
    "wide": SHARED | {"model.d_model": 512, "training.batch_size": 16, "training.steps": 6},
    "deep": SHARED
    | {"model.d_model": 256, "training.batch_size": 32, "training.steps": 6, "training.mode": "end_to_end"},
}
"""Overrides of the preset smoke, by the name of a case."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("plan", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("plan", __doc__)
    made.add_argument("--cases", default=",".join(CASES), metavar="A,B", help=f"of {', '.join(CASES)}; default: all")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Plan and run each case.

    Raises:
        UsageError: There is no case of that name.
    """
    names = options.cases.split(",")
    for name in names:
        if name not in CASES:
            raise refuse(f"there is no case {name}", f"there are {', '.join(CASES)}")
    from stackwise.pipeline.device import describe, resolve_device

    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory(prefix="stackwise-bench-") as directory:
        environment = os.environ | {"XDG_CACHE_HOME": str(Path(directory) / "cache")}
        say("measuring this machine")
        _command(["doctor", "--measure"], environment, directory)
        cases = {name: _case(name, device.type, Path(directory), environment) for name in names}
    return {"device": describe(device)["name"], "device_type": device.type, "cases": cases}


def _case(name: str, kind: str, directory: Path, environment: Mapping[str, str]) -> list[Result]:
    overrides = {"device": kind, **CASES[name]}
    given = [
        "--preset",
        "smoke",
        *(w for key, value in overrides.items() for w in ("-o", f"{key}={json.dumps(value)}")),
    ]
    planned = json.loads(_command(["plan", *given, "--gpu", "auto", "--json"], environment, directory))
    say(f"{name}: running it")
    run = str(directory / name)
    lines = _command(["run", *given, "--run", run, "--json"], environment, directory).splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    status = json.loads(_command(["status", "--run", run, "--json"], environment, directory))
    return [
        {
            "planned_memory": plan["host_memory"] if kind == "cpu" else plan["memory"]["peak"],
            "memory": stage["peak_memory_bytes"],
            "planned_seconds": plan["seconds"],
            "seconds": _seconds(events, number),
        }
        for number, (plan, stage) in enumerate(zip(planned["stages"], status["stages"], strict=True))
    ]


def _seconds(events: Sequence[Mapping[str, Any]], number: int) -> float:
    """From where a stage trains to where its boundary is written, or it is committed."""
    mine = [event for event in events if event.get("stage") == number]
    begun = next(event["time"] for event in mine if event["event"] == "training")
    return float(max(event["time"] for event in mine if event["event"] in ("committed", "written")) - begun)


def _command(given: Sequence[str], environment: Mapping[str, str], directory: str | Path) -> str:
    command = [sys.executable, "-m", "stackwise", *given]
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=directory, env={**environment, "PYTHONPATH": path}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise refuse(f"stackwise {given[0]} failed: {last}", "run it by itself")
    return done.stdout


def beside(result: Result) -> str:
    """What was planned beside what was measured, as a table."""
    rows = [
        [
            name,
            str(number),
            words.size(one["planned_memory"]),
            words.size(one["memory"]),
            f"{one['planned_memory'] / one['memory'] - 1:+.0%}",
            f"{one['planned_seconds']:.2f} s",
            f"{one['seconds']:.2f} s",
            f"{one['planned_seconds'] / one['seconds'] - 1:+.0%}",
        ]
        for name, stages in result["cases"].items()
        for number, one in enumerate(stages)
    ]
    header = ["run", "stage", "memory, planned", "measured", "off by", "time, planned", "measured", "off by"]
    return table(header, rows)


def _section(result: Result) -> Section:
    text = (
        "The preset smoke with other widths, batches and modes, each planned with the rates that `stackwise doctor "
        "--measure` found just before, then run. Memory on a CPU is the worker's largest resident size, Python and "
        "torch included; on a GPU what PyTorch allocated. Time is from a stage's first step to its commit, the "
        "boundary above it included. Rates change where others use the machine: times hold on a quiet one."
    )
    where = "GPU" if result["device_type"] == "cuda" else "CPU"
    title = f"What a plan says, and what the run took ({where})"
    return Section(f"plan on a {where}", title, text, beside(result), result["device"], result)


if __name__ == "__main__":
    sys.exit(main())
