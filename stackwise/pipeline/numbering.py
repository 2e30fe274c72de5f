"""What windows are called: the numbers of their rowsets, and the names of what goes from one to the next."""

from __future__ import annotations

from collections.abc import Iterable

from stackwise.config import StackWiseConfig

STATE = "state."
"""What the name of what a later window takes up begins with: the stage's depth, and the part, follow."""


def window_rowset(config: StackWiseConfig, drawn: int, window: int | None) -> int:
    """The number of the rowset of a window (None: of all windows together) of rows that are drawn as number `drawn`."""
    return drawn * config.windows + window if window is not None else -2 - drawn if config.windows > 1 else drawn


def drawn_and_window(config: StackWiseConfig, rowset: int) -> tuple[int, int | None]:
    """The inverse of `window_rowset`."""
    return divmod(rowset, config.windows) if rowset >= 0 else (-2 - rowset, None)


def head_version(depth: int) -> str:
    """What the newest head of stage `depth` goes by, beside those of other stages."""
    return f"head.{depth}"


def state_names(depth: int, parts: Iterable[str]) -> tuple[str, ...]:
    """The states of a stage that trains so: one a part, and the trainer's own."""
    return (*dict.fromkeys(f"{STATE}{depth}.{part}" for part in parts), f"{STATE}{depth}")


def is_state(name: str, depth: int) -> bool:
    """Whether a name is that of a state of stage `depth`."""
    return name == f"{STATE}{depth}" or name.startswith(f"{STATE}{depth}.")
