"""Whether the rate that is best for a shallow rack is best for a deep one, with AdamW and with Muon.

    python -m benchmarks.quality.rates [--depths 2,8] [--rates 7.5e-4,1.5e-3,3e-3,6e-3] [--write]

A rack that grows keeps its rate as it gets deeper, so the best rate must not move with depth. The racks, the data, the
steps and the files of results are those of `benchmarks.quality`, whose 8 blocks are here beside other depths.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Result, numbers, parser, positive, refuse, run_command, table
from benchmarks.document import Section
from benchmarks.quality.__main__ import DOCS
from benchmarks.quality.results import Results, Trial, mean_loss, setting_of
from benchmarks.quality.rows import BASE, PLAIN, ROWS
from stackwise import words

OPTIMIZERS = {"AdamW": PLAIN, "Muon": "end to end, Muon"}
"""The row of each optimizer: both train the whole rack in a cosine of rates."""

DEPTH = "model.architecture.n_stacks"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    page = DOCS / "quality.md"
    return run_command("quality.rates", arguments, lambda given: _measure(_parser().parse_args(given)), page)


def _parser() -> argparse.ArgumentParser:
    made = parser("quality.rates", __doc__)
    add = made.add_argument
    add("--depths", type=numbers, default=[2, BASE[DEPTH]], metavar="N,N", help="blocks; default 2,8")
    add("--rates", default="7.5e-4,1.5e-3,3e-3,6e-3", metavar="X,X", help="the grid of learning rates")
    add("--steps", type=positive, default=800, metavar="N", help="updates of each block; default 800")
    add("--dir", metavar="DIR", help="where the temporary runs go; default: the system's temporary directory")
    add("--report", action="store_true", help="run nothing: the table of what is there")
    return made


def results_file(docs: Path, depth: int, steps: int) -> Path:
    """Where results of a depth and length are: for 8 blocks those of `benchmarks.quality`."""
    blocks = [] if depth == BASE[DEPTH] else [f"{depth}-blocks"]
    return docs / ("-".join(["quality", *([] if steps == 800 else [str(steps)]), *blocks]) + ".json")


def grids(docs: Path, depths: Sequence[int], rates: Sequence[float], steps: int) -> Result:
    """By optimizer and depth the mean held-out losses of the rates that are measured, by rate."""
    found: Result = {}
    for optimizer, name in OPTIMIZERS.items():
        row = next(row for row in ROWS if row.name == name)
        for depth in depths:
            results = Results(results_file(docs, depth, steps), setting_of(BASE | {DEPTH: depth}, steps))
            trials = {rate: Trial(row, "rows", rate, 0) for rate in rates}
            known = {rate: mean_loss(results.runs[one.key]) for rate, one in trials.items() if one.key in results.runs}
            found.setdefault(optimizer, {})[depth] = known
    return found


def steps_apart(grid: Sequence[float], first: dict[float, float], second: dict[float, float]) -> int:
    """How many steps of the grid lie between the best rates of two depths."""
    order = sorted(grid)
    return abs(order.index(min(first, key=first.__getitem__)) - order.index(min(second, key=second.__getitem__)))


def _measure(options: argparse.Namespace) -> Section:
    rates = [float(rate) for rate in options.rates.split(",")]
    if not options.report:
        for name in OPTIMIZERS.values():
            row = next(row for row in ROWS if row.name == name)
            for depth in options.depths:
                setting = setting_of(BASE | {DEPTH: depth}, options.steps)
                results = Results(results_file(DOCS, depth, options.steps), setting, options.dir)
                for rate in rates:
                    results.of(Trial(row, "rows", rate, 0))
    found = grids(DOCS, options.depths, rates, options.steps)
    lines, verdicts = [], []
    for optimizer, by_depth in found.items():
        for depth, losses in by_depth.items():
            cells = [_cell(rate, losses) for rate in rates]
            lines.append([optimizer, str(depth), *cells])
        measured = {depth: losses for depth, losses in by_depth.items() if len(losses) > 1}
        if len(measured) > 1:
            low, high = measured[min(measured)], measured[max(measured)]
            apart = words.plural(steps_apart(rates, low, high), "step")
            verdicts.append(
                f"with {optimizer} the best rates of {min(measured)} and {max(measured)} blocks are {apart} of "
                "the grid apart"
            )
    if not verdicts:
        raise refuse("there are no results of two depths yet", "leave --report out")
    text = (
        f"Mean held-out losses in nats a masked token after {options.steps:,} updates of each block, width "
        f"{BASE['model.d_model']}, one seed, the best of each line in bold; –: not measured. {'; '.join(verdicts)}."
    )
    body = table(["optimizer", "blocks", *(words.rate(rate) for rate in rates)], lines)
    return Section("quality-rates", "The best rate over depth", text, body, "CPU", found)


def _cell(rate: float, losses: dict[float, float]) -> str:
    if rate not in losses:
        return "–"
    shown = f"{losses[rate]:.3f}"
    return f"**{shown}**" if losses[rate] == min(losses.values()) else shown


if __name__ == "__main__":
    sys.exit(main())
