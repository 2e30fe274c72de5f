"""Data: files of text become token files, packed into samples, with a held-out side."""

from stackwise.data.documents import IGNORED
from stackwise.data.preparation import WAITING, prepare
from stackwise.data.prepared import PreparedData, is_prepared
from stackwise.data.split import Split, require_samples, sample_ids
from stackwise.data.tokenizer import Tokenizer, bytes_tokenizer

__all__ = [
    "IGNORED",
    "WAITING",
    "PreparedData",
    "Split",
    "Tokenizer",
    "bytes_tokenizer",
    "is_prepared",
    "prepare",
    "require_samples",
    "sample_ids",
]
