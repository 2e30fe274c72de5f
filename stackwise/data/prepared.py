"""A prepared data set: two sides (`split.py`), a tokenizer, what it says of itself; samples of whole documents.

It may be a copy that somebody else made: what lies in it is opened as regular files alone, and compared with digests.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from stackwise import files
from stackwise.data.documents import IGNORED, PAIR, PROMPT, SCORED, TARGETS, Array, Int64s
from stackwise.data.split import DamagedColumnError, Split
from stackwise.data.tokenizer import Tokenizer
from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.identity import Hex, content_id, digest, is_hex_id
from stackwise.text import printable


class TaskStream(Split):
    """A stream whose samples never hold two tasks: the tail of each task that fills no sample is left."""

    def __init__(self, directory: Path, meta: Mapping[str, Any], byte_table: Callable[[], Int64s | None]) -> None:
        super().__init__(directory, meta, byte_table)
        self._tokens_at = np.append(np.asarray(self.documents, np.int64), self.n_tokens)[self._task_edges]

    def _counts(self, seq_len: int) -> Int64s:
        """Samples of each task."""
        return np.diff(self._tokens_at) // seq_len

    def n_samples(self, seq_len: int) -> int:
        return int(self._counts(seq_len).sum())

    def sample_tasks(self, seq_len: int) -> Int64s:
        return np.repeat(np.arange(len(self.tasks)), self._counts(seq_len))

    def _begins(self, samples: Int64s, seq_len: int) -> Int64s:
        edges = np.append(0, np.cumsum(self._counts(seq_len)))  # at which sample each task begins
        task = np.searchsorted(edges, samples, side="right") - 1
        return np.asarray(self._tokens_at[task] + (samples - edges[task]) * seq_len)

    def _rows(self, column: str, indices: Any, seq_len: int) -> Array:
        begins = self._begins(self._checked(indices, seq_len), seq_len)
        return np.asarray(self._columns[column][begins[:, None] + np.arange(seq_len)])


class WholeDocuments(Split):
    """A split whose samples hold whole documents, cut to the sample's length, and padding after them.

    Padding is the separator, a segment of its own, with nothing scored.
    """

    name = ""

    def __init__(self, directory: Path, meta: Mapping[str, Any], byte_table: Callable[[], Int64s | None]) -> None:
        super().__init__(directory, meta, byte_table)
        self._laid: dict[int, list[list[tuple[int, int, int]]]] = {}
        self._shortened: dict[int, int] = {}  # by the sample's length, documents of which not all is there
        self._padding = {"tokens": int(self.tokens[-1]) if len(self.tokens) else 0, TARGETS: IGNORED}

    def places(self, seq_len: int) -> list[list[tuple[int, int, int]]]:
        """For each sample its runs: where one begins in the sample, where in the stream, how many tokens."""
        if seq_len not in self._laid:
            self._shortened[seq_len] = 0
            runs = zip(self._task_edges[:-1].tolist(), self._task_edges[1:].tolist(), strict=True)
            self._laid[seq_len] = [sample for first, last in runs for sample in self._lay(seq_len, first, last)]
        return self._laid[seq_len]

    def sample_tasks(self, seq_len: int) -> Int64s:
        begins = np.array([runs[0][1] for runs in self.places(seq_len)], np.int64)
        return np.searchsorted(np.asarray(self.documents)[self._task_edges[1:-1]], begins, side="right")

    def n_samples(self, seq_len: int) -> int:
        """Samples of `seq_len` tokens."""
        return len(self.places(seq_len))

    def remarks(self, seq_len: int) -> list[str]:
        """What samples of a length lack of the documents, a line each."""
        here = sum(map(self._documents_in, self.places(seq_len)))
        lines = {
            "are cut": self._shortened[seq_len],
            "are left out, as nothing scored is left of them,": self.n_documents - here,
        }
        return [
            f"{count} of {self.n_documents} rows {what} at {seq_len} tokens" for what, count in lines.items() if count
        ]

    def _documents_in(self, runs: list[tuple[int, int, int]]) -> int:
        return len(runs)

    def segments(self, indices: Any, seq_len: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """See `Split.segments`; padding is a document of its own."""
        samples = self._checked(indices, seq_len)
        marks = np.zeros((len(samples), seq_len), np.int32)
        for row, index in enumerate(samples):
            runs = self.places(seq_len)[index]
            marks[row] = len(runs)
            for number, (at, _, length) in enumerate(runs):
                marks[row, at : at + length] = number
        return marks

    def _rows(self, column: str, indices: Any, seq_len: int) -> Array:
        values, samples = self._columns[column], self._checked(indices, seq_len)
        rows = np.full((len(samples), seq_len), self._padding.get(column, 0), values.dtype)
        for row, index in enumerate(samples):
            for at, start, length in self.places(seq_len)[index]:
                rows[row, at : at + length] = values[start : start + length]
        return rows

    def _edges(self) -> Int64s:
        return np.append(np.asarray(self.documents, np.int64), self.n_tokens)

    def _lay(self, seq_len: int, first: int, last: int) -> list[list[tuple[int, int, int]]]:
        """The samples of documents `first` to `last`, the latter excluded: a task's, or all."""
        raise TypeError(f"{type(self).__name__} does not say how samples are laid out")


class PackedSplit(WholeDocuments):
    """Documents packed into samples, the longest first, each where the least room is left (best fit, decreasing).

    One of which nothing scored would be left is left out.
    """

    name = "packed"

    def _lay(self, seq_len: int, first: int, last: int) -> list[list[tuple[int, int, int]]]:
        edges, scored = self._edges()[first : last + 1], np.flatnonzero(self._columns[SCORED])
        starts, lengths = edges[:-1], np.minimum(np.diff(edges), seq_len)
        any_scored = np.searchsorted(scored, starts) < np.searchsorted(scored, starts + lengths)
        self._shortened[seq_len] += int((np.diff(edges) > seq_len)[any_scored].sum())
        # The number of a document breaks ties: the layout is a function of the documents and the length alone.
        order = np.lexsort((np.arange(len(starts)), -lengths))
        samples: list[list[tuple[int, int, int]]] = []
        room: list[int] = []  # the different amounts of room that are left, sorted
        with_room: dict[int, list[int]] = {}  # samples by the room that is left, the lowest first
        for document in order[any_scored[order]].tolist():
            start, length = int(starts[document]), int(lengths[document])
            place = bisect_left(room, length)
            if place == len(room):
                number, left = len(samples), seq_len
                samples.append([])
            else:
                left = room[place]
                number = heapq.heappop(with_room[left])
                if not with_room[left]:
                    del with_room[left], room[place]
            samples[number].append((seq_len - left, start, length))
            if (after := left - length) > 0:
                if after not in with_room:
                    insort(room, after)
                heapq.heappush(with_room.setdefault(after, []), number)
        return samples


class PairSplit(WholeDocuments):
    """A pair a sample: the chosen side in its first half, the rejected one in its second.

    A pair is left out where a side keeps nothing that is scored.
    """

    name = "pairs"

    def _lay(self, seq_len: int, first: int, last: int) -> list[list[tuple[int, int, int]]]:
        edges, marks, half = self._edges()[first : last + 1], np.asarray(self._columns[PAIR]), seq_len // 2
        samples, shortened = [], 0
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            of_pair = marks[start:stop]
            second = np.flatnonzero(of_pair >= 2)
            if not len(second):
                continue
            at, end = int(second[0]), int(second[-1]) + 1
            chosen, rejected = min(at, half), min(end - at, half)
            if (of_pair[:chosen] == 1).any() and (of_pair[at : at + rejected] == 3).any():
                samples.append([(0, start, chosen), (half, start + at, rejected)])
                shortened += chosen + rejected < end
        self._shortened[seq_len] += shortened
        return samples

    def _documents_in(self, runs: list[tuple[int, int, int]]) -> int:
        return 1


class PromptSplit(WholeDocuments):
    """A prompt a sample, at its beginning; one that is longer than a sample is cut."""

    name = "prompts"

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        marks = np.asarray(self._columns[PROMPT])
        return int(np.add.reduceat(marks, self.documents).max(initial=0)) if len(marks) else 0

    def _lay(self, seq_len: int, first: int, last: int) -> list[list[tuple[int, int, int]]]:
        edges = self._edges()[first : last + 1]
        lengths = np.diff(edges)
        self._shortened[seq_len] += int((lengths > seq_len).sum())
        ends = np.minimum(lengths, seq_len).tolist()
        return [[(0, start, length)] for start, length in zip(edges[:-1].tolist(), ends, strict=True) if length]


def split_of(directory: Path, meta: Mapping[str, Any], byte_table: Callable[[], Int64s | None]) -> Split:
    """A side of a prepared set, its samples as its columns say: pairs, packed conversations, prompts, or a stream."""
    columns = meta["columns"]
    stream = TaskStream if "tasks" in meta else Split
    kinds = {PAIR: PairSplit, SCORED: PackedSplit, PROMPT: PromptSplit}
    kind = next((kind for name, kind in kinds.items() if name in columns), stream)
    return kind(directory, meta, byte_table)


FORMAT, VERSION = "stackwise prepared data", 1
META, TOKENIZER = "meta.json", "tokenizer.json"

VERIFIED_BYTES = 256 << 20
"""A set of at most so many bytes is verified whole whenever it is opened."""


CLAIM_BYTES = 1 << 20
"""A `meta.json` beyond this is someone else's."""

_TOKENIZER_BYTES = 256 << 20


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
        self.tokenizer_id: Hex = meta["tokenizer"]["id"]
        self.mask_id: int = meta["tokenizer"]["mask_id"]
        self.skipped: Mapping[str, Any] = meta["skipped"] if isinstance(meta.get("skipped"), dict) else {}
        """Files that were left out: `count`, `reasons`, the first of the `files`."""
        self.notes: list[str] = [str(note) for note in meta.get("notes") or ()]
        """What was decided about the data, a line each."""
        self.train = split_of(directory / "train", meta["splits"]["train"], self._table)
        self.held_out = split_of(directory / "held_out", meta["splits"]["held_out"], self._table)

    @classmethod
    def open(cls, directory: Path | str) -> Self:
        """Open a set and check it: a small one whole, a large one by its sizes and a sample of its content.

        Raises:
            NotFound: There is none.
            UsageError: It is of a newer format.
            DamageError: It is damaged.
        """
        directory = Path(directory)
        meta = _read_meta(directory)
        try:
            # its id first: then everything else in it is what was written
            if meta["id"] != _id(meta["version"], meta["tokenizer"], meta["splits"]):
                raise _damaged(directory, f"{META} has changed")
            data = cls(directory, meta)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, OSError) as error:
            raise _damaged(directory, str(getattr(error, "message", error))) from None
        data._verify_tokenizer()
        data._verify_splits(whole=data.train.nbytes + data.held_out.nbytes <= VERIFIED_BYTES)
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
            DamageError: Something is damaged.
        """
        self._verify_tokenizer()
        self._verify_splits(whole=True)

    def _table(self) -> Int64s | None:
        return self.byte_table

    def _verify_splits(self, *, whole: bool) -> None:
        try:
            for split in (self.train, self.held_out):
                split.verify() if whole else split.verify_sample()
        except (DamagedColumnError, OSError) as error:
            raise _damaged(self.directory, str(error)) from None

    def _verify_tokenizer(self) -> None:
        try:
            now = digest(files.read_bytes(self.directory / TOKENIZER, limit=_TOKENIZER_BYTES, root=self.directory))
        except OSError as error:
            raise _damaged(self.directory, str(error)) from None
        if now != self._meta["tokenizer"]["digest"]:
            raise _damaged(self.directory, f"{TOKENIZER} has changed")

    def summary(self) -> dict[str, Any]:
        """Plain data: id, directory, tokenizer; documents, tokens, bytes, in all and by split; skipped, notes."""
        splits = {"train": self.train.summary(), "held_out": self.held_out.summary()}
        totals = {key: sum(split[key] for split in splits.values()) for key in ("documents", "tokens", "bytes")}
        tokenizer = {key: value for key, value in self._meta["tokenizer"].items() if key != "digest"}
        head = {"id": self.id, "directory": str(self.directory), "tokenizer": tokenizer}
        tasks = {"tasks": list(self.train.tasks)} if self.train.tasks else {}
        return {**head, **totals, **splits, **tasks, "skipped": self.skipped, "notes": self.notes}


def is_prepared(directory: Path) -> bool:
    """Whether a folder is a prepared set, whole or damaged. It says nothing of what it holds."""
    meta = directory / META
    try:
        if (directory / TOKENIZER).is_file() and (directory / "train" / "tokens.bin").is_file():
            return True
        return meta.is_file() and FORMAT.encode() in files.read_bytes(meta, limit=CLAIM_BYTES)
    except OSError:
        return False


def describe(key: Hex, tokenizer: Tokenizer, splits: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The description of a new set, its id included."""
    named = dict(zip(("train", "held_out"), splits, strict=True))
    about = {
        "name": tokenizer.name,
        "id": tokenizer.id,
        "digest": digest(tokenizer.json.encode()),
        "vocab_size": tokenizer.vocab_size,
        "separator_id": tokenizer.separator_id,
        "mask_id": tokenizer.mask_id,
    }
    head = {"format": FORMAT, "version": VERSION, "id": _id(VERSION, about, named), "key": key}
    return {**head, "tokenizer": about, "splits": named, **more}


def _id(version: int, tokenizer: Mapping[str, Any], splits: Mapping[str, Any]) -> Hex:
    about = {name: value for name, value in tokenizer.items() if name != "name"}  # a path, which may differ
    return content_id("prepared data", {"version": version, "tokenizer": about, "splits": splits})


def _read_meta(directory: Path) -> Mapping[str, Any]:
    try:
        meta = files.read_json(directory / META)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{directory} is not a prepared data set (it has no {META})") from None
    except (OSError, ValueError) as error:
        raise _damaged(directory, f"{META}: {getattr(error, 'message', error)}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:  # any tool may have a meta.json
        raise NotFound(f"{directory} is not a prepared data set ({META} is something else)")
    version = meta.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version > VERSION:
        raise UsageError(
            f"{directory}: prepared data of format {version}; this version reads up to {VERSION}",
            hint="update stackwise, or prepare the data again",
        )
    if not is_hex_id(meta.get("id")) or not is_hex_id(meta.get("key")):
        raise _damaged(directory, f"{META}: no id")
    return meta


def _damaged(directory: Path, what: str) -> DamageError:
    return DamageError(
        f"{directory}: damaged prepared data: {printable(what)[:500]}", hint="remove it and prepare the data again"
    )
