"""Rows in an order by their experts against an order by chance: experts read of the disk, and what it does to the loss.

    python -m benchmarks.routes [--steps 20] [--seeds 3] [--dir RUNS]

A swapped rack with many small experts and few rows a step: from fresh weights, and trained on, at a tenth of the rate,
from a run whose routers have learned. Where the benchmark was interrupted, the same `--dir` goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Result, overrides, parser, place, positive, run_command, say, table
from benchmarks.document import Section
from benchmarks.moe import PAGE
from stackwise import words
from stackwise.config import StackWiseConfig
from stackwise.pipeline.events import Event, read_log
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.runner import Runner

ORDERS = {"chance": "count", "experts": "order"}
"""Orders of rows, and the setting of each."""
BEGUN = ("fresh", "trained")
RATE = 3e-3
PACKAGES = ("asyncio", "email", "json", "unittest", "xml")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("routes", arguments, lambda given: _section(measure(_parser().parse_args(given))), PAGE)


def _parser() -> argparse.ArgumentParser:
    made = parser("routes", __doc__)
    made.add_argument("--steps", type=positive, metavar="N", default=20, help="default: 20")
    made.add_argument("--seeds", type=positive, metavar="N", default=3, help="default: 3")
    made.add_argument("--dir", metavar="DIR", help="where runs stay; default: a temporary directory")
    return made


def measure(options: argparse.Namespace) -> Result:
    """What each order reads and comes to, by how the rack begins and by seed."""
    with place(options.dir) as here:
        return _measured(options, here)


def _measured(options: argparse.Namespace, here: Path) -> Result:
    runs: dict[str, dict[str, list[Result]]] = {begun: {order: [] for order in ORDERS} for begun in BEGUN}
    for seed in range(options.seeds):
        for begun in BEGUN:
            for order, setting in ORDERS.items():
                values = _values(seed, options) | {"training.routes": setting}
                if begun != BEGUN[0]:
                    values |= {"init.weights": str(_trained(here / f"before-{seed}", seed, options))}
                    values |= {"training.learning_rate": RATE / 10}
                run = RunDirectory(here / f"{begun}-{order}-{seed}")
                Runner(StackWiseConfig.from_preset("micro", values), run, lambda event: None).run()
                runs[begun][order].append(_figures(run))
                say(f"{begun}, {order}, seed {seed}: {runs[begun][order][-1]}")
    return {"steps": options.steps, "seeds": options.seeds, "runs": runs}


def _trained(path: Path, seed: int, options: argparse.Namespace) -> Path:
    """A run in memory of ten times the steps."""
    steps = 10 * options.steps
    values = _values(seed, options) | {"training.swap": "never", "training.steps": steps, "training.rows": 4 * steps}
    Runner(StackWiseConfig.from_preset("micro", values), RunDirectory(path), lambda event: None).run()
    return path


def _figures(run: RunDirectory) -> Result:
    """Of a run whose stages are one: what was predicted, what a step reached and read, the held-out loss at its end."""
    events = [event for event, _ in read_log(run.events_file)]
    steps = [event for event in events if event["event"] == "step"]

    def mean(name: str) -> float:
        return statistics.fmean(event["pieces"][name] for event in _each(steps))

    predicted = next(event for event in events if event["event"] == "routes")
    losses = [event["nats"] for event in events if event["event"] == "held_out"]
    figures = {"predicted": predicted["reached"], "first": predicted["first"], "of": predicted["of"]}
    return figures | {"reached": mean("reached"), "bytes": mean("bytes"), "loss": losses[-1]}


def _each(steps: list[Event]) -> Iterator[Event]:
    """An event's figures are means over its steps: each as often as it has steps."""
    for event in steps:
        yield from [event] * len(event["losses"])


def _values(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    library = Path(sysconfig.get_path("stdlib"))
    return {
        "data.paths": [str(library / part) for part in PACKAGES],
        "seed": seed,
        "training.objective": "clm",
        "training.mode": "end_to_end",
        "training.swap": "always",
        "training.swap_experts": 32,  # where all of them stay in memory, none is read
        "training.steps": options.steps,
        "training.eval_every": options.steps,
        "training.learning_rate": RATE,
        "training.batch_size": 4,
        "training.seq_len": 16,
        "training.rows": 4 * options.steps,
        "model.d_model": 32,
        "model.architecture.n_stacks": 2,
        "model.ffn": {"kind": "moe", "experts": 64, "expert_dim": 32, "at": [1], "aux_weight": 0.1},
        "tracking.trackers": [],
        **overrides(options.overrides),
    }


def _section(found: Result) -> Section:
    def row(begun: str, order: str) -> list[str]:
        runs, chance = found["runs"][begun][order], found["runs"][begun]["chance"]

        def mean(name: str) -> float:
            return statistics.fmean(run[name] for run in runs)

        apart = [one["loss"] - other["loss"] for one, other in zip(runs, chance, strict=True)]
        loss = "" if order == "chance" else ", ".join(f"{value:+.4f}" for value in apart)
        reached = f"{mean('predicted'):.1f}", f"{mean('reached'):.1f}"
        return [begun, order, *reached, words.size(mean("bytes")), f"{mean('loss'):.4f}", loss]

    lines = [row(begun, order) for begun in BEGUN for order in ORDERS]
    header = ["weights at first", "order", "experts predicted", "reached", "read a step", "held-out loss", "by seed"]
    first = found["runs"][BEGUN[0]]["chance"][0]
    text = (
        f"A causal rack of two blocks, the upper one with {first['of']} experts, swapped; 4 rows of 16 a step, "
        f"{found['steps']} steps, means of {found['seeds']} seeds. Trained: ten times the steps before, in memory, and "
        "these at a tenth of the rate. Predicted before the first step, reached and read in the mean of all steps; by "
        "seed: held-out loss less that of the order by chance."
    )
    return Section("routes", "An order of rows by their experts", text, table(header, lines), "CPU", found)


if __name__ == "__main__":
    raise SystemExit(main())
