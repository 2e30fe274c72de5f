"""Training a stage from the store beside training it on the same tensors in memory, in interleaved rounds.

    python -m benchmarks.feed [--preset stages] [--rounds 7] [--steps 32]

In each round three trainers start from the same weights and take the same batches in the same order: out of memory,
from the store through a reader that has read every row before, and from the store through a fresh reader, which
checks the digest of each row as it comes. Their losses must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import Result, Spread, overrides, parser, positive, run_command, shown, table
from benchmarks.document import Section
from stackwise import words
from stackwise.config import StackWiseConfig
from stackwise.errors import StackWiseError

if TYPE_CHECKING:
    import torch

    from benchmarks.setting import Setting
    from benchmarks.workbench import Bench, Timed
    from stackwise.batch import Batch
    from stackwise.store import Prefetcher
    from stackwise.training.feed import Feed
    from stackwise.training.stage import StageModel

MEMORY, LATER, FIRST = "memory", "store", "store, first epoch"
"""Where the batches come from."""


class Different(StackWiseError):
    """Two sources of the same batches gave different losses."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("feed", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("feed", __doc__)
    add = made.add_argument
    add("--preset", metavar="NAME", default="stages", help="whose stage; default: stages")
    add("--blocks", type=positive, metavar="N", help="blocks in the stage; default: the preset's")
    add("--rounds", type=positive, default=7, metavar="N", help="rounds of all three; default 7, at least 5")
    add("--steps", type=positive, default=32, metavar="N", help="timed steps of each in a round; default 32")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--store-bytes", type=positive, default=2 << 30, metavar="N", help="most that the boundary takes twice; 2 GiB")
    add("--dir", metavar="DIR", help="where the temporary store goes; default: the system's temporary directory")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Measure it.

    Raises:
        Different: The losses are not the same.
    """
    from benchmarks.workbench import fresh_model, weights_of, workbench
    from stackwise.pipeline.device import describe

    setting = choose(options)
    with tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=options.dir) as name:
        setting.check(Path(name))
        with workbench(setting, Path(name)) as bench, bench.feed() as warm:
            model = fresh_model(setting)
            race = _Race(bench, model, weights_of(model), options.steps)
            for _ in warm.sequential([(0, bench.rows)], setting.config.training.batch_size):
                pass  # every row's digest is checked now
            race.store(warm)  # kernels, memory
            rounds = [_round(race, bench, warm, turn) for turn in range(max(5, options.rounds))]
    return {
        "preset": setting.config.name,
        "device": describe(setting.device)["name"],
        "device_type": setting.device.type,
        "precision": setting.config.precision,
        "blocks": setting.blocks,
        "batch_size": setting.config.training.batch_size,
        "accumulation": setting.config.training.accumulation,
        "seq_len": setting.config.training.seq_len,
        "rows": bench.rows,
        "batch_bytes": setting.config.training.batch_size * setting.row_bytes,
        "rounds": len(rounds),
        "steps_per_round": options.steps,
        "losses_identical": True,
        "sources": {source: _figures(setting, options.steps, rounds, source) for source in (MEMORY, LATER, FIRST)},
    }


def choose(options: argparse.Namespace) -> Setting:
    """The stage that the options name."""
    from benchmarks.setting import Setting, resolved
    from benchmarks.workbench import settle_steps
    from stackwise.pipeline.device import resolve_device

    device = resolve_device(options.device)
    config = resolved(StackWiseConfig.from_preset(options.preset, overrides(options.overrides)), device)
    training = config.training
    # One epoch is what a round reads: a fresh reader then never meets a row that it has checked.
    rows = (settle_steps(config) + options.steps) * training.accumulation * training.batch_size
    blocks = options.blocks or config.partition[0][1] + 1
    return Setting(config, blocks, device, options.store_bytes, most_rows=rows)


class _Race:
    """Trains the same stage on the same batches, from wherever they come."""

    def __init__(self, bench: Bench, model: StageModel, start: dict[str, torch.Tensor], steps: int) -> None:
        from benchmarks.workbench import settle_steps

        self.bench, self.model, self.start, self.steps = bench, model, start, steps
        self.settle = settle_steps(bench.setting.config)
        self.size = bench.setting.config.training.batch_size
        self.count = (self.settle + steps) * bench.setting.config.training.accumulation
        with bench.feed() as feed, self._ahead(feed) as batches:  # so they are pinned where the store's are
            self.ready = [next(batches) for _ in range(self.count)]

    def _ahead(self, feed: Feed) -> Prefetcher[Batch]:
        from stackwise.training.feed import ahead

        return ahead(feed.shuffled(self.bench.order, self.size, 0), self.bench.setting.device)

    def memory(self) -> Timed:
        """Batches that lie in memory, ready: nothing is left to be done for them."""
        return self._train(iter(self.ready))

    def store(self, feed: Feed) -> Timed:
        """Batches through the store, as a stage worker gets them."""
        with self._ahead(feed) as batches:
            return self._train(batches)

    def _train(self, batches: Iterator[Batch]) -> Timed:
        from benchmarks.workbench import Timed, train, trainer_of

        setting = self.bench.setting
        self.model.load_state_dict(self.start)
        trainer = trainer_of(setting, self.model, self.settle + self.steps + 1)
        before = train(trainer, batches, self.settle)
        timed = train(trainer, batches, self.steps)
        return Timed(timed.seconds, timed.waited, before.losses + timed.losses)


def _round(race: _Race, bench: Bench, warm: Feed, turn: int) -> dict[str, Timed]:
    """All three sources, in an order that turns from round to round."""
    found: dict[str, Timed] = {}
    order = [MEMORY, LATER, FIRST]
    for source in order[turn % 3 :] + order[: turn % 3]:
        if source == MEMORY:
            found[source] = race.memory()
        elif source == LATER:
            found[source] = race.store(warm)
        else:
            with bench.feed() as fresh:
                found[source] = race.store(fresh)
        if found[source].losses != next(iter(found.values())).losses:
            raise Different(f"the losses from {source} are not those of the same batches from {next(iter(found))}")
    return found


def _figures(setting: Setting, steps: int, rounds: list[dict[str, Timed]], source: str) -> Result:
    training = setting.config.training
    tokens = steps * training.accumulation * training.batch_size * training.seq_len
    return {
        "tokens_per_second": Spread.of(tokens / one[source].seconds for one in rounds).plain(),
        "speed_of_memory": Spread.of(one[MEMORY].seconds / one[source].seconds for one in rounds).plain(),
        "wait_share": Spread.of(one[source].waited / one[source].seconds for one in rounds).plain(),
    }


def _section(result: Result) -> Section:
    rows = [
        [
            source,
            shown(figures["tokens_per_second"], words.count),
            shown(figures["speed_of_memory"], lambda value: f"{value:.3f}") if source != MEMORY else "1",
            shown(figures["wait_share"], words.percent) if source != MEMORY else "0%",
        ]
        for source, figures in result["sources"].items()
    ]
    text = (
        f"The preset {result['preset']}'s stage of {words.plural(result['blocks'], 'block')}, "
        f"{result['batch_size']} x {result['accumulation']} rows a step of {result['seq_len']:,} tokens "
        f"({words.size(result['batch_bytes'])} of activations a microbatch), {result['precision']}. "
        f"{result['rounds']} rounds, the order turning, each of {result['steps_per_round']} timed steps from the same "
        "weights; medians, smallest to largest in brackets, ratios within a round. Memory is the strictest there is: "
        "batches that lie ready, nothing left to gather. A round reads each of "
        f"{words.plural(result['rows'], 'row')} about once; a fresh reader checks the digest of each as it comes. "
        "The losses of all three were the same, bit for bit, in every round."
    )
    header = ["batches from", "tokens/s", "speed, of that from memory", "share of the time waiting for data"]
    gpu = result["device_type"] != "cpu"
    where = "GPU" if gpu else "CPU"
    title = f"From the store, and from memory ({where})"
    return Section(f"feed on a {where}", title, text, table(header, rows), result["device"] if gpu else "CPU", result)


if __name__ == "__main__":
    sys.exit(main())
