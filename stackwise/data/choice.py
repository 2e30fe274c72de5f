"""Which tokenizer a corpus is made into tokens with."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.data.cache import Cache
from stackwise.data.held_out import HeldOut
from stackwise.data.scan import Corpus, Progress
from stackwise.data.tokenizer import Tokenizer, bytes_tokenizer
from stackwise.data.training import DEFAULT_VOCABULARY, TRAINER, check_vocabulary, numbers_tokenizer, train_bpe
from stackwise.errors import UsageError
from stackwise.identity import content_id

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
        """What the settings choose, before the corpus is read.

        Raises:
            NotFound: The tokenizer's file does not exist.
            UsageError: It is broken, or does not fit the model's vocabulary.
        """
        wanted = config.vocab_size or model_vocab
        if config.tokenizer == "bpe":
            size = wanted or DEFAULT_VOCABULARY
            check_vocabulary(size, "data.vocab_size" if config.vocab_size else "model.vocab_size")
            check_fit(size, "the tokenizer (data.vocab_size)", model_vocab)
            return cls({"kind": "bpe", "size": size, "trainer": TRAINER}, None, size, model_vocab, wanted)
        if config.tokenizer == "bytes":
            return cls._known("bytes", bytes_tokenizer(), model_vocab)
        return cls._known("file", Tokenizer.load(Path(config.tokenizer).expanduser()), model_vocab)

    @classmethod
    def _known(cls, kind: str, tokenizer: Tokenizer, model_vocab: int | None) -> Choice:
        check_fit(tokenizer.vocab_size, f"the tokenizer {tokenizer.name}", model_vocab)
        return cls({"kind": kind, "id": tokenizer.id}, tokenizer, 0, model_vocab, None)

    def resolve(self, corpus: Corpus) -> Choice:
        """The choice for a corpus: on rows of ready tokens nothing is trained.

        Raises:
            UsageError: The rows' ids do not fit the tokenizer, or the model.
        """
        if corpus.has_text:
            return self
        largest = corpus.contents.largest_id
        if self.tokenizer is None:
            # the rows' own ids first, then separator and mask
            return self._known("ids", numbers_tokenizer(max(largest + 1, (self.wanted or 0) - 2)), self.model_vocab)
        if largest >= self.tokenizer.vocab_size:
            raise UsageError(
                f"data.paths: rows bring the id {largest}, but the tokenizer {self.tokenizer.name} has "
                f"{self.tokenizer.vocab_size} ids",
                hint="set data.tokenizer to the one that made the rows",
            )
        return self

    def make(self, corpus: Corpus, held_out: HeldOut, cache: Cache, progress: Progress) -> Tokenizer:
        """The tokenizer: bpe is trained, or found in the cache where it was trained on this text before."""
        if self.tokenizer is not None:
            return self.tokenizer
        trained_on = {
            "documents": corpus.contents.documents,
            "sequence": corpus.contents.sequence,
            "held_out": held_out.share if held_out.single else held_out.below,
        }
        path = cache.tokenizer(content_id("bpe", {**self.spec, **trained_on}))
        if path is not None:
            with contextlib.suppress(UsageError):
                return Tokenizer.from_json(Tokenizer.load(path).json, name="bpe")
        tokenizer = train_bpe(corpus, held_out, self.bpe_size, progress)
        if path is not None:
            tokenizer.save(path)
        return tokenizer


def check_fit(vocab_size: int, what: str, model_vocab: int | None) -> None:
    """Check that a model's vocabulary holds a tokenizer's ids.

    Raises:
        UsageError: It does not.
    """
    if model_vocab is not None and vocab_size > model_vocab:
        raise UsageError(
            f"model.vocab_size: {model_vocab} is too small for {what}: {vocab_size} ids, separator and mask included",
            hint=f"set model.vocab_size to null, or to {vocab_size} or more",
        )
