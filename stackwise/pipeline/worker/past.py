"""What a stage as its window before left it says of its new rows, written before it trains on them.

Learning without forgetting asks it for its likeliest tokens, a self-paced curriculum for its loss of each row. What it
says is a boundary like a teacher's: found again by the same stage, and gone with its commit.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.batch import Batch
from stackwise.config.continual import LwF
from stackwise.errors import InterruptedRun
from stackwise.host import host_total
from stackwise.identity import Hex, content_id
from stackwise.model.rack import Head
from stackwise.objectives.distillation import LOGITS, LikeliestTokens
from stackwise.pipeline.device import describe
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.parts import task_of
from stackwise.pipeline.recipe import boundary_chunk_rows
from stackwise.pipeline.schedule import FRONT, HEAD
from stackwise.pipeline.worker.job_parts import JobParts
from stackwise.pipeline.worker.training import RESUME, StageContext
from stackwise.store import BoundarySpec, Codec
from stackwise.training.curriculum import DIFFICULTY, RowLosses
from stackwise.training.feed import RowSource
from stackwise.training.forward import MakeOutputs, write_boundary
from stackwise.training.stage import StageModel
from stackwise.training.swap_outputs import grouped_outputs

PROGRESS_SECONDS = 0.25


@dataclass(frozen=True)
class _Asked:
    """What a stage is asked for of each row.

    Args:
        name: The input that a batch has it as.
        trunk: What makes it, and what of that shapes the numbers.
        shape: Positions of a row, and numbers at each.
        above: The module in place of the head.
    """

    name: str
    trunk: tuple[str, dict[str, Any]]
    shape: tuple[int, int]
    above: Callable[[Head], nn.Module]


def _asked(context: StageContext) -> list[_Asked]:
    job, config = context.job, context.config
    passes, method, curriculum = list[_Asked](), config.training.continual, context.settings.curriculum
    if not job.train or not context.stage.window:  # in its first window a stage has no past
        return passes
    if isinstance(method, LwF):
        top_k = min(method.top_k, job.vocab_size)
        shape = config.row_positions, 2 * top_k
        passes.append(_Asked(LOGITS, ("past", {"top_k": top_k}), shape, lambda head: LikeliestTokens(head, top_k)))
    if curriculum is not None and curriculum.by == "loss":
        objective = task_of(config, job.mask_token, job.vocab_size, job.stage)
        scored = config.objective.scoring() | config.objective.code
        passes.append(
            _Asked(DIFFICULTY, ("past losses", {"objective": scored}), (1, 1), lambda head: RowLosses(head, objective))
        )
    return passes


@contextlib.contextmanager
def beside_past(context: StageContext, model: StageModel | None) -> Iterator[StageContext]:
    """The same work, its feed bringing what the stage said before it trains; elsewhere the work as it is.

    Args:
        context: The stage's work, what enters it ready.
        model: The stage with the weights that it starts from; None: it is not in memory, and goes over rows group by
            group.

    Raises:
        InterruptedRun: Told to stop; what was written stays.
    """
    passes, boundaries = _asked(context), list[Hex]()
    for rank in range(context.ranks.size if passes else 0):  # what the first has written, the others find
        if rank == context.ranks.rank:
            boundaries = [_written(context, model, one) for one in passes]
        context.ranks.wait()
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(context.store.reader(boundary)) for boundary in boundaries]
        more = {one.name: RowSource(reader.info.id, reader.read) for one, reader in zip(passes, readers, strict=True)}
        yield replace(context, feed=replace(context.feed, sources={**context.feed.sources, **more}))
    if context.ranks.main:
        for boundary in boundaries:
            context.store.drop(boundary)


def _written(context: StageContext, model: StageModel | None, past: _Asked) -> Hex:
    """The boundary with what a stage is asked for of its rows."""
    job, config, rowset, begun = context.job, context.config, context.feed.rowset, time.perf_counter()
    name, shaped = past.trunk
    about = {"initial": job.recipe["initial"], "reads": job.recipe["reads"], "forward": job.forward}
    spec = BoundarySpec(
        trunk=content_id(name, about | shaped),
        rowset=rowset.id,
        depth=context.stage.depth + 1,
        seq_len=past.shape[0],
        d_model=past.shape[1],
        codec="fp32",  # an id must stay whole
        chunk_rows=boundary_chunk_rows(config, rowset.rows),
    )
    emitted = begun

    def progress(done: int, total: int) -> None:
        nonlocal emitted
        if time.perf_counter() - emitted > PROGRESS_SECONDS:
            emitted = time.perf_counter()
            context.event("boundary", done=done, total=total)

    with context.store.writer(spec) as writer:
        if writer.info.state != "complete":
            context.event("past", rows=rowset.rows)
            stages = _by_groups(context, past) if model is None else [_saying(model, past)]
            done = write_boundary(stages, context.feed, writer, context.device, progress=progress, stop=context.stop)
            if not done.finished:
                raise InterruptedRun("stopped while a stage went over its new rows", hint=RESUME)
            writer.finish(done.seconds)
    return writer.info.id


def _saying(model: StageModel, past: _Asked) -> StageModel:
    """A stage that says what it is asked for, of the same modules."""
    assert isinstance(model.head, Head), "a stage that trains has a head"
    blocks = [*model.blocks, *model.beyond, past.above(model.head)]
    return StageModel(model.front, blocks, None, model.objective, model.precision)


def _by_groups(context: StageContext, past: _Asked) -> MakeOutputs:
    """The same of a stage of which one group is in memory at a time, and the head."""
    job, config, device = context.job, context.config, context.device
    turns = Estimate(config, job.vocab_size, job.stage, device.type).turns(
        int(describe(device)["memory"]), host_total()
    )
    assert turns is not None, "parts of a stage that is not in memory take turns"
    below = JobParts(job, config, {part: source for part, source in job.initial.items() if part != HEAD})
    whole = JobParts(job, config, job.initial)
    embedding_VD = whole.make(FRONT, None).get_parameter("embedding.weight").detach() if whole.tied else None
    head = whole.make(HEAD, None, embedding_VD)
    assert isinstance(head, Head)
    says = past.above(head).to(device).eval()
    row_bytes = 4 * config.row_positions * config.model.d_model
    make = grouped_outputs(below, turns.groups, row_bytes, turns.boundaries)

    def outputs(batches: Iterator[Batch], codec: Codec, device: torch.device) -> Generator[Tensor]:
        waiting: deque[Batch] = deque()

        def noted() -> Iterator[Batch]:
            for batch in batches:
                waiting.append(batch)
                yield batch

        for x_BSD in make(noted(), codec, device):
            batch = waiting.popleft()
            if callable(prepare := getattr(says, "prepare", None)):
                prepare(batch.to(device))
            with torch.no_grad(), below.model({}).numerics(device):
                answers: Tensor = says(x_BSD.to(device)).cpu()
            yield answers

    return outputs
