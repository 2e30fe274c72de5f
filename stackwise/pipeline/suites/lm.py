"""Language modelling: perplexity and bits per byte of whole documents, in windows that overlap."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from stackwise.data import Split
from stackwise.errors import UsageError
from stackwise.pipeline.suites.scoring import Continuation, Ids, Scorer

TOKENS_AT_ONCE = 1 << 20
"""Tokens of documents that are asked about together."""


def language_modelling(
    scorer: Scorer,
    split: Split,
    *,
    stride: int | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """How well a rack says documents. Each token is scored once, from what its window has before (and, where the rack
    is not causal, behind) it; windows begin every `stride` tokens.

    Args:
        split: Prepared text.
        stride: Tokens that a window is further than the one before; None: half of what a row takes.
        limit: Documents, at most.
        progress: Called with (documents done, documents).

    Returns:
        `likelihood` (exact, pseudo, bound), `perplexity` (a token's; None under pseudo-likelihood has its own name:
        `pseudo_perplexity`), `bits_per_byte`, `documents`, `tokens`, `bytes`, `stride`; `by_document`: the quartiles of
        a document's bits per byte.

    Raises:
        UsageError: A stride longer than a row, or no documents.
    """
    longest = scorer.longest
    stride = stride or max(1, longest // 2)
    if stride > longest:
        raise UsageError(f"--stride {stride}: windows of {longest} tokens would leave tokens out", hint="a smaller one")
    documents = [ids for ids in _documents(split, scorer.rack.data.tokenizer.separator_id) if len(ids)][:limit]
    if not documents:
        raise UsageError("the text has no documents", hint="name other text: --data PATH")
    nats, sizes, tokens, done = [], [], 0, 0
    for group in _groups(documents):
        questions = [(place, window) for place, ids in enumerate(group) for window in windows(ids, longest, stride)]
        answers = scorer.answers([window for _, window in questions])
        of_group = np.zeros(len(group))
        for (place, _), answer in zip(questions, answers, strict=True):
            of_group[place] += answer.nats
        nats += of_group.tolist()
        sizes += [len(scorer.decode(ids).encode()) for ids in group]
        tokens += sum(len(ids) for ids in group)
        done += len(group)
        if progress is not None:
            progress(done, len(documents))
    total, nbytes = sum(nats), sum(sizes)
    by_document = [n / math.log(2) / size for n, size in zip(nats, sizes, strict=True) if size]
    name = "pseudo_perplexity" if scorer.likelihood == "pseudo" else "perplexity"
    return {
        "likelihood": scorer.likelihood,
        name: math.exp(min(total / tokens, 700.0)),
        "bits_per_byte": total / math.log(2) / nbytes if nbytes else None,
        "by_document": np.percentile(by_document, [25, 50, 75]).tolist() if by_document else [],
        "documents": len(documents),
        "tokens": tokens,
        "bytes": nbytes,
        "stride": stride,
    }


def _documents(split: Split, separator: int) -> Iterator[Ids]:
    """The tokens of each document, without the separator behind it."""
    starts = [*np.asarray(split.documents).tolist(), len(split.tokens)]
    for start, stop in itertools.pairwise(starts):
        ids = np.asarray(split.tokens[start:stop], dtype=np.int64)
        yield ids[:-1] if len(ids) and ids[-1] == separator else ids


def _groups(documents: list[Ids]) -> Iterator[list[Ids]]:
    group: list[Ids] = []
    for ids in documents:
        group.append(ids)
        if sum(map(len, group)) > TOKENS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def windows(ids: Ids, longest: int, stride: int) -> Iterator[Continuation]:
    """The first `longest` tokens; then the next `stride`, behind as many as a row takes beside them."""
    yield Continuation(ids[:0], ids[:longest])
    for start in range(longest, len(ids), stride):
        stop = min(start + stride, len(ids))
        yield Continuation(ids[max(0, stop - longest) : start], ids[start:stop])
