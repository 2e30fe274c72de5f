"""Families of baselines × ways of training them, at equal compute, several seeds: the table of docs/baselines.md.

    python -m benchmarks.baselines [--seeds 3] [--steps 200] [--rates 1e-3,3e-3,1e-2] [--write]

Each cell is composed as `baselines/scripts/train.py` composes it. Its learning rate is the best of the grid on the
first seed. Results are kept in a file run by run; what is there is not run again. The table says what is unfinished.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Result, parser, positive, refuse, run_command, say, table
from benchmarks.document import Section
from benchmarks.quality.rows import flops
from stackwise.config import StackWiseConfig
from stackwise.data import prepare
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.runner import Runner
from stackwise.report.groups import Samples, paired

DOCS = Path(__file__).parent.parent / "docs"

FAMILIES = {
    "BERT": "encoder/bert_family/tiny",
    "ModernBERT": "encoder/modernbert/tiny",
    "GPT-2": "decoder/gpt2_family/tiny",
    "LLaMA": "decoder/llama_family/tiny",
}
TRAININGS = {"end to end": "end_to_end", "blockwise": "blockwise", "growth": "growth"}
PLAIN = "end to end"
SIZES: dict[str, Any] = {
    "model.d_model": 64,
    "model.n_heads": 4,
    "model.architecture.n_stacks": 4,
    "model.dropout": 0.0,  # a text that is read once, for so short a time, is not learned by heart
    "model.init_std": 0.12,  # about 1/sqrt(d_model): narrow racks spend a short run on a plateau else
    "data.tokenizer": "bytes",
    "data.vocab_size": "null",
    "training.seq_len": 64,
    "training.batch_size": 8,
    "training.accumulation": 1,
    "training.checkpoint_minutes": 60.0,
    "evaluation.samples": 128,
    "device": "cpu",
}
"""What all racks of the table are: 4 blocks of width 64 over bytes."""


@dataclass(frozen=True)
class Trial:
    """A cell of the table, at a rate, from a seed."""

    family: str
    training: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """Names it in the file."""
        return f"{self.family} | {self.training} | {self.rate:g} | {self.seed}"


class Results:
    """What has been measured, in a file that grows.

    Args:
        path: The file.
        steps: Steps of end-to-end training, whose compute every cell gets.
        directory: Where temporary runs go; None: the system's temporary directory.
    """

    def __init__(self, path: Path, steps: int, directory: str | None) -> None:
        self.path, self.steps, self.directory = path, steps, directory
        self.setting: Result = {"sizes": SIZES, "steps": steps}
        self.runs: dict[str, Result] = {}
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["setting"] != self.setting:
                raise refuse(f"{path} holds results of another setting", "name another file: --results FILE")
            self.runs = known["runs"]

    def of(self, trial: Trial) -> Result:
        """A trial's result; it is run where it is not there yet."""
        if trial.key not in self.runs:
            say(trial.key)
            self.runs[trial.key] = self._run(trial)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(".new")
            temporary.write_text(json.dumps({"setting": self.setting, "runs": self.runs}, indent=1) + "\n")
            temporary.replace(self.path)
        return self.runs[trial.key]

    def _run(self, trial: Trial) -> Result:
        with tempfile.TemporaryDirectory(prefix="stackwise-baselines-", dir=self.directory) as temporary:
            config = configuration(trial, self.steps, f"{temporary}/store")
            run = RunDirectory(Path(temporary) / "run")
            events: list[dict[str, Any]] = []
            figures = Runner(config, run, events.append).run()
        return {
            "samples": figures["by_sample"],
            "steps": config.training.steps,
            "flops": flops(config, _vocab_size(config)),
            "written": sum(event["bytes"] for event in events if event["event"] == "written"),
            "seconds": events[-1]["seconds"],
        }


def configuration(trial: Trial, steps: int, store: str) -> StackWiseConfig:
    """A trial's configuration, with as many steps as cost what `steps` of end-to-end training cost."""
    plain = _composed(trial, "end_to_end", steps, store)
    budget = flops(plain, _vocab_size(plain))
    # Each step costs the same, and each is given rows of its own: compute is proportional to steps.
    probe = _composed(trial, TRAININGS[trial.training], steps, store)
    own = round(steps * budget / flops(probe, _vocab_size(plain)))
    return _composed(trial, TRAININGS[trial.training], own, store)


def _composed(trial: Trial, training: str, steps: int, store: str) -> StackWiseConfig:
    import hydra

    from baselines.compose import CONFIGS, register
    from baselines.compose import configuration as composed

    register()
    own: dict[str, Any] = {"seed": trial.seed, "training.learning_rate": trial.rate, "training.steps": steps}
    own |= {"store.path": store, "training.rows": steps * SIZES["training.batch_size"]}
    words = [f"model={FAMILIES[trial.family]}", f"training={training}", "data=stdlib"]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return composed(hydra.compose("config", [*words, *(f"{k}={v}" for k, v in (SIZES | own).items())]), "baseline")


def _vocab_size(config: StackWiseConfig) -> int:
    return config.model.vocab_size or prepare(config.data)[0].tokenizer.vocab_size


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(
        "baselines", arguments, lambda given: _measure(_parser().parse_args(given)), DOCS / "baselines.md"
    )


def _parser() -> argparse.ArgumentParser:
    made = parser("baselines", __doc__)
    add = made.add_argument
    add("--seeds", type=positive, default=3, metavar="N", help="seeds; default 3")
    add("--steps", type=positive, default=200, metavar="N", help="steps of end to end; default 200")
    add("--rates", default="1e-3,3e-3,1e-2", metavar="X,X", help="the grid of learning rates")
    add("--results", type=Path, default=DOCS / "baselines.json", metavar="FILE", help="where results are kept")
    add("--dir", metavar="DIR", help="where the temporary runs go; default: the system's temporary directory")
    add("--report", action="store_true", help="run nothing: the table of what is there")
    return made


def _measure(options: argparse.Namespace) -> Section:
    rates = [float(rate) for rate in options.rates.split(",")]
    results = Results(options.results, options.steps, options.dir)
    cells = [(family, training) for family in FAMILIES for training in TRAININGS]
    wanted = [Trial(*cell, rate, 0) for cell in cells for rate in rates]
    best = {
        cell: _best(results, [trial for trial in wanted if (trial.family, trial.training) == cell], options.report)
        for cell in cells
    }
    for seed in range(1, options.seeds):  # seed by seed, so that an unfinished table has all of its rows
        for cell in cells:
            if (trial := best[cell]) is not None:
                other = Trial(*cell, trial.rate, seed)
                if not options.report:
                    results.of(other)
    found = {
        cell: [
            results.runs[one.key]
            for seed in range(options.seeds)
            if (one := Trial(*cell, trial.rate, seed)).key in results.runs
        ]
        for cell, trial in best.items()
        if trial is not None
    }
    if not found:
        raise refuse("there are no results yet", "leave --report out")
    header = (
        "family",
        "training",
        "rate",
        "seeds",
        "held out",
        "against end to end",
        "steps",
        "TFLOP",
        "written",
        "seconds",
    )
    rows = [_row(cell, best[cell], runs, found.get((cell[0], PLAIN), [])) for cell, runs in found.items()]
    missing = sum(options.seeds - len(found.get(cell, [])) for cell in cells)
    text = (
        f"4 blocks of width 64 of each family's own kind, samples of 64 bytes, batches of 8, {options.steps} steps of "
        "end to end; the other rows have as many steps as cost the same: operations of matrices, those of forward "
        "passes between stages among them. Each sample is seen once. Data: this machine's Python standard library, "
        "held-out files; of both encoders the bound of masked diffusion, of the others exact, so it is not "
        "to be compared with them. Medians over seeds, smallest to largest in brackets. "
        "Against end to end: the mean difference over seeds and held-out samples, and its 95% interval by a paired "
        "bootstrap over both; below 0 is better. BERT learns at 15% masked alone, ModernBERT at 30%, and their bound "
        "asks all shares. "
        f"Rates: the best of {options.rates} by the first seed. Dropout is 0, and fresh "
        "weights are wider than the families' own. So short a training says which way learns sooner, not where it ends."
        + (f" Unfinished: {missing} of {len(cells) * options.seeds} runs are not there yet." if missing else "")
    )
    return Section(
        "baselines", "Four families at equal compute", text, table(header, rows), "CPU", {"runs": results.runs}
    )


def _best(results: Results, trials: list[Trial], report: bool) -> Trial | None:
    """The rate that is best; None: none was tried, or not all in a report."""
    if report:
        trials = [trial for trial in trials if trial.key in results.runs]
    return min(trials, key=lambda trial: Samples(**results.of(trial)["samples"]).value, default=None)


def _row(cell: tuple[str, str], trial: Trial | None, runs: list[Result], plain: list[Result]) -> list[str]:
    assert trial is not None
    samples = [Samples(**run["samples"]) for run in runs]
    values = [one.value for one in samples]
    unit = "bits a byte" if samples[0].unit == "byte" else "nats a masked token"
    beside = "–"
    if cell[1] != PLAIN and plain:
        others = [Samples(**run["samples"]) for run in plain]
        difference = paired(list(zip(samples, others, strict=False)))
        beside = f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
    return [
        *cell,
        f"{trial.rate:g}",
        str(len(runs)),
        f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}) {unit}",
        beside,
        str(runs[0]["steps"]),
        f"{runs[0]['flops'] / 1e12:.2g}",
        f"{runs[0]['written'] / 1e6:.0f} MB",
        f"{statistics.median(run['seconds'] for run in runs):.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
