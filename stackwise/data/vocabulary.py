"""Which tokenizer a corpus is made into tokens with, and the training of byte-level BPE."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from stackwise import files
from stackwise.data.corpus import Corpus, Progress
from stackwise.data.documents import HeldOut, TextDocument
from stackwise.data.tokenizer import MASK, MOST_IDS, SEPARATOR, Tokenizer, bytes_tokenizer
from stackwise.durable import write_bytes
from stackwise.errors import UsageError
from stackwise.identity import Hex, content_id, digest

if TYPE_CHECKING:
    from stackwise.config import DataConfig


@dataclass(frozen=True)
class Choice:
    """A tokenizer, or how to train one. `spec` says which, as part of a set's key."""

    spec: Mapping[str, Any]
    tokenizer: Tokenizer | None
    bpe_size: int
    model_vocab: int | None
    wanted: int | None

    @classmethod
    def of(cls, config: DataConfig, model_vocab: int | None) -> Choice:
        """What the settings choose, before the corpus is read."""
        entries = config.vocab_size or model_vocab
        if config.tokenizer == "bpe":
            size = entries or DEFAULT_VOCABULARY
            check_vocabulary(size, "data.vocab_size" if config.vocab_size else "model.vocab_size")
            check_fit(size, "the tokenizer (data.vocab_size)", model_vocab)
            return cls({"kind": "bpe", "size": size, "trainer": TRAINER}, None, size, model_vocab, entries)
        if config.tokenizer == "bytes":
            return cls._known("bytes", bytes_tokenizer(), model_vocab)
        return cls._known("file", Tokenizer.load(files.expanded(config.tokenizer)), model_vocab)

    @classmethod
    def _known(cls, kind: str, tokenizer: Tokenizer, model_vocab: int | None) -> Choice:
        check_fit(tokenizer.vocab_size, f"the tokenizer {tokenizer.name}", model_vocab)
        return cls({"kind": kind, "id": tokenizer.id}, tokenizer, 0, model_vocab, None)

    def resolve(self, corpus: Corpus) -> Choice:
        """The choice for a corpus: on rows of ready tokens nothing is trained."""
        if corpus.has_text:
            return self
        largest = corpus.contents.largest_id
        if self.tokenizer is None:
            if largest >= _OWN_IDS:
                raise UsageError(
                    f"data.paths: rows bring the id {largest}; without a tokenizer ids are below {_OWN_IDS}",
                    hint="set data.tokenizer to the one that made the rows",
                )
            # the rows' own ids first, then separator and mask
            return self._known("ids", numbers_tokenizer(max(largest + 1, (self.wanted or 0) - 2)), self.model_vocab)
        if largest >= self.tokenizer.vocab_size:
            raise UsageError(
                f"data.paths: rows bring the id {largest}, but the tokenizer {self.tokenizer.name} has "
                f"{self.tokenizer.vocab_size} ids",
                hint="set data.tokenizer to the one that made the rows",
            )
        return self

    def make(
        self, corpus: Corpus, held_out: Sequence[HeldOut], kept: Callable[[Hex], Path | None], progress: Progress
    ) -> Tokenizer:
        """The tokenizer: bpe is trained, or found where it was kept when it was trained on this text before.

        Args:
            corpus: The documents.
            held_out: Those of each task that training must not see.
            kept: Where the tokenizer of a key is kept; None: nowhere.
            progress: See `train_bpe`.
        """
        if self.tokenizer is not None:
            return self.tokenizer
        chosen = [split.share if split.single else split.below for split in held_out]
        trained_on = {
            "documents": corpus.contents.documents,
            "sequence": corpus.contents.sequence,
            "held_out": chosen if corpus.task_names else chosen[0],
        }
        path = kept(content_id("bpe", {**self.spec, **trained_on}))
        if path is not None:
            with contextlib.suppress(OSError, ValueError):  # missing, damaged or changed: trained again
                seal, _, text = files.read_text(path, limit=_KEPT_BYTES).partition("\n")
                if seal == digest(text.encode()):  # a damaged one would silently give other tokens
                    return Tokenizer.from_json(text, name="bpe")
        tokenizer = train_bpe(corpus, held_out, self.bpe_size, progress)
        if path is not None:
            with contextlib.suppress(OSError):  # a convenience; a full disk is met again by what matters
                write_bytes(path, f"{digest(tokenizer.json.encode())}\n{tokenizer.json}".encode())
        return tokenizer


def check_fit(vocab_size: int, what: str, model_vocab: int | None) -> None:
    """Check that a model's vocabulary holds a tokenizer's ids."""
    if model_vocab is not None and vocab_size > model_vocab:
        raise UsageError(
            f"model.vocab_size: {model_vocab} is too small for {what}: {vocab_size} ids, separator and mask included",
            hint=f"set model.vocab_size to null, or to {vocab_size} or more",
        )


# Training.

_KEPT_BYTES = 256 << 20

_OWN_IDS = 1 << 20
"""Of rows of tokens whose tokenizer is not named: each gets a word of its own."""

TRAINER = 1
"""Version of the training below: raise it when the same text gives another tokenizer."""

SAMPLE_BYTES = 32 << 20
"""About the most text that a tokenizer is trained on; of a larger corpus a sample is drawn, piece by piece."""

_BATCH_BYTES = 1 << 20

DEFAULT_VOCABULARY = 4096
SMALLEST = 256 + 2


def check_vocabulary(size: int, key: str) -> None:
    """Check a size that bpe is to be trained to."""
    if size > MOST_IDS:
        raise UsageError(f"{key}: {size} is too large; bpe has at most {MOST_IDS} ids")
    if size < SMALLEST:
        raise UsageError(
            f"{key}: {size} is too small for bpe; it takes {SMALLEST} (256 bytes, separator, mask) or more"
        )


def train_bpe(corpus: Corpus, held_out: Sequence[HeldOut], vocab_size: int, progress: Progress) -> Tokenizer:
    """Train byte-level BPE on the training side: the separator is id 0, the mask id 1.

    The same documents, in any order, give the same tokenizer. A small text gives fewer ids than asked for.

    Args:
        corpus: The documents.
        held_out: Those of each task that it must not see.
        vocab_size: Ids, at most.
        progress: Told "tokenizer" with bytes of the sample.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR, MASK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    total = min(corpus.contents.text_bytes, SAMPLE_BYTES)
    backend.train_from_iterator(_sample(corpus, held_out, total, progress), trainer)
    progress("tokenizer", total, total)
    return Tokenizer(backend, name="bpe")


def _sample(corpus: Corpus, held_out: Sequence[HeldOut], total: int, progress: Progress) -> Iterator[list[str]]:
    share = int(total / corpus.contents.text_bytes * 2**64)
    batch: list[str] = []
    done = size = 0
    for _, side, part in corpus.divided(held_out):
        if side or not isinstance(part, TextDocument):  # nothing held out may shape the tokenizer
            continue
        for number, piece in enumerate(part.pieces()):
            # which pieces are drawn depends on the document alone
            if xxhash.xxh3_64_intdigest(part.digest.to_bytes(16, "big") + number.to_bytes(8, "big")) < share:
                batch.append(piece)
                size += len(piece)
                if size >= _BATCH_BYTES:
                    progress("tokenizer", min(done, total), total)
                    yield batch
                    done, size, batch = done + size, 0, []
    if batch:
        progress("tokenizer", min(done, total), total)
        yield batch


def numbers_tokenizer(n: int) -> Tokenizer:
    """For rows that bring ids 0 … n-1: a token is its own number; separator and mask follow."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    # the words are never looked at: rows bring ids
    backend = Backend(models.WordLevel({str(i): i for i in range(n)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([SEPARATOR, MASK])
    return Tokenizer(backend, name="ids")
