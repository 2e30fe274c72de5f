"""Tasks to adapt to (meta-learning): which one each microbatch is of, and what its rows are.

A task is a pure function of the seed and its number, and so is which task a microbatch has: nothing is remembered. And
inner steps: weights that adapt to a task's support rows, and the gradient that makes this quick. Sources: MAML and its
first-order form (Finn et al., arXiv 1703.03400); Reptile (Nichol et al., arXiv 1803.02999). Adapted weights are tensors
beside the model's own, which it runs with through `torch.func.functional_call`.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from stackwise.batch import TOKENS, Batch, Term
from stackwise.config.continual import Meta
from stackwise.identity import generator
from stackwise.model import Head
from stackwise.objectives.cross_entropy import ProjectionHead, whole_graph
from stackwise.store import RowOrder
from stackwise.store.order import Rows
from stackwise.training.optim import steered_in
from stackwise.training.phases import BACKWARD, FORWARD, PhaseClock
from stackwise.training.stage import StageModel, StepLoss

if TYPE_CHECKING:
    from stackwise.training.feed import Feed


EPISODES = 4
"""Times that a task held out is adapted to at most, each time from other rows."""
KEPT = 256  # tables of tasks in memory


@dataclass(frozen=True)
class Tasks(abc.ABC):
    """The tasks of a stage: training ones count from 0, those held out follow.

    Args:
        meta: How they are learned.
        seed: What they are drawn by.
        rows: In a microbatch: support and query.
    """

    meta: Meta
    seed: int
    rows: int

    @property
    @abc.abstractmethod
    def training(self) -> int:
        """How many are trained on."""

    @property
    @abc.abstractmethod
    def held(self) -> int:
        """How many are held out."""

    @abc.abstractmethod
    def order(self, plain: RowOrder) -> RowOrder:
        """The order in which rows are taken, where `plain` is that without tasks."""

    @abc.abstractmethod
    def rows_of(self, task: int, feed: Feed) -> Rows:
        """The rows of a feed that a task may have."""

    @abc.abstractmethod
    def show(self, batch: Batch, task: int) -> Batch:
        """Rows as a task has them."""

    def at(self, microbatch: int) -> tuple[int, int]:
        """The training task of a microbatch, counted from the stage's first, and how often it was before.

        Each comes once before one comes again.
        """
        turn, place = divmod(microbatch, self.training)
        return int(_turn(self.seed, turn, self.training)[place]), turn

    def of_microbatch(self, batch: Batch, microbatch: int) -> Batch:
        """The rows of a microbatch as its task has them."""
        return self.show(batch, self.at(microbatch)[0])

    def held_out(self, feed: Feed, share: int = 0, shares: int = 1) -> Iterator[Batch]:
        """Rows of tasks that training never has, in microbatches: several of each task, with no sample twice.

        Args:
            feed: The held-out rows.
            share: Which of the shares is asked for: each has every so-many-th microbatch.
        """
        number, ids_R = 0, np.ascontiguousarray(feed.rowset.sample_ids).view("V16").ravel()
        for task in range(self.training, self.training + self.held):
            order = generator(self.seed, "held-out rows", task).permutation(self.rows_of(task, feed))
            _, first = np.unique(ids_R[order], return_index=True)  # of a sample under several masks one
            chosen = order[np.sort(first)]
            for episode in range(min(EPISODES, len(chosen) // self.rows)):
                if number % shares == share:
                    yield self.show(feed.batch(chosen[episode * self.rows : (episode + 1) * self.rows]), task)
                number += 1


@dataclass(frozen=True)
class PermutedTasks(Tasks):
    """Tasks in each of which other tokens stand for each other.

    Args:
        used_U: The ids that tasks permute, sorted: those that occur in the data, and no separator.
        vocab_size: Ids in all.
    """

    used_U: NDArray[np.int64]
    vocab_size: int
    _tables: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def training(self) -> int:
        return self.meta.permutations

    @property
    def held(self) -> int:
        return self.meta.tasks_held_out(by_data=False)

    def order(self, plain: RowOrder) -> RowOrder:
        """See `Tasks.order`: every task may have any row."""
        return plain

    def rows_of(self, task: int, feed: Feed) -> Rows:
        return np.arange(feed.rowset.rows)

    def show(self, batch: Batch, task: int) -> Batch:
        """See `Tasks.show`: other tokens."""
        tokens_BS = self.table(task)[batch[TOKENS].long()].to(batch[TOKENS].dtype)
        return replace(batch, tensors={**batch.tensors, TOKENS: tokens_BS})

    def table(self, task: int) -> Tensor:
        """What stands for each id in a task, int64 [V]."""
        known = self._tables.get(task)
        if known is None:
            draw = generator(self.seed, "task", task)
            chosen = max(2, round(self.meta.permuted * len(self.used_U)))
            among = np.sort(draw.permutation(self.used_U)[:chosen])
            table = np.arange(self.vocab_size)
            table[among] = draw.permutation(among)
            while len(self._tables) >= KEPT:
                self._tables.pop(next(iter(self._tables)))
            known = self._tables[task] = torch.from_numpy(table)
        return known


@dataclass(frozen=True)
class DataTasks(Tasks):
    """Tasks that are data sets (`data.tasks`): the last ones are held out.

    Args:
        task_R: For each row of the feed its task.
        count: Tasks in all.
    """

    task_R: NDArray[np.int64]
    count: int

    @property
    def training(self) -> int:
        return self.count - self.held

    @property
    def held(self) -> int:
        return self.meta.tasks_held_out(by_data=True)

    def order(self, plain: RowOrder) -> RowOrder:
        """See `Tasks.order`: a microbatch's rows are of one task."""
        return TaskOrder(plain, self)

    def rows_of(self, task: int, feed: Feed) -> Rows:
        return np.flatnonzero(self.task_R == task)

    def show(self, batch: Batch, task: int) -> Batch:
        """See `Tasks.show`: as they are."""
        return batch


class TaskOrder(RowOrder):
    """Rows of one task after another: a task's rows all come once before one comes again, but for an incomplete rest.

    Args:
        plain: The order without tasks.
        tasks: Which rows are whose; each training task has a microbatch of them at least.
    """

    def __init__(self, plain: RowOrder, tasks: DataTasks) -> None:
        super().__init__(
            plain.rows,
            **plain.settings(),
            select=np.flatnonzero(tasks.task_R < tasks.training),
        )
        self._tasks = tasks
        self._rows_of = [np.flatnonzero(tasks.task_R == task) for task in range(tasks.training)]
        self._passes: dict[int, tuple[int, Rows]] = {}  # of each task the newest pass over its rows

    def at(self, start: int, stop: int) -> Rows:
        """Rows int64 [stop - start] at these positions."""
        size, parts = self._tasks.rows, list[Rows]()
        while start < stop:
            microbatch, offset = divmod(start, size)
            parts.append(self._microbatch(microbatch)[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def window_rows(self, position: int) -> tuple[Rows, int]:
        """The rows of the microbatch that holds `position`, and the position after its last row."""
        microbatch = position // self._tasks.rows
        return self._microbatch(microbatch), (microbatch + 1) * self._tasks.rows

    def _microbatch(self, number: int) -> Rows:
        (task, before), size = self._tasks.at(number), self._tasks.rows
        rows = self._rows_of[task]
        turn, place = divmod(before, len(rows) // size)
        known = self._passes.get(task)
        if known is None or known[0] != turn:
            known = self._passes[task] = turn, generator(*self.seed, "task", task, turn).permutation(rows)
        return known[1][place * size : (place + 1) * size]


@lru_cache(maxsize=4)
def _turn(seed: int, turn: int, tasks: int) -> NDArray[np.int64]:
    return generator(seed, "tasks", turn).permutation(tasks)


Weights = Mapping[str, Tensor]

ADAPTATION = "adaptation"
"""What is looked at on tasks held out: the query loss before the inner steps and after each, in nats."""


class Adaptation:
    """What a stage's weights become by a few steps on a task's support rows.

    A task is a microbatch: its first `meta.support` rows, and the query rows after them.

    Args:
        parameters: Those that adapt, by their name in the model; what a rule moves (`steered`) is frozen.
        device: Where the model computes.
    """

    def __init__(
        self, model: StageModel, meta: Meta, parameters: Mapping[str, nn.Parameter], device: torch.device
    ) -> None:
        self._model, self._meta, self._device = model, meta, device
        ruled = steered_in([model])
        self._parameters = {name: p for name, p in parameters.items() if id(p) not in ruled}
        projection = model.head.weight if isinstance(model.head, Head) and model.head.tied else None
        self._tied = next((name for name, p in self._parameters.items() if p is projection), None)

    def query(self, task: Batch) -> Batch:
        """The rows that judge."""
        return task.part(self._meta.support, len(task.rows_B))

    def gradient(self, task: Batch, losses: StepLoss, phases: PhaseClock) -> dict[str, Term]:
        """Add the gradient of one task to the parameters.

        MAML: of the query loss at the adapted weights, with respect to the weights before them. First-order MAML takes
        it at the adapted weights as if inner steps had no slope; Reptile adds the inner steps' own gradients, so that
        it is (weights before - weights after a last step on the query rows) / inner rate.

        Returns:
            The terms of the query loss at the adapted weights.
        """
        support, query = task.part(0, self._meta.support), self.query(task)
        weights: Weights = self._parameters
        slopes: dict[str, Tensor] = {}
        with self._differentiable():
            for _ in range(self._meta.inner_steps):
                inner = self._slopes(weights, support, phases, through=self._meta.second_order)
                weights = self._moved(weights, inner)
                if self._meta.adds_steps:
                    slopes = {name: slope + slopes[name] if slopes else slope for name, slope in inner.items()}
            with phases(FORWARD):
                terms = self._terms(weights, query)
                root = losses.root(terms, query)
            with phases(BACKWARD):
                root.backward()  # type: ignore[no-untyped-call]
        share = losses.portion(terms)
        for name, slope in slopes.items():
            p = self._parameters[name]
            p.grad = slope * share if p.grad is None else p.grad.add_(slope, alpha=share)
        return terms

    def judged(self, task: Batch) -> dict[str, Term]:
        """The terms of the query loss at the adapted weights, and `ADAPTATION` beside them; no parameter changes."""
        support, query = task.part(0, self._meta.support), self.query(task)
        weights, curve, count = dict[str, Tensor](self._parameters), list[Tensor](), 1
        for step in range(self._meta.inner_steps + 1):
            with torch.no_grad():
                terms = self._terms(weights, query)
            count = next(iter(terms.values())).count
            curve.append(_mean(terms).detach() * count)
            if step < self._meta.inner_steps:
                with torch.enable_grad(), self._differentiable():
                    inner = self._slopes(weights, support, None, through=False)
                weights = {name: w.detach().requires_grad_() for name, w in self._moved(weights, inner).items()}
        return {**terms, ADAPTATION: Term(torch.stack(curve), count)}

    def _slopes(
        self, weights: Weights, support: Batch, phases: PhaseClock | None, *, through: bool
    ) -> dict[str, Tensor]:
        """The gradient of the mean loss on support rows at some weights; of those alone that it reaches.

        Args:
            through: Whether it has a gradient itself.
        """
        forward = contextlib.nullcontext() if phases is None else phases(FORWARD)
        backward = contextlib.nullcontext() if phases is None else phases(BACKWARD)
        with forward:
            loss = _mean(self._terms(weights, support))
        if not loss.requires_grad:  # no position of these rows is scored
            return {}
        with backward:
            slopes: Sequence[Tensor | None] = torch.autograd.grad(
                loss, list(weights.values()), create_graph=through, allow_unused=True
            )
        return {name: slope for name, slope in zip(weights, slopes, strict=True) if slope is not None}

    def _moved(self, weights: Weights, slopes: Weights) -> dict[str, Tensor]:
        rate = self._meta.inner_rate
        return {name: w.sub(slopes[name], alpha=rate) if name in slopes else w for name, w in weights.items()}

    def _terms(self, weights: Weights, batch: Batch) -> dict[str, Term]:
        changed = dict(weights)
        if self._tied is not None:  # a tied projection is no parameter of the head
            changed["head.projection"] = changed[self._tied]
        with self._model.numerics(self._device):
            terms: dict[str, Term] = functional_call(self._model, changed, (batch,))
        return terms

    @contextlib.contextmanager
    def _differentiable(self) -> Iterator[None]:
        """Kernels whose gradients have gradients, where those are needed."""
        with contextlib.ExitStack() as stack:
            if self._meta.second_order:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # What is recomputed in a backward pass would be so with the model's own weights.
            if self._meta.second_order or not isinstance(self._model.head, ProjectionHead):
                stack.enter_context(whole_graph())
            yield


def _mean(terms: Mapping[str, Term]) -> Tensor:
    """The loss of a batch: the sum of its terms' means, each times its weight."""
    weighed = [term.sum * (term.weight / max(1, term.count)) for term in terms.values() if not term.sum.ndim]
    return torch.stack([part.to(weighed[0].dtype) for part in weighed]).sum()
