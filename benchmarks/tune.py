"""A search over settings of the upper stages: stages trained, with a store that trials share and with one for each.

    python -m benchmarks.tune [--stages 8] [--trials 14]

The search is `stackwise tune` as it is. Then every trial's configuration runs once more over an empty store of its own;
its value has to be the same. Real text: the standard library's sources.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Result, overrides, parser, run_command, say, table
from benchmarks.document import Section
from stackwise import words
from stackwise.config import StackWiseConfig
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.search.begin import Typed, begin
from stackwise.pipeline.search.record import objective
from stackwise.report.tuning import result


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("tune", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("tune", __doc__)
    made.add_argument("--stages", type=int, metavar="N", default=8, help="stages of one block; default: 8")
    made.add_argument("--trials", type=int, metavar="N", default=14, help="default: 14")
    made.add_argument("--sampler", metavar="NAME", default="tpe", help="default: tpe")
    made.add_argument("--dir", metavar="DIR", help="where it runs; default: the system's temporary directory")
    return made


def measure(options: argparse.Namespace) -> Result:
    """The search, and its trials each by itself."""
    top = options.stages - 1
    fixed = {"model.architecture.n_stacks": options.stages, "training.steps": 30, **overrides(options.overrides)}

    def make(settings: dict[str, Any]) -> StackWiseConfig:
        return StackWiseConfig.from_preset("micro", {**fixed, **settings})

    space = [
        f"stages.{top - 1}.training.weight_decay=0,0.1",
        f"stages.{top}.training.learning_rate=1e-3..3e-2:log",
        f"stages.{top}.training.weight_decay=0,0.1",
    ]
    with tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=options.dir) as name:
        here = Path(name)
        typed = Typed(space, options.sampler, options.trials)
        study, _ = begin(make, typed, here / "search", "python -m benchmarks.tune")
        begun = time.perf_counter()
        study.run(lambda trial, event: None)
        together = time.perf_counter() - begun
        shared = result(study)
        apart, seconds = [], 0.0
        for trial in study.trials:
            config = make(trial.settings)
            run = RunDirectory(here / f"apart-{trial.number}")
            begun = time.perf_counter()
            Runner(config, run, lambda event: None).run()
            seconds += time.perf_counter() - begun
            apart.append(objective("bits_per_byte")(run))
            say(f"trial {trial.number}: {trial.values}, by itself {apart[-1]}")
    values = [trial["value"] for trial in shared["trials"]]
    return {
        "stages": options.stages,
        "trials": options.trials,
        "sampler": study.record.search["sampler"],
        "trained": shared["sharing"]["trained"],
        "seconds": together,
        "values": values,
        "apart": {"trained": options.trials * options.stages, "seconds": seconds, "values": apart},
        "same_values": values == apart,
        "winner": values.index(min(values)),
        "winner_apart": apart.index(min(apart)),
        "settings": shared["best"]["settings"],
    }


def _section(found: Result) -> Section:
    apart = found["apart"]

    def row(name: str, trained: int, seconds: float, values: list[float], winner: int) -> list[str]:
        return [name, str(trained), words.duration(seconds), f"trial {winner}: {min(values):.6f}"]

    lines = [
        row("one store for all", found["trained"], found["seconds"], found["values"], found["winner"]),
        row("a store for each", apart["trained"], apart["seconds"], apart["values"], found["winner_apart"]),
    ]
    text = table(["trials with", "stages trained", "time", "best held-out bits a byte"], lines)
    factor = apart["trained"] / found["trained"]
    same = "is the same to the last bit" if found["same_values"] else "DIFFERS"
    about = (
        f"{found['trials']} trials of {found['stages']} stages over two keys of the top stage and one of that below "
        f"it ({found['sampler']['name']}, seed {found['sampler']['seed']}): {factor:.1f} times fewer stage trainings, "
        f"{apart['seconds'] / found['seconds']:.1f} times less time. The value of every trial {same}."
    )
    return Section("tune", "A search over upper stages", about, text, "CPU", found)


if __name__ == "__main__":
    raise SystemExit(main())
