"""What a worker holds: the parts of one stage, and how a batch runs through them.

Shapes: B rows, S positions, D model width.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stackwise.batch import ACTIVATIONS, SEGMENTS, TASKS, Batch, Term
from stackwise.config.model import Direction
from stackwise.errors import StackWiseError, UsageError
from stackwise.model import Block, Stack, enter
from stackwise.objectives import RuntimeObjective
from stackwise.objectives.objective import Outputs
from stackwise.training.anchor import EWC
from stackwise.training.ranks import Ranks

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the precisions that are computed in by autocast


class StageModel(nn.Module):
    """The front (in a stage that reads tokens), the blocks and the head of one stage.

    Args:
        front: Tokens to activations; None in a stage that reads a boundary.
        blocks: Those that the stage hands on, in order: StackWise's own, or any modules from [B, S, D] to the same.
            Only the former are told the attention's direction and the documents.
        head: Activations at scored positions to logits; None in a stage that only passes activations on.
        precision: "fp32", "fp64", or "bf16" or "fp16": autocast, with the residual stream in the same.
        beyond: Further blocks between `blocks` and the head, which only the loss goes through.
    """

    def __init__(
        self,
        front: nn.Module | None,
        blocks: Sequence[nn.Module],
        head: nn.Module | None,
        objective: RuntimeObjective,
        precision: str,
        beyond: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.front, self.blocks, self.head = front, nn.ModuleList(blocks), head
        self.beyond = nn.ModuleList(beyond)
        self.objective, self.precision = objective, precision
        self.recomputed_every = 0
        """Of how many blocks one keeps only what enters it, and is recomputed in the backward pass; 0: none."""
        self.stream_dtype = NARROW.get(precision, torch.float64 if precision == "fp64" else torch.float32)

    @property
    def in_half(self) -> bool:
        """Whether something of it computes in fp16, whose gradients need a scale."""
        blocks = (*self.blocks, *self.beyond)
        return self.precision == "fp16" or any(getattr(block, "compute", None) is torch.float16 for block in blocks)

    def run(self, batch: Batch, terms: Mapping[str, Term] | None = None) -> tuple[Tensor, dict[str, Term]]:
        """The activations that leave the last block handed on, [B, S, D], and the terms of the blocks so far.

        Args:
            terms: Those of the blocks below, which they are added to; None: none.
        """
        if self.front is not None:
            objective = self.objective
            shown, times, sequences = objective.shown(batch), objective.times(batch), objective.sequences
            times = times if sequences == 1 else times.repeat_interleave(sequences, 0)
            tasks = batch.tensors.get(TASKS)
            x_BSD = enter(self.front, _apart(shown, sequences), times, causal=objective.causal, tasks=tasks)
            x_BSD = _together(x_BSD, len(shown))
            terms = added(terms or {}, of_weights(self.front, x_BSD))
        else:
            x_BSD = batch[ACTIVATIONS]
        return self._run_blocks(self.blocks, x_BSD.to(self.stream_dtype), batch, terms or {})

    def activations(self, batch: Batch) -> Tensor:
        """The activations that leave the last block handed on, [B, S, D]."""
        return self.run(batch)[0]

    def forward(self, batch: Batch, terms: Mapping[str, Term] | None = None) -> dict[str, Term]:
        """The terms of the loss of a batch: those of its objective, then those of its blocks (`terms`: see `run`)."""
        assert self.head is not None, "a stage without a head has no loss"
        x_BSD, of_blocks = self.run(batch, terms)
        x_BSD, of_blocks = self._run_blocks(self.beyond, x_BSD, batch, of_blocks)
        scored = self.objective.loss(Outputs(x_BSD, self.head), batch)
        return added(scored, added(of_blocks, of_weights(self.head, x_BSD)))

    def _run_blocks(
        self, blocks: nn.ModuleList, x_BSD: Tensor, batch: Batch, below: Mapping[str, Term]
    ) -> tuple[Tensor, dict[str, Term]]:
        objective, segments_BS = self.objective, batch.tensors.get(SEGMENTS)
        causal, rows, terms = objective.causal, len(x_BSD), dict(below)
        x_BSD = _apart(x_BSD, objective.sequences)
        segments_BS = None if segments_BS is None else _apart(segments_BS, objective.sequences)
        every = self.recomputed_every if torch.is_grad_enabled() else 0
        for place, block in enumerate(blocks):
            call = _Call(block, batch, causal, segments_BS)
            if every and place % every == 0:
                x_BSD, handed_up = checkpoint(call, x_BSD, use_reentrant=False, preserve_rng_state=call.draws)
            else:
                x_BSD, handed_up = call(x_BSD)
            for of_module in handed_up:
                terms = added(terms, _checked(of_module, x_BSD))
            terms = added(terms, of_weights(block, x_BSD))
        return _together(x_BSD, rows), terms

    @contextlib.contextmanager
    def numerics(self, device: torch.device) -> Iterator[None]:
        """The precision that the stage computes in."""
        with torch.autocast(device.type, dtype=NARROW.get(self.precision), enabled=self.precision in NARROW):
            yield


class _Call:
    """A block as a batch goes through it: in the backward pass again, when other batches have been through since."""

    def __init__(self, block: nn.Module, batch: Batch, causal: Direction, segments_BS: Tensor | None) -> None:
        self._block, self._batch, self._modules = block, batch, list(block.modules())
        self._options: dict[str, Any] = {}
        if isinstance(block, Block | Stack):
            self._options = {"causal": causal, "segments_BS": segments_BS}

    @property
    def draws(self) -> bool:
        """Whether it may draw random numbers, which must be the same when it is recomputed."""
        return not self._options or any(getattr(module, "dropout", 0.0) for module in self._modules)

    def __call__(self, x_BSD: Tensor) -> tuple[Tensor, list[Mapping[str, Term]]]:
        """What leaves it, and the terms of its modules: what it leaves of them when recomputed counts nowhere."""
        for module in self._modules:
            if callable(prepare := getattr(module, "prepare", None)):
                prepare(self._batch)
        try:
            x_BSD = self._block(x_BSD, **self._options)
            return x_BSD, [terms for module in self._modules if (terms := getattr(module, "terms", None))]
        finally:  # also where it ends early, as all that the backward pass needs is there again
            for module in self._modules:
                if getattr(module, "terms", None):
                    module.terms = {}  # type: ignore[assignment]  # its graph must not outlive the step


@contextlib.contextmanager
def casts_held(device: torch.device) -> Iterator[None]:
    """Within it, autocast casts a weight once, whatever the number of passes; the weights must stay as they are.

    Autocast keeps its copies until the outermost context is left: this is one, which itself casts nothing.
    """
    with torch.autocast(device.type, enabled=False):
        yield


SHAPES = 64
"""Shapes of batches that blocks are compiled for; beyond them the compiler would give up, and numbers would change."""


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Let blocks be compiled as they are first called: once for each shape, for all that are alike."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = SHAPES
    for block in blocks:
        block.compile(dynamic=False)


def of_weights(module: nn.Module, x_BSD: Tensor) -> Mapping[str, Term]:
    """The loss of a part's weights in training, where it is held to what it was (`anchor.Anchored`)."""
    anchored = getattr(module, "anchored", None)
    if anchored is None or not module.training:
        return {}
    return {EWC: anchored.term(module, x_BSD.shape[0] * x_BSD.shape[1])}


def _apart(rows: Tensor, sequences: int) -> Tensor:
    """The sequences of each row as rows of their own: [B, S, …] to [B n, S / n, …]."""
    return rows if sequences == 1 else rows.reshape(-1, rows.shape[1] // sequences, *rows.shape[2:])


def _together(x_BSD: Tensor, rows: int) -> Tensor:
    """The other way round."""
    return x_BSD if len(x_BSD) == rows else x_BSD.reshape(rows, -1, x_BSD.shape[2])


def added(some: Mapping[str, Term], more: Mapping[str, Term]) -> dict[str, Term]:
    """Terms of blocks brought together: of one name, sums are added up and the positions are the same.

    Raises:
        UsageError: Two of one name count or weigh differently.
    """
    terms = dict(some)
    for name, term in more.items():
        if (before := terms.get(name)) is not None:
            if (before.count, before.weight) != (term.count, term.weight):
                raise UsageError(f"two losses are called {name}, with other counts or weights: give one another name")
            term = replace(term, sum=before.sum + term.sum)
        terms[name] = term
    return terms


def _checked(terms: Mapping[str, Term], x_BSD: Tensor) -> Mapping[str, Term]:
    positions = x_BSD.shape[0] * x_BSD.shape[1]
    for name, term in terms.items():
        if term.count != positions:  # or the step's count could not be known before the pass
            raise UsageError(f"the loss {name} of a block counts {term.count}, not the {positions} positions it saw")
    return terms


@dataclass(frozen=True)
class MeanLoss:
    """A loss over many batches."""

    total: float  # the sum of the terms' means, each times its weight, in nats
    terms: Mapping[str, float] = field(default_factory=dict)  # the means by name, where there are several
    observed: Mapping[str, Sequence[float]] = field(default_factory=dict)  # means of what is only looked at


class Microbatches:
    """The microbatches of one step, each taken from where it comes from when its turn is: none waits for the last."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._source, self._held = iter(batches), deque[Batch]()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._held.popleft() if self._held else next(self._source)

    def following(self) -> Sequence[Batch]:
        """All those still to come, which are held until their turns."""
        self._held.extend(self._source)
        return tuple(self._held)


class StepLoss:
    """The loss of one step: what the terms of its microbatches are multiplied by, and what they come to.

    A single term is divided by its microbatch's tokens; the step's gradient is multiplied by `share` at the end, when
    the true count is known. Of several terms each is divided by its count in the whole step, which follows from masks
    and shapes ahead of the passes: so the gradient is that of the sum of their means, however rows are divided.

    Args:
        following: The microbatches after the first; asked for once, where the loss has several terms.
        scale: Factor on the loss while gradients are taken (half precision).
    """

    def __init__(
        self,
        objective: RuntimeObjective,
        following: Callable[[], Sequence[Batch]],
        device: torch.device,
        ranks: Ranks,
        scale: float = 1.0,
    ) -> None:
        self._objective, self._following, self._device = objective, following, device
        self._ranks, self._scale = ranks, scale
        self.tokens = 0
        """Those of the newest microbatch."""
        self._values: dict[str, list[Tensor]] = {}  # the sum of each microbatch of this rank
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._weights: dict[str, float] = {}
        self.ahead: dict[str, int] | None = None
        """The counts in the whole step of several terms; empty: there is one term. None: no term was seen yet."""
        self.sum_ahead = ranks.sum_counts
        """What sums up counts over the ranks that call `root`."""

    def root(self, terms: Mapping[str, Term], batch: Batch) -> Tensor:
        """What the gradient of a microbatch is taken of. The first call has every term that there is."""
        self.tokens = batch.tokens_BS.numel()
        if self.ahead is None:
            self.ahead = self._counted_ahead(terms, batch)
        if self.ahead:
            weighed = {name: term for name, term in terms.items() if not term.sum.ndim}
            divided = [term.sum * (term.weight / max(1, self.ahead[name])) for name, term in weighed.items()]
            return torch.stack([part.to(divided[0].dtype) for part in divided]).sum() * self._scale
        (term,) = terms.values()
        return (term.sum if self._scale == 1.0 else term.sum * self._scale) / self.tokens

    def portion(self, terms: Mapping[str, Term]) -> float:
        """What a gradient of the mean loss of the microbatch last given to `root` counts, among the step's."""
        name, term = next(iter(terms.items()))
        return self._scale * term.count / (max(1, self.ahead[name]) if self.ahead else self.tokens)

    def add(self, terms: Mapping[str, Term]) -> None:
        """Add up a microbatch's terms, all of them."""
        for name, term in terms.items():
            self._values.setdefault(name, []).append(term.sum.detach())
            self._counts[name] = self._counts.get(name, 0) + term.count
            self._weights[name] = term.weight

    def finish(self) -> None:
        """After the last microbatch.

        Raises:
            StackWiseError: An objective's terms counted otherwise than it said ahead.
        """
        for name, count in (self.ahead or {}).items():
            if self._ranks.shares == 1 and self._counts[name] != count:
                raise StackWiseError(
                    f"objective {self._objective.name}: its term {name} counted {self._counts[name]}, not {count}",
                    hint="its `counts` and `loss` must agree",
                )
        self._counts = self._ranks.sum_counts(self._counts)
        for name, values in self._values.items():
            total = self._sums[name] = torch.zeros(values[0].shape, device=self._device)
            for value in self._ranks.in_order(torch.stack(values)):
                total += value

    @property
    def several(self) -> bool:
        """Whether there are several terms."""
        return bool(self.ahead)

    @property
    def scored(self) -> bool:
        """Whether anything was."""
        return any(self._counts.values())

    @property
    def share(self) -> float | None:
        """What the gradients of all microbatches, added up, are multiplied by; None: they stand as they are."""
        if self.ahead:
            return None if self._scale == 1.0 else 1.0 / self._scale
        (scored,) = self._counts.values()
        return self.tokens / scored / self._scale if scored else None

    def means(self) -> dict[str, Tensor]:
        """The mean of each term, in nats (of what is only looked at, in its unit), on the device."""
        return {name: total / max(self._counts[name], 1) for name, total in self._sums.items()}

    def total(self) -> Tensor:
        """The step's loss: the sum of the means, each times its weight."""
        means = self.means()
        if not self.ahead:
            return next(iter(means.values()))
        weighed = [mean * self._weights[name] for name, mean in means.items() if not mean.ndim]
        return torch.stack(weighed).sum()

    def _counted_ahead(self, terms: Mapping[str, Term], batch: Batch) -> dict[str, int]:
        if len(terms) == 1 and next(iter(terms.values())).weight == 1.0:
            return {}
        counts = dict.fromkeys(terms, 0)
        for one in (batch, *self._following()):
            known = self._objective.counts(one)
            for name, term in terms.items():
                # A block's term counts positions, in every microbatch as many for a token.
                positions = term.count * one.tokens_BS.numel() // batch.tokens_BS.numel()
                counts[name] += known.get(name, positions)
        return self.sum_ahead(counts)


class Tally:
    """The means of terms over many batches, every N-th of them of one rank; added up in float64, in their order."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Any]] = {}  # a number of each batch, or a list of them
        self._counts: dict[str, int] = {}
        self._weights: dict[str, float] = {}

    def add(self, terms: Mapping[str, Term]) -> None:
        """Add a batch's terms."""
        for name, term in terms.items():
            self._sums.setdefault(name, []).append(term.sum.double().tolist())
            self._counts[name] = self._counts.get(name, 0) + term.count
            self._weights[name] = term.weight

    def mean(self, ranks: Ranks) -> MeanLoss:
        """What they come to, over the batches of all ranks."""
        every = ranks.of_shares([self._sums, self._counts, self._weights])
        weights = {name: weight for of_rank in every for name, weight in of_rank[2].items()}
        means: dict[str, float] = {}
        observed: dict[str, list[float]] = {}
        for name in weights:
            by_batch = itertools.zip_longest(*(of_rank[0].get(name, []) for of_rank in every))
            sums = [value for value in itertools.chain.from_iterable(by_batch) if value is not None]
            count = max(sum(of_rank[1].get(name, 0) for of_rank in every), 1)
            if isinstance(sums[0], list):  # what is only looked at
                observed[name] = [_in_order(column) / count for column in zip(*sums, strict=True)]
            else:
                means[name] = _in_order(sums) / count
        total = sum(mean * weights[name] for name, mean in means.items())
        return MeanLoss(total, means if len(means) > 1 else {}, observed)


def _in_order(values: Iterable[float]) -> float:
    """Their sum, added one by one: `sum` would compensate for rounding."""
    total = 0.0
    for value in values:
        total += value
    return total
