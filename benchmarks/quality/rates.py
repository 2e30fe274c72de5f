"""Whether the rate that is best for a shallow rack is best for a deep one, with AdamW and with Muon.

    python -m benchmarks.quality.rates [--depths 2,8] [--width 96] [--rates 7.5e-4,1.5e-3,3e-3,6e-3] [--write]

A rack that grows keeps its rate as it gets deeper, so the best rate must not move with depth. The racks, the data, the
steps and the files of results are those of `benchmarks.quality`, whose 8 blocks are here beside other depths.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Result, numbers, parser, positive, refuse, run_command, table
from benchmarks.document import Section
from benchmarks.quality.__main__ import DOCS
from benchmarks.quality.results import Results, Trial, mean_loss, setting_of
from benchmarks.quality.rows import BASE, DEPTH, PLAIN, ROWS, WIDTH, Size
from stackwise import words

OPTIMIZERS = {"AdamW": PLAIN, "Muon": "end to end, Muon"}
"""The row of each optimizer: both train the whole rack in a cosine of rates."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    page = DOCS / "quality.md"
    return run_command("quality.rates", arguments, lambda given: _measure(_parser().parse_args(given)), page)


def _parser() -> argparse.ArgumentParser:
    made = parser("quality.rates", __doc__)
    add = made.add_argument
    add("--depths", type=numbers, default=[2, BASE[DEPTH]], metavar="N,N", help="blocks; default 2,8")
    add("--width", type=positive, default=WIDTH, metavar="N", help=f"width of the racks; default {WIDTH}")
    add("--rates", default="7.5e-4,1.5e-3,3e-3,6e-3", metavar="X,X", help="the grid of learning rates")
    add("--optimizer", choices=tuple(OPTIMIZERS), help="one of them; default: both")
    add("--steps", type=positive, default=800, metavar="N", help="updates of each block; default 800")
    add("--dir", metavar="DIR", help="where the temporary runs go; default: the system's temporary directory")
    add("--report", action="store_true", help="run nothing: the table of what is there")
    return made


def grids(docs: Path, size: Size, depths: Sequence[int], rates: Sequence[float]) -> Result:
    """By optimizer and depth the mean held-out losses of the rates that are measured, by rate."""
    losses: Result = {}
    for optimizer, name in OPTIMIZERS.items():
        for depth in depths:
            results = Results(size.file(docs, depth), setting_of(size.base(depth), size.steps))
            trials = {rate: _trial(name, rate) for rate in rates}
            known = {rate: mean_loss(results.runs[one.key]) for rate, one in trials.items() if one.key in results.runs}
            losses.setdefault(optimizer, {})[depth] = known
    return losses


def _trial(name: str, rate: float) -> Trial:
    return Trial(next(row for row in ROWS if row.name == name), "rows", rate, 0)


def steps_apart(grid: Sequence[float], first: dict[float, float], second: dict[float, float]) -> int:
    """How many steps of the grid lie between the best rates of two depths."""
    order = sorted(grid)
    return abs(order.index(min(first, key=first.__getitem__)) - order.index(min(second, key=second.__getitem__)))


def settled(grid: Sequence[float], losses: dict[float, float]) -> bool:
    """Whether the rates beside the best one are measured: at an edge of what is measured it may lie beyond."""
    order = sorted(grid)
    place = order.index(min(losses, key=losses.__getitem__))
    return 0 < place < len(order) - 1 and order[place - 1] in losses and order[place + 1] in losses


def _measure(options: argparse.Namespace) -> Section:
    rates, size = [float(rate) for rate in options.rates.split(",")], Size(options.width, options.steps)
    names = [OPTIMIZERS[options.optimizer]] if options.optimizer else list(OPTIMIZERS.values())
    for name, depth in itertools.product([] if options.report else names, options.depths):
        results = Results(size.file(DOCS, depth), setting_of(size.base(depth), size.steps), options.dir)
        for rate in rates:
            results.of(_trial(name, rate))
    losses_of = grids(DOCS, size, options.depths, rates)
    lines, verdicts = [], []
    for optimizer, by_depth in losses_of.items():
        measured = {depth: losses for depth, losses in by_depth.items() if len(losses) > 1}
        for depth, losses in measured.items():
            lines.append([optimizer, str(depth), *(_cell(rate, losses) for rate in rates)])
        if len(measured) > 1:
            low, high = measured[min(measured)], measured[max(measured)]
            between = f"With {optimizer} the best rates of {min(measured)} and {max(measured)} blocks are"
            apart = f"{words.plural(steps_apart(rates, low, high), 'step')} of the grid apart"
            sure = settled(rates, low) and settled(rates, high)
            verdicts.append(f"{between} {apart if sure else 'at an edge of what is measured: nothing follows yet'}")
    if not verdicts:
        raise refuse("there are no results of two depths yet", "leave --report out")
    text = (
        f"Mean held-out losses in nats a masked token after {options.steps:,} updates of each block, width "
        f"{size.width}, one seed, the best of each line in bold; –: not measured. {'. '.join(verdicts)}."
    )
    body = table(["optimizer", "blocks", *(words.rate(rate) for rate in rates)], lines)
    key = size.file(Path(), BASE[DEPTH]).stem + "-rates"
    title = f"The best rate over depth, width {size.width}"
    return Section(key, title, text, body, "CPU", losses_of)


def _cell(rate: float, losses: dict[float, float]) -> str:
    if rate not in losses:
        return "–"
    shown = f"{losses[rate]:.3f}"
    return f"**{shown}**" if losses[rate] == min(losses.values()) else shown


if __name__ == "__main__":
    sys.exit(main())
