"""From settings to a prepared data set: made once, found again by content."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.data.cache import Cache
from stackwise.data.choice import Choice, check_fit
from stackwise.data.held_out import HeldOut
from stackwise.data.memo import open_memo
from stackwise.data.prepared import META, TOKENIZER, VERSION, PreparedData, describe, is_prepared
from stackwise.data.scan import Corpus, Progress, scan
from stackwise.data.sources import find_sources
from stackwise.data.tokenizer import Tokenizer
from stackwise.data.tokenizing import SIDES, NotExactError, write_splits
from stackwise.durable import TEMPORARY, explain_full_disk, fsync_directory, write_json
from stackwise.errors import UsageError
from stackwise.identity import Hex, content_id

if TYPE_CHECKING:
    from stackwise.config import DataConfig


def prepare(
    config: DataConfig,
    *,
    model_vocab: int | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
    all_held_out: bool = False,
) -> tuple[PreparedData, bool]:
    """Prepare the data that `config` names, or find it prepared.

    Args:
        config: The `data` section.
        model_vocab: `model.vocab_size`: bpe is trained to it, another tokenizer must fit into it.
        out: Where the set goes; None: a directory named by content under the cache.
        progress: Called with (phase, done, total or None): "reading", "tokenizer", "tokenizing" in bytes, and
            "waiting" while another process prepares the same set.
        all_held_out: Hold out every document, for evaluation alone; with a tokenizer that is there already. A
            prepared set is taken as it is, if it was made with that tokenizer.

    Returns:
        The set, and whether it was there already.

    Raises:
        NotFound: A path does not exist.
        UsageError: The settings or the data cannot be used. Nothing is left behind.
        NoSpaceError: The disk is full. Nothing is left behind.
    """
    tell: Progress = progress or (lambda phase, done, total: None)
    given = _given(config, None if all_held_out else out)
    if given is not None:
        check_fit(given.vocab_size, f"the tokenizer of {given.directory}", model_vocab)
        if all_held_out:
            _check_tokenizer(given, Choice.of(config, model_vocab))
        return given, True
    if out is not None:
        _check_out(out)
    choice = Choice.of(config, model_vocab)
    if all_held_out and choice.tokenizer is None:
        raise UsageError("data.tokenizer: bpe has nothing to be trained on where all text is held out")
    sources, skipped = find_sources(config.paths)
    cache = Cache(config.cache_dir, optional=out is not None)
    with open_memo(cache.memo) as memo:
        corpus = scan(sources, skipped, config.text_column, config.max_bytes, memo, tell)
    choice = choice.resolve(corpus)
    share = 1.0 if all_held_out else config.held_out
    held_out = HeldOut.everything() if all_held_out else HeldOut.choose(corpus.contents, share)
    key = _key(corpus, choice, share)
    directory = out.absolute() if out is not None else cache.prepared(key)
    with explain_full_disk(directory), cache.building(directory, tell):
        if (found := _reusable(directory, key, mine=out is None)) is not None:
            return found, True
        tokenizer = choice.make(corpus, held_out, cache, tell)
        return _build(directory, key, corpus, held_out, tokenizer, tell)


def _given(config: DataConfig, out: Path | None) -> PreparedData | None:
    """The prepared set that the paths name."""
    named = [path for path in (Path(name).expanduser() for name in config.paths) if is_prepared(path)]
    if not named:
        return None
    if len(config.paths) > 1:
        raise UsageError(f"data.paths: {named[0]} is a prepared data set; it stands alone, without other paths")
    if out is not None:
        raise UsageError(f"{named[0]} is prepared already", hint=f"set data.paths to [{named[0]}]")
    return PreparedData.open(named[0])


def _check_tokenizer(given: PreparedData, choice: Choice) -> None:
    if choice.tokenizer is not None and choice.tokenizer.id != given.tokenizer_id:
        raise UsageError(
            f"{given.directory}: prepared with another tokenizer",
            hint="name the text itself instead of the prepared set",
        )


def _check_out(out: Path) -> None:
    if out.is_dir():
        if not is_prepared(out) and any(out.iterdir()):
            raise UsageError(
                f"--out {out}: exists and is not a prepared data set", hint="name a folder that does not exist"
            )
    elif out.exists():
        raise UsageError(f"--out {out}: exists and is not a folder", hint="name a folder that does not exist")


def _key(corpus: Corpus, choice: Choice, share: float) -> Hex:
    """What determines a set. The text column and max_bytes do so through the documents that they select."""
    found = corpus.contents
    documents = {"n": found.documents, "sequence": found.sequence, "text": corpus.has_text}
    parts = {"version": VERSION, "documents": documents, "tokenizer": choice.spec, "held_out": share}
    return content_id("prepared data request", parts)


def _reusable(directory: Path, key: Hex, *, mine: bool) -> PreparedData | None:
    """The set in `directory`, where it is the one wanted. A damaged one in the cache is made anew."""
    if not directory.exists() or (not mine and not any(directory.iterdir())):
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


def _build(
    directory: Path, key: Hex, corpus: Corpus, held_out: HeldOut, tokenizer: Tokenizer, tell: Progress
) -> tuple[PreparedData, bool]:
    """Make the set under a temporary name, then give it its own. True where another process was faster."""
    temporary = directory.parent / f"{TEMPORARY}{directory.name}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UsageError(f"{directory}: cannot be made ({error.strerror})") from None
    try:
        splits = _write(temporary, corpus, held_out, tokenizer, tell)
        tokenizer.save(temporary / TOKENIZER)
        for side in SIDES:
            fsync_directory(temporary / side)
        notes = ["the only document was divided: its end is held out"] if held_out.single else []
        description = describe(key, tokenizer, splits, skipped=corpus.skipped.to_dict(), notes=notes)
        write_json(temporary / META, description)
        try:
            temporary.rename(directory)
        except OSError:
            # without a cache to hold a lock in, another process may have come first
            if is_prepared(directory) and (found := PreparedData.open(directory)).key == key:
                return found, True
            raise
        fsync_directory(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return PreparedData.open(directory), False


def _write(
    directory: Path, corpus: Corpus, held_out: HeldOut, tokenizer: Tokenizer, tell: Progress
) -> list[dict[str, Any]]:
    measure = corpus.has_text and tokenizer.bytes_per_token() is None
    try:
        return write_splits(directory, corpus, held_out, tokenizer, measure=measure, progress=tell)
    except NotExactError:
        for side in SIDES:
            shutil.rmtree(directory / side)
        return write_splits(directory, corpus, held_out, tokenizer, measure=True, progress=tell)
