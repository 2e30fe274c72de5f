"""Making tokenizers: byte-level BPE trained on the corpus, and one for corpora that bring token ids."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from stackwise.data.documents import TextDocument
from stackwise.data.held_out import HeldOut
from stackwise.data.scan import Corpus, Progress
from stackwise.data.tokenizer import MASK, SEPARATOR, Tokenizer
from stackwise.errors import UsageError

TRAINER = 1
"""Version of the training below: raise it when the same text gives another tokenizer."""

SAMPLE_BYTES = 32 << 20
"""About the most text that a tokenizer is trained on; of a larger corpus a sample is drawn, piece by piece."""

_BATCH_BYTES = 1 << 20

DEFAULT_VOCABULARY = 4096
SMALLEST = 256 + 2


def check_vocabulary(size: int, key: str) -> None:
    """Check a size that bpe is to be trained to.

    Raises:
        UsageError: It does not hold the bytes and the two special tokens.
    """
    if size < SMALLEST:
        raise UsageError(
            f"{key}: {size} is too small for bpe; it takes {SMALLEST} (256 bytes, separator, mask) or more"
        )


def train_bpe(corpus: Corpus, held_out: HeldOut, vocab_size: int, progress: Progress) -> Tokenizer:
    """Train byte-level BPE on the training side: the separator is id 0, the mask id 1.

    The same documents, in any order, give the same tokenizer. A small text gives fewer ids than asked for.

    Args:
        corpus: The documents.
        held_out: Those that it must not see.
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


def _sample(corpus: Corpus, held_out: HeldOut, total: int, progress: Progress) -> Iterator[list[str]]:
    share = int(total / corpus.contents.text_bytes * 2**64)
    batch: list[str] = []
    done = size = 0
    for document in corpus.documents():
        for side, part in held_out.divide(document):
            if side or not isinstance(part, TextDocument):
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

    backend = Backend(models.WordLevel({str(i): i for i in range(n)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([SEPARATOR, MASK])
    return Tokenizer(backend, name="ids")
