"""A teacher's numbers for the rows of a stage: written where they are missing, then read beside everything else."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from stackwise.batch import ACTIVATIONS, Batch
from stackwise.data import PreparedData
from stackwise.durable import FileLock
from stackwise.errors import InterruptedRun
from stackwise.identity import Hex
from stackwise.model.rack import Head
from stackwise.objectives import RuntimeObjective, make_objective
from stackwise.objectives.distillation import LikeliestTokens
from stackwise.objectives.objective import Outputs
from stackwise.objectives.preferences import side_log_probabilities
from stackwise.pipeline.committed.partwise import PartwiseCapture, Progress
from stackwise.pipeline.events import Pace
from stackwise.pipeline.job import Source
from stackwise.pipeline.parts import load_part, make_head
from stackwise.pipeline.recipe import boundary_chunk_rows
from stackwise.pipeline.schedule import FRONT, HEAD
from stackwise.pipeline.teacher import DIFFICULTY, LOGITS, REFERENCE, Teacher, judge_of, teacher_of
from stackwise.pipeline.worker.training import RESUME, StageContext
from stackwise.store import BoundarySpec
from stackwise.training.curriculum import RowLosses
from stackwise.training.feed import Feed, RowSource
from stackwise.training.forward import PassControl, forward_rows, write_boundary
from stackwise.training.stage import StageModel

Shape = tuple[int, int]  # positions and numbers at each


@contextlib.contextmanager
def beside_teacher(context: StageContext) -> Iterator[StageContext]:
    """The same work, its feeds bringing what the stage is drawn to.

    The teacher goes over the rows part by part before the stage is in memory, and not again for the same rows.

    Raises:
        InterruptedRun: Told to stop; what was written stays.
    """
    config, job = context.config, context.job
    data = PreparedData.open(Path(job.data)).id
    teacher = teacher_of(config, job.vocab_size, job.mask_token, data) if job.train else None
    judge = judge_of(config, job.stage, job.vocab_size, job.mask_token, data) if job.train else None
    if teacher is None and judge is None:
        yield context
        return
    with contextlib.ExitStack() as stack:
        feed, held_out = context.feed, context.held_out
        for rank in range(context.ranks.size):  # what the first has written, the others find
            if rank == context.ranks.rank:
                if judge is not None:  # held-out rows have no order
                    feed = _Lesson(context, judge).added(stack, feed)
                if teacher is not None:
                    lesson = _Lesson(context, teacher)
                    feed = lesson.added(stack, feed)
                    held_out = None if held_out is None else lesson.added(stack, held_out)
            context.ranks.wait()
        gc.collect()
        yield replace(context, feed=feed, held_out=held_out)


class _Lesson:
    """One stage's: what of the teacher it needs, and for which rows."""

    def __init__(self, context: StageContext, teacher: Teacher) -> None:
        self._context, self.teacher = context, teacher
        self._config = teacher.config.model_copy(update={"device": context.device.type})
        self._pace = Pace(at_once=True)

    def added(self, stack: contextlib.ExitStack, feed: Feed) -> Feed:
        """A feed with the teacher's sources beside its own."""
        context, teacher = self._context, self.teacher
        sources = dict(feed.sources)
        context.event("teacher", model=str(teacher.checkpoint.directory), rows=feed.rowset.rows)
        for name, trunk in teacher.inputs(context.stage).items():
            if name == LOGITS:
                boundary = self._of_head(feed, trunk, _likeliest, (feed.seq_len, 2 * teacher.top_k))
            elif name == REFERENCE:
                boundary = self._of_head(feed, trunk, _Said, (2, 1))
            elif name == DIFFICULTY:
                boundary = self._of_head(feed, trunk, _losses, (1, 1))
            else:
                boundary = self._hidden(feed, teacher.depth(context.stage))
            reader = stack.enter_context(context.store.reader(boundary))
            sources[name] = RowSource(boundary, reader.read)
        return replace(feed, sources=sources)

    def _hidden(self, feed: Feed, depth: int) -> Hex:
        """The boundary with the hidden states at a depth."""
        context, teacher, job = self._context, self.teacher, self._context.job
        tokens = replace(feed, sources={n: source for n, source in feed.sources.items() if n != ACTIVATIONS})
        trunks = [teacher.trunk(below) for below in range(depth + 1)]
        lock = Path(job.store) / "locks" / f"work-{trunks[-1]}.lock"
        with FileLock(lock, "the same teacher"):
            work = PartwiseCapture(
                teacher.checkpoint,
                self._config,
                context.store,
                tokens,
                trunks,
                forward_rows(feed.seq_len),
                self._report,
                context.stop,
                objective=self.objective(),
            )
            return work.run([depth]).boundaries[depth].id

    def _of_head(self, feed: Feed, trunk: Hex, make: Callable[[Head, _Lesson], nn.Module], shape: Shape) -> Hex:
        """The boundary of a shape a row with what a module above the head says, made of the last hidden states."""
        context, teacher = self._context, self.teacher
        store, rowset = context.store, feed.rowset
        spec = BoundarySpec(
            trunk=trunk,
            rowset=rowset.id,
            depth=teacher.n_blocks + 1,
            seq_len=shape[0],
            d_model=shape[1],
            codec="fp32",  # an id must stay whole
            chunk_rows=boundary_chunk_rows(self._config, rowset.rows),
        )
        with store.writer(spec) as writer:
            store.register_run(f"teacher {writer.info.id}", recipes=[], boundaries=[writer.info.id])
            if writer.info.state == "complete":
                return writer.info.id
            hidden = self._hidden(feed, teacher.n_blocks)
            module = make(self._head(), self)
            head = StageModel(None, [module], None, self.objective(), self._config.precision)
            with store.reader(hidden) as reader:
                above = feed.above(RowSource(hidden, reader.read, reader.stream))
                control = PassControl(
                    lambda done, total: self._report(Progress("the teacher's tokens", done, total)), context.stop
                )
                frozen = [head.requires_grad_(False).to(context.device)]
                done = write_boundary(frozen, above, writer, context.device, control=control)
            if not done.finished:
                raise InterruptedRun("stopped while a teacher's tokens were written", hint=RESUME)
        return writer.info.id

    def objective(self) -> RuntimeObjective:
        job, config = self._context.job, self._context.config
        return make_objective(config.training, job.mask_token, self.teacher.vocab_size, config.seed)

    def _head(self) -> Head:
        checkpoint, config = self.teacher.checkpoint, self._config

        def source(part: str) -> Source:
            return Source(str(checkpoint.directory), checkpoint.digest(part), names=checkpoint.names(part))

        embedding = None
        if config.model.tie_embeddings:
            front = load_part(source(FRONT), self.teacher.vocab_size)
            assert front is not None
            embedding = front["embedding.weight"].float()
        return make_head(config, self.teacher.vocab_size, source(HEAD), embedding, projects=False)

    def _report(self, progress: Progress) -> None:
        if self._context.stop():
            raise InterruptedRun("stopped while the teacher went over the rows", hint=RESUME)
        if self._pace.due():
            self._context.event("boundary", done=progress.done, total=progress.total)


def _likeliest(head: Head, lesson: _Lesson) -> nn.Module:
    """The likeliest tokens of those that the student knows."""
    return LikeliestTokens(head, lesson.teacher.top_k, lesson.teacher.shared_ids)


def _losses(head: Head, lesson: _Lesson) -> nn.Module:
    """The loss of each row."""
    return RowLosses(head, lesson.objective())


class _Said(nn.Module):
    """The log-probability of each answer: from the sides of pairs [2 B, L, D] to [2 B, 1, 1]."""

    def __init__(self, head: Head, lesson: _Lesson) -> None:
        super().__init__()
        self.head, self._objective = head, lesson.objective()
        self._batch: Batch | None = None

    def prepare(self, batch: Batch) -> None:
        """Take note of the rows that come next."""
        self._batch = batch

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The sum over each side's answer."""
        assert self._batch is not None, "a stage prepares its modules before each pass"
        rows = x_BLD.reshape(len(self._batch.tokens_BS), -1, x_BLD.shape[-1])
        said_B2, _ = side_log_probabilities(self._objective, Outputs(rows, self.head), self._batch)
        return said_B2.reshape(-1, 1, 1)
