"""Which store a `cache` command means, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stackwise.cli.options import as_json, find_run, run_option
from stackwise.errors import NotFound, UsageError
from stackwise.files import expanded

if TYPE_CHECKING:
    from stackwise.store import ActivationStore

F = TypeVar("F", bound=Callable[..., Any])


def where(command: F) -> F:
    """The options that name a store: --run, --store, and --json."""
    for option in (as_json, click.option("--store", metavar="DIR", help="The store's directory."), run_option):
        command = option(command)
    return command


def store_path(run: str | None, store: str | None) -> Path:
    """The store that `--store` names, or that of the run.

    Raises:
        UsageError: Both are given.
        NotFound: There is no such store.
    """
    if run is not None and store is not None:
        raise UsageError("--run and --store both name a store; give one")
    path = expanded(store) if store is not None else find_run(run).store_settings()[0]
    if not path.is_dir():
        raise NotFound(f"there is no store at {path}", hint="--store DIR names one, --run DIR names a run")
    return path


@contextmanager
def opened(run: str | None, store: str | None) -> Iterator[ActivationStore]:
    """The store, open.

    Raises:
        DamageError: Its index is missing or damaged.
    """
    path = store_path(run, store)
    from stackwise.store import ActivationStore

    with ActivationStore(path, create=False) as found:
        yield found
