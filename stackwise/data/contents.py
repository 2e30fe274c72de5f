"""What a run of documents holds, in a few numbers that add up."""

from __future__ import annotations

from dataclasses import dataclass

from stackwise.data.documents import Document, TextDocument

DIGESTS = 1 << 128
"""Documents' digests are below it."""

_MODULUS = (1 << 127) - 1
_BASE = 0x5DEECE66D_2545F4914F6CDD1D_9E3779B9 % _MODULUS


@dataclass
class Contents:
    """Documents counted up one by one, or run by run.

    `sequence` is a polynomial hash of their digests in order: it does not depend on how they are spread over files,
    and needs no list of them. `lowest` and `highest` are the digests' bounds, `largest_id` the largest token id.
    """

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    sequence: int = 0
    lowest: int = DIGESTS
    highest: int = -1
    texts: int = 0
    targeted: int = 0
    largest_id: int = -1

    def add(self, document: Document) -> None:
        """Count one more document."""
        value = document.digest
        self.documents += 1
        self.sequence = (self.sequence * _BASE + value) % _MODULUS
        if value < self.lowest:
            self.lowest = value
        if value > self.highest:
            self.highest = value
        if isinstance(document, TextDocument):
            self.texts += 1
            self.text_bytes += document.n_bytes
            return
        self.tokens += len(document.tokens)
        self.largest_id = max(self.largest_id, int(document.tokens.max()))
        if document.targets is not None:
            self.targeted += 1
            self.largest_id = max(self.largest_id, int(document.targets.max()))

    def extend(self, after: Contents) -> None:
        """Count a run of documents that follow."""
        self.sequence = (self.sequence * pow(_BASE, after.documents, _MODULUS) + after.sequence) % _MODULUS
        self.documents += after.documents
        self.text_bytes += after.text_bytes
        self.tokens += after.tokens
        self.lowest = min(self.lowest, after.lowest)
        self.highest = max(self.highest, after.highest)
        self.texts += after.texts
        self.targeted += after.targeted
        self.largest_id = max(self.largest_id, after.largest_id)

    @property
    def size(self) -> int:
        """Bytes of input; a token counts as four."""
        return self.text_bytes + 4 * self.tokens
