"""What the pipeline costs beside training: handing off, starting again, a slow disk, many stages, fused passes.

    python -m benchmarks.pipeline [--rounds 5] [--steps 600] [--stages 10,30,100] [--only NAME,NAME] [--write]

Runs are real ones of the command with the preset micro; what is compared takes turns.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import (
    Result,
    Spread,
    numbers,
    overrides,
    parser,
    positive,
    refuse,
    run_command,
    say,
    shown,
    table,
)
from benchmarks.document import Section
from benchmarks.pipeline import slow_disk
from benchmarks.pipeline.runs import Run, first_batch_at, first_step_at, handoffs, named
from stackwise import words
from stackwise.config import StackWiseConfig

PARTS = ("handoff", "restart", "disk", "stages", "fused")
SPEEDS = (1.5, 0.8)
"""Of a disk, as shares of the bandwidth that the stage needs."""
TOKENS = 16 * 32
"""In a step of the preset micro."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("pipeline", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("pipeline", __doc__)
    add = made.add_argument
    add("--rounds", type=positive, default=5, metavar="N", help="rounds of what is compared, and kills; default 5")
    add("--steps", type=positive, default=600, metavar="N", help="steps of a stage; default 600")
    add("--stages", type=numbers, default=[10, 30, 100], metavar="N,N", help="depths compared; default 10,30,100")
    add("--only", metavar="NAME,NAME", help=f"of {', '.join(PARTS)}; default: all")
    add("--dir", metavar="DIR", help="where runs go; default: the system's temporary directory")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Measure what is asked for."""
    chosen = options.only.split(",") if options.only else list(PARTS)
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        raise refuse(f"--only {unknown[0]}: there is no such part", f"there are {', '.join(PARTS)}")
    StackWiseConfig.from_preset("micro", overrides(options.overrides))  # refused before anything runs
    result: Result = {"load_before": os.getloadavg()[0], "steps": options.steps, "rounds": options.rounds}
    with tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=options.dir) as name:
        parts: dict[str, Callable[[], Result]] = {
            "handoff": lambda: _handoff(options, Path(name)),
            "restart": lambda: _restart(options, Path(name)),
            "disk": lambda: {
                "speeds": slow_disk.measure("stages", SPEEDS, options.rounds, min(24, options.steps), name)
            },
            "stages": lambda: _stages(options, Path(name)),
            "fused": lambda: _fused(options, Path(name)),
        }
        for part in chosen:
            say(f"{part} …")
            result[part] = parts[part]()
    return result | {"load_after": os.getloadavg()[0]}


def _settings(options: argparse.Namespace, *more: str) -> list[str]:
    own = ["evaluation.samples=4", "device=cpu", "training.checkpoint_steps=null", *more]
    return [*own, *options.overrides]


def _run(options: argparse.Namespace, where: Path, *more: str) -> Run:
    return Run(where, "micro", _settings(options, *more))


def _handoff(options: argparse.Namespace, home: Path) -> Result:
    """Between stages that last long enough for the next worker's imports."""
    stages = 1 + options.rounds
    settings = (f"model.architecture.n_stacks={stages}", f"training.steps={options.steps}")
    events = _run(options, home / "handoff", *settings, "training.rows=2000").finish()
    return {"stages": stages, "seconds": Spread.of(handoffs(events, stages, TOKENS)).plain()}


def _restart(options: argparse.Namespace, home: Path) -> Result:
    """A worker killed at a random moment of its second stage, and the run started again."""
    every = 2.0
    settings = (
        "training.steps=1000000",
        "stages.0.training.steps=20",
        "training.rows=2000",
        f"training.checkpoint_minutes={every / 60}",
    )
    restarts, lost, killed_at = [], [], []
    draw = random.Random(0)
    run = _run(options, home / "restart", *settings)
    for _ in range(options.rounds):
        checkpoints = 0
        kill_after: float | None = None
        for event in run.events():
            checkpoints += event["event"] == "checkpoint" and event["stage"] == 1
            if checkpoints == 1 and kill_after is None:
                kill_after = event["time"] + draw.uniform(0.0, every)
            if event["event"] == "step" and kill_after is not None and event["time"] >= kill_after:
                run.kill_worker(event["pid"])
                break
        last = named(run.seen, "step", 1)[-1]
        again = _run(options, home / "restart", *settings)
        for event in again.events():
            if event["event"] == "step":
                break
        (resumed,) = named(again.seen, "resumed", 1)
        restarts.append(first_step_at(again.seen, 1, TOKENS) - again.begun)
        lost.append((last["step"] - resumed["step"]) * TOKENS / last["tokens_per_second"])
        killed_at.append(last["step"])
        run = again
    run.kill_worker(named(run.seen, "step", 1)[-1]["pid"])
    return {
        "kills": options.rounds,
        "checkpoint_seconds": every,
        "restart_seconds": Spread.of(restarts).plain(),
        "lost_seconds": Spread.of(lost).plain(),
        "default_minutes": StackWiseConfig.from_preset("micro").training.checkpoint_minutes,
    }


def _stages(options: argparse.Namespace, home: Path) -> Result:
    """Runs of several depths, their stages alike and short."""
    found = []
    for depth in options.stages:
        settings = (f"model.architecture.n_stacks={depth}", "training.steps=20", "store.keep=1")
        events = _run(options, home / f"stages-{depth}", *settings).finish()
        begun = first_batch_at(events, 0, TOKENS)
        seconds = named(events, "committed", depth - 1)[0]["time"] - begun
        found.append({"stages": depth, "seconds": seconds, "each": seconds / depth})
    return {"runs": found}


def _fused(options: argparse.Namespace, home: Path) -> Result:
    """Four stages whose rows are seen once, with separate and with fused passes, in turns."""
    shape = ("model.architecture.n_stacks=4", "model.d_model=128", "model.n_heads=4", f"training.steps={options.steps}")
    ways = {"separate": "store.every=1", "fused": "store.fuse_passes=true", "every 2": "store.every=2"}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    weights: set[str] = set()
    traffic: Result = {}
    for turn in range(options.rounds):
        order = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
        for way in order:
            events = _run(options, home / f"{way.replace(' ', '-')}-{turn}", *shape, ways[way]).finish()
            begun = first_batch_at(events, 0, TOKENS)
            seconds[way].append(named(events, "committed", 3)[0]["time"] - begun)
            traffic[way] = named(events, "fit")[0]["traffic"]
            weights.add(str(sorted(named(events, "committed", 3)[0]["parts"].items())))
    if len(weights) != 1:
        raise refuse("fused and separate passes gave different weights", "this is a defect")
    ratio = {
        way: Spread.of(a / b for a, b in zip(seconds[way], seconds["separate"], strict=True)).plain() for way in ways
    }
    return {
        "ways": {way: {"seconds": Spread.of(seconds[way]).plain(), "ratio": ratio[way], **traffic[way]} for way in ways}
    }


def _section(result: Result) -> Section:
    seconds = words.duration
    tables = []
    rows = []
    if "handoff" in result:
        rows.append(["handoff between two small stages (goal: 0.5 s)", shown(result["handoff"]["seconds"], _precise)])
    if "restart" in result:
        restart = result["restart"]
        rows.append(["a run started again, to the first step", shown(restart["restart_seconds"], _precise)])
        every = f"{restart['checkpoint_seconds']:g} s"
        rows.append([f"training lost to a kill, checkpoints every {every}", shown(restart["lost_seconds"], _precise)])
    if rows:
        tables.append(table(["what", "seconds"], rows))
    if "disk" in result:
        head = ["disk, of the bandwidth needed", "batches", "waiting for data", "speed, of that from the page cache"]
        tables.append(
            table(
                head,
                [
                    [
                        f"{one['speed_of_need']:g} ({words.size(one['bytes_per_second']['median'])}/s)",
                        way,
                        shown(one[way]["waited"], words.percent),
                        shown(one[way]["speed"], lambda value: f"{value:.2f}"),
                    ]
                    for one in result["disk"]["speeds"]
                    for way in ("ahead", "on demand")
                ],
            )
        )
    if "stages" in result:
        runs = result["stages"]["runs"]
        tables.append(
            table(
                ["stages of 20 steps", "total", "each"],
                [[str(one["stages"]), seconds(one["seconds"]), seconds(one["each"])] for one in runs],
            )
        )
    if "fused" in result:
        head = ["passes", "time, of separate", "seconds", "read from the store", "written", "forward passes"]
        tables.append(
            table(
                head,
                [
                    [
                        way,
                        shown(one["ratio"], lambda value: f"{value:.2f}"),
                        shown(one["seconds"], lambda value: f"{value:.1f}"),
                        words.size(one["read"]),
                        words.size(one["written"]),
                        f"{one['flops'] / 1e9:.3g} GFLOP",
                    ]
                    for way, one in result["fused"]["ways"].items()
                ],
            )
        )
    return Section("pipeline", "The pipeline beside training", _text(result), "\n\n".join(tables), "CPU", result)


def _precise(value: float) -> str:
    return f"{value:.2f}"


def _text(result: Result) -> str:
    said = [
        f"Load average {result['load_before']:.1f} before and {result['load_after']:.1f} after; medians, smallest to "
        "largest in brackets. Runs are real ones of the preset micro."
    ]
    if "handoff" in result:
        said.append(
            "A handoff lasts from the boundary below being complete to the trainer's first batch being asked for; the "
            "next worker's imports are done while the stage before trains."
        )
    if "restart" in result:
        said.append(
            f"Kills are SIGKILL of the worker at random moments, {result['restart']['kills']} of them. At the default, "
            f"a checkpoint every {result['restart']['default_minutes']:g} minutes, a kill costs up to those minutes, "
            "half of them on average, and the restart; Ctrl-C and SIGTERM cost the restart alone."
        )
    if "disk" in result:
        said.append(
            "The slow disk is every read made to last as long as at that bandwidth; the stage is that of the preset "
            "stages, each row is read once; ahead: prepared by a thread while the stage computes."
        )
    if "fused" in result:
        said.append(
            "Fused and separate: four stages of width 128, each row seen once, in turns; the weights were the same, "
            "bit for bit. Bytes and FLOPs are what the runs said beforehand."
        )
    return " ".join(said)


if __name__ == "__main__":
    sys.exit(main())
