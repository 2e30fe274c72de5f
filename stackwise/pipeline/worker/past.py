"""What a stage says of its rows before it trains on them, with the weights that it begins with.

Learning without forgetting asks it, as its window before left it, for its likeliest tokens, a self-paced curriculum for
its loss of each row; `training.routes` asks it for the experts that each row goes to. What it says is a boundary like a
teacher's: found again by the same stage, and gone with its commit.
"""

from __future__ import annotations

import contextlib
import statistics
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
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
from stackwise.pipeline.events import Pace
from stackwise.pipeline.parts import task_of
from stackwise.pipeline.recipe import boundary_chunk_rows
from stackwise.pipeline.schedule import FRONT, HEAD, block_number
from stackwise.pipeline.worker.engines import JobParts
from stackwise.pipeline.worker.order import row_order
from stackwise.pipeline.worker.training import RESUME, StageContext
from stackwise.store import BoundarySpec, Codec
from stackwise.training.curriculum import DIFFICULTY, RouteCounts, Routes, RowLosses
from stackwise.training.feed import RowSource
from stackwise.training.forward import MakeOutputs, PassControl, write_boundary
from stackwise.training.stage import StageModel
from stackwise.training.swap_outputs import grouped_outputs

ROUTES = "routes"
"""The name of the experts that each row goes to, among what a stage says."""


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
    emits: str = "past"


def _asked(context: StageContext) -> list[_Asked]:
    job, config = context.job, context.config
    passes, method, curriculum = list[_Asked](), config.training.continual, context.settings.curriculum
    if job.train and context.settings.routes is not None and (pieces := _pieces(context)):
        trunk, shape = ("routes", {"recipe": job.recipe_id}), (1, sum(pieces.values()))
        passes.append(_Asked(ROUTES, trunk, shape, lambda head: RouteCounts(pieces), emits="routing"))
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


def _pieces(context: StageContext) -> dict[int, int]:
    """Of each block of the stage with experts, how many."""
    stage, counts = context.stage, dict[int, int]()
    for number in map(block_number, (*stage.blocks, *stage.lookahead)):
        model = context.config.model.at(number)
        counts[number] = len(model.ffn.pieces(model))
    return {number: count for number, count in counts.items() if count}


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
        source, routes = more.pop(ROUTES, None), None  # rows are ordered by it; batches need none of it
        if source is not None:
            routes = Routes(partial(_reached, source), sum(_pieces(context).values()))
        entered = replace(context, routes=routes, feed=replace(context.feed, sources={**context.feed.sources, **more}))
        if routes is not None and context.ranks.main:
            _emit_routes(entered, routes, swapped=model is None)
        yield entered
    if context.ranks.main:
        for boundary in boundaries:
            context.store.drop(boundary)


def _reached(source: RowSource, rows_N: np.ndarray) -> np.ndarray:
    return np.asarray(source.read(rows_N).flatten(1).numpy() > 0)


def _emit_routes(context: StageContext, routes: Routes, *, swapped: bool) -> None:
    """Emit how many experts a step's rows reach together, with the weights that the stage begins with."""
    job, settings, order = context.job, context.settings, row_order(context)
    step_rows = settings.batch_size * settings.accumulation
    of = partial(routes.of_steps, first=job.rows_begin, steps=job.span.length, step_rows=step_rows)
    counts, by_chance = of(order), None
    reached = statistics.fmean(counts)
    if settings.routes == "order":
        by_chance = statistics.fmean(of(row_order(replace(context, routes=None))))
    state = Estimate(context.config, job.vocab_size, context.stage, context.device.type).pieces_bytes
    read = round(reached * state / routes.pieces) if swapped and state else None
    context.event("routes", step=0, first=counts[0], reached=reached, of=routes.pieces, by_chance=by_chance, bytes=read)


def _written(context: StageContext, model: StageModel | None, past: _Asked) -> Hex:
    """The boundary with what a stage is asked for of its rows."""
    job, config, rowset = context.job, context.config, context.feed.rowset
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
    pace = Pace()

    def progress(done: int, total: int) -> None:
        if pace.due():
            context.event("boundary", done=done, total=total)

    with context.store.writer(spec) as writer:
        if writer.info.state != "complete":
            context.event(past.emits, rows=rowset.rows)
            stages = _by_groups(context, past) if model is None else [_saying(model, past)]
            control = PassControl(progress, context.stop)
            done = write_boundary(stages, context.feed, writer, context.device, control=control)
            if model is not None:
                _watch(None, model)
            if not done.finished:
                raise InterruptedRun("stopped while a stage went over its new rows", hint=RESUME)
            writer.finish(done.seconds)
    return writer.info.id


def _saying(model: StageModel, past: _Asked) -> StageModel:
    """A stage that says what it is asked for, of the same modules."""
    assert isinstance(model.head, Head), "a stage that trains has a head"
    above = past.above(model.head)
    _watch(above, model)
    blocks = [*model.blocks, *model.beyond, above]
    return StageModel(model.front, blocks, None, model.objective, model.precision)


def _watch(above: nn.Module | None, part: nn.Module) -> None:
    """Have the routers of a part say what they choose, where that is asked for, and no more where it is not."""
    for module in part.modules():
        if hasattr(module, "routed"):
            setattr(module, "routed", above.note if isinstance(above, RouteCounts) else None)  # noqa: B010


class _WatchedParts(JobParts):
    """Parts whose routers say what they choose."""

    above: nn.Module

    def make(self, name: str, *arguments: Any, whole: bool = True) -> nn.Module:
        part = super().make(name, *arguments, whole=whole)
        _watch(self.above, part)
        return part


def _by_groups(context: StageContext, past: _Asked) -> MakeOutputs:
    """The same of a stage of which one group is in memory at a time, and the head."""
    job, config, device = context.job, context.config, context.device
    grouping = Estimate(config, job.vocab_size, job.stage, device.type).grouping(
        int(describe(device)["memory"]), host_total()
    )
    assert grouping is not None, "a stage that is not in memory goes in groups"
    below = _WatchedParts(job, config, {part: source for part, source in job.initial.items() if part != HEAD})
    whole = JobParts(job, config, job.initial)
    embedding_VD = whole.make(FRONT, None).get_parameter("embedding.weight").detach() if whole.tied else None
    head = whole.make(HEAD, None, embedding_VD)
    assert isinstance(head, Head)
    says = below.above = past.above(head).to(device).eval()
    row_bytes = 4 * config.row_positions * config.model.d_model
    make = grouped_outputs(below, grouping.groups, row_bytes, grouping.boundaries, most_pieces=grouping.pieces)

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
