"""Text to token ids and back, with the two ids of our own: the separator after a document, and the mask."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from stackwise import files
from stackwise.durable import write_bytes, write_json
from stackwise.errors import NotFound, StackWiseError, UsageError, line_of
from stackwise.identity import Hex, digest

if TYPE_CHECKING:
    import tokenizers

SEPARATOR, MASK = "<|endoftext|>", "<|mask|>"
"""The names of the tokens that are added where a tokenizer brings none."""

_SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]", "<sep>")
CONFIG, END = "config.json", "eos_token_id"
"""The model's file beside a tokenizer.json, and its key for the id that ends a text."""

_MASKS = (MASK, "<mask>", "[MASK]", "<|mdm_mask|>")

MOST_IDS = 1 << 22
"""Ids are below it: tables of all of them are held. The largest vocabularies in use have about a million."""

_FILE_BYTES = 256 << 20
_CONFIG_BYTES = 4 << 20

Ids = np.ndarray[Any, np.dtype[np.uint32]]
Table = np.ndarray[Any, np.dtype[np.int64]]


@contextlib.contextmanager
def _library(message: str, hint: str) -> Iterator[None]:
    """Turn whatever the `tokenizers` library raises into one line; its panics derive from BaseException alone."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, StackWiseError):
        raise
    except BaseException as error:
        reason = line_of(error, "unreadable")
        raise UsageError(f"{message} ({reason})", hint=hint) from None


class Tokenizer:
    """A tokenizer of the `tokenizers` library, made fit for training on plain text.

    Templates, truncation, padding and dropout are off, and the names of special tokens that stand in a text are
    text: no text encodes to the separator or the mask. Where it has no separator or mask of its own, one is added
    after its vocabulary.

    Args:
        backend: The library's tokenizer; it is changed.
        name: What it is called in messages.
        ends_with: The id that ends a text, as the model says: the separator, where no name says which one is.

    Raises:
        UsageError: Its ids have gaps, so that nothing can be added after them.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, name: str = "tokenizer", ends_with: int | None = None) -> None:
        self.name = name
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
        backend.encode_special_tokens = True
        # names that the model itself, though not the list of added tokens, takes for the token (Unigram does)
        self._taken: list[str] = []
        named = any(backend.token_to_id(separator) is not None for separator in _SEPARATORS)
        end = None if named or ends_with is None else backend.id_to_token(ends_with)
        self.separator_id = self._special(_SEPARATORS if end is None else (end,))
        self.ends_with = None if end is None else ends_with
        """The separator's id, where the model says it and no name does."""
        self.mask_id = self._special(_MASKS)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        """All ids, the added ones included."""

    @classmethod
    def from_json(cls, text: str, *, name: str = "tokenizer", ends_with: int | None = None) -> Self:
        """Read the text of a tokenizer.json.

        Raises:
            UsageError: It is not one.
        """
        from tokenizers import Tokenizer as Backend

        hint = "it is what `save_pretrained` writes beside a model"
        with _library(f"{name}: not a tokenizer.json", hint):
            return cls(Backend.from_str(text), name=name, ends_with=ends_with)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a tokenizer.json, or the one in a folder; the model's files beside it may say which id ends a text.

        Raises:
            NotFound: There is none.
            UsageError: It cannot be read, or is broken.
        """
        path = path / "tokenizer.json" if os.path.isdir(path) else path
        return cls.from_json(_text(path), name=str(path), ends_with=_end_of_text(path.parent))

    @staticmethod
    def names_in(path: Path) -> dict[str, int]:
        """The names of a tokenizer.json and their ids, nothing added to them. Raises: see `load`."""
        from tokenizers import Tokenizer as Backend

        with _library(f"{path}: not a tokenizer.json", "it is what `save_pretrained` writes beside a model"):
            return dict(Backend.from_str(_text(path)).get_vocab(with_added_tokens=True))

    def _special(self, names: tuple[str, ...]) -> int:
        from tokenizers import AddedToken

        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        if (highest := max(vocabulary.values(), default=0)) >= MOST_IDS:
            raise UsageError(
                f"{self.name}: it has the id {highest}; ids are below {MOST_IDS}", hint="is its vocabulary damaged?"
            )
        name = next((name for name in names if name in vocabulary), names[0])
        self._backend.add_special_tokens([AddedToken(name, special=True, normalized=False)])
        added = self._backend.token_to_id(name)
        assert added is not None
        if added in self._backend.encode(name, add_special_tokens=False).ids:
            self._taken.append(name)
        if name not in vocabulary and added in vocabulary.values():
            raise UsageError(f"{self.name}: its ids have gaps, and {name} cannot be added after them")
        return added

    @cached_property
    def json(self) -> str:
        """The text of its tokenizer.json, the added tokens included."""
        return str(self._backend.to_str())

    @cached_property
    def id(self) -> Hex:
        """Fingerprint of everything that it does."""
        content = json.dumps(json.loads(self.json), sort_keys=True)
        return digest((content if self.ends_with is None else f"{content} {self.ends_with}").encode())

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of what its vocabulary lacks; None where it has none."""
        model = json.loads(self.json)["model"]
        if model.get("unk_id") is not None:  # Unigram
            unknown: int | None = int(model["unk_id"])
        else:
            unknown = None if model.get("unk_token") is None else self._backend.token_to_id(model["unk_token"])
        return unknown if unknown is not None and unknown < self.vocab_size else None

    def save(self, path: Path) -> None:
        """Write its tokenizer.json, durably and whole; what its names do not say stands beside it, as in a model."""
        if self.ends_with is not None:
            write_json(path.parent / CONFIG, {END: self.ends_with})
        write_bytes(path, self.json.encode())

    @cached_property
    def is_bytes(self) -> bool:
        """Whether a token is a byte, and the id its value."""
        return self.json == _bytes_json()

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids (uint32 [n]) of each text, in parallel; nothing is added to them."""
        if self.is_bytes:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
        if self._taken:
            return [ids for ids, _ in self.encode_with_bytes(texts)]
        with self._encoding():
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode_with_bytes(self, texts: Sequence[str]) -> list[tuple[Ids, Ids]]:
        """Token ids of each text, and the bytes of it that each token stands for (uint32 [n]).

        A token stands for what lies between its predecessor's end and its own; the last one for the rest too. So the
        bytes of a text's tokens add up to the text's, whatever the tokenizer drops or normalises. (A text may make no
        token at all.)
        """
        encoded = self._measured(texts)
        if self._taken:
            special = [self.separator_id, self.mask_id]
            for index, (ids, _) in enumerate(encoded):
                if np.isin(ids, special).any():
                    encoded[index] = self._spelled(texts[index], special)
        return encoded

    def _encoding(self) -> contextlib.AbstractContextManager[None]:
        return _library(f"data.tokenizer: {self.name} cannot encode this text", "use another tokenizer")

    def _measured(self, texts: Sequence[str]) -> list[tuple[Ids, Ids]]:
        with self._encoding():
            encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(encoding.ids, np.uint32), bytes_between(text, encoding.offsets))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _spelled(self, text: str, special: list[int]) -> tuple[Ids, Ids]:
        """Encode a text that holds the name of a special token: the name in two parts, so that it stays text."""
        cuts = [match.start() + 1 for name in self._taken for match in re.finditer(re.escape(name), text)]
        parts = [text[start:end] for start, end in pairwise([0, *sorted(cuts), len(text)])]
        encoded: list[tuple[Ids, Ids]] = []
        for part, (ids, sizes) in zip(parts, self._measured(parts), strict=True):
            # a normalizer can make the name of other letters (NFKC of full-width ones): then letter by letter
            encoded += self._measured(list(part)) if np.isin(ids, special).any() else [(ids, sizes)]
        ids, sizes = (np.concatenate(column) for column in zip(*encoded, strict=True))
        if len(ids):  # parts that made no token
            sizes[-1] += len(text.encode()) - int(sizes.sum())
        return ids, sizes

    def decode(self, ids: Sequence[int] | np.ndarray[Any, Any]) -> str:
        """The text of ids; special tokens appear by name, bytes that are no UTF-8 as replacement characters."""
        with _library(f"{self.name} cannot decode these ids", "use another tokenizer"):
            return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def bytes_per_token(self) -> Table | None:
        """Bytes of text that each id stands for (int64 [vocab_size]; specials 0), or None.

        None: the length of a token's text depends on where it stands (the tokenizer is not byte-level, or
        normalises, or drops text).
        """
        return self._table

    @cached_property
    def _table(self) -> Table | None:
        return byte_table(json.loads(self.json), self.vocab_size)


def _text(path: Path) -> str:
    try:
        return files.read_text(Path(os.path.realpath(path)), limit=_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(
            f"tokenizer {path} does not exist", hint="data.tokenizer is bpe, bytes, or the path of a tokenizer.json"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"tokenizer {path} cannot be read ({getattr(error, 'message', error)})") from None


def _end_of_text(directory: Path) -> int | None:
    """The id that ends a text, as the model's files in a directory say; of several the first."""
    for name in (CONFIG, "generation_config.json"):
        try:
            content = files.read_json(directory / name, limit=_CONFIG_BYTES)
        except (OSError, ValueError, StackWiseError):  # whoever reads the model says what is wrong with it
            continue
        end = content.get(END) if isinstance(content, dict) else None
        end = end[0] if isinstance(end, list) and end else end
        if type(end) is int and 0 <= end < MOST_IDS:
            return end
    return None


def bytes_tokenizer() -> Tokenizer:
    """256 bytes, a separator (256), a mask (257)."""
    return Tokenizer.from_json(_bytes_json(), name="bytes")


@lru_cache(maxsize=1)
def _bytes_json() -> str:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE({letter: byte for byte, letter in enumerate(byte_letters())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([SEPARATOR, MASK])
    return str(backend.to_str())


# How many bytes of source text each token stands for, exactly.


def byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: itself where it can be seen, else one from 256 up."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(hidden)) for byte in range(256)]


def bytes_between(text: str, offsets: Sequence[tuple[int, int]]) -> Ids:
    """Bytes of each token (uint32 [n]) of a text, from where the tokens lie in it (start, end; in characters).

    A token has what lies between its predecessor's end and its own; the last one the rest too. Tokens that share a
    character (the bytes of one) leave it to the first of them.
    """
    ends = np.fromiter((end for _, end in offsets), np.int64, len(offsets))
    if not len(ends):
        return np.empty(0, np.uint32)
    ends = np.maximum.accumulate(ends)
    ends[-1] = len(text)
    if not text.isascii():
        code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (code_points > 0x7F) + (code_points > 0x7FF) + (code_points > 0xFFFF)
        ends = np.concatenate(([0], np.cumsum(widths)))[ends]
    return np.diff(ends, prepend=0).astype(np.uint32)


def byte_table(spec: dict[str, Any], vocab_size: int) -> Table | None:
    """Bytes of each id (int64 [vocab_size]; specials 0), or None where that is not the id's own.

    It is for a byte-level BPE that has every byte and neither normalises nor adds nor drops anything: a token's
    text is a letter a byte.

    Args:
        spec: The tokenizer.json.
        vocab_size: All ids.
    """
    model, letters = spec["model"], set(byte_letters())
    stages = _flat(spec["pre_tokenizer"], "pretokenizers")
    byte_level = [stage for stage in stages if stage["type"] == "ByteLevel"]
    exact = (
        model["type"] == "BPE"
        and not _flat(spec["normalizer"], "normalizers")
        and len(byte_level) == 1
        and stages[-1] is byte_level[0]
        and not byte_level[0]["add_prefix_space"]
        and all(stage["type"] in ("Split", "Digits") and stage.get("behavior") != "Removed" for stage in stages[:-1])
        and letters <= model["vocab"].keys()
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
    )
    if not exact:
        return None
    table = np.zeros(vocab_size, np.int64)
    for token, i in model["vocab"].items():
        table[i] = len(token)
    for added in spec["added_tokens"]:
        if not added["special"] and (added["lstrip"] or added["rstrip"]):
            return None
        table[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return table


def _flat(stage: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if stage is None:
        return []
    return [flat for part in stage[inner] for flat in _flat(part, inner)] if stage["type"] == "Sequence" else [stage]
