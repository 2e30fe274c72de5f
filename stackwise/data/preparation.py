"""From settings to a prepared data set: made once, kept in the user's cache, found again by content."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise import files
from stackwise.data.chat import Chat
from stackwise.data.corpus import Corpus, Progress, Task, open_memory, scan, task_setting
from stackwise.data.documents import MASK, PAIR, PROMPT, SCORED, TARGETS, TOKENS, HeldOut, Reading
from stackwise.data.prepared import (
    META,
    TOKENIZER,
    VERSION,
    PreparedData,
    describe,
    is_prepared,
)
from stackwise.data.sources import Skipped, Source, find_sources
from stackwise.data.split import OWN_COLUMNS, is_column_name
from stackwise.data.tokenizer import Tokenizer
from stackwise.data.vocabulary import Choice, check_fit
from stackwise.data.writing import SIDES, NotExactError, write_splits
from stackwise.durable import (
    TEMPORARY,
    FileLock,
    explain_full_disk,
    fsync_directory,
    is_full_disk,
    is_locked,
    unusable,
    write_json,
)
from stackwise.errors import BusyError, DamageError, UsageError
from stackwise.identity import Hex, content_id, digest
from stackwise.text import printable

if TYPE_CHECKING:
    from stackwise.config import DataConfig

WAITING = "waiting for"
"""How the phase begins in which another process prepares the same data; its name follows."""

_POLL_SECONDS = 0.2


def prepare(
    config: DataConfig,
    *,
    model_vocab: int | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
    all_held_out: bool = False,
    columns: tuple[str, ...] = (),
) -> tuple[PreparedData, bool]:
    """Prepare the data that `config` names, or find it prepared.

    Args:
        config: The `data` section.
        model_vocab: `model.vocab_size`: bpe is trained to it, another tokenizer must fit into it.
        out: Where the set goes; None: a directory named by content under the cache.
        progress: Called with (phase, done, total or None): "reading", "tokenizer", "tokenizing" in bytes; and while
            another process prepares the same set, with "waiting for" and that process.
        all_held_out: Hold out every document, for evaluation alone; with a tokenizer that is there already. A
            prepared set is taken as it is, if it was made with that tokenizer.
        columns: Named columns that rows must bring, beside `data.columns`: what an objective needs. (Only `targets`
            are kept wherever rows bring them.)

    Returns:
        The set, and whether it was there already.

    Raises:
        NotFound: A path does not exist.
        UsageError: The settings or the data cannot be used. Nothing is left behind.
        DamageError: A prepared set that is named, or that lies in `out`, is damaged.
        NoSpaceError: The disk is full. Nothing is left behind.
    """
    report: Progress = progress or (lambda phase, done, total: None)
    columns_kept = _columns((*config.columns, *columns))
    source = _given(config, None if all_held_out else out)
    if source is not None:
        check_fit(source.vocab_size, f"the tokenizer of {source.directory}", model_vocab)
        if all_held_out:
            _check_tokenizer(source, Choice.of(config, model_vocab))
        for name in columns_kept:
            _check_column(source, name)
        return source, True
    if out is not None:
        _check_out(out)
    choice = Choice.of(config, model_vocab)
    if all_held_out and choice.tokenizer is None:
        raise UsageError("data.tokenizer: bpe has nothing to be trained on where all text is held out")
    reading = Reading(config.text_column, columns_kept, _chat(config, choice, columns_kept))
    sources, skipped = _find(config, reading)
    cache = Cache(config.cache_dir, optional=out is not None)
    with open_memory(cache.memory) as memory:
        corpus = scan(sources, skipped, reading, max_bytes=config.max_bytes, memory=memory, progress=report)
    for task in corpus.tasks if reading.chat is not None and not all_held_out else ():
        if task.contents.documents < 2:
            raise UsageError(f"{task.setting}: one row alone: none can be held out from training", hint="add more rows")
    choice = choice.resolve(corpus)
    share = 1.0 if all_held_out else config.held_out
    held_out = [HeldOut.everything() if all_held_out else _choose(task, share) for task in corpus.tasks]
    key = _key(corpus, choice, share)
    directory = out.absolute() if out is not None else cache.prepared(key)
    with explain_full_disk(directory), cache.building(directory, report):
        reusable = _reusable(directory, key, mine=out is None)
        if reusable is None:
            tokenizer = choice.make(corpus, held_out, cache.tokenizer, report)
            return _build(directory, key, corpus, held_out, tokenizer, report)
    # the same documents may have been found elsewhere, with other files beside them
    reusable.skipped, reusable.notes = corpus.skipped.to_dict(), _notes(corpus, held_out)
    return reusable, True


def _chat(config: DataConfig, choice: Choice, columns: tuple[str, ...]) -> Chat | None:
    """What makes documents of conversations, where the columns that are wanted come of these."""
    makes = next((name for name in (PAIR, PROMPT, SCORED) if name in columns), None)
    if makes is None:
        return None
    directory = None
    if config.tokenizer not in ("bpe", "bytes"):
        path = files.expanded(config.tokenizer)
        directory = path if path.is_dir() else path.parent
    return Chat.of(config.chat_template, choice.tokenizer, directory, makes=makes)


def _find(config: DataConfig, reading: Reading) -> tuple[dict[str, list[Source]], Skipped]:
    """The files of each task, by its name; without tasks all of them under an empty one."""
    if not config.tasks:
        sources, skipped = find_sources(config.paths, reading, follow_links=config.follow_links)
        return {"": sources}, skipped
    skipped, by_task, task_of = Skipped(), dict[str, list[Source]](), dict[str, str]()
    for task in config.tasks:
        by_task[task.name], without = find_sources(
            task.paths, reading, follow_links=config.follow_links, setting=task_setting(task.name)
        )
        skipped.extend(without)
        for source in by_task[task.name]:
            if (other := task_of.setdefault(os.path.realpath(source.path), task.name)) != task.name:
                raise UsageError(
                    f"data.tasks: {source.path} is in {other} and in {task.name}",
                    hint="leave it out of one of them: what a task holds out, no other may train on",
                )
    return by_task, skipped


def _choose(task: Task, share: float) -> HeldOut:
    contents = task.contents
    return HeldOut.choose(contents.documents, contents.lowest, contents.highest, share, task.setting)


def _columns(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not is_column_name(name) or name in OWN_COLUMNS | {TOKENS, MASK}:
            raise UsageError(f"data.columns: {name!r} cannot be a column's name", hint="such as `weights`")
    return tuple(sorted(set(names) - {TARGETS}))  # targets are kept wherever they are


def _check_column(source: PreparedData, name: str) -> None:
    if name not in source.train.columns:
        raise UsageError(
            f"{source.directory}: prepared without the column {name!r}",
            hint="prepare its rows again with data.columns naming it, or name the rows themselves in data.paths",
        )


def _given(config: DataConfig, out: Path | None) -> PreparedData | None:
    """The prepared set that the paths name."""
    for task in config.tasks:
        if ready := next((path for path in map(files.expanded, task.paths) if is_prepared(path)), None):
            raise UsageError(
                f"{task_setting(task.name)}: {ready} is a prepared data set, with a tokenizer of its own",
                hint="name the text itself: all tasks have one tokenizer",
            )
    named = [path for path in (files.expanded(name) for name in config.paths) if is_prepared(path)]
    if not named:
        return None
    if len(config.paths) > 1:  # its split and tokenizer are made already
        raise UsageError(f"data.paths: {named[0]} is a prepared data set; it stands alone, without other paths")
    if out is not None:
        raise UsageError(f"{named[0]} is prepared already", hint=f"set data.paths to [{named[0]}]")
    return PreparedData.open(named[0])


def _check_tokenizer(source: PreparedData, choice: Choice) -> None:
    if choice.tokenizer is not None and choice.tokenizer.id != source.tokenizer_id:
        raise UsageError(
            f"{source.directory}: prepared with another tokenizer",
            hint="name the text itself instead of the prepared set",
        )


def _check_out(out: Path) -> None:
    if out.is_dir():
        if not is_prepared(out) and any(out.iterdir()):
            raise UsageError(
                f"--out {out}: exists and is not a prepared data set", hint="name a folder that does not exist"
            )
    elif os.path.lexists(out):
        raise UsageError(f"--out {out}: exists and is not a folder", hint="name a folder that does not exist")


def _key(corpus: Corpus, choice: Choice, share: float) -> Hex:
    """What determines a set. The text column and max_bytes do so through the documents that they select."""
    contents = corpus.contents
    documents = {"n": contents.documents, "sequence": contents.sequence, "text": corpus.has_text}
    parts: dict[str, Any] = {"version": VERSION, "documents": documents, "tokenizer": choice.spec, "held_out": share}
    if corpus.task_names:
        parts["tasks"] = [[task.name, task.contents.documents, task.contents.sequence] for task in corpus.tasks]
    return content_id("prepared data request", parts)


def _notes(corpus: Corpus, held_out: Sequence[HeldOut]) -> list[str]:
    divided = [task for task, chosen in zip(corpus.tasks, held_out, strict=True) if chosen.single]
    lines = [
        f"{task.name}: " * bool(task.name) + "the only document was divided: its end is held out" for task in divided
    ]
    return [*lines, *corpus.notes()]


def _reusable(directory: Path, key: Hex, *, mine: bool) -> PreparedData | None:
    """The set in `directory`, where it is the one wanted. What else lies in the cache in its place is made anew."""
    if not os.path.lexists(directory) or (not mine and directory.is_dir() and not any(directory.iterdir())):
        return None
    try:
        there = PreparedData.open(directory)
        if there.key != key:  # never replace what the user named
            raise UsageError(
                f"--out {directory}: holds another prepared data set", hint="name another folder, or remove that one"
            )
    except (UsageError, DamageError):
        if not mine:
            raise
        if directory.is_dir() and not directory.is_symlink():
            shutil.rmtree(directory)
        else:
            directory.unlink()
        return None
    return there


def _build(
    directory: Path, key: Hex, corpus: Corpus, held_out: Sequence[HeldOut], tokenizer: Tokenizer, report: Progress
) -> tuple[PreparedData, bool]:
    """Make the set under a temporary name, then give it its own. True where another process was faster."""
    temporary = directory.parent / f"{TEMPORARY}{directory.name}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        if is_full_disk(error):
            raise
        raise UsageError(f"{directory}: cannot be made ({error.strerror})") from None
    try:
        splits = _write(temporary, corpus, held_out, tokenizer, report)
        tokenizer.save(temporary / TOKENIZER)
        for side in SIDES:
            fsync_directory(temporary / side)
        notes = _notes(corpus, held_out)
        write_json(temporary / META, describe(key, tokenizer, splits, skipped=corpus.skipped.to_dict(), notes=notes))
        try:
            temporary.rename(directory)  # appears whole, or not at all
        except OSError:
            # without a cache to hold a lock in, another process may have come first
            if is_prepared(directory) and (first := PreparedData.open(directory)).key == key:
                return first, True
            raise
        fsync_directory(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return PreparedData.open(directory), False


def _write(
    directory: Path, corpus: Corpus, held_out: Sequence[HeldOut], tokenizer: Tokenizer, report: Progress
) -> list[dict[str, Any]]:
    # text lengths of such tokens depend on their place
    measure = corpus.has_text and tokenizer.bytes_per_token() is None
    try:
        return write_splits(directory, corpus, held_out, tokenizer, measure=measure, progress=report)
    except NotExactError:
        for side in SIDES:
            shutil.rmtree(directory / side)
        return write_splits(directory, corpus, held_out, tokenizer, measure=True, progress=report)


class Cache:
    """The user's cache directory: prepared sets, trained tokenizers, what files were found to hold, locks.

    Nothing is made in it before something is kept.

    Args:
        setting: `data.cache_dir`; None: `$XDG_CACHE_HOME/stackwise`, else `~/.cache/stackwise`.
        optional: One that cannot be written is done without.

    Raises:
        UsageError: It cannot be written, and is not optional.
    """

    def __init__(self, setting: str | None, *, optional: bool) -> None:
        root = files.expanded(setting or files.user_cache()).absolute()
        self.root: Path | None = root
        """The directory; None: it cannot be written."""
        if (why := unusable(root)) is not None:
            if not optional:
                raise UsageError(
                    f"the cache directory {root} cannot be written ({why})",
                    hint="set data.cache_dir (or XDG_CACHE_HOME) to a folder that can",
                )
            self.root = None

    @property
    def memory(self) -> Path | None:
        """Where is remembered what files hold."""
        return None if self.root is None else self.root / "files.sqlite"

    def prepared(self, key: Hex) -> Path:
        """Where the set of that key is, or goes (not for an optional cache)."""
        assert self.root is not None
        return self.root / "prepared" / key

    def tokenizer(self, key: Hex) -> Path | None:
        """Where the tokenizer of that key is, or goes; its folder is made."""
        return None if self.root is None else _made(self.root / "tokenizers") / f"{key}.json"

    @contextlib.contextmanager
    def building(self, directory: Path, report: Progress) -> Iterator[None]:
        """Hold what is to become `directory`; whoever comes second waits, and reports for whom.

        What a killed process left half made beside it is removed.
        """
        if self.root is None:
            yield
            return
        lock = FileLock(self._lock_file(directory), f"the preparation of {directory}")
        waited = 0
        while not lock.held:
            try:
                lock.acquire()
            except BusyError as error:
                holder = printable(error.message.rpartition(" is held by ")[2])
                report(f"{WAITING} {holder}", waited, None)
                time.sleep(_POLL_SECONDS)  # the lock has no queue to wait in
                waited += 1
        with lock:
            self._sweep(directory)
            yield

    def _lock_file(self, directory: Path) -> Path:
        assert self.root is not None
        return _made(self.root / "locks") / digest(os.fsencode(directory))

    def _sweep(self, mine: Path) -> None:
        for stale in list(mine.parent.glob(f"{TEMPORARY}*-????????")):
            whose = mine.parent / stale.name.removeprefix(TEMPORARY)[:-9]
            # listed first, asked second: a live builder held its lock before its folder was there to be listed
            if whose == mine or (mine.parent.name == "prepared" and not is_locked(self._lock_file(whose))):
                shutil.rmtree(stale, ignore_errors=True)


def _made(folder: Path) -> Path:
    files.make_directory(folder)
    return folder
