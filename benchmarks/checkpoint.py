"""How long training pauses for a checkpoint, and what a checkpoint on its way costs the steps beside it.

    python -m benchmarks.checkpoint [--parameters 200000000] [--rounds 5]

A stage of so many parameters trains with AdamW. In each round some steps are timed alone; then a checkpoint is begun,
and steps go on until it is on the disk, fsync included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import Result, Spread, parser, positive, refuse, run_command, say, shown, table
from benchmarks.document import Section
from stackwise import words

if TYPE_CHECKING:
    from stackwise.batch import Batch
    from stackwise.training.trainer import Trainer

EVERY = 600.0
"""Seconds between checkpoints, as `training.checkpoint_minutes` has it."""
BILLION = 10**9
WIDTH, SEQUENCE, VOCABULARY = 1024, 64, 512


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("checkpoint", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("checkpoint", __doc__)
    add = made.add_argument
    add("--parameters", type=positive, default=200_000_000, metavar="N", help="about so many; default 200 million")
    add("--rounds", type=positive, default=5, metavar="N", help="checkpoints after the first; default 5")
    add("--steps", type=positive, default=3, metavar="N", help="steps timed alone before each; default 3")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dir", metavar="DIR", help="where checkpoints go; default: the system's temporary directory")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Measure it.

    Raises:
        UsageError: The stage and its copy do not fit into memory.
    """
    import psutil

    from stackwise.training.checkpoint import Checkpoints

    if 30 * options.parameters > psutil.virtual_memory().available:
        raise refuse(f"{options.parameters} parameters take about 30 bytes each here", "lower --parameters")
    trainer, batch, size = _stage(options)
    say(f"{size / 1e6:.0f} million parameters")
    alone, beside, stopped, seconds = [], list[float](), list[float](), list[float]()
    first = 0.0
    trainer.train_step([batch])
    with (
        tempfile.TemporaryDirectory(prefix="stackwise-checkpoint-", dir=options.dir) as directory,
        Checkpoints(Path(directory), keep=1) as checkpoints,
    ):
        checkpoints.prepare(trainer)
        checkpoints.finish()
        for number in range(options.rounds + 1):
            before = [_step(trainer, batch) for _ in range(options.steps)]
            checkpoints.save(trainer)
            during = []
            while checkpoints.busy:
                during.append(_step(trainer, batch))
            checkpoints.finish()
            (saved,) = checkpoints.written()
            say(f"stopped {saved.stopped:.3f} s, on the disk after {saved.seconds:.2f} s")
            if not number:
                first = saved.stopped
                continue
            own = statistics.median(before)
            alone.append(own)
            stopped.append(saved.stopped)
            seconds.append(saved.seconds)
            beside.append(max(0.0, sum(during) - own * len(during)))
    state = sum(tensor.numel() * tensor.element_size() for tensor in trainer.engine.state().values())
    lost = [a + b for a, b in zip(stopped, beside, strict=True)]
    return {
        "parameters": size,
        "bytes": state,
        "rounds": options.rounds,
        "device": trainer.engine.device.type,
        "step_seconds": Spread.of(alone).plain(),
        "first_stopped": first,
        "stopped": Spread.of(stopped).plain(),
        "written": Spread.of(seconds).plain(),
        "lost_beside": Spread.of(beside).plain(),
        "share_stopped": Spread.of(value / EVERY for value in stopped).plain(),
        "share_lost": Spread.of(value / EVERY for value in lost).plain(),
        "share_waiting": Spread.of(value / EVERY for value in seconds).plain(),
    }


def _stage(options: argparse.Namespace) -> tuple[Trainer, Batch, int]:
    import numpy as np
    import torch

    from stackwise.batch import Batch
    from stackwise.config import ModelConfig, StageTraining
    from stackwise.model import build_block, build_head
    from stackwise.objectives import MaskDiffusionObjective
    from stackwise.pipeline.device import resolve_device
    from stackwise.training.engine import ResidentEngine
    from stackwise.training.stage import StageModel
    from stackwise.training.trainer import Trainer

    device = resolve_device(options.device)
    config = ModelConfig(d_model=WIDTH, n_heads=16, vocab_size=VOCABULARY, tie_embeddings=False)
    count = max(1, round(options.parameters / config.block_parameters))
    blocks = [build_block(config, index, 0) for index in range(count)]
    head = build_head(config, VOCABULARY, 0, None)
    model = StageModel(None, blocks, head, MaskDiffusionObjective(VOCABULARY - 1), "fp32").to(device)
    settings = StageTraining()
    engine = ResidentEngine(model, settings, seed=(0, 0), device=device)
    draw = np.random.default_rng(0)
    batch = Batch(
        np.arange(1),
        np.zeros((1, 16), np.uint8),
        {
            "tokens": torch.from_numpy(draw.integers(0, VOCABULARY - 1, (1, SEQUENCE))),
            "masks": torch.from_numpy(draw.random((1, SEQUENCE)) < 0.5),
            "activations": torch.randn(1, SEQUENCE, WIDTH),
        },
    )
    batch.masks_BS[:, 0] = True
    size = sum(p.numel() for p in engine.parameters.values())
    return Trainer(engine, settings, steps=10**9), batch, size


def _step(trainer: Trainer, batch: Batch) -> float:
    begun = time.perf_counter()
    trainer.train_step([batch]).loss.item()
    return time.perf_counter() - begun


def _section(result: Result) -> Section:
    def seconds(value: float) -> str:
        return f"{value:.2f} s"

    def percent(value: float) -> str:
        return f"{100 * value:.2f}%"

    factor = BILLION / result["parameters"]
    rows = [
        ["training pauses", shown(result["stopped"], seconds), shown(result["share_stopped"], percent),
         percent(factor * result["share_stopped"]["median"])],
        ["and what steps beside the writing lose", shown(result["lost_beside"], seconds),
         shown(result["share_lost"], percent), percent(factor * result["share_lost"]["median"])],
        ["if it paused until all is on the disk", shown(result["written"], seconds),
         shown(result["share_waiting"], percent), percent(factor * result["share_waiting"]["median"])],
    ]  # fmt: skip
    text = (
        f"A stage of {result['parameters'] / 1e6:.0f} million parameters, AdamW, float32: a checkpoint is "
        f"{words.size(result['bytes'])}. Over {words.plural(result['rounds'], 'checkpoint')} after the first, which "
        f"stopped training for {result['first_stopped']:.2f} s; medians, smallest to largest "
        f"in brackets. A step took {result['step_seconds']['median']:.2f} s. The shares in the second row are of both "
        "rows together. The last column is extrapolated, in proportion to the parameters: it was not measured."
    )
    header = ["", "a checkpoint", "of the time, one every 10 minutes", "at 10^9 parameters, extrapolated"]
    where = "GPU" if result["device"] == "cuda" else "CPU"
    return Section(
        f"checkpoint on a {where}", f"Checkpoints beside training ({where})", text, table(header, rows), where, result
    )


if __name__ == "__main__":
    sys.exit(main())
