"""The directory of a run's store: whether it can be used, and the store in it."""

from __future__ import annotations

from pathlib import Path

from stackwise.durable import unusable
from stackwise.errors import UsageError
from stackwise.store import ActivationStore


def check_store(path: Path) -> None:
    """Look whether a store can be there.

    Raises:
        UsageError: It cannot.
    """
    if fault := unusable(path):
        raise UsageError(f"store.path {path} cannot be used: {fault}", hint="name another directory")


def open_store(path: Path) -> ActivationStore:
    """Open a store, or make one.

    Raises:
        UsageError: It cannot be there.
    """
    try:
        return ActivationStore(path)
    except (PermissionError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        raise UsageError(f"store.path {path} cannot be used: {error.strerror}", hint="name another directory") from None
