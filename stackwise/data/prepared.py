"""A prepared data set: token files that are mapped, not read, and what can be asked of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from stackwise.data.tokenizer import Tokenizer
from stackwise.durable import read_json, write_bytes
from stackwise.errors import NotFound, UsageError
from stackwise.identity import Hex, content_id, digest, is_hex_id

FORMAT, VERSION = "stackwise prepared data", 1
META, TOKENIZER = "meta.json", "tokenizer.json"

VERIFIED_BYTES = 256 << 20
"""A set of at most so many bytes is verified whole whenever it is opened; of a larger one the sizes."""

_TYPES = {"tokens": ("<u2", "<u4"), "documents": ("<i8",), "counts": ("<i8",), "bytes": ("<u4",), "targets": ("<i4",)}

Array = np.ndarray[Any, Any]
Int64s = np.ndarray[Any, np.dtype[np.int64]]


class Split:
    """One side of a prepared set: its documents' tokens, one after another, a separator after each.

    Samples are consecutive runs of the stream, so that a set serves every length; the tail that fills none is left.

    Args:
        directory: Its folder.
        meta: Its description.
        owner: The set.
    """

    def __init__(self, directory: Path, meta: Mapping[str, Any], owner: PreparedData) -> None:
        self.directory = directory
        self._owner = owner
        self._meta = meta
        self._columns = {name: _map(directory, name, column) for name, column in meta["columns"].items()}
        self.tokens: Array = self._columns["tokens"]
        """The whole stream: uint16 or uint32 [n_tokens], memory-mapped."""
        self.documents: Int64s = self._columns["documents"]
        """Where each document starts: int64 [n_documents], memory-mapped."""
        self.counts: Int64s = self._columns["counts"]
        """How often each id occurs: int64 [vocab_size]."""
        self.n_tokens = len(self.tokens)
        self.n_documents = len(self.documents)
        self.n_bytes: int = meta["bytes"]
        """Bytes of source text; 0 where rows brought tokens."""

    def n_samples(self, seq_len: int) -> int:
        """Whole samples of `seq_len` tokens."""
        return self.n_tokens // seq_len

    def samples(self, indices: Any, seq_len: int) -> Int64s:
        """Tokens of samples: int64 [n, seq_len].

        Args:
            indices: Integers in [0, n_samples) (a sequence or array; [n]).
            seq_len: Tokens in a sample.

        Raises:
            IndexError: An index is out of range.
        """
        return self._rows("tokens", indices, seq_len).astype(np.int64)

    def targets(self, indices: Any, seq_len: int) -> Int64s | None:
        """Targets of samples: int64 [n, seq_len], -100 where ignored. None where the rows brought none."""
        return self._rows("targets", indices, seq_len).astype(np.int64) if "targets" in self._columns else None

    def sample_bytes(self, indices: Any, seq_len: int) -> Int64s:
        """Bytes of source text that samples stand for: int64 [n].

        Over all tokens they add up to the documents' bytes; a separator stands for none. All 0 where rows brought
        tokens of a tokenizer whose tokens have no length of their own.
        """
        if "bytes" in self._columns:
            return self._rows("bytes", indices, seq_len).sum(axis=1, dtype=np.int64)
        rows = self._rows("tokens", indices, seq_len)
        table = self._owner.byte_table
        return np.zeros(len(rows), np.int64) if table is None else table[rows].sum(axis=1, dtype=np.int64)

    def segments(self, indices: Any, seq_len: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Which document of the sample, from 0, each position belongs to: int32 [n, seq_len].

        A separator belongs to the document that it ends.
        """
        first = np.asarray(indices, np.int64) * seq_len
        low = np.searchsorted(self.documents, first, side="right")
        high = np.searchsorted(self.documents, first + seq_len, side="left")
        marks = np.zeros((len(first), seq_len), np.int32)
        row = np.repeat(np.arange(len(first)), high - low)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(high - low) - (high - low), high - low)
        starts = self.documents[np.repeat(low, high - low) + nth]
        marks[row, starts - first[row]] = 1
        return np.cumsum(marks, axis=1, dtype=np.int32)

    def sample_ids(self, seq_len: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The ids of all samples: uint8 [n_samples, 16]; see `sample_ids`.

        Computed once for a length and kept beside the set, where that can be written.
        """
        path = self.directory / f"sample_ids-{seq_len}.bin"
        tokens_digest = bytes.fromhex(self._meta["columns"]["tokens"]["digest"])
        n = self.n_samples(seq_len)
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if len(data) == 16 * (n + 1) and data[-16:] == _seal(data[:-16], tokens_digest):
                return np.frombuffer(data, np.uint8, 16 * n).reshape(n, 16)
        ids = sample_ids(self.tokens[: n * seq_len].reshape(n, seq_len))
        data = ids.tobytes()
        with contextlib.suppress(OSError):  # a convenience: a read-only or full disk is no fault here
            write_bytes(path, data + _seal(data, tokens_digest))
        return ids

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(column.nbytes for column in self._columns.values())

    def verify(self) -> None:
        """Read everything and compare it with its digests.

        Raises:
            UsageError: A file has changed.
        """
        for name, column in self._columns.items():
            if digest(column) != self._meta["columns"][name]["digest"]:
                raise _damaged(self.directory.parent, f"{self.directory.name}/{name}.bin has changed")

    def summary(self) -> dict[str, int]:
        """Plain data: `documents`, `tokens`, `bytes`."""
        return {"documents": self.n_documents, "tokens": self.n_tokens, "bytes": self.n_bytes}

    def _rows(self, column: str, indices: Any, seq_len: int) -> Array:
        n = self.n_samples(seq_len)
        return self._columns[column][: n * seq_len].reshape(n, seq_len)[np.asarray(indices, np.int64)]


class PreparedData:
    """A prepared set, opened for reading. Make one with `prepare`."""

    def __init__(self, directory: Path, meta: Mapping[str, Any]) -> None:
        self.directory = directory
        self._meta = meta
        self.id: Hex = meta["id"]
        """The content id of everything in it: tokens, tokenizer, split."""
        self.key: Hex = meta["key"]
        """What it was made from: documents, tokenizer, split."""
        self.vocab_size: int = meta["tokenizer"]["vocab_size"]
        self.separator_id: int = meta["tokenizer"]["separator_id"]
        self.mask_id: int = meta["tokenizer"]["mask_id"]
        self.train = Split(directory / "train", meta["splits"]["train"], self)
        self.held_out = Split(directory / "held_out", meta["splits"]["held_out"], self)

    @classmethod
    def open(cls, directory: Path | str) -> Self:
        """Open a set and check it: a small one whole, a large one by its sizes.

        Raises:
            NotFound: There is none.
            UsageError: It is damaged, or of a newer format.
        """
        directory = Path(directory)
        meta = _read_meta(directory)
        try:
            data = cls(directory, meta)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise _damaged(directory, str(error)) from None
        data._verify_tokenizer()
        if sum(split.nbytes for split in (data.train, data.held_out)) <= VERIFIED_BYTES:
            data.train.verify()
            data.held_out.verify()
        return data

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, loaded when first asked for."""
        return Tokenizer.load(self.directory / TOKENIZER)

    @cached_property
    def byte_table(self) -> Int64s | None:
        """Bytes of text that each id stands for, where that is the id's own."""
        return self.tokenizer.bytes_per_token()

    def verify(self) -> None:
        """Read everything and compare it with its digests.

        Raises:
            UsageError: Something is damaged.
        """
        self._verify_tokenizer()
        self.train.verify()
        self.held_out.verify()

    def _verify_tokenizer(self) -> None:
        try:
            found = digest((self.directory / TOKENIZER).read_bytes())
        except OSError as error:
            raise _damaged(self.directory, str(error)) from None
        if found != self._meta["tokenizer"]["digest"]:
            raise _damaged(self.directory, f"{TOKENIZER} has changed")

    def summary(self) -> dict[str, Any]:
        """Plain data: id, directory, tokenizer; documents, tokens, bytes, in all and by split; skipped, notes."""
        splits = {"train": self.train.summary(), "held_out": self.held_out.summary()}
        totals = {key: sum(split[key] for split in splits.values()) for key in ("documents", "tokens", "bytes")}
        tokenizer = {key: value for key, value in self._meta["tokenizer"].items() if key != "digest"}
        head = {"id": self.id, "directory": str(self.directory), "tokenizer": tokenizer}
        return {**head, **totals, **splits, "skipped": self._meta["skipped"], "notes": self._meta["notes"]}


def is_prepared(directory: Path) -> bool:
    """Whether a folder is, or claims to be, a prepared set."""
    return (directory / META).is_file() and (directory / "train").is_dir() and (directory / TOKENIZER).is_file()


def describe(key: Hex, tokenizer: Tokenizer, splits: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The description of a new set, its id included."""
    named = dict(zip(("train", "held_out"), splits, strict=True))
    contents = {"version": VERSION, "tokenizer": tokenizer.id, "splits": named}
    about = {
        "name": tokenizer.name,
        "id": tokenizer.id,
        "digest": digest(tokenizer.json.encode()),
        "vocab_size": tokenizer.vocab_size,
        "separator_id": tokenizer.separator_id,
        "mask_id": tokenizer.mask_id,
    }
    head = {"format": FORMAT, "version": VERSION, "id": content_id("prepared data", contents), "key": key}
    return {**head, "tokenizer": about, "splits": named, **more}


def sample_ids(tokens_NS: Array) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Content ids of samples: xxh3-128 of each row as little-endian uint32 (big-endian digest; uint8 [N, 16])."""
    ids = np.empty((len(tokens_NS), 16), np.uint8)
    block = max(1, (1 << 20) // max(1, tokens_NS.shape[1]))
    for start in range(0, len(ids), block):
        rows = np.ascontiguousarray(tokens_NS[start : start + block], "<u4")
        joined = b"".join(xxhash.xxh3_128_digest(row) for row in rows)
        ids[start : start + block] = np.frombuffer(joined, np.uint8).reshape(-1, 16)
    return ids


def require_samples(split: Split, seq_len: int, name: str) -> int:
    """How many samples a split has, at least one.

    Raises:
        UsageError: It is shorter than one sample.
    """
    if (n := split.n_samples(seq_len)) > 0:
        return n
    raise UsageError(
        f"{name}: {split.n_tokens} tokens are fewer than one sample of {seq_len} (training.seq_len)",
        hint=f"add text, set training.seq_len to {split.n_tokens} or less"
        + (", or raise data.held_out" if "held" in name else ""),
    )


def _seal(data: bytes, tokens_digest: bytes) -> bytes:
    return xxhash.xxh3_128_digest(tokens_digest + data)


def _map(directory: Path, name: str, column: Mapping[str, Any]) -> Array:
    if name not in _TYPES or column["dtype"] not in _TYPES[name]:
        raise ValueError(f"a column {name!r} of type {column['dtype']!r}")
    dtype, length, path = np.dtype(column["dtype"]), column["length"], directory / f"{name}.bin"
    if path.stat().st_size != length * dtype.itemsize:
        raise ValueError(f"{directory.name}/{name}.bin is {path.stat().st_size} bytes, not {length * dtype.itemsize}")
    return np.memmap(path, dtype, "r", shape=(length,)) if name != "counts" else np.fromfile(path, dtype)


def _read_meta(directory: Path) -> Mapping[str, Any]:
    try:
        meta = read_json(directory / META)
    except FileNotFoundError:
        raise NotFound(f"{directory} is not a prepared data set (it has no {META})") from None
    except (OSError, ValueError) as error:
        raise _damaged(directory, f"{META}: {error}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise NotFound(f"{directory} is not a prepared data set ({META} is something else)")
    version = meta.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise UsageError(
            f"{directory}: prepared data of format {version}; this version reads up to {VERSION}",
            hint="update stackwise, or prepare the data again",
        )
    if not is_hex_id(meta.get("id")) or not is_hex_id(meta.get("key")):
        raise _damaged(directory, f"{META}: no id")
    return meta


def _damaged(directory: Path, what: str) -> UsageError:
    return UsageError(f"{directory}: damaged prepared data: {what}", hint="remove it and prepare the data again")
