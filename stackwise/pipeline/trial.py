"""`batch_size: auto`: the largest batch that a stage fits in memory with, found by trying.

The worker's side doubles the batch until memory runs out, or would; then halves the distance between what fitted and
what did not. The runner's side has it done once and keeps the answer, before anything is hashed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stackwise.config import StackWiseConfig
from stackwise.config.continual import EWC
from stackwise.config.loading import build
from stackwise.config.yaml_files import parse_yaml
from stackwise.errors import line_of
from stackwise.host import Memory
from stackwise.pipeline.device import cannot_repeat, is_out_of_memory, make_deterministic, memory
from stackwise.pipeline.schedule import Stage

if TYPE_CHECKING:
    import torch

    from stackwise.training.engine import ResidentEngine
    from stackwise.training.stage import StageModel

SHARE = 0.8  # of the memory, what a stage with the batch that is chosen may have taken in its trial

SLOW = 10.0
"""Seconds of a step beyond which no larger batch is tried: on a CPU memory is seldom what a batch is bounded by."""


@dataclass(frozen=True)
class TrialJob:
    """A stage whose batch is to be found."""

    config: str
    stage: Stage
    vocab_size: int
    mask_token: int
    most: int  # the largest batch of use
    kind: str = field(default="trial", init=False)


@dataclass(frozen=True)
class CompileJob(TrialJob):
    """A stage whose blocks are to be compiled, to see whether they can be; `most`: the rows of a microbatch."""

    kind: str = field(default="compile", init=False)


def run_compile(job: CompileJob, device: torch.device) -> dict[str, Any]:
    """A step of a stage with its blocks compiled; returns the `fault` in a line, None where there is none.

    What was compiled lies in the cache on the disk, where the workers that train find it.
    """
    config = build(StackWiseConfig, parse_yaml(job.config, "job"))
    if config.deterministic and device.type == "cuda":
        make_deterministic()
    from stackwise.training.stage import compile_blocks

    model = make_model(job, config).to(device)
    compile_blocks((*model.blocks, *model.beyond))
    engine = make_engine(job, config, model, device)
    try:
        engine.step([make_batch(engine, job, config, job.most)], 0, 0.0)
        engine.evaluate([make_batch(engine, job, config, job.most)])
    except Exception as error:  # a compiler has as many kinds of failure as parts
        if is_out_of_memory(error) or cannot_repeat(error):
            raise
        return {"fault": f"{type(error).__name__}: {line_of(error, '')}"[:200]}
    return {"fault": None}


def run_trial(job: TrialJob, device: torch.device) -> dict[str, Any]:
    """Find the batch; returns `rows`, the `peak` in bytes that it took, and the `limit`.

    Raises:
        MemoryError: Not even one row fits.
    """
    config = build(StackWiseConfig, parse_yaml(job.config, "job"))
    if config.deterministic and device.type == "cuda":  # whose kernels may want other memory
        make_deterministic()
    before = memory(device)
    engine = make_engine(job, config, make_model(job, config).to(device), device)
    _tried(engine, job, config, 1, device, before)  # the first step makes the moments that all others have beside them
    good, used, bad, rows = 0, 0, 0, 1
    while rows:
        peak, seconds = _tried(engine, job, config, rows, device, before)
        if peak is not None and peak <= SHARE * before.limit:
            good, used = rows, peak
        else:
            bad = rows
        following = min(2 * good, job.most) if not bad else good + (bad - good) // 2
        # What a row takes is seen: a batch that would not fit by that is not tried where trying is dangerous.
        per_row = (used - before.used) / good if good else 0
        if device.type != "cuda" and before.used + per_row * following > SHARE * before.limit:
            bad = bad or following
            following = (
                good + (bad - good) // 2 if per_row == 0 else int((SHARE * before.limit - before.used) / per_row)
            )
        done = following <= good or (bad and bad - good <= max(1, good // 8)) or following >= (bad or following + 1)
        rows = 0 if done or (seconds > SLOW and not bad) else following
    if not good:
        raise MemoryError(f"a batch of one row does not fit into {SHARE:.0%} of {before.limit} bytes of {before.what}")
    good = good // 8 * 8 if good >= 16 else good
    return {"rows": good, "peak": used, "limit": before.limit, "what": before.what}


def make_engine(job: TrialJob, config: StackWiseConfig, model: StageModel, device: torch.device) -> ResidentEngine:
    """The stage's engine."""
    from stackwise.pipeline.parts import parts_of
    from stackwise.training.anchor import hold_where_it_is
    from stackwise.training.engine import ResidentEngine

    settings, parts = config.stage_training(job.stage.depth), parts_of(model, job.stage)
    method = config.training.continual
    if isinstance(method, EWC) and job.stage.window:
        for module in parts.values():
            hold_where_it_is(module, method.strength)
    return ResidentEngine(model, settings, seed=(0,), device=device, parts=parts)


def make_model(job: TrialJob, config: StackWiseConfig) -> StageModel:
    """The stage's modules, with fresh weights, on torch's default device."""
    from stackwise.pipeline.job import Source
    from stackwise.pipeline.parts import make_block, make_front, make_head, objective_of, parts_of, require_gradients
    from stackwise.training.stage import StageModel

    stage, fresh = job.stage, Source()
    front = None if stage.reads_boundary else make_front(config, job.vocab_size, fresh)
    sources = dict.fromkeys(stage.holds, fresh)
    blocks, beyond = (
        [make_block(config, part, sources, stage.format(part), packed=stage.packs(part)) for part in parts]
        for parts in (stage.blocks, stage.lookahead)
    )
    for part, block in zip((*stage.blocks, *stage.lookahead), (*blocks, *beyond), strict=True):
        require_gradients(part, block, stage)
    tied = front.embedding.weight if front is not None and config.model.tie_embeddings else None
    head = make_head(config, job.vocab_size, fresh, tied, projects=False, match=config.objective.score_width)
    objective = objective_of(config, job.mask_token, job.vocab_size, stage)
    model = StageModel(front, blocks, head, objective, config.precision, beyond)
    if stage.column is not None:
        for part, module in parts_of(model, stage).items():
            require_gradients(part, module, stage)
    return model


def _tried(
    engine: ResidentEngine, job: TrialJob, config: StackWiseConfig, rows: int, device: torch.device, before: Memory
) -> tuple[int | None, float]:
    """One step with so many rows: the most bytes held (None: memory ran out), and the seconds of a microbatch."""
    import gc
    import time

    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begun, short = time.perf_counter(), False
    # From the second on, a step's gradients are there while a microbatch goes forward; a third takes no more.
    microbatches = min(2, config.stage_training(job.stage.depth).accumulation)
    try:
        engine.step((make_batch(engine, job, config, rows) for _ in range(microbatches)), 0, 0.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        short = True
    seconds = (time.perf_counter() - begun) / microbatches
    if short:
        engine.model.zero_grad(set_to_none=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None, seconds
    return _peak(device, before), seconds


def make_batch(
    engine: ResidentEngine, job: TrialJob, config: StackWiseConfig, rows: int, *, activations: bool = True
) -> Any:
    """A microbatch of so many rows, as many of their positions masked as ever are."""
    import numpy as np
    import torch

    from stackwise.batch import ACTIVATIONS, MASKS, SEGMENTS, TOKENS, Batch
    from stackwise.objectives.ppo import ADVANTAGES, ROLLOUT
    from stackwise.objectives.preferences import REFERENCE

    length = config.training.seq_len
    masks_BS = torch.zeros(rows, length, dtype=torch.bool)
    masks_BS[:, : max(1, round(config.training.max_mask_fraction * length))] = config.objective.masks
    tokens_BS = torch.randint(0, min(4, job.vocab_size), (rows, length))
    tensors = {TOKENS: tokens_BS, MASKS: masks_BS} | dict.fromkeys(engine.model.objective.inputs, tokens_BS)
    if engine.model.front is None and activations:
        shape = rows, config.row_positions, config.model.d_model
        tensors[ACTIVATIONS] = torch.zeros(shape, dtype=engine.model.stream_dtype)
    if config.objective.reference is not None:
        tensors[REFERENCE] = torch.zeros(rows, config.objective.sequences, 1)
    if config.objective.rolls_out:
        tensors |= {ROLLOUT: torch.ones(rows, length, 4), ADVANTAGES: torch.ones(rows, length, 2)}
    if config.data.within_documents:
        tensors[SEGMENTS] = torch.zeros(rows, length, dtype=torch.int32)
    return Batch(np.arange(rows), np.zeros((rows, 16), dtype=np.uint8), tensors)


def _peak(device: torch.device, before: Memory) -> int:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    from stackwise.pipeline.device import peak_memory

    now = memory(device)
    return max(now.used, peak_memory(device)) if now.what == before.what else peak_memory(device)
