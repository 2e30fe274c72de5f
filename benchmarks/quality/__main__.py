"""Every mode on the same rack, data and seeds, beside plain end-to-end training: what fitting in memory costs.

    python -m benchmarks.quality [--rows NAME,NAME] [--seeds 3] [--rates 7.5e-4,1.5e-3,3e-3] [--steps 800] [--write]

Each row's learning rate is the best of the grid on the first seed, by mean held-out loss; the other seeds train at
that one. Results are kept in a file run by run, and what is there is not run again. `--write` writes the tables and
plots of docs/quality.md: a section for each file of results, which is named after it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Result, overrides, parser, positive, refuse, run_command
from benchmarks.document import Section
from benchmarks.quality.page import body, gaps, write_gaps, write_plots
from benchmarks.quality.results import Results, Trial, mean_loss, setting_of
from benchmarks.quality.rows import BUDGETS, ROWS, WIDTH, Budget, Row, Size, configuration, whole_share
from stackwise.config import StackWiseConfig

DOCS = Path(__file__).parent.parent.parent / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("quality", arguments, lambda given: _measure(_parser().parse_args(given)), DOCS / "quality.md")


def _parser() -> argparse.ArgumentParser:
    made = parser("quality", __doc__)
    add = made.add_argument
    add("--rows", metavar="NAMES", help="rows by name, commas between; default: all")
    add("--budget", choices=tuple(BUDGETS), help="one of the budgets; default: all")
    add("--seeds", type=positive, default=3, metavar="N", help="seeds; default 3")
    add("--rates", default="7.5e-4,1.5e-3,3e-3", metavar="X,X", help="the grid of learning rates")
    add("--steps", type=positive, default=800, metavar="N", help="updates of each block; default 800")
    add("--width", type=positive, default=WIDTH, metavar="N", help=f"width of the rack; default {WIDTH}")
    add("--results", type=Path, metavar="FILE", help="where results are kept; default: by steps and width, in docs")
    add("--dir", metavar="DIR", help="where the temporary runs go; default: the system's temporary directory")
    add("--store", metavar="DIR", help="one store for all runs: rows that grow share their shallow phases")
    add("--report", action="store_true", help="run nothing: tables of what is there")
    return made


def _measure(options: argparse.Namespace) -> Section:
    rows = _chosen(options.rows)
    rates = [float(rate) for rate in options.rates.split(",")]
    size = Size(options.width, options.steps)
    base = size.base() | overrides(options.overrides)
    path = options.results or size.file(DOCS)
    config = StackWiseConfig.from_preset("stages", base)
    results = Results(path, setting_of(base, options.steps), options.dir, options.store)
    budgets: list[Budget] = [options.budget] if options.budget else list(BUDGETS)
    wanted = [(row, budget) for budget in budgets for row in rows if budget in row.budgets]
    found = [one for row, budget in wanted if (one := _row(results, row, budget, rates, options)) is not None]
    if not found:
        raise refuse("there are no results yet", "leave --report out")
    name = path.stem
    if options.write:
        write_plots(DOCS, name, found)
        write_gaps(DOCS, gaps(sorted(DOCS.glob("quality*.json"))))
    text = (
        f"{config.model.n_blocks} blocks of width {config.model.d_model}, samples of {config.training.seq_len} tokens, "
        f"{options.steps} updates of each block, batches of {config.training.batch_size}. Losses in nats a masked "
        "token on held-out files at 15, 50 and 90% masked; medians over the seeds, smallest to largest in brackets, "
        "without brackets one seed; against plain seed by seed. Rates from the same grid, the best by the first seed. "
        "Block updates, rows and bytes are of one run. Whole rack held: the share of the operations during which every "
        "block is in memory at once. Peak memory is what a process takes beyond what it held before its job, in a run "
        "of a few updates, by phase where the rack grows." + _unfinished(wanted, found, options.seeds)
    )
    paths = base.get("data.paths")
    rack = f"width {config.model.d_model}" + (f", {Path(paths[0]).name}" if paths else "")
    title = f"Modes beside end to end, {rack}, {options.steps:,} updates of each block"
    return Section(name, title, text, body(name, found), "CPU", {"rows": found})


def _unfinished(wanted: list[tuple[Row, Budget]], found: list[Result], seeds: int) -> str:
    """What is still to be measured, in a sentence; empty: nothing is."""
    runs = {(row["name"], row["budget"]): len(row["runs"]) for row in found}
    left = {(row.name, budget): seeds - runs.get((row.name, budget), 0) for row, budget in wanted}
    none = sorted({name for name, _ in left} - {name for name, _ in runs})
    some = sorted({name for (name, budget), count in left.items() if count > 0 and (name, budget) in runs})
    # A table of few rows names what it has: the list of all others would be longer than the table.
    named = "; ".join(none) if len(none) <= len(runs) else f"{len(none)} other rows"
    parts = [f"not measured yet: {named}"] if none else []
    parts += [f"fewer than {seeds} seeds: {'; '.join(some)}"] if some else []
    return f" Unfinished: {'. '.join(parts)}." if parts else ""


def _chosen(names: str | None) -> list[Row]:
    if names is None:
        return list(ROWS)
    known = {row.name: row for row in ROWS}
    # Names hold commas: they are matched whole, longest first.
    chosen, rest = [], names
    while rest:
        name = max((n for n in known if rest == n or rest.startswith(f"{n},")), key=len, default=None)
        if name is None:
            raise refuse(f"no row is called {rest!r}", f"rows: {'; '.join(known)}")
        chosen.append(known[name])
        rest = rest[len(name) + 1 :]
    return chosen


def _row(results: Results, row: Row, budget: Budget, rates: list[float], options: argparse.Namespace) -> Result | None:
    trials = [Trial(row, budget, rate, 0) for rate in rates]
    if options.report:
        trials = [trial for trial in trials if trial.key in results.runs]
        if not trials:
            return None
    best = min(trials, key=lambda trial: mean_loss(results.of(trial)))
    runs = [results.of(best)]
    for seed in range(1, options.seeds):
        trial = Trial(row, budget, best.rate, seed)
        if not options.report or trial.key in results.runs:
            runs.append(results.of(trial))
    grid = {f"{trial.rate:g}": mean_loss(results.of(trial)) for trial in trials}
    known = not options.report or row.name in results.memory
    memory = results.memory_of(row) if known else None
    shape = configuration(results.setting["base"], row, budget, steps=options.steps, rate=best.rate, seed=0)
    whole = whole_share(shape, results.setting["vocab_size"])
    head = {"name": row.name, "budget": budget, "rate": best.rate, "grid": grid}
    return head | {"whole": whole, "memory": memory, "runs": runs}


if __name__ == "__main__":
    sys.exit(main())
