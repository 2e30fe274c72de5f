"""Curricula against random order: held-out bits per byte of the standard library's source.

    python -m benchmarks.curriculum [--steps 300] [--seeds 3] [--dir RUNS]

Each order and seed is an ordinary run of a small causal rack; where the benchmark was interrupted, the same
`--dir` goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Result, overrides, parser, positive, run_command, say, table
from benchmarks.document import Section
from stackwise.config import StackWiseConfig
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.runner import Runner

RANDOM = "random"
ORDERS: dict[str, dict[str, str] | None] = {
    RANDOM: None,
    "rarity, sqrt": {"by": "rarity", "competence": "sqrt"},
    "rarity, linear": {"by": "rarity", "competence": "linear"},
    "compression, sqrt": {"by": "compression", "competence": "sqrt"},
    "length, sqrt": {"by": "length", "competence": "sqrt"},
}
PACKAGES = ("asyncio", "email", "json", "unittest", "xml")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("curriculum", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("curriculum", __doc__)
    made.add_argument("--steps", type=positive, metavar="N", default=300, help="default: 300")
    made.add_argument("--seeds", type=positive, metavar="N", default=3, help="default: 3")
    made.add_argument("--dir", metavar="DIR", help="where runs stay; default: a temporary directory")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Bits per byte of every order, by seed."""
    if options.dir is None:
        with tempfile.TemporaryDirectory(prefix="stackwise-bench-") as name:
            return _measured(options, Path(name))
    return _measured(options, Path(options.dir))


def _measured(options: argparse.Namespace, here: Path) -> Result:
    bits: dict[str, list[float]] = {order: [] for order in ORDERS}
    for order, values in bits.items():
        for seed in range(options.seeds):
            values.append(_bits_per_byte(here, order, seed, options))
            say(f"{order}, seed {seed}: {values[-1]:.3f}")
    return {"steps": options.steps, "seeds": options.seeds, "bits_per_byte": bits}


def _bits_per_byte(here: Path, order: str, seed: int, options: argparse.Namespace) -> float:
    library = Path(sysconfig.get_path("stdlib"))
    values: dict[str, Any] = {
        "data.paths": [str(library / part) for part in PACKAGES],
        "seed": seed,
        "training.objective": "clm",
        "training.mode": "end_to_end",
        "training.steps": options.steps,
        "training.batch_size": 8,
        "training.seq_len": 128,
        "training.curriculum": ORDERS[order],
        "model.d_model": 64,
        "model.architecture.n_stacks": 2,
        "tracking.trackers": [],
        **overrides(options.overrides),
    }
    run = RunDirectory(here / f"{order.replace(', ', '-')}-{seed}")
    Runner(StackWiseConfig.from_preset("micro", values), run, lambda event: None).run()
    evaluation = run.evaluation()
    assert evaluation is not None
    return float(evaluation["bits_per_byte"])


def _section(found: Result) -> Section:
    bits = found["bits_per_byte"]

    def row(order: str) -> list[str]:
        difference = statistics.mean(a - b for a, b in zip(bits[order], bits[RANDOM], strict=True))
        shown = ", ".join(f"{value:.3f}" for value in bits[order])
        return [order, shown, f"{statistics.mean(bits[order]):.3f}", "" if order == RANDOM else f"{difference:+.3f}"]

    body = table(["order of rows", "held-out bits per byte by seed", "mean", "mean difference"], map(row, bits))
    text = f"A causal rack of two blocks, {found['steps']} steps, {found['seeds']} seeds; difference from random order."
    return Section("curriculum", "Curricula against random order", text, body, "CPU", found)


if __name__ == "__main__":
    raise SystemExit(main())
