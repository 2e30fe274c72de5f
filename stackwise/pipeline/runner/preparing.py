"""A run's data, prepared or found prepared, with a word on how far it is and on what was left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from stackwise.config import DataConfig, StackWiseConfig
from stackwise.config.fields import changed
from stackwise.data import PreparedData, is_prepared, prepare

PROGRESS_SECONDS = 0.2
"""Between two words on how far the preparation of the data is."""


def prepare_data(config: StackWiseConfig, tell: Callable[..., None], check: Callable[[], None]) -> PreparedData:
    """Prepare what a configuration names, or find it prepared.

    Args:
        config: The configuration.
        tell: Told what happens, as an event's name and its values.
        check: Called now and then; what it raises ends this.
    """
    begun = told = time.perf_counter()
    before = ""

    def progress(phase: str, done: int, total: int | None) -> None:
        nonlocal told, before
        check()
        if phase != before or time.perf_counter() - told > PROGRESS_SECONDS:
            told, before = time.perf_counter(), phase
            tell("preparing", phase=phase, done=done, total=total)

    data, reused = prepare(config.data, model_vocab=config.model.vocab_size, progress=progress)
    summary = data.summary()
    tell("data", reused=reused, seconds=time.perf_counter() - begun, **summary)
    for reason, number in summary["skipped"].get("reasons", {}).items():
        if reason.startswith("compressed"):
            tell("note", text=f"data.paths: {number} files are left out, {reason}")
    for line in unused_beside_prepared(config.data):
        tell("note", text=line)
    return data


def unused_beside_prepared(data: DataConfig) -> list[str]:
    """The settings that a prepared data set has settled already."""
    if not any(is_prepared(Path(path)) for path in data.paths):
        return []
    given = sorted(set(changed(data)) & {"tokenizer", "vocab_size", "held_out", "max_bytes", "text_column"})
    return [f"data.{', '.join(given)}: unused, {data.paths[0]} is prepared already"] if given else []
