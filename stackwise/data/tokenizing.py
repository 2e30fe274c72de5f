"""The second pass: documents become tokens, in bounded memory, every core at work."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stackwise.data.documents import Document, TextDocument, TokenDocument
from stackwise.data.held_out import HeldOut
from stackwise.data.scan import Corpus, Progress
from stackwise.data.tokenizer import Tokenizer
from stackwise.data.writer import Array, SplitWriter
from stackwise.errors import UsageError

SIDES = ("train", "held_out")
"""The splits, and their folders' names."""

BATCH_BYTES = 2 << 20
"""Text that is tokenized at once: enough to keep every core busy, little enough to forget."""

BATCH_PIECES = 4096
UNKNOWN_SHARE = 0.5
"""Of the tokens of a text: with more unknown ones it is the wrong tokenizer, and there is nothing to learn."""
_AHEAD = 2
"""Batches in the making: while one's tokens come over from the library, it works at the next."""


class NotExactError(Exception):
    """The byte table does not add up to a text's bytes: this tokenizer's tokens must be measured where they stand."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of a document's text, or a row of tokens. `ends`: the document's bytes in its last piece, else -1."""

    side: int
    content: str | TokenDocument
    size: int
    ends: int


_Encoded = list[dict[str, Array]]


def write_splits(
    directory: Path, corpus: Corpus, held_out: HeldOut, tokenizer: Tokenizer, *, measure: bool, progress: Progress
) -> list[dict[str, Any]]:
    """Tokenize a corpus into `directory/train` and `directory/held_out`.

    Args:
        directory: An existing folder without those two.
        corpus: The documents.
        held_out: Which are held out.
        tokenizer: Makes the tokens.
        measure: Store the bytes of every token, instead of relying on the tokenizer's byte table.
        progress: Told "tokenizing" with bytes.

    Returns:
        The descriptions of the two splits.

    Raises:
        NotExactError: Without `measure`, the byte table does not add up.
        UsageError: A file changed meanwhile, the mask token occurs, a side stays empty, or the tokenizer knows less
            than half of the text.
    """
    extra = {"targets"} if corpus.has_targets else {"bytes"} if measure and corpus.has_text else set[str]()
    writers = [SplitWriter(directory / side, tokenizer, frozenset(extra)) for side in SIDES]
    done = 0
    try:
        progress("tokenizing", 0, corpus.contents.size)
        for batch, encoded in _in_parallel(_batches(corpus, held_out), tokenizer, measure):
            for piece, columns in zip(batch, encoded, strict=True):
                writer = writers[piece.side]
                writer.add(**columns)
                if "bytes" in columns and not len(columns["tokens"]):
                    writer.leave(piece.size)
                if piece.ends >= 0:
                    writer.end_document(piece.ends)
                done += piece.size
            progress("tokenizing", done, corpus.contents.size)
        wanted = writers if held_out.share < 1 else writers[1:]
        if not all(writer.n_documents for writer in wanted):
            raise UsageError("data.paths: too little text to hold some of it out", hint="add more text")
        made = [writer.finish() for writer in writers]
        if corpus.has_text:
            _check_known(tokenizer, writers[0].counts + writers[1].counts)
        return made
    finally:
        for writer in writers:
            writer.abandon()


def _check_known(tokenizer: Tokenizer, counts: Array) -> None:
    """Separators aside, as a tokenizer that makes one unknown token of a document has as many of them."""
    unknown = tokenizer.unknown_id
    total = int(counts.sum() - counts[tokenizer.separator_id])
    if unknown is None or counts[unknown] <= UNKNOWN_SHARE * total:
        return
    raise UsageError(
        f"data.tokenizer: {tokenizer.name} does not know this text: {counts[unknown] / total:.0%} of its tokens are "
        f"{tokenizer.decode([unknown])} (id {unknown}), its token for the unknown",
        hint="use a tokenizer made for such text, or set data.tokenizer to bpe or bytes",
    )


def _batches(corpus: Corpus, held_out: HeldOut) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for document in corpus.documents():
        for side, part in held_out.divide(document):
            for piece in _pieces(side, part):
                batch.append(piece)
                size += piece.size
                if size >= BATCH_BYTES or len(batch) >= BATCH_PIECES:
                    yield batch
                    batch, size = [], 0
    if batch:
        yield batch


def _pieces(side: int, part: Document) -> Iterator[_Piece]:
    if not isinstance(part, TextDocument):
        yield _Piece(side, part, 4 * len(part.tokens), 0)
        return
    left = part.n_bytes
    for text in part.pieces():
        size = len(text) if text.isascii() else len(text.encode())
        left -= size
        yield _Piece(side, text, size, -1 if left else part.n_bytes)


def _in_parallel(
    batches: Iterable[list[_Piece]], tokenizer: Tokenizer, measure: bool
) -> Iterator[tuple[list[_Piece], _Encoded]]:
    """Every batch with its tokens, in order; the next ones are in the making meanwhile."""
    waiting: deque[tuple[list[_Piece], Future[_Encoded]]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch, tokenizer, measure)))
            if len(waiting) > _AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        for rest, future in waiting:
            yield rest, future.result()


def _encode(batch: list[_Piece], tokenizer: Tokenizer, measure: bool) -> _Encoded:
    rows = [piece.content for piece in batch if isinstance(piece.content, TokenDocument)]
    if rows:
        return [{"tokens": row.tokens} | ({} if row.targets is None else {"targets": row.targets}) for row in rows]
    texts = [piece.content for piece in batch if isinstance(piece.content, str)]
    if measure:
        return [{"tokens": ids, "bytes": sizes} for ids, sizes in tokenizer.encode_with_bytes(texts)]
    encoded = tokenizer.encode_batch(texts)
    table = tokenizer.bytes_per_token()
    if table is None or int(table[np.concatenate(encoded)].sum()) != sum(piece.size for piece in batch):
        raise NotExactError
    return [{"tokens": ids} for ids in encoded]
