"""Everything that a rented GPU is wanted for, in order of worth, in one command that can be interrupted.

    python -m benchmarks.h200 [--minutes 25] [--skip peers,plan] [--out h200] [--write]

Each part is a process of its own, and its result is kept as it ends: the same command goes on where it was. Shapes
follow from the device's memory; on a CPU they are the smallest, so that the command itself can be tried anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import plan
from benchmarks.common import Result, parser, positive, refuse, run_command, say, table
from benchmarks.document import Section
from stackwise import durable, files, words

LEAST = 20.0
"""Seconds below which a part is not begun any more."""
GRACE = 20.0
"""Seconds that a part has to clean up once it is ended."""


@dataclass(frozen=True)
class Shape:
    """What is measured on devices with so much memory.

    Args:
        rows: Rows of a microbatch that one block is measured with.
        fat: Blocks of the fattest stages.
        options: Of every measurement of a stage.
        run: Overrides of the runs, by dotted key.
    """

    name: str
    least: int  # bytes of the device's memory
    preset: str
    rows: str
    fat: str
    microbatch: int
    parameters: int  # of the stage whose checkpoints are timed
    options: tuple[str, ...] = ()
    run: dict[str, Any] = field(default_factory=dict)


_FEW = {"training.steps": 4, "evaluation.samples": 8, "data.max_bytes": 8 << 20}
_LAYERS = {"training.mode": "layerwise", "model.architecture": {"n_stacks": 4, "blocks_per_stack": 1}}
SHAPES = (
    Shape("141 GB", 120 << 30, "llama-70b", "1,4,8,16", "6,7", 4, 2_000_000_000, run=_FEW | _LAYERS),
    Shape("80 GB", 70 << 30, "llama-70b", "1,4,8,16", "3", 4, 1_000_000_000, run=_FEW | _LAYERS),
    Shape("40 GB", 36 << 30, "llama-70b", "1,2,4", "2", 2, 500_000_000, run=_FEW | _LAYERS),
    Shape("16 GB", 12 << 30, "llama-1b", "1,4,8,16", "2,4", 4, 200_000_000, run=_FEW | _LAYERS),
    Shape(
        "a CPU", 0, "micro", "1,4", "1,2", 4, 200_000,
        ("--store-bytes", "2000000", "--steps", "5", "-o", "model.n_heads=2"),
        {"training.steps": 4, "evaluation.samples": 8} | _LAYERS,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A device, what is measured on it, and where results are kept."""

    shape: Shape
    device: str
    kind: str  # cuda or cpu
    out: Path


def parts(bench: Bench) -> dict[str, Callable[[float], Any]]:
    """What there is to measure, by name, most worth first; each takes the seconds that it may last."""
    shape = bench.shape

    def module(name: str, *arguments: str) -> Callable[[float], Any]:
        return lambda seconds: _json([sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json"], seconds)

    def stage(*arguments: str) -> Callable[[float], Any]:
        common = ("--preset", shape.preset, "--device", bench.kind, *shape.options)
        return module("stage", *common, *arguments)

    plain = ("--blocks", "1", "-o", "training.compile=false")  # auto compiles where there is a GPU
    one = (*plain, "--batch-size", str(shape.microbatch))
    own = (sys.executable, "-m", "benchmarks.h200_parts")
    about = ("--preset", shape.preset, "--device", bench.kind, "--rows", str(shape.microbatch))
    return {
        "smoke": lambda seconds: _json([*own, "resume", *about], seconds),
        "block": stage(*plain, "--batch-size", shape.rows),
        "compile": stage("--blocks", "1", "--batch-size", str(shape.microbatch), "-o", "training.compile=true"),
        "fp8": stage(*one, "-o", "training.products=fp8"),
        "checkpointing": stage(*one, "-o", "training.activation_checkpointing=true"),
        "deterministic": stage(*one, "-o", "deterministic=true"),
        "undeterministic": stage(*one, "-o", "deterministic=false"),
        "fat": stage("--blocks", shape.fat, "--batch-size", str(shape.microbatch)),
        "checkpoint": module("checkpoint", "--parameters", str(shape.parameters), "--device", bench.kind),
        "swapped": lambda seconds: _json([*own, "swapped", *about], seconds),
        "stages": lambda seconds: _json([*own, "stages", *about, "--run", json.dumps(shape.run)], seconds),
        "loss": lambda seconds: _json([*own, "loss", *about], seconds),
        "peers": lambda seconds: _json([*own, "fsdp", *about], seconds),
        "plan": module("plan", "--device", bench.kind),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("h200", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("h200", __doc__)
    add = made.add_argument
    add("--minutes", type=positive, default=25, metavar="N", help="no part begins or lasts beyond them; default 25")
    add("--skip", default="", metavar="A,B", help="parts that are left out")
    add("--only", default="", metavar="A,B", help="these parts alone")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--out", default="h200", metavar="DIR", help="where results are kept as they come; default: h200")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Measure what is still to be measured, as far as the time goes; all that is known by then.

    Raises:
        UsageError: There is no part of that name, or the directory has results of another device.
    """
    bench = _bench(options)
    known, record = parts(bench), bench.out / "results.json"
    skipped, only = ([name for name in text.split(",") if name] for text in (options.skip, options.only))
    for name in (*skipped, *only):
        if name not in known:
            raise refuse(f"there is no part {name}", f"there are {', '.join(known)}")
    result: Result = {"device": bench.device, "shape": bench.shape.name, "preset": bench.shape.preset, "parts": {}}
    if record.exists():
        before = files.read_json(record)
        if (before["device"], before["shape"]) != (bench.device, bench.shape.name):
            raise refuse(f"{record} has results of {before['device']}", "name another directory with --out")
        result = before
    bench.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    for name, take in known.items():
        left = end - time.monotonic()
        if name in skipped or (only and name not in only) or "result" in result["parts"].get(name, {}):
            continue
        if left < LEAST:
            say(f"{name}: no time left; the same command goes on with it")
            continue
        say(f"{name}: {words.duration(left)} left")
        begun = time.perf_counter()
        try:
            outcome: Result = {"result": take(left)}
        except subprocess.TimeoutExpired:
            outcome = {"fault": "the time was up"}
        except (OSError, ValueError) as error:
            outcome = {"fault": str(error)}
        say(f"{name}: {outcome.get('fault', 'measured')}")
        result["parts"][name] = {"seconds": time.perf_counter() - begun, **outcome}
        durable.write_json(record, result)
    return result


def _bench(options: argparse.Namespace) -> Bench:
    from stackwise.pipeline.device import describe, resolve_device

    device = resolve_device(options.device)
    about = describe(device)
    memory = about["memory"] if device.type == "cuda" else 0
    shape = next(shape for shape in SHAPES if memory >= shape.least)
    return Bench(shape, about["name"], device.type, Path(options.out))


def _json(command: Sequence[str], seconds: float) -> Any:
    """What a command prints as JSON in its last line.

    Raises:
        ValueError: It failed; the last line that it said.
        TimeoutExpired: It took longer.
    """
    with tempfile.TemporaryDirectory(prefix="stackwise-h200-") as scratch:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"TMPDIR": scratch},  # a part that is ended does not remove its directory
        )
        try:
            out, errors = process.communicate(timeout=seconds)
        except BaseException:  # the time is up, or Ctrl-C: runs that it has started would go on, and hold the device
            _end(process)
            raise
    if process.returncode:
        raise ValueError((errors.strip().splitlines() or [f"it ended with {process.returncode}"])[-1])
    return json.loads(out.strip().splitlines()[-1])


def _end(process: subprocess.Popen[str]) -> None:
    """End a part and what it has started: first so that a run ends its workers."""
    for ending in (signal.SIGTERM, signal.SIGKILL):  # not SIGINT: what a script starts in the background ignores it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, ending)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=GRACE)


def _settings(result: Any) -> list[Result]:
    return result.get("settings", [result])  # type: ignore[no-any-return]


def _stage_rows(name: str, result: Any) -> list[list[str]]:
    """The lines of a measured stage: what it was, its speed, its memory beside the estimate."""
    lines = []
    for one in _settings(result):
        training = one["training"]
        what = f"{words.plural(one['blocks'], 'block')}, {words.plural(one['batch_size'], 'row')} of {one['seq_len']:,}"
        lines.append(
            [
                name,
                what + (", compiled" if one["compile"] else ""),
                words.count(training["tokens_per_second"]["median"]),
                words.percent(training["share"]["median"]),
                words.percent(training["wait_share"]["median"]),
                words.size(one["peak_memory_bytes"]),
                words.size(one["memory_estimate"]),
            ]
        )
    return lines


def _section(result: Result) -> Section:
    taken = {name: part["result"] for name, part in result["parts"].items() if "result" in part}
    of_stages = ("block", "compile", "fp8", "checkpointing", "deterministic", "undeterministic", "fat")
    names = [name for name in of_stages if name in taken]
    header = ["part", "stage", "tokens/s", "share of the matrix product's", "waiting", "peak memory", "foreseen"]
    tables = [table(header, [row for name in names for row in _stage_rows(name, taken[name])])] if names else []
    facts = [
        [name, str(key), _shown(value)]
        for name in ("smoke", "swapped", "stages", "loss", "peers", "checkpoint")
        for key, value in taken.get(name, {}).items()
        if not isinstance(value, dict | list)
    ]
    if facts:
        tables.append(table(["part", "figure", ""], facts))
    if "plan" in taken:
        tables.append(plan.beside(taken["plan"]))
    times = [
        [name, words.duration(part["seconds"]), part.get("fault", "measured")] for name, part in result["parts"].items()
    ]
    tables.append(table(["part", "took", "came to"], times))
    text = (
        f"Shapes for {result['shape']}: the preset {result['preset']}. Each part in a process of its own. The share is "
        "of what a large matrix product reaches on the same device, in turns with the steps; foreseen is what a run's "
        "check before the stage says of its memory."
    )
    return Section("h200", "One device, in order of worth", text, "\n\n".join(tables), result["device"], result)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
