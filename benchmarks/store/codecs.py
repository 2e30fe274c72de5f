"""What each codec costs on real activations: disk, time, and the next stage's held-out loss.

A rack of two stages is trained on the standard library. Stage 0 is trained once a seed; above it, stage 1 is trained
once for every number format, on the same rows in the same order from the same weights, so that only what the store
gives back differs. A compressor gives the same bits back, which is checked: its loss is that of its number format.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.store.measure import table
from stackwise.config import StackWiseConfig
from stackwise.pipeline.events import Event
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.runner import Runner
from stackwise.store import ActivationStore, RowOrder, codec_named, codec_names

if TYPE_CHECKING:
    import torch

BATCH = 32
Losses = dict[str, list[float]]
"""Held-out losses of stage 1 by number format, one a seed."""


def configuration(path: Path, *, codec: str, seed: int, steps: int) -> StackWiseConfig:
    """Two stages of one block each, large enough to have learnt something after some hundred steps."""
    return StackWiseConfig.from_preset(
        "smoke",
        {
            "name": "codecs",
            "seed": seed,
            "device": "cpu",
            "precision": "fp32",
            "model.d_model": 128,
            "model.init_std": 0.08,
            "model.architecture.n_stacks": 2,
            "training.seq_len": 128,
            "training.steps": steps,
            "training.batch_size": 8,
            "data.cache_dir": str(path / "cache"),
            "evaluation.samples": 256,
            "store.path": str(path / "store"),
            "store.codec": codec,
        },
    )


def train(path: Path, *, seeds: int, steps: int) -> tuple[Losses, list[float]]:
    """Train stage 1 from boundaries of every number format.

    Returns:
        Its held-out losses, and stage 0's, one a seed.
    """
    formats = list(dict.fromkeys(codec_named(name).base for name in codec_names()))
    losses: Losses = {name: [] for name in formats}
    below = []
    for seed in range(seeds):
        for name in formats:
            config = configuration(path, codec=name, seed=seed, steps=steps)
            events: list[Event] = []
            stages = Runner(config, RunDirectory(path / f"{name}-{seed}"), events.append).run()["stages"]
            trained = [event["stage"] for event in events if event["event"] == "training"]
            if trained != ([0, 1] if name == formats[0] else [1]):
                raise AssertionError(f"stage 0 is trained once a seed, and stage 1 always; not {trained}")
            losses[name].append(statistics.mean(stages[1]["loss"].values()))
        below.append(statistics.mean(stages[0]["loss"].values()))
    return losses, below


def activations(store: ActivationStore, mib: int) -> torch.Tensor:
    """Activations of stage 0 in float32 [rows, seq, d_model], `mib` MiB of them, repeated where there are fewer."""
    import torch

    info = next(info for info in store.boundaries() if info.codec == "fp32")
    rows = max(1, (mib << 20) // (info.seq_len * info.d_model * 4))
    with store.reader(info.id) as reader:
        x = reader.read(np.arange(min(rows, info.rows)))
    return torch.cat([x] * -(-rows // len(x)))[:rows]


def speeds(path: Path, x: torch.Tensor, *, rounds: int) -> dict[str, list[float]]:
    """For each codec: bytes a token on disk, seconds to write and to read `x`, relative error, bytes decoded."""
    import torch

    count, seq_len, d_model = x.shape
    samples = np.random.default_rng(0).integers(0, 256, (count, 16), np.uint8)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in codec_names()}
    found: dict[str, list[float]] = {}
    decoded: dict[str, torch.Tensor] = {}
    order = RowOrder(count, seed=("codecs",), chunk_rows=64)
    for turn in range(rounds):
        for name in codec_names():
            codec = codec_named(name)
            with ActivationStore(path / "speed") as store:
                rowset = store.put_rowset(samples, store.put_masks(np.ones((1, seq_len), bool)).repeat(count, axis=0))
                began = time.perf_counter()
                with store.writer(
                    trunk="ab" * 16, rowset=rowset, depth=1, seq_len=seq_len, d_model=d_model, codec=name
                ) as writer:
                    for chunk in writer.missing:
                        start, stop = writer.chunk_rows_of(chunk)
                        writer.submit(chunk, x[start:stop])
                    info = writer.finish()
                wrote = time.perf_counter() - began
                with store.reader(info.id) as reader:
                    stream = reader.stream(order, BATCH)
                    # The first epoch: later ones find small boundaries decoded in memory.
                    began = time.perf_counter()
                    for _ in range(count // BATCH):
                        next(stream)
                    took = time.perf_counter() - began
                    if turn == 0:
                        y = reader.read(np.arange(min(256, count)))
                        if not torch.equal(y, decoded.setdefault(codec.base, y)):
                            raise AssertionError(f"{name} gives other bits back than {codec.base}")
                        error = (y.float() - x[: len(y)]).norm() / x[: len(y)].norm()
                        found[name] = [info.disk_bytes / count / seq_len, float(error), x.numel() * y.element_size()]
                taken[name].append((wrote, took))
            shutil.rmtree(path / "speed")
    for name, times in taken.items():
        found[name] += [statistics.median(each) for each in zip(*times, strict=True)]
    return found


def run(path: Path, *, mib: int, rounds: int, seeds: int, steps: int) -> str:
    """The table."""
    losses, below = train(path, seeds=seeds, steps=steps)
    with ActivationStore(path / "store") as store:
        found = speeds(path, activations(store, mib), rounds=rounds)
    return shown(found, losses, below, rounds=rounds, steps=steps)


def shown(found: dict[str, list[float]], losses: Losses, below: list[float], *, rounds: int, steps: int) -> str:
    """The table of what `speeds` and `train` found."""
    seeds = "one seed" if len(below) == 1 else f"{len(below)} seeds (in parentheses the least and the most)"
    lines = []
    for name, (size, error, decoded, wrote, read) in found.items():
        own, exact = losses[codec_named(name).base], losses["fp32"]
        cost = sorted(one - other for one, other in zip(own, exact, strict=True))
        spread = f" ({cost[0]:+.4f} to {cost[-1]:+.4f})" if len(cost) > 1 else ""
        lines.append(
            [
                f"`{name}`",
                f"{size:.0f}",
                f"{decoded / wrote / 1e6:,.0f}",
                f"{decoded / read / 1e6:,.0f}",
                f"{error:.1e}" if error else "0",
                "0" if name.startswith("fp32") else f"{statistics.mean(cost):+.4f}{spread}",
            ]
        )
    note = (
        f"\n\nHeld-out loss (nats a masked token, mean of 15, 50 and 90% masked) with fp32: "
        f"{statistics.mean(losses['fp32']):.4f}, of stage 0: {statistics.mean(below):.4f}; "
        f"{seeds}, {steps} steps a stage of 8 rows of 128 tokens, width 128. "
        f"Speeds: median of {rounds}, of the decoded tensor (4 bytes a number for fp32, else 2), written durably with "
        f"`submit`, read shuffled in a first epoch, digests checked."
    )
    head = ["codec", "bytes a token", "write, MB/s", "read, MB/s", "relative error", "next stage's loss against fp32"]
    return table(head, lines) + note
