"""How likely a rack finds a continuation: the one question that language modelling and reasoning tasks ask.

Shapes in names: B rows, S positions, n scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from stackwise.errors import UsageError
from stackwise.identity import derive_seed, generator
from stackwise.inference import Continuing, Filling, LoadedModel, fill, sample_causal
from stackwise.pipeline.committed.generate import resident_stages
from stackwise.pipeline.committed.load import CommittedRack

Ids = NDArray[np.int64]
Likelihood = Literal["exact", "pseudo", "bound"]
"""exact: a causal rack's. pseudo: each token from all others, masked alone (arXiv 1910.14659), which is no likelihood.
bound: of masked diffusion, so the likelihood is at least as good (arXiv 2502.09992, eq. 6)."""

DRAWS = 32
"""Masks that a bound is the mean of, for each continuation."""
MOST_POSITIONS, MOST_LOGITS = 1 << 14, 1 << 26
"""Positions that go through the rack at once, and logits that are made of them."""


@dataclass(frozen=True)
class Continuation:
    """Tokens, and those that they follow.

    Args:
        context: int64 [c]; may be empty: a causal rack then begins behind a separator.
        ids: int64 [n], at least one.
    """

    context: Ids
    ids: Ids


@dataclass(frozen=True)
class Answer:
    """What a rack says of a continuation.

    Args:
        nats: -log probability of all its tokens together.
        greedy: Whether each of them was the likeliest.
    """

    nats: float
    greedy: bool


@dataclass(frozen=True)
class Row:
    """A row that a rack reads.

    Args:
        ids: int64 [s].
        positions: Where it is asked: int64 [n].
        masked: The share of the row that is masked.
    """

    ids: Ids
    positions: Ids
    masked: float = 0.0


@dataclass(frozen=True)
class _Row(Row):
    """A row whose positions are to say `targets`: their nats, weighted, count for one answer."""

    answer: int = 0
    targets: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    weight: float = 1.0


R = TypeVar("R", bound=Row)


class RackReader:
    """A rack that reads rows of tokens, its stages one at a time where they do not fit together.

    Args:
        rack: Of one whose stages answer for masked shares of their own, the last answers.
    """

    def __init__(self, rack: CommittedRack) -> None:
        self.rack = rack
        stages, causal = resident_stages(rack, rack.modules), rack.objective.causal
        self.model = LoadedModel(rack.front(), stages, causal, rack.autocast, rack.config.model.keeps_cache)

    @property
    def longest(self) -> int:
        """Tokens of a row, at most."""
        return self.rack.config.model.max_seq_len or self.rack.config.training.seq_len

    def encode(self, text: str) -> Ids:
        """Text as ids."""
        return self.rack.data.tokenizer.encode_batch([text])[0].astype(np.int64) if text else np.zeros(0, np.int64)

    def decode(self, ids: Ids) -> str:
        """Ids as text."""
        return self.rack.data.tokenizer.decode(ids)

    def batches(self, rows: Sequence[R]) -> Iterator[list[R]]:
        """Rows of nearly one length together: little is padded."""
        batch: list[R] = []
        most = max(1, MOST_LOGITS // self.rack.vocab_size)
        scored = 0
        for row in sorted(rows, key=lambda row: -len(row.ids)):
            scored += len(row.positions)
            if batch and ((len(batch) + 1) * len(batch[0].ids) > MOST_POSITIONS or scored > most):
                yield batch
                batch, scored = [], len(row.positions)
            batch.append(row)
        if batch:
            yield batch

    @torch.no_grad()
    def logits(self, batch: Sequence[Row]) -> torch.Tensor:
        """Logits at the positions of some rows, one row's behind the other's: float32 [n, V]."""
        device, width = self.rack.device, max(len(row.ids) for row in batch)
        ids_BS = np.zeros((len(batch), width), np.int64)
        segments_BS = np.ones((len(batch), width), np.int32)
        for place, row in enumerate(batch):
            ids_BS[place, : len(row.ids)] = row.ids
            segments_BS[place, : len(row.ids)] = 0  # what is padded sees itself alone
        index_n = np.concatenate([place * width + row.positions for place, row in enumerate(batch)])
        return self.model.logits_at(
            torch.from_numpy(ids_BS).to(device),
            torch.from_numpy(index_n).to(device),
            segments_BS=torch.from_numpy(segments_BS).to(device) if segments_BS.any() else None,
            time=torch.tensor([row.masked for row in batch], device=device),
        )


class Scorer(RackReader):
    """A rack that scores continuations, and makes them.

    Args:
        rack: What is asked.
        seed: Of the masks that a bound is drawn under.

    Raises:
        UsageError: A rack that says no tokens, or one trained in blocks of a sample: it has no such likelihood.
    """

    def __init__(self, rack: CommittedRack, seed: int = 0) -> None:
        objective = rack.objective
        if not isinstance(objective.causal, bool) or objective.likelihood is None:
            raise UsageError(
                "this rack has no likelihood of a text: its objective predicts no tokens one could ask for",
                hint="suites take racks of clm, mlm and mask_diffusion",
            )
        super().__init__(rack)
        self.seed = seed
        self.likelihood: Likelihood = "bound"
        if objective.causal:
            self.likelihood = "exact"
        elif rack.config.objective.scores_alone:
            self.likelihood = "pseudo"

    def answers(
        self, continuations: Sequence[Continuation], progress: Callable[[int, int], None] | None = None
    ) -> list[Answer]:
        """How likely each continuation is. A context that is too long loses its beginning.

        Args:
            continuations: Each with at least one token, and no more than fit a row.
            progress: Called with (rows done, rows).

        Raises:
            UsageError: A continuation that is empty, or longer than a row.
        """
        rows = [row for number, texts in enumerate(continuations) for row in self._rows(number, texts)]
        nats, greedy = np.zeros(len(continuations)), np.ones(len(continuations), dtype=np.bool_)
        done = 0
        for batch in self.batches(rows):
            for row, (row_nats, hits) in zip(batch, self._scored(batch), strict=True):
                nats[row.answer] += row.weight * row_nats
                greedy[row.answer] &= hits
            done += len(batch)
            if progress is not None:
                progress(done, len(rows))
        return [Answer(float(a), bool(b)) for a, b in zip(nats, greedy, strict=True)]

    def _rows(self, number: int, continuation: Continuation) -> Iterator[_Row]:
        """The rows whose weighted nats add up to those of a continuation."""
        length = len(continuation.ids)
        room = self.longest - length + (self.likelihood == "exact")  # its last token is said, and enters no row
        if not length or room < (self.likelihood == "exact"):
            raise UsageError(
                f"a text of {length} tokens cannot be scored: this rack takes 1 to {self.longest}",
                hint="shorten it, or train with a longer training.seq_len",
            )
        context = continuation.context[-room:] if room else continuation.context[:0]
        if self.likelihood == "exact":
            if not len(context):
                context = np.array([self.rack.data.tokenizer.separator_id])
            ids = np.concatenate((context, continuation.ids))
            places = np.arange(len(context) - 1, len(ids) - 1)
            yield _Row(ids[:-1], places, answer=number, targets=continuation.ids)
            return
        ids, start = np.concatenate((context, continuation.ids)), len(context)
        if self.likelihood == "pseudo":
            holes = [np.array([place]) for place in range(length)]
            weights = [1.0] * length
        else:
            draw = generator(derive_seed(self.seed, "suite", len(ids), *continuation.ids[:8].tolist()), "masks")
            # strata of k, so that few draws cover short and long masks alike
            counts = np.ceil((np.arange(DRAWS) + draw.random(DRAWS)) / DRAWS * length).astype(int).clip(1, length)
            holes = [np.sort(draw.permutation(length)[:count]) for count in counts]
            weights = [length / count / DRAWS for count in counts.tolist()]
        for places, weight in zip(holes, weights, strict=True):
            shown = ids.copy()
            shown[start + places] = self.rack.mask_token
            share = len(places) / len(ids)
            yield _Row(shown, start + places, share, number, continuation.ids[places], weight)

    def _scored(self, batch: Sequence[_Row]) -> Iterator[tuple[float, bool]]:
        """For each row the nats of its targets together, and whether all were the likeliest."""
        logits_nV = self.logits(batch)
        targets_n = torch.from_numpy(np.concatenate([row.targets for row in batch])).to(logits_nV.device)
        nats_n = torch.nn.functional.cross_entropy(logits_nV, targets_n, reduction="none").double().cpu()
        hits_n = (logits_nV.argmax(-1) == targets_n).cpu()
        start = 0
        for row in batch:
            stop = start + len(row.targets)
            yield float(nats_n[start:stop].sum()), bool(hits_n[start:stop].all())
            start = stop

    @torch.no_grad()
    def continue_text(self, prompt: str, length: int, until: Sequence[str] = ()) -> str:
        """Text behind a prompt: token by token, or by filling masked positions behind it; cut before any of `until`.

        Args:
            length: Tokens to make, at most.
            until: Strings that end it.
        """
        tokenizer, device = self.rack.data.tokenizer, self.rack.device
        forbidden = {self.rack.mask_token, *range(tokenizer.vocab_size, self.rack.vocab_size)}
        length = min(length, self.longest - 1)
        prompt_ids = self.encode(prompt)[-(self.longest - length) :]
        if not len(prompt_ids):
            prompt_ids = np.array([tokenizer.separator_id])
        start = len(prompt_ids)
        ids_S = torch.from_numpy(prompt_ids).to(device)
        if self.likelihood == "exact":
            how = Continuing(forbidden=forbidden, stop_token_id=tokenizer.separator_id)
            ids_S = _until(self.model, ids_S, length, how, lambda ids: self._ended(ids[start:], until))
        else:
            holes = torch.arange(start + length, device=device) >= start
            canvas = torch.cat((ids_S, torch.full((length,), self.rack.mask_token, device=device)))
            filling = Filling(mask_token_id=self.rack.mask_token, steps=length, forbidden=forbidden)
            ids_S = fill(self.model, canvas, holes, filling)
        text = self._text(ids_S[start:])
        ends = [at for end in until if end and (at := text.find(end)) >= 0]
        return text[: min(ends)] if ends else text

    def _ended(self, ids: torch.Tensor, until: Sequence[str]) -> bool:
        text = self._text(ids[-64:])  # a string that ends it is short
        return any(end in text for end in until if end)

    def _text(self, ids: torch.Tensor) -> str:
        """The text up to the separator."""
        tokens = ids.cpu().numpy()
        ends = np.flatnonzero(tokens == self.rack.data.tokenizer.separator_id)
        return self.decode(tokens[: ends[0]] if len(ends) else tokens)


class _Ended(Exception):
    """What was made is enough."""

    def __init__(self, ids: torch.Tensor) -> None:
        super().__init__()
        self.ids = ids


def _until(
    model: LoadedModel, ids_S: torch.Tensor, length: int, how: Continuing, ended: Callable[[torch.Tensor], bool]
) -> torch.Tensor:
    def look(ids: torch.Tensor) -> None:
        if ended(ids):
            raise _Ended(ids)

    try:
        return sample_causal(model, ids_S, length, how, callback=look)
    except _Ended as end:
        return end.ids
