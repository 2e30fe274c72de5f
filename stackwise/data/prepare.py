"""From settings to a prepared data set: made once, found again by content."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.data.memo import open_memo
from stackwise.data.prepared import META, TOKENIZER, VERSION, PreparedData, describe, is_prepared
from stackwise.data.scan import Corpus, HeldOut, Progress, scan
from stackwise.data.sources import find_sources
from stackwise.data.tokenizer import Tokenizer, bytes_tokenizer
from stackwise.data.training import DEFAULT_VOCABULARY, TRAINER, check_vocabulary, numbers_tokenizer, train_bpe
from stackwise.data.writer import NotExactError, write_splits
from stackwise.durable import TEMPORARY, FileLock, explain_full_disk, fsync_directory, write_json
from stackwise.errors import BusyError, NotFound, UsageError
from stackwise.identity import Hex, content_id, digest

if TYPE_CHECKING:
    from stackwise.config import DataConfig


def prepare(
    config: DataConfig,
    *,
    model_vocab: int | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> tuple[PreparedData, bool]:
    """Prepare the data that `config` names, or find it prepared.

    Args:
        config: The `data` section.
        model_vocab: `model.vocab_size`: bpe is trained to it, another tokenizer must fit into it.
        out: Where the set goes; None: a directory named by content under the cache.
        progress: Called with (phase, done, total or None): "reading", "tokenizer", "tokenizing" in bytes, and
            "waiting" while another process prepares the same set.

    Returns:
        The set, and whether it was there already.

    Raises:
        NotFound: A path does not exist.
        UsageError: The settings or the data cannot be used. Nothing is left behind.
        NoSpaceError: The disk is full. Nothing is left behind.
    """
    report: Progress = progress or (lambda phase, done, total: None)
    given = _given(config, out)
    if given is not None:
        _check_fit(given.vocab_size, f"the tokenizer of {given.directory}", model_vocab)
        return given, True
    if out is not None:
        _check_out(out)
    choice = _Choice.of(config, model_vocab)
    cache = _Cache(config.cache_dir, optional=out is not None)
    sources, skipped = find_sources(config.paths)
    with open_memo(cache.file("files.sqlite")) as memo:
        corpus = scan(sources, skipped, config.text_column, config.max_bytes, memo, report)
    held_out = HeldOut.choose(corpus.contents, config.held_out)
    choice = choice.resolve(corpus, model_vocab)
    key = _key(corpus, choice, config.held_out)
    directory = out.absolute() if out is not None else cache.prepared(key)
    with cache.lock(directory, report):
        if (found := _reusable(directory, key, mine=out is None)) is not None:
            return found, True
        tokenizer = choice.tokenizer or _trained(corpus, held_out, choice.vocab_size, cache, report)
        with explain_full_disk(directory):
            reused = _build(directory, key, corpus, held_out, tokenizer, report)
    return PreparedData.open(directory), reused


def _given(config: DataConfig, out: Path | None) -> PreparedData | None:
    """The prepared set that the paths name."""
    named = [path for path in map(_user_path, config.paths) if is_prepared(path) or (path / META).is_file()]
    if not named:
        return None
    if len(config.paths) > 1:
        raise UsageError(f"data.paths: {named[0]} is a prepared data set; it stands alone, without other paths")
    if out is not None:
        raise UsageError(f"{named[0]} is prepared already", hint=f"set data.paths to [{named[0]}]")
    return PreparedData.open(named[0])


def _user_path(name: str) -> Path:
    return Path(name).expanduser()


def _check_out(out: Path) -> None:
    if not out.exists() or is_prepared(out):
        return
    if not out.is_dir():
        raise UsageError(f"--out {out}: exists and is not a folder")
    if any(out.iterdir()):
        raise UsageError(
            f"--out {out}: exists and is not a prepared data set", hint="name a folder that does not exist"
        )


def _check_fit(vocab_size: int, what: str, model_vocab: int | None) -> None:
    if model_vocab is not None and vocab_size > model_vocab:
        raise UsageError(
            f"model.vocab_size: {model_vocab} is too small for {what}, whose ids (separator and mask included) are "
            f"{vocab_size}",
            hint=f"set model.vocab_size to null, or to {vocab_size} or more",
        )


@dataclass(frozen=True)
class _Choice:
    """Which tokenizer: `tokenizer` where it is known beforehand, else the size that bpe is trained to."""

    spec: dict[str, Any]
    tokenizer: Tokenizer | None
    vocab_size: int
    default: bool

    @classmethod
    def of(cls, config: DataConfig, model_vocab: int | None) -> _Choice:
        if config.tokenizer == "bpe":
            size = config.vocab_size or model_vocab or DEFAULT_VOCABULARY
            check_vocabulary(size, "data.vocab_size" if config.vocab_size else "model.vocab_size")
            _check_fit(size, f"data.vocab_size {size}", model_vocab)
            return cls({"kind": "bpe", "vocab_size": size, "trainer": TRAINER}, None, size, default=True)
        if config.tokenizer == "bytes":
            return cls._fixed("bytes", bytes_tokenizer(), model_vocab)
        return cls._fixed("file", Tokenizer.load(_user_path(config.tokenizer)), model_vocab)

    @classmethod
    def _fixed(cls, kind: str, tokenizer: Tokenizer, model_vocab: int | None) -> _Choice:
        _check_fit(tokenizer.vocab_size, f"the tokenizer {tokenizer.name}", model_vocab)
        spec = {"kind": kind, "id": tokenizer.id}
        return cls(spec, tokenizer, tokenizer.vocab_size, default=False)

    def resolve(self, corpus: Corpus, model_vocab: int | None) -> _Choice:
        """The choice for a corpus: one of ready tokens is not trained on."""
        largest = corpus.contents.largest_id
        if corpus.has_text:
            return self
        if self.default:
            return _Choice._fixed("ids", numbers_tokenizer(max(largest + 1, (model_vocab or 0) - 2)), model_vocab)
        assert self.tokenizer is not None
        if largest >= self.tokenizer.vocab_size:
            raise UsageError(
                f"data.paths: rows bring the id {largest}, but the tokenizer {self.tokenizer.name} has "
                f"{self.tokenizer.vocab_size} ids",
                hint="set data.tokenizer to the one that made the rows",
            )
        return self


def _key(corpus: Corpus, choice: _Choice, share: float) -> Hex:
    """What determines a set; the text column and max_bytes do so through the documents that they select."""
    found = corpus.contents
    documents = {"n": found.documents, "sequence": found.sequence, "text": corpus.has_text}
    parts = {"version": VERSION, "documents": documents, "tokenizer": choice.spec, "held_out": share}
    return content_id("prepared data request", parts)


class _Cache:
    """The cache directory. An optional one that cannot be written is done without."""

    def __init__(self, setting: str | None, *, optional: bool) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.root: Path | None = (_user_path(setting) if setting else Path(base).expanduser() / "stackwise").absolute()
        try:
            for name in ("prepared", "tokenizers", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            if not os.access(self.root / "locks", os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            if not optional:
                raise UsageError(
                    f"the cache directory {self.root} cannot be written ({error.strerror})",
                    hint="set data.cache_dir (or XDG_CACHE_HOME) to a folder that can",
                ) from None
            self.root = None

    def file(self, name: str) -> Path | None:
        return None if self.root is None else self.root / name

    def prepared(self, key: Hex) -> Path:
        assert self.root is not None
        return self.root / "prepared" / key

    @contextlib.contextmanager
    def lock(self, directory: Path, report: Progress) -> Iterator[None]:
        """Hold what is to become `directory`; whoever comes second waits."""
        path = self.file(f"locks/{digest(os.fsencode(directory))}")
        if path is None:
            yield
            return
        lock = FileLock(path, f"the preparation of {directory}")
        waited = 0
        while True:
            try:
                lock.acquire()
                break
            except BusyError:
                report("waiting", waited, None)
                time.sleep(0.2)
                waited += 1
        with lock:
            yield


def _reusable(directory: Path, key: Hex, *, mine: bool) -> PreparedData | None:
    """The set in `directory`, where it is the one wanted. A damaged one in the cache is made anew."""
    if not directory.exists():
        return None
    if not mine and not any(directory.iterdir()):
        return None
    try:
        found = PreparedData.open(directory)
    except UsageError:
        if not mine:
            raise
        shutil.rmtree(directory)
        return None
    if found.key != key:
        raise UsageError(
            f"--out {directory}: holds another prepared data set", hint="name another folder, or remove that one"
        )
    return found


def _trained(corpus: Corpus, held_out: HeldOut, vocab_size: int, cache: _Cache, report: Progress) -> Tokenizer:
    """The bpe of this text, from the cache where it was trained before."""
    documents = {"n": corpus.contents.documents, "sequence": corpus.contents.sequence, "below": held_out.below}
    share = held_out.share if held_out.single else None
    key = content_id("bpe", {"trainer": TRAINER, "vocab_size": vocab_size, "share": share, **documents})
    path = cache.file(f"tokenizers/{key}.json")
    if path is not None:
        with contextlib.suppress(NotFound, UsageError):
            return Tokenizer.from_json(Tokenizer.load(path).json, name="bpe")
    tokenizer = train_bpe(corpus, held_out, vocab_size, report)
    if path is not None:
        tokenizer.save(path)
    return tokenizer


def _build(
    directory: Path, key: Hex, corpus: Corpus, held_out: HeldOut, tokenizer: Tokenizer, report: Progress
) -> bool:
    """Make the set under a temporary name, then give it its own. True where another process was faster."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    for stale in directory.parent.glob(f"{TEMPORARY}{directory.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = directory.parent / f"{TEMPORARY}{directory.name}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        splits = _write(temporary, corpus, held_out, tokenizer, report)
        notes = []
        if held_out.single:
            notes.append("the only document was divided: its end is held out")
        tokenizer.save(temporary / TOKENIZER)
        for split in ("train", "held_out"):
            fsync_directory(temporary / split)
        skipped = corpus.skipped.to_dict()
        write_json(temporary / META, describe(key, tokenizer, splits, skipped=skipped, notes=notes))
        try:
            os.rename(temporary, directory)
        except OSError:
            if is_prepared(directory) and PreparedData.open(directory).key == key:
                return True
            raise
        fsync_directory(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return False


def _write(
    directory: Path, corpus: Corpus, held_out: HeldOut, tokenizer: Tokenizer, report: Progress
) -> list[dict[str, Any]]:
    measure = corpus.has_text and tokenizer.bytes_per_token() is None
    try:
        return write_splits(directory, corpus, held_out, tokenizer, measure=measure, progress=report)
    except NotExactError:
        for split in ("train", "held_out"):
            shutil.rmtree(directory / split)
        return write_splits(directory, corpus, held_out, tokenizer, measure=True, progress=report)
