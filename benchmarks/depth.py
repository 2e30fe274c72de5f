"""Held-out loss by depth of a staged rack, beside the same rack trained end to end with as many block updates.

    python -m benchmarks.depth [--preset stages] [--repeats 3] [--learning-rate 3e-3] [--whole-learning-rate 3e-3]

A stage of b blocks that trains s steps makes b x s block updates. End to end every step updates all blocks, so it
gets the sum over the stages divided by the number of blocks, on the same rows, from the same seed, and is evaluated
on the same held-out passages under the same masks. Both are real runs, in processes of their own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Result, Spread, overrides, parser, positive, refuse, run_command, say, table
from benchmarks.document import Section
from stackwise import words
from stackwise.config import StackWiseConfig
from stackwise.pipeline.run import RunDirectory, status

WHOLE = "end to end"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("depth", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("depth", __doc__)
    add = made.add_argument
    add("--preset", metavar="NAME", default="stages", help="the rack, its data and its stages; default: stages")
    add("--steps", type=positive, metavar="N", help="steps of a stage; default: the preset's")
    add("--repeats", type=positive, default=3, metavar="N", help="pairs, each with the next seed; default 3")
    add("--learning-rate", type=float, metavar="X", help="of the stages; default: the preset's")
    add("--whole-learning-rate", type=float, metavar="X", help="end to end; default: that of the stages")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--dir", metavar="DIR", help="where the temporary runs go; default: the system's temporary directory")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Train pairs of racks, staged and end to end."""
    staged, whole = configurations(options)
    pairs = []
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=options.dir) as name:
            pair = {}
            kinds = [("staged", staged), ("whole", whole)]
            for kind, config in kinds if repeat % 2 == 0 else reversed(kinds):
                own = config.model_copy(deep=True, update={"seed": config.seed + repeat})
                say(f"repeat {repeat + 1} of {options.repeats}: {kind}")
                pair[kind] = carry_out(own, Path(name) / kind)
            if pair["staged"]["rowset"] != pair["whole"]["rowset"]:
                raise refuse("the two racks did not see the same rows", "name settings under which they do")
            pairs.append(pair)
    return {
        "preset": staged.name,
        "n_blocks": staged.model.n_blocks,
        "stages": [list(span) for span in staged.partition],
        "objective": staged.objective,
        "d_model": staged.model.d_model,
        "seq_len": staged.training.seq_len,
        "learning_rate": {"staged": staged.training.learning_rate, "whole": whole.training.learning_rate},
        "repeats": pairs,
        "gap": Spread.of(_mean(pair["staged"]) - _mean(pair["whole"]) for pair in pairs).plain(),
    }


def configurations(options: argparse.Namespace) -> tuple[StackWiseConfig, StackWiseConfig]:
    """The staged rack, and the same rack end to end with as many block updates on the same rows."""
    given = overrides(options.overrides) | {"device": options.device}
    if options.steps is not None:
        given["training.steps"] = options.steps
    if options.learning_rate is not None:
        given["training.learning_rate"] = options.learning_rate
    staged = StackWiseConfig.from_preset(options.preset, given)
    if staged.training.steps is None:
        raise refuse(f"preset {options.preset} counts epochs, not steps", "name --steps")
    updates = sum(block_updates(staged))
    steps, rest = divmod(updates, staged.model.n_blocks)
    if rest:
        raise refuse(
            f"{updates} block updates do not divide into {staged.model.n_blocks} blocks", "give each stage equal steps"
        )
    rows = staged.training.steps * staged.training.batch_size * staged.training.accumulation
    rate = options.whole_learning_rate or staged.training.learning_rate
    ends = {"training.mode": "end_to_end", "training.steps": steps, "training.learning_rate": rate}
    dropped = {key: value for key, value in given.items() if not key.startswith("stages.")}
    # Steps would choose the rows too; here both racks see the rows that the stages choose.
    given["training.rows"] = dropped["training.rows"] = staged.training.rows or rows
    staged = StackWiseConfig.from_preset(options.preset, given)
    return staged, StackWiseConfig.from_preset(options.preset, dropped | ends)


def block_updates(config: StackWiseConfig) -> list[int]:
    """Block updates of each stage."""
    steps = [config.stage_training(depth).steps or 0 for depth in range(config.n_stages)]
    return [count * (last - first + 1) for count, (first, last) in zip(steps, config.partition, strict=True)]


def carry_out(config: StackWiseConfig, directory: Path) -> Result:
    """Run a configuration and gather what it came to."""
    from stackwise.data import prepare
    from stackwise.pipeline.recipe import boundary_bytes
    from stackwise.pipeline.runner.runner import Runner
    from stackwise.pipeline.schedule import schedule
    from stackwise.report.facts import PHASES, read_history

    prepare(config.data, model_vocab=config.model.vocab_size)  # not part of either's time
    run = RunDirectory(directory)
    events: list[dict[str, Any]] = []
    evaluation = Runner(config, run, events.append).run()
    history = read_history(run.events_file)
    device = next(event for event in events if event["event"] == "device")
    batch = config.training.batch_size * config.training.accumulation
    steps = [config.stage_training(depth).steps or 0 for depth in range(config.n_stages)]
    rowset, rows = next(iter(run.manifest()["rowsets"].values()))
    written = [event for event in events if event["event"] == "written"]
    # A stage above a boundary reads its rows as it trains; one below a boundary reads all of them to write it.
    stages = schedule(config)
    trained = sum(count * batch for stage, count in zip(stages, steps, strict=True) if stage.reads_boundary)
    passed = sum(rows for stage in stages[:-1] if stage.reads_boundary)
    return {
        "seed": config.seed,
        "device": device["name"],
        "device_type": device["device"],
        "precision": device["precision"],
        "by_depth": [_scores(stage) for stage in evaluation["stages"]],
        "unigram": _scores(evaluation["baselines"]["unigram"]),
        "updates": block_updates(config),
        "rowset": rowset,
        "rows": rows,
        "rows_read": sum(steps) * batch,
        "seconds": sum(history.phases[phase] for phase in PHASES[1:] if phase != "evaluation"),
        "training_seconds": history.phases["training"],
        "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in status(run)["stages"]),
        "written_bytes": sum(event["bytes"] for event in written),
        "read_bytes": boundary_bytes(config, trained + passed),
    }


def _scores(figures: dict[str, Any]) -> Result:
    return {"loss": figures["loss"], "bits_per_byte": figures["bits_per_byte"]}


def _mean(run: Result) -> float:
    """Mean loss over the fractions, at full depth."""
    return _average(run["by_depth"][-1]["loss"])


def _average(loss: dict[str, float]) -> float:
    return sum(loss.values()) / len(loss)


def _section(result: Result) -> Section:
    pairs = result["repeats"]
    first = pairs[0]["staged"]
    fractions = list(first["by_depth"][0]["loss"])
    header = ["blocks", *(f"loss at {words.fraction(key)}" for key in fractions), "mean", "bits per byte"]
    rows = [_row("none: unigram frequencies", [pair["staged"]["unigram"] for pair in pairs])]
    for depth, (_, last) in enumerate(result["stages"]):
        rows.append(_row(f"staged: 0 to {last}", [pair["staged"]["by_depth"][depth] for pair in pairs]))
    rows.append(_row(f"{WHOLE}: 0 to {result['n_blocks'] - 1}", [pair["whole"]["by_depth"][0] for pair in pairs]))
    costs = [_costs(kind, [pair[key] for pair in pairs]) for kind, key in (("staged", "staged"), (WHOLE, "whole"))]
    cost_header = [
        "rack", "block updates", "rows", "rows read", "seconds", "of them training", "peak memory of a worker",
        "written to the store", "read from it",
    ]  # fmt: skip
    gap, rates = result["gap"], result["learning_rate"]
    ahead = "ahead" if gap["median"] < 0 else "behind"
    text = (
        f"The preset {result['preset']}: {result['n_blocks']} blocks of width {result['d_model']} in "
        f"{words.plural(len(result['stages']), 'stage')}, samples of {result['seq_len']} tokens, "
        f"{result['objective']}, {first['precision']}; learning rate {words.rate(rates['staged'])} in the stages, "
        f"{words.rate(rates['whole'])} {WHOLE}. Losses in nats a masked token, on held-out files, of the rack cut off "
        "at each depth with the head that its stage trained with; medians over "
        f"{words.plural(len(pairs), 'seed')}, smallest to largest in brackets. By mean loss the staged rack is "
        f"{abs(gap['median']):.3f} {ahead} (staged less {WHOLE}: {gap['min']:+.3f} to {gap['max']:+.3f}). Rows are "
        "distinct (sample, mask) pairs, the same for both; each stage reads them again. Seconds leave out preparation "
        "and evaluation."
    )
    body = f"{table(header, rows)}\n\n{table(cost_header, costs)}"
    gpu = first["device_type"] != "cpu"
    return Section(
        "depth", "Loss by depth, staged and end to end", text, body, first["device"] if gpu else "CPU", result
    )


def _row(name: str, figures: list[Result]) -> list[str]:
    losses = [[one["loss"][key] for one in figures] for key in figures[0]["loss"]]
    means = [_average(one["loss"]) for one in figures]
    return [name, *(_cell(values) for values in (*losses, means, [one["bits_per_byte"] for one in figures]))]


def _cell(values: list[float]) -> str:
    found = Spread.of(values)
    return f"{found.median:.3f}" + (f" ({found.min:.3f} to {found.max:.3f})" if len(values) > 1 else "")


def _costs(name: str, runs: list[Result]) -> list[str]:
    def middle(key: str) -> float:
        return Spread.of(run[key] for run in runs).median

    first = runs[0]
    return [
        name,
        f"{sum(first['updates']):,}",
        f"{first['rows']:,}",
        f"{first['rows_read']:,}",
        words.duration(middle("seconds")),
        words.duration(middle("training_seconds")),
        words.size(middle("peak_memory_bytes")),
        words.size(first["written_bytes"]),
        words.size(first["read_bytes"]),
    ]


if __name__ == "__main__":
    sys.exit(main())
