"""Curricula against random order: held-out bits per byte of the standard library's source.

    python -m benchmarks.curriculum [--steps 300] [--seeds 3] [--dir RUNS]

Each order and seed is an ordinary run of a small causal rack; where the benchmark was interrupted, the same
`--dir` goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Result, overrides, parser, place, positive, run_command, say, table
from benchmarks.document import Section
from stackwise.config import StackWiseConfig
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.committed.use import export_rack
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.runner import Runner
from stackwise.pretrained.writing import ExportOptions

RANDOM = "random"
MODEL = "loss of a model, sqrt"
ORDERS: dict[str, dict[str, str] | None] = {
    RANDOM: None,
    "rarity, sqrt": {"by": "rarity", "competence": "sqrt"},
    "rarity, linear": {"by": "rarity", "competence": "linear"},
    "compression, sqrt": {"by": "compression", "competence": "sqrt"},
    "length, sqrt": {"by": "length", "competence": "sqrt"},
    MODEL: {"by": "model", "competence": "sqrt"},
    "self-paced, sqrt": {"by": "loss", "competence": "sqrt"},
}
WINDOWS = 6
"""Of the self-paced order: at the end of each the rack says how hard the rows of the next one are."""
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
    with place(options.dir) as here:
        return _measured(options, here)


def _measured(options: argparse.Namespace, here: Path) -> Result:
    bits: dict[str, list[float]] = {order: [] for order in ORDERS}
    for order, values in bits.items():
        for seed in range(options.seeds):
            values.append(_bits_per_byte(here, order, seed, options))
            say(f"{order}, seed {seed}: {values[-1]:.3f}")
    return {"steps": options.steps, "seeds": options.seeds, "bits_per_byte": bits}


def _bits_per_byte(here: Path, order: str, seed: int, options: argparse.Namespace) -> float:
    run = RunDirectory(here / f"{order.replace(', ', '-').replace(' ', '-')}-{seed}")
    values = _values(seed, options) | {"training.curriculum": ORDERS[order]}
    if order == MODEL:
        values["training.curriculum"] = {**(ORDERS[order] or {}), "model": str(_judge(here, seed, options))}
    if order.startswith("self-paced"):
        values["training.windows"] = WINDOWS
    _trained(values, run)
    evaluation = run.evaluation()
    assert evaluation is not None
    return float(evaluation["bits_per_byte"])


def _judge(here: Path, seed: int, options: argparse.Namespace) -> Path:
    """A model of half the width that saw half the steps, in random order."""
    run, model = RunDirectory(here / f"judge-{seed}"), here / f"judge-{seed}-model"
    if not model.exists():
        values = _values(seed, options)
        _trained(values | {"model.d_model": 32, "training.steps": max(1, options.steps // 2)}, run)
        export_rack(load_rack(run, torch.device("cpu")), model, ExportOptions())
    return model


def _trained(values: dict[str, Any], run: RunDirectory) -> None:
    Runner(StackWiseConfig.from_preset("micro", values), run, lambda event: None).run()


def _values(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    library = Path(sysconfig.get_path("stdlib"))
    return {
        "data.paths": [str(library / part) for part in PACKAGES],
        "seed": seed,
        "training.objective": "clm",
        "training.mode": "end_to_end",
        "training.steps": options.steps,
        "training.batch_size": 8,
        "training.seq_len": 128,
        "model.d_model": 64,
        "model.architecture.n_stacks": 2,
        "tracking.trackers": [],
        **overrides(options.overrides),
    }


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
