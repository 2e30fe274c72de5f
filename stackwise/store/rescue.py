"""Repairing a store that may not even open."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from stackwise.errors import DamageError
from stackwise.identity import is_hex_id
from stackwise.store import files, inspection
from stackwise.store.backend import Backend, LocalBackend
from stackwise.store.layout import Layout, read_format, seal
from stackwise.store.rebuild import set_aside
from stackwise.store.recompute import Recompute
from stackwise.store.repair import Repairer
from stackwise.store.store import ActivationStore


def repair_store(
    path: str | os.PathLike[str],
    recompute: Recompute | None = None,
    *,
    backend: Backend | None = None,
    dry_run: bool = False,
    drop_stages: bool = False,
    progress: inspection.Progress | None = None,
) -> dict[str, Any]:
    """Repair a store that may not even open: a lost or damaged index is set aside and rebuilt.

    Args:
        path: The store's directory.
        recompute: See `ActivationStore.repair`.
        backend: Where its boundaries lie, where not beside the index.
        dry_run: Say what would be done, change nothing.
        drop_stages: See `ActivationStore.repair`.
        progress: Called with (done, total) damaged chunks.

    Returns:
        What `ActivationStore.repair` returns, with `index`: `sound`, `rebuilt`, or (in a dry run) `damaged`.

    Raises:
        NotFound: There is no store.
    """
    state = "sound"
    layout = Layout(Path(path).absolute())
    try:
        read_format(layout)
    except DamageError:
        if not dry_run and (layout.index / "data.mdb").exists():
            if layout.format.is_dir() and not layout.format.is_symlink():
                files.remove_tree(layout.format)
            seal(layout)
            state = "format.json written anew"
    try:
        store = ActivationStore(path, create=False, backend=backend)
    except DamageError as error:
        if dry_run:
            names = (backend or LocalBackend(Layout(Path(path)).boundaries)).names()
            rebuilt = [name for name in names if is_hex_id(name)]
            empty: dict[str, Any] = {"repaired": [], "gone": [], "dropped_stages": [], "busy": [], "checked_chunks": 0}
            return {"dry_run": True, "index": "damaged", "rebuilt": rebuilt, "fault": error.message, **empty}
        set_aside(layout.index)
        state = "rebuilt"
        for stale in layout.rowsets.glob("*") if layout.rowsets.is_dir() else ():
            stale.unlink()
        # Its format is known: `format.json` was read before the index was opened.
        with contextlib.suppress(FileNotFoundError):
            layout.format.rename(layout.format.with_name(".tmp-format.json"))
        store = ActivationStore(path, backend=backend)
    with store:
        report = Repairer(store, recompute, dry_run=dry_run, drop_stages=drop_stages, progress=progress).run()
    files.discard(store.path / ".tmp-format.json")
    return {**report, "index": state}
