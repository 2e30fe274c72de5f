"""The measurements of one stage: rounds of training with a matrix product between them, and the pass that writes."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.arithmetic import Reference, synchronise, work_of
from benchmarks.common import Result, Spread
from benchmarks.workbench import Bench, settle_steps, train, trainer_of, trains_projection
from stackwise.batch import Batch
from stackwise.identity import content_id
from stackwise.pipeline.recipe import boundary_chunk_rows, codec_name
from stackwise.training.feed import ahead
from stackwise.training.forward import write_boundary
from stackwise.training.stage import StageModel
from stackwise.training.trainer import Trainer


def training(bench: Bench, model: StageModel, rounds: int, steps: int, profile: str | None = None) -> Result:
    """Train in rounds of `steps` timed steps, a matrix product before and after each.

    Args:
        bench: Where the stage reads.
        model: The stage.
        rounds: How many.
        steps: Timed steps in each.
        profile: A file for the profile of one more step.

    Returns:
        Spreads over the rounds of tokens/s, TFLOP/s, share of the matrix product, seconds a step, wait share.
    """
    setting = bench.setting
    config, settings = setting.config, setting.config.training
    settle = settle_steps(config)
    work = work_of(
        config.model, setting.blocks, settings.seq_len, setting.vocab_size,
        causal=model.objective.causal is True, trained_head=trains_projection(config),
    )  # fmt: skip
    trainer = trainer_of(setting, model, 10**9)
    reference = Reference(setting.device)
    rates, seconds, waits, flops, losses = [], [], [], [], []
    with bench.feed() as feed, ahead(feed.shuffled(bench.order, settings.batch_size, 0), setting.device) as batches:
        train(trainer, batches, settle)  # the first steps pay for memory, kernels and optimizer state
        rates.append(reference.rate())
        for _ in range(rounds):
            losses += train(trainer, batches, settle).losses
            first = trainer.step * settings.accumulation
            timed = train(trainer, batches, steps)
            rates.append(reference.rate())
            seconds.append(timed.seconds)
            waits.append(timed.waited / timed.seconds)
            losses += timed.losses
            count = steps * settings.accumulation
            tokens = count * settings.batch_size * settings.seq_len
            flops.append(work.training(tokens, bench.scored(first, count)) / timed.seconds)
        if profile is not None:
            _profile(trainer, batches, Path(profile))
    shares = [2 * own / (before + after) for own, before, after in zip(flops, rates, rates[1:], strict=False)]
    return {
        "rounds": rounds,
        "steps_per_round": steps,
        "reference": reference.name,
        "losses": losses,
        "tokens_per_second": Spread.of(tokens / s for s in seconds).plain(),
        "tflops": Spread.of(f / 1e12 for f in flops).plain(),
        "reference_tflops": Spread.of(rate / 1e12 for rate in rates).plain(),
        "share": Spread.of(shares).plain(),
        "seconds_per_step": Spread.of(s / steps for s in seconds).plain(),
        "wait_share": Spread.of(waits).plain(),
    }


def _profile(trainer: Trainer, batches: Iterator[Batch], path: Path) -> None:
    """One step under torch's profiler: a Chrome trace for a .json file, else a table of the costliest operators."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    gpu = trainer.engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with record(activities=activities) as found:
        train(trainer, batches, 1)
    if path.suffix == ".json":
        found.export_chrome_trace(str(path))
    else:
        by = "self_device_time_total" if gpu else "self_cpu_time_total"
        path.write_text(found.key_averages().table(sort_by=by, row_limit=40), encoding="utf-8")


def forward(bench: Bench, model: StageModel) -> Result:
    """The forward-only pass that writes the boundary above, once over all rows, fsync included."""
    setting, config = bench.setting, bench.setting.config
    model.head = None  # as a worker does: the head and the optimizer are done with
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()
    work = work_of(
        config.model, setting.blocks, config.training.seq_len, setting.vocab_size,
        causal=model.objective.causal is True, trained_head=True,
    )  # fmt: skip
    synchronise(setting.device)
    with bench.feed() as feed:
        begun = time.perf_counter()
        with bench.store.writer(
            trunk=content_id("benchmark", {"what": "the boundary above", "below": bench.boundary}),
            rowset=bench.rowset,
            depth=setting.stage.depth + 1,
            seq_len=config.training.seq_len,
            d_model=config.model.d_model,
            codec=codec_name(config.store),
            chunk_rows=boundary_chunk_rows(config, bench.rows),
        ) as writer:
            write_boundary([model], feed, writer, setting.device)
            written = writer.info.disk_bytes
        seconds = time.perf_counter() - begun
    tokens = bench.rows * config.training.seq_len
    return {
        "seconds": seconds,
        "rows": bench.rows,
        "bytes": written,
        "tokens_per_second": tokens / seconds,
        "bytes_per_second": written / seconds,
        "tflops": work.forward(tokens) / seconds / 1e12,
    }
