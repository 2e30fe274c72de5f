"""One side of a prepared set: token files that are mapped, not read, cut into samples of any length."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from stackwise import files
from stackwise.data.documents import Array, Int64s
from stackwise.durable import write_bytes
from stackwise.errors import UsageError

SUMMED_BYTES = 1 << 20
"""Of each so many bytes of a column there is a sum, so that a part of a large set can be verified."""

SAMPLED_BLOCKS = 64
"""Of a larger set so many of these blocks are verified, other ones each time: some tens of milliseconds."""

SUMS = "block-sums.bin"
"""Sums of a side's blocks, column by column in the order of names. (No column has a dash in its name.)"""

_BLOCK_TOKENS = 1 << 20
"""Tokens that are looked at together where every sample is."""

_BLOCK_BYTES = 1 << 20

_TYPES = {
    **{"tokens": ("<u2", "<u4"), "documents": ("<i8",), "counts": ("<i8",), "bytes": ("<u4",), "targets": ("<i4",)},
    "tasks": ("<i8",),
}
"""What columns of a known name may be; others are of rows: int64 or float32."""

OWN_COLUMNS = frozenset({"tokens", "documents", "counts", "bytes", "tasks"})
"""What a set has of its own making, beside the columns that rows bring."""


class DamagedColumnError(ValueError):
    """A file of a set is not what its description says. `PreparedData` says which set."""


class Split:
    """One side of a prepared set: its documents' tokens, one after another, a separator after each.

    Samples are consecutive runs of the stream, so that a set serves every length; the tail that fills none is left.

    Args:
        directory: Its folder.
        meta: Its description.
        byte_table: Gives the bytes of text that each id stands for, where that is the id's own.
    """

    name = ""
    """How samples are laid out; empty: as consecutive runs of the stream."""

    def __init__(self, directory: Path, meta: Mapping[str, Any], byte_table: Callable[[], Int64s | None]) -> None:
        self.directory = directory
        self._byte_table = byte_table
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
        self.tasks: tuple[str, ...] = tuple(meta.get("tasks", ()))
        """Names of the tasks that documents are of, in order; empty: there are none."""
        self._task_edges = self._find_tasks()

    @property
    def task_tokens(self) -> list[int]:
        """Tokens of each task; without tasks of all."""
        edges = np.append(np.asarray(self.documents, np.int64), self.n_tokens)[self._task_edges]
        return [int(n) for n in np.diff(edges)]

    def _find_tasks(self) -> Int64s:
        """At which document each task begins, and the last one ends: int64 [tasks + 1]; without tasks one run."""
        if not self.tasks:
            return np.array([0, self.n_documents])
        of_documents = np.asarray(self._columns["tasks"])
        edges = np.searchsorted(of_documents, np.arange(len(self.tasks) + 1))
        ordered = len(of_documents) == self.n_documents and bool((np.diff(of_documents) >= 0).all())
        if not ordered or edges[0] or edges[-1] != self.n_documents:
            raise DamagedColumnError(f"{self.directory.name}/tasks.bin does not fit its documents")
        return edges

    def sample_tasks(self, seq_len: int) -> Int64s:
        """The task of each sample, by its place in `tasks`: int64 [n_samples]; without tasks all 0.

        No sample holds documents of two tasks.
        """
        return np.zeros(self.n_samples(seq_len), np.int64)

    def n_samples(self, seq_len: int) -> int:
        """Whole samples of `seq_len` tokens."""
        return self.n_tokens // seq_len  # the tail that fills no sample is left

    def remarks(self, seq_len: int) -> list[str]:
        """What samples of a length lack of the documents, a line each: of a stream nothing."""
        return []

    def samples(self, indices: Any, seq_len: int) -> Int64s:
        """Tokens of samples: int64 [n, seq_len].

        Args:
            indices: Integers in [0, n_samples) (a sequence or array; [n]).
            seq_len: Tokens in a sample.

        Raises:
            IndexError: An index is out of range.
        """
        return self._rows("tokens", indices, seq_len).astype(np.int64)

    @property
    def columns(self) -> tuple[str, ...]:
        """The named columns that rows brought beside their tokens, one value a token: `targets` and others."""
        return tuple(name for name in self._columns if name not in OWN_COLUMNS)

    def column(self, name: str, indices: Any, seq_len: int) -> Array:
        """A named column of samples: int64 or float32 [n, seq_len].

        Raises:
            UsageError: The rows brought none of that name.
            IndexError: An index is out of range.
        """
        if name not in self.columns:
            raise UsageError(
                f"the data has no column {name!r}",
                hint="prepare rows of input_ids that bring it, one value a token; data.columns names what is kept",
            )
        values = self._rows(name, indices, seq_len)
        return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)

    def column_digest(self, name: str) -> str:
        """Digest of a column's whole content, of `tokens` too."""
        digest: str = self._meta["columns"][name]["digest"]
        return digest

    def targets(self, indices: Any, seq_len: int) -> Int64s | None:
        """Targets of samples: int64 [n, seq_len], -100 where ignored. None where the rows brought none."""
        return self.column("targets", indices, seq_len) if "targets" in self.columns else None

    def sample_bytes(self, indices: Any, seq_len: int) -> Int64s:
        """Bytes of source text that samples stand for: int64 [n].

        Over all tokens they add up to the documents' bytes; a separator stands for none. All 0 where rows brought
        tokens of a tokenizer whose tokens have no length of their own.
        """
        samples = self._checked(indices, seq_len)
        sums = np.zeros(len(samples), np.int64)
        column, table = ("bytes", None) if "bytes" in self._columns else ("tokens", self._byte_table())
        if column == "tokens" and table is None:
            return sums
        block = max(1, _BLOCK_TOKENS // seq_len)
        for start in range(0, len(samples), block):
            rows = self._rows(column, samples[start : start + block], seq_len)
            sums[start : start + block] = (rows if table is None else table[rows]).sum(axis=1, dtype=np.int64)
        return sums

    def segments(self, indices: Any, seq_len: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Which document of the sample, from 0, each position belongs to: int32 [n, seq_len].

        A separator belongs to the document that it ends.
        """
        first = self._begins(self._checked(indices, seq_len), seq_len)
        low = np.searchsorted(self.documents, first, side="right")
        high = np.searchsorted(self.documents, first + seq_len, side="left")
        marks = np.zeros((len(first), seq_len), np.int32)
        row = np.repeat(np.arange(len(first)), high - low)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(high - low) - (high - low), high - low)
        starts = self.documents[np.repeat(low, high - low) + nth]  # starts of documents that lie within each sample
        marks[row, starts - first[row]] = 1
        return np.cumsum(marks, axis=1, dtype=np.int32)

    def sample_ids(self, seq_len: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The ids of all samples: uint8 [n_samples, 16]; see `sample_ids`.

        Computed once for a length and kept beside the set, where that can be written.
        """
        path = self.directory / f"sample_ids-{self.name}{seq_len}.bin"
        tokens_digest = bytes.fromhex(self._meta["columns"]["tokens"]["digest"])
        n = self.n_samples(seq_len)
        with contextlib.suppress(OSError):
            data = files.read_bytes(path, limit=16 * (n + 1), root=self.directory)
            if len(data) == 16 * (n + 1) and data[-16:] == _seal(data[:-16], tokens_digest):
                return np.frombuffer(data, np.uint8, 16 * n).reshape(n, 16)
        ids = self._ids(seq_len)
        data = ids.tobytes()
        with contextlib.suppress(OSError):  # a convenience: a read-only or full disk is no fault here
            write_bytes(path, data + _seal(data, tokens_digest))
        return ids

    def _ids(self, seq_len: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        n, block = self.n_samples(seq_len), max(1, _BLOCK_TOKENS // seq_len)
        parts = [sample_ids(self._rows("tokens", np.arange(i, min(i + block, n)), seq_len)) for i in range(0, n, block)]
        return np.concatenate(parts) if parts else np.empty((0, 16), np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(column.nbytes for column in self._columns.values())

    def verify(self) -> None:
        """Read everything and compare it with its digests.

        Raises:
            DamagedColumnError: A file has changed.
        """
        for name, column in self._meta["columns"].items():
            state = xxhash.xxh3_128()
            # read, not mapped: pages of a mapped file count as this process's memory
            with os.fdopen(_open_column(self.directory, name), "rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    state.update(block)
            if state.hexdigest() != column["digest"]:
                raise DamagedColumnError(f"{self.directory.name}/{name}.bin has changed")

    def verify_sample(self) -> None:
        """Read some blocks, drawn anew each time, and compare them with their sums; sets of before have none.

        Raises:
            DamagedColumnError: A block has changed.
        """
        names = sorted(name for name in self._columns if name != "counts")
        blocks = [(name, at) for name in names for at in range(0, self._columns[name].nbytes, SUMMED_BYTES)]
        try:
            kept = files.read_bytes(self.directory / SUMS, limit=8 * len(blocks) + 16, root=self.directory)
        except OSError:
            return
        sums = np.frombuffer(kept[:-16], "u1")
        if len(sums) != 8 * len(blocks) or kept != sealed(kept[:-16], self._meta["columns"]):
            return  # what is checked with is damaged, not what is checked
        sums = sums.view("<u8")
        for index in random.SystemRandom().sample(range(len(blocks)), min(SAMPLED_BLOCKS, len(blocks))):
            name, start = blocks[index]
            with os.fdopen(_open_column(self.directory, name), "rb") as file:
                file.seek(start)
                if xxhash.xxh3_64_intdigest(file.read(SUMMED_BYTES)) != sums[index]:
                    raise DamagedColumnError(f"{self.directory.name}/{name}.bin has changed near byte {start}")

    def summary(self) -> dict[str, int]:
        """Plain data: `documents`, `tokens`, `bytes`."""
        return {"documents": self.n_documents, "tokens": self.n_tokens, "bytes": self.n_bytes}

    def _rows(self, column: str, indices: Any, seq_len: int) -> Array:
        n = self.n_samples(seq_len)
        rows: Array = self._columns[column][: n * seq_len].reshape(n, seq_len)
        return rows[self._checked(indices, seq_len)]

    def _begins(self, samples: Int64s, seq_len: int) -> Int64s:
        """Where samples begin in the stream."""
        return samples * seq_len

    def _checked(self, indices: Any, seq_len: int) -> Int64s:
        array = np.asarray(indices, np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.n_samples(seq_len):
            raise IndexError(f"samples {array.min()} … {array.max()} of {self.n_samples(seq_len)}")
        return array


def sample_ids(tokens_NS: Array) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Content ids of samples: xxh3-128 of each row as little-endian uint32 (big-endian digest; uint8 [N, 16])."""
    ids = np.empty((len(tokens_NS), 16), np.uint8)
    block = max(1, _BLOCK_TOKENS // max(1, tokens_NS.shape[1]))
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
        for number in set(range(len(split.tasks))) - set(split.sample_tasks(seq_len).tolist()):
            raise UsageError(
                f"data.tasks: {split.tasks[number]}: its {name} text is less than one sample of {seq_len} tokens "
                "(training.seq_len)",
                hint="add text, or lower training.seq_len" + (", or raise data.held_out" if "held" in name else ""),
            )
        return n
    if split.name:  # samples of whole documents
        raise UsageError(
            f"{name}: no row keeps anything that is scored at {seq_len} tokens (training.seq_len)",
            hint="raise training.seq_len, or add rows" + (", or raise data.held_out" if "held" in name else ""),
        )
    raise UsageError(
        f"{name}: {split.n_tokens} tokens are fewer than one sample of {seq_len} (training.seq_len)",
        hint=f"add text, set training.seq_len to {split.n_tokens} or less"
        + (", or raise data.held_out" if "held" in name else ""),
    )


def sealed(sums: bytes, columns: Mapping[str, Any]) -> bytes:
    """Sums of blocks as their file has them: with a digest of them and of the columns that they are of."""
    return sums + xxhash.xxh3_128_digest(sums + "".join(columns[name]["digest"] for name in sorted(columns)).encode())


def _seal(data: bytes, tokens_digest: bytes) -> bytes:
    return xxhash.xxh3_128_digest(tokens_digest + data)


def _open_column(directory: Path, name: str) -> int:
    return files.open_regular(directory / f"{name}.bin", root=directory.parent)


def _map(directory: Path, name: str, column: Mapping[str, Any]) -> Array:
    if not is_column_name(name) or column["dtype"] not in _TYPES.get(name, ("<i8", "<f4")):
        raise DamagedColumnError(f"a column {name!r} of type {column['dtype']!r}")
    dtype, length = np.dtype(column["dtype"]), column["length"]
    with os.fdopen(_open_column(directory, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != length * dtype.itemsize:  # mapped beyond its end, a file ends the process
            raise DamagedColumnError(f"{directory.name}/{name}.bin is {size} bytes, not {length * dtype.itemsize}")
        if name == "counts" or not length:  # an empty file cannot be mapped
            return np.fromfile(file, dtype)
        return np.memmap(file, dtype, "r", shape=(length,))


def is_column_name(name: object) -> bool:
    """Whether a name can be a column's: it becomes a file's name."""
    return isinstance(name, str) and name.isidentifier() and name.isascii() and len(name) <= 64
