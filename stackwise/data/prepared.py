"""A prepared data set: its two sides (`split.py`), its tokenizer, and what it says of itself.

It may be a copy that somebody else made: what lies in it is opened as regular files alone, and compared with digests.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from stackwise import files
from stackwise.data.documents import Int64s
from stackwise.data.layouts import split_of
from stackwise.data.split import DamagedColumnError
from stackwise.data.tokenizer import Tokenizer
from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.identity import Hex, content_id, digest, is_hex_id
from stackwise.text import printable

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
