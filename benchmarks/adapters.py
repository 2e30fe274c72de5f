"""Adapters above a frozen trunk: what storing the boundary below them saves, epoch by epoch.

    python -m benchmarks.adapters [--width 256] [--blocks 8] [--above 4] [--rows 64] [--epochs 6]

A LLaMA of random weights is written as a checkpoint, and adapters train on its upper blocks. The boundary below them
is written by forward passes; then every epoch is trained twice, in turns: by reading it, and (`store.every: 2`) by
computing it again from tokens as rows are asked for. Both see the same rows in the same order, through the same codec.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Result, Spread, parser, positive, refuse, run_command, shown, table
from benchmarks.document import Section
from stackwise import words

VOCABULARY = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("adapters", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("adapters", __doc__)
    add = made.add_argument
    add("--width", type=positive, default=256, metavar="N", help="d_model, in heads of 64; default 256")
    add("--blocks", type=positive, default=8, metavar="N", help="blocks; default 8")
    add("--above", type=positive, metavar="N", help="blocks below the lowest adapter; default: half of them")
    add("--rank", type=positive, default=8, metavar="N", help="rank of the adapters; default 8")
    add("--hold", default="full", help="what the frozen weights are held in: full, bf16, fp8, nvfp4, nf4; default full")
    add("--rows", type=positive, default=64, metavar="N", help="rows of an epoch; default 64")
    add("--batch-size", type=positive, default=4, metavar="N", help="rows in a step; default 4")
    add("--seq-len", type=positive, default=128, metavar="N", help="tokens of a row; default 128")
    add("--epochs", type=positive, default=6, metavar="N", help="epochs, the first of which is left out; default 6")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dir", metavar="DIR", help="where checkpoint and store go; default: the system's temporary directory")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Measure it."""
    from stackwise.config import StackWiseConfig
    from stackwise.config.loading import build
    from stackwise.pipeline.device import describe, resolve_device
    from stackwise.pipeline.initial import with_checkpoint

    above = options.above or options.blocks // 2
    if options.width % 64:
        raise refuse(f"--width {options.width} is no multiple of 64", "heads are 64 wide")
    if not 0 < above < options.blocks:
        raise refuse(f"--above {above}: there are {options.blocks} blocks", "adapters are above some, and on some")
    if options.rows % options.batch_size:
        raise refuse(f"--rows {options.rows} are no whole number of batches", "give a multiple of --batch-size")
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=options.dir) as name:
        root = Path(name)
        parameters = _checkpoint(options, root / "model")
        steps = options.rows // options.batch_size * options.epochs
        values = {
            "init.weights": str(root / "model"),
            "data.tokenizer": "bytes",
            "data.max_bytes": 40 * options.rows * options.seq_len,
            "data.cache_dir": str(root / "cache"),
            "device": device.type,
            "precision": describe(device)["precision"],
            "training.mode": "end_to_end",
            "training.adapters": {"rank": options.rank, "above": above, "precision": options.hold},
            "training.seq_len": options.seq_len,
            "training.batch_size": options.batch_size,
            "training.rows": options.rows,
            "training.steps": steps,
        }
        config = with_checkpoint(build(StackWiseConfig, {}, values))
        found = _Race(config, root, device).run(options.epochs)
    return {
        "device": describe(device)["name"],
        "precision": config.precision,
        "parameters": parameters,
        "codec": config.store.codec or "bf16",
        **{name: getattr(options, name) for name in ("blocks", "rank", "hold", "rows", "seq_len", "batch_size")},
        "above": above,
        **found,
    }


def _checkpoint(options: argparse.Namespace, directory: Path) -> int:
    """A checkpoint of random weights; how many they are."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.width // 64,
        max_position_embeddings=options.seq_len,
    )
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


class _Race:
    """The same stage twice: one reads the boundary below it, one computes it again."""

    def __init__(self, config: Any, root: Path, device: Any) -> None:
        self.config, self.root, self.device = config, root, device

    def run(self, epochs: int) -> Result:
        """Write the boundary, then train epoch by epoch, both in turns."""
        from stackwise.data import prepare
        from stackwise.pipeline.initial import initial_sources
        from stackwise.pipeline.plan import Entry, Plan
        from stackwise.pipeline.schedule import stage_below
        from stackwise.store import ActivationStore

        config, root = self.config, self.root
        data = prepare(config.data)[0]
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(ActivationStore(root / "store"))
            plan = Plan(config, data, store, device=str(self.device), sources=initial_sources(config))
            (stage,), versions = plan.stages, dict(plan.sources)
            below = stage_below(plan.stages, stage)

            def job(of: Any, entry: Any, train: bool) -> Any:
                return plan.job(of, versions, checkpoints=root, train=train, entry=entry, writes=not train, rowset=0)

            written = self._write(job(below, Entry(), False))
            info = plan.boundary(stage, versions)
            assert info is not None, "the pass has written it"
            reader = stack.enter_context(store.reader(info.id))
            ways = {
                "cached": stack.enter_context(_Way.opened(job(stage, Entry(info.id), True), self, store, reader)),
                "recomputed": stack.enter_context(_Way.opened(job(stage, Entry(None, (below,)), True), self, store)),
            }
            rates: dict[str, list[float]] = {name: [] for name in ways}
            losses: dict[str, list[float]] = {name: [] for name in ways}
            for epoch in range(epochs):
                for name in list(ways)[:: 1 if epoch % 2 else -1]:
                    seconds, found = ways[name].epoch(epoch)
                    losses[name] += found
                    rates[name].append(self.tokens / seconds)
        kept = {name: found[1:] if epochs > 1 else found for name, found in rates.items()}
        return {
            "written_seconds": written,
            "written_bytes": info.disk_bytes,
            "epochs": len(kept["cached"]),
            **{name: Spread.of(found).plain() for name, found in kept.items()},
            "ratio": Spread.of(a / b for a, b in zip(kept["cached"], kept["recomputed"], strict=True)).plain(),
            "losses_identical": losses["cached"] == losses["recomputed"],
        }

    @property
    def tokens(self) -> int:
        """Tokens of an epoch."""
        training = self.config.training
        return int(training.rows * training.seq_len)

    def _write(self, job: Any) -> float:
        """Seconds of writing the boundary, from forward passes to the last fsync."""
        import torch

        from stackwise.pipeline.worker.jobs import run_stage

        events: list[dict[str, Any]] = []
        run_stage(job, events.append, lambda: False, torch.device(job.device))
        return float(next(event["seconds"] for event in events if event["event"] == "written"))


class _Way:
    """A stage in training, and where its rows come from."""

    def __init__(self, race: _Race, job: Any, feed: Any) -> None:
        from stackwise.pipeline.parts import parts_of, stage_model
        from stackwise.pipeline.recipe import SHUFFLED_CHUNKS, order_rows
        from stackwise.store import RowOrder
        from stackwise.training.engine import ResidentEngine

        config = race.config
        self.settings, self.device, self.feed = config.stage_training(0), race.device, feed
        model = stage_model(job, config).to(race.device)
        parts = parts_of(model, job.stage)
        self.engine = ResidentEngine(model, self.settings, seed=job.seed(config), device=race.device, parts=parts)
        rows = order_rows(config, job.rows)
        self.order = RowOrder(job.rows, seed=job.order(config), chunk_rows=rows, window_chunks=SHUFFLED_CHUNKS)
        self.steps = job.rows // self.settings.batch_size

    @classmethod
    @contextlib.contextmanager
    def opened(cls, job: Any, race: _Race, store: Any, reader: Any = None) -> Any:
        """One with what enters its stage: what is stored, or what the frozen blocks below make of tokens."""
        from stackwise.data import PreparedData
        from stackwise.pipeline.parts import frozen_stage
        from stackwise.pipeline.rows import choose_samples
        from stackwise.pipeline.worker.boundaries import entering
        from stackwise.pipeline.worker.stores import Place, Stores
        from stackwise.pipeline.worker.training import StageContext
        from stackwise.training.feed import Feed

        config, split = race.config, PreparedData.open(Path(job.data)).train
        samples_R, rowset = choose_samples(config, split, 0), store.rowset(job.rowset)
        feed = Feed.stored(store, rowset, split, samples_R, config.training.seq_len, reader=reader)
        stores = Stores(store, Place(store.path))
        context = StageContext(job, config, store, race.device, lambda event: None, lambda: False, feed, stores=stores)
        frozen = [frozen_stage(below, job, config).to(race.device) for below in job.recomputed]
        with entering(context, frozen) as above:
            yield cls(race, job, above.feed)

    def epoch(self, number: int) -> tuple[float, list[float]]:
        """One pass over the rows: its seconds, and the loss of each step."""
        from stackwise.training.feed import ahead

        begun, losses, first = time.perf_counter(), [], number * self.steps
        batches = itertools.islice(self.feed.shuffled(self.order, self.settings.batch_size, first), self.steps)
        with ahead(batches, self.device) as ready:
            for step, batch in enumerate(ready, first):
                losses.append(self.engine.step([batch], step, self.settings.learning_rate).loss)
        return time.perf_counter() - begun, [float(loss) for loss in losses]


def _section(result: Result) -> Section:
    speed = {key: shown(result[key], lambda value: f"{words.count(value)}/s") for key in ("cached", "recomputed")}
    tokens = result["rows"] * result["seq_len"]
    body = table(
        ("the boundary below the adapters", "tokens", "of recomputing"),
        [
            ("computed again in every epoch", speed["recomputed"], "1"),
            ("written once, read in every epoch", speed["cached"], shown(result["ratio"], lambda v: f"{v:.2f}")),
        ],
    )
    spared = tokens / result["recomputed"]["median"] - tokens / result["cached"]["median"]
    repaid = f"after {result['written_seconds'] / spared:.1f} epochs" if spared > 0 else "never"
    same = "the same, bit for bit" if result["losses_identical"] else "not the same"
    text = (
        f"A LLaMA of {words.count(result['parameters'])} parameters and {result['blocks']} blocks in "
        f"{result['precision']}, its weights held in {result['hold']}; adapters of rank {result['rank']} on the "
        f"blocks from {result['above']} on. {result['rows']} rows of {result['seq_len']} tokens, "
        f"{result['batch_size']} a step; {result['epochs']} epochs after a first one, in each of which both take "
        "turns: median (smallest to largest), the ratio epoch by epoch. The boundary takes "
        f"{words.size(result['written_bytes'])} as {result['codec']}; writing it took "
        f"{result['written_seconds']:.1f} s, which is repaid {repaid}. The losses of both are {same}."
    )
    return Section("adapters", "Adapters above a stored trunk", text, body, result["device"], result)


if __name__ == "__main__":
    sys.exit(main())
