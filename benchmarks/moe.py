"""Mixtures of experts beside dense racks of equal active parameters, of equal training FLOPs, of equal wall clock.

    python -m benchmarks.moe [--dir runs/moe] [--seeds 3] [--most 4]

Each run is an ordinary one, kept in DIR with its figures in DIR/experiment_results.json: a command that was stopped
goes on, and --most leaves the rest for another day. --write puts the table, of what is there, into docs/moe.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Result, overrides, parser, positive, refuse, run_command, say, table
from benchmarks.document import Section
from benchmarks.gains import write_gains
from benchmarks.mixtures import relative_cost, run_begun, run_stagewise
from stackwise.durable import write_json
from stackwise.pipeline.device import describe, resolve_device
from stackwise.pipeline.experiments import ExperimentConfig, get_experiment_configs, run_single_experiment
from stackwise.pipeline.experiments.criteria import Verdict, evaluate_success_criteria
from stackwise.pipeline.experiments.experiment import BASE, RESULTS, run_dense, save_dense
from stackwise.pipeline.run import RunDirectory
from stackwise.shapes import finite

PAGE = Path(__file__).parent.parent / "docs" / "moe.md"
PLOT = PAGE.with_name("moe-gains.svg")
LENGTH = "training.rows"
SIZES: dict[str, Any] = {
    "seq_len": 32,
    "hidden_dim": 64,
    "num_layers": 4,
    "num_heads": 4,
    "ffn_dim": 256,
    "moe_layers": [1, 3],
    "num_epochs": 1,
    "learning_rate": 3e-3,
    "training.rows": 6_400,
}
OWN = "experts"
SIDES = {"flops": "equal FLOPs", "active": "equal active parameters", "clock": "equal wall clock"}
"""The dense racks; that of equal wall clock follows from the one of equal FLOPs and the processor time of a step."""
WAYS = {"stagewise": "stage-wise", "upcycled": "begun as a dense rack", "disco": "begun as a dense rack an expert"}
"""Other ways to train the mixture, of equal FLOPs."""
WAYS_OF = ("shared", "baseline")
"""The experiments whose mixture is trained so too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("moe", arguments, lambda given: _made(_parser().parse_args(given)), PAGE)


def _made(options: argparse.Namespace) -> Section:
    measured = _measure(options)
    if options.write:
        write_gains(PLOT, _gains(measured), "nats below a dense rack of equal FLOPs, by seed")
    return _section(measured)


def _parser() -> argparse.ArgumentParser:
    made = parser("moe", __doc__)
    names = list(get_experiment_configs())
    made.add_argument("--dir", metavar="DIR", type=Path, default=Path("runs/moe"), help="default: runs/moe")
    made.add_argument("--seeds", metavar="N", type=positive, default=3, help="default: 3")
    made.add_argument("--most", metavar="N", type=int, help="new runs, at most; 0: the table of what is there")
    made.add_argument(
        "--other", metavar="DIR", type=Path, nargs="+", default=[], help="results of other lengths, shown beside these"
    )
    made.add_argument("--experiments", metavar="NAME", nargs="+", choices=names, default=names, help=", ".join(names))
    return made


class Kept:
    """What has been measured: a result a run, in a file that grows.

    Args:
        directory: Where the runs and the file are.
        base: What all of them share; results of another setting are refused.
        most: New runs, at most; None: any number.
    """

    def __init__(self, directory: Path, base: Result, most: int | None) -> None:
        self.directory, self.base, self.left = directory, base, most
        self.file, self.runs = directory / RESULTS, dict[str, Result]()
        if self.file.exists():
            known = json.loads(self.file.read_text(encoding="utf-8"))
            if known.get("base") != base:
                raise refuse(f"{self.file} holds results of another setting", "name another directory with --dir")
            self.runs = known["runs"]

    def measure(self, config: ExperimentConfig, seed: int, sides: Sequence[str]) -> None:
        """The runs of an experiment and a seed that are not there yet."""
        base = self.base | {"seed": seed, "store.path": str((self.directory / "store").absolute())}
        for side in sides:
            key = f"{config.name} | {side} | {seed}"
            if key in self.runs:
                continue
            if self.left == 0:
                return
            say(key)
            self.runs[key] = self._run(config, side, base)
            self.left = None if self.left is None else self.left - 1
            write_json(self.file, finite({"base": self.base, "runs": self.runs}))

    def of(self, name: str, side: str, seeds: Sequence[int]) -> list[Result]:
        """The results of a side, of the seeds that are there."""
        keys = [f"{name} | {side} | {seed}" for seed in seeds]
        return [self.runs[key] for key in keys if key in self.runs]

    def _run(self, config: ExperimentConfig, side: str, base: Result) -> Result:
        place, seed = self.directory / side, base["seed"]
        if side == OWN:
            return run_single_experiment(config, base_config=base, directory=place)
        mine = self.runs[f"{config.name} | {OWN} | {seed}"]
        if side == "flops":
            return run_dense(config, mine, base, directory=place)
        epochs = (BASE | base)["num_epochs"]
        if side == "active":
            # As many parameters more in every block as the experts of a token are wider in theirs.
            wide, blocks = base["ffn_dim"], base["num_layers"]
            more = len(base["moe_layers"]) * (config.top_k * (config.expert_dim or wide) - wide) / blocks
            if not round(more):
                return self.runs[f"{config.name} | flops | {seed}"]  # the same rack; the router's products apart
            return run_dense(config, mine, base | {"ffn_dim": round(wide + more)}, directory=place, epochs=epochs)
        if side == "stagewise":
            return run_stagewise(config, mine["flops"], base, place)
        if side in WAYS:
            models = 1 if side == "upcycled" else (BASE | base)["num_experts"]
            data = Path(RunDirectory(Path(mine["run"])).manifest()["data"]["directory"])
            return run_begun(config, mine["flops"], base, place / str(seed), data, models=models)
        dense = Path(self.runs[f"{config.name} | flops | {seed}"]["run"])
        return run_dense(config, mine, base, directory=place, epochs=epochs * relative_cost(Path(mine["run"]), dense))


def _measure(options: argparse.Namespace) -> Result:
    """The runs that are asked for and not there yet, and what is there then."""
    if options.most is not None and options.most < 0:
        raise refuse(f"--most {options.most} is below 0", "0 shows the table of what is there")
    base = SIZES | overrides(options.overrides)
    kept = Kept(options.dir, base, options.most)
    seeds, configs = range(options.seeds), get_experiment_configs()
    # What the verdict needs first; all experiments of a seed before the next: what is there is then comparable.
    for sides in ((OWN, "flops"), tuple(WAYS), ("active", "clock")):
        for seed in seeds:
            for name in options.experiments:
                if sides != tuple(WAYS) or name in WAYS_OF:
                    kept.measure(configs[name], seed, sides)
    experiments: dict[str, Any] = {}
    for name in options.experiments:
        ways = {way: kept.of(name, way, seeds) for way in WAYS if name in WAYS_OF}
        runs = {side: kept.of(name, side, seeds) for side in (OWN, *SIDES)}
        done, wanted = sum(map(len, runs.values())), len(runs) * len(seeds)
        verdict: Verdict | None = None
        if len(runs[OWN]) == len(runs["flops"]) == len(seeds):
            losses = [run["loss"] for run in runs["flops"]]
            products = min(run["flops"] for run in runs["flops"])
            verdict = evaluate_success_criteria({name: runs[OWN]}, losses, products, quiet=True)[name]
        plain = None if verdict is None else dataclasses.asdict(verdict)
        experiments[name] = {"runs": runs, "ways": ways, "done": done, "wanted": wanted, "verdict": plain}
    if first := next((entry["runs"]["flops"] for entry in experiments.values() if entry["runs"]["flops"]), None):
        save_dense(Path(first[0]["run"]), options.dir / "dense_model")
    here = [options.dir] if kept.file.exists() else []
    lengths = {directory: _length(directory, base, options, seeds) for directory in (*here, *options.other)}
    return {
        "base": base,
        "seeds": options.seeds,
        "experiments": experiments,
        "lengths": dict(sorted(lengths.values(), key=lambda entry: entry[0])),
    }


def _length(directory: Path, base: Result, options: argparse.Namespace, seeds: Sequence[int]) -> tuple[int, Result]:
    """The rows that the runs of a directory train on, and by experiment the gain over dense racks with each seed."""
    known = json.loads((directory / RESULTS).read_text(encoding="utf-8"))["base"]
    if {**known, LENGTH: None} != {**base, LENGTH: None}:
        raise refuse(f"{directory / RESULTS} differs in more than {LENGTH}", "name results of the same setting")
    kept = Kept(directory, known, 0)
    gains: Result = {}
    for name in options.experiments:
        pairs = [(kept.of(name, OWN, [seed]), kept.of(name, "flops", [seed])) for seed in seeds]
        gains[name] = [dense[0]["loss"] - mine[0]["loss"] for mine, dense in pairs if mine and dense]
    return known[LENGTH], gains


def _gains(measured: Result) -> dict[str, list[float]]:
    """By row of the plot its gains: experiments at each length, then the other ways to train."""
    gains: dict[str, list[float]] = {}
    for rows, by_name in measured["lengths"].items():
        tokens = rows * measured["base"]["seq_len"] / 1e6
        gains |= {f"{name}, {tokens:.2f} M tokens": values for name, values in by_name.items()}
    for name, entry in measured["experiments"].items():
        dense = {run["seed"]: run["loss"] for run in entry["runs"]["flops"]}
        for way, words in WAYS.items():
            runs = [run for run in entry["ways"].get(way, []) if run["seed"] in dense]
            gains[f"{name}, {words}"] = [dense[run["seed"]] - run["loss"] for run in runs]
    return gains


def _loss(runs: Sequence[Result]) -> str:
    losses = [run["loss"] for run in runs if run["loss"] is not None]
    if not losses:
        return "–"
    spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else ", one seed"
    return f"{statistics.fmean(losses):.4f}{spread}"


def _lengths(measured: Result) -> str:
    """The table of gains by length."""
    header = ["tokens", *measured["experiments"]]
    lines = []
    for rows, gains in measured["lengths"].items():
        cells = [", ".join(f"{gain:+.4f}" for gain in gains[name]) or "–" for name in measured["experiments"]]
        lines.append([f"{rows * measured['base']['seq_len']:,}", *cells])
    return table(header, lines)


def _ways(found: Result) -> str:
    """The table of `WAYS`."""
    lines = [
        [name, _loss(entry["runs"][OWN]), *(_loss(entry["ways"][way]) for way in WAYS), _loss(entry["runs"]["flops"])]
        for name, entry in found["experiments"].items()
        if entry["ways"]
    ]
    return table(["experiment", "end to end", *WAYS.values(), "dense"], lines)


def _section(found: Result) -> Section:
    lines, unfinished = [], []
    for name, entry in found["experiments"].items():
        runs, verdict = entry["runs"], entry["verdict"]
        if entry["done"] < entry["wanted"]:
            unfinished.append(f"{name} ({entry['done']} of {entry['wanted']} runs)")
        says = "unfinished" if verdict is None else "passed" if verdict["passed"] else "failed"
        used, speed = "–", "–"
        if verdict is not None:
            used = "–" if verdict["least_used"] is None else f"{verdict['least_used']:.1%}"
            speed = f"{verdict['tokens_per_second']:,.0f}" if verdict["tokens_per_second"] else "–"
        lines.append([name, _loss(runs[OWN]), *(_loss(runs[side]) for side in SIDES), used, speed, says])
    header = ["experiment", "experts", *(f"dense, {side}" for side in SIDES.values())]
    text = table([*header, "least used expert", "tokens/s", "criteria"], lines)
    text += "\n\nThe same mixture, trained otherwise for the same products:\n\n" + _ways(found)
    text += "\n\nBelow the dense rack of equal FLOPs, in nats, with each seed, by length:\n\n" + _lengths(found)
    text += f"\n\n![Gains over dense racks]({PLOT.name})"
    reasons = [f"{n}: {e['verdict']['reason']}." for n, e in found["experiments"].items() if e["verdict"] is not None]
    about = [
        f"Held-out cross entropy in nats, mean of up to {found['seeds']} seeds (smallest to largest); one seed: 0."
    ]
    about += [f"Unfinished: {', '.join(unfinished)}."] if unfinished else []
    device = resolve_device(found["base"].get("device", "auto"))
    where = "CPU" if device.type == "cpu" else str(describe(device)["name"])
    return Section("moe", "Beside dense racks", " ".join(about + reasons), text, where, found)


if __name__ == "__main__":
    raise SystemExit(main())
