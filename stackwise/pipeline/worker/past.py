"""Learning without forgetting: what a stage as its task before left it says of the new rows, written before it trains.

Its likeliest tokens are a boundary like a teacher's: found again by the same stage, and gone with its commit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from stackwise.batch import Batch
from stackwise.config.continual import LwF
from stackwise.errors import InterruptedRun
from stackwise.host import host_total
from stackwise.identity import Hex, content_id
from stackwise.model.rack import Head
from stackwise.objectives.distillation import LOGITS, LikeliestTokens
from stackwise.pipeline.device import describe
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.parts import JobParts
from stackwise.pipeline.recipe import boundary_chunk_rows
from stackwise.pipeline.schedule import FRONT, HEAD
from stackwise.pipeline.worker.training import RESUME, StageContext
from stackwise.store import BoundarySpec, Codec
from stackwise.training.feed import RowSource
from stackwise.training.forward import MakeOutputs, write_boundary
from stackwise.training.stage import StageModel
from stackwise.training.swap_parts import grouped_outputs

PROGRESS_SECONDS = 0.25


@contextlib.contextmanager
def beside_past(context: StageContext, model: StageModel | None) -> Iterator[StageContext]:
    """The same work, its feed bringing what the stage said before it trains; elsewhere the work as it is.

    Args:
        context: The stage's work, what enters it ready.
        model: The stage with the weights that it starts from; None: it is swapped, and goes over rows group by group.

    Raises:
        InterruptedRun: Told to stop; what was written stays.
    """
    method = context.config.training.continual
    if not isinstance(method, LwF) or not context.stage.window or not context.job.train:
        yield context
        return
    boundary = ""
    for rank in range(context.ranks.size):  # what the first has written, the others find
        if rank == context.ranks.rank:
            boundary = _written(context, model, min(method.top_k, context.job.vocab_size))
        context.ranks.wait()
    with context.store.reader(boundary) as reader:
        sources = {**context.feed.sources, LOGITS: RowSource(boundary, reader.read)}
        yield replace(context, feed=replace(context.feed, sources=sources))
    if context.ranks.main:
        context.store.drop(boundary)


def _written(context: StageContext, model: StageModel | None, top_k: int) -> Hex:
    """The boundary with the stage's likeliest tokens at every position of its rows."""
    job, config, rowset, begun = context.job, context.config, context.feed.rowset, time.perf_counter()
    about = {"initial": job.recipe["initial"], "reads": job.recipe["reads"], "forward": job.forward, "top_k": top_k}
    spec = BoundarySpec(
        trunk=content_id("past", about),
        rowset=rowset.id,
        depth=context.stage.depth + 1,
        seq_len=config.row_positions,
        d_model=2 * top_k,
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
            stages = _by_groups(context, top_k) if model is None else [_saying(model, top_k)]
            done = write_boundary(stages, context.feed, writer, context.device, progress=progress, stop=context.stop)
            if not done.finished:
                raise InterruptedRun("stopped while a stage went over its new rows", hint=RESUME)
            writer.finish(done.seconds)
    return writer.info.id


def _saying(model: StageModel, top_k: int) -> StageModel:
    """A stage that gives its likeliest tokens, of the same modules."""
    assert isinstance(model.head, Head), "a stage that trains has a head"
    blocks = [*model.blocks, *model.beyond, LikeliestTokens(model.head, top_k)]
    return StageModel(model.front, blocks, None, model.objective, model.precision)


def _by_groups(context: StageContext, top_k: int) -> MakeOutputs:
    """The same of a stage of which one group is in memory at a time, and the head."""
    job, config, device = context.job, context.config, context.device
    swap = Estimate(config, job.vocab_size, job.stage, device.type).swap(int(describe(device)["memory"]), host_total())
    assert swap is not None, "a stage that is not in memory is swapped"
    below = JobParts(job, config, {part: source for part, source in job.initial.items() if part != HEAD})
    whole = JobParts(job, config, job.initial)
    embedding_VD = whole.make(FRONT, None).get_parameter("embedding.weight").detach() if whole.tied else None
    head = whole.make(HEAD, None, embedding_VD)
    assert isinstance(head, Head)
    says = LikeliestTokens(head, top_k).to(device).eval()
    row_bytes = 4 * config.row_positions * config.model.d_model
    make = grouped_outputs(below, swap.groups, row_bytes, swap.boundaries)

    def outputs(batches: Iterator[Batch], codec: Codec, device: torch.device) -> Generator[Tensor]:
        for x_BSD in make(batches, codec, device):
            with torch.no_grad(), below.model({}).numerics(device):
                answers: Tensor = says(x_BSD.to(device)).cpu()
            yield answers

    return outputs
