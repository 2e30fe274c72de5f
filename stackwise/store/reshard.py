"""Stores of ranks that each keep some groups of rows: which rank keeps which, and how groups move between disks.

Rank r of N keeps the groups r, r + N, …. A group of a boundary is a boundary of its own, which nothing changes once it
is complete; so it moves by being written elsewhere, chunk by chunk as it is stored, and is dropped when it is complete
there. A kill at any moment leaves every group whole in one store or in two.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from stackwise.errors import NotFound, UsageError
from stackwise.identity import Hex
from stackwise.store.records import BoundaryInfo, BoundarySpec
from stackwise.store.store import ActivationStore

RANK = "{rank}"
_SLICE = 1 << 15  # rows whose masks are in memory at once


def spec_of(info: BoundaryInfo) -> BoundarySpec:
    """What a boundary is to hold, wherever it is."""
    return BoundarySpec(**{one.name: getattr(info, one.name) for one in fields(BoundarySpec)})


def complete(store: ActivationStore, boundary: Hex) -> bool:
    """Whether a store has the whole of a boundary."""
    with contextlib.suppress(NotFound):
        return store.boundary(boundary).state == "complete"
    return False


def sibling_stores(template: str) -> dict[int, Path]:
    """The stores on this host that a path with {rank} in it stands for, by rank."""
    parts = Path(template).parts
    at = next((at for at, part in enumerate(parts) if RANK in part), None)
    if at is None or not (root := Path(*parts[:at])).is_dir():
        return {}
    named = re.compile(re.escape(parts[at]).replace(re.escape(RANK), "([0-9]+)", 1).replace(re.escape(RANK), r"\1"))
    found = {}
    for entry in root.iterdir():
        if (match := named.fullmatch(entry.name)) is None:
            continue
        path = rank_store(template, rank := int(match[1]))
        if path.parts[at] == entry.name and (path / "format.json").exists():  # "01" is no rank's
            found[rank] = path
    return dict(sorted(found.items()))


def rank_store(template: str, rank: int) -> Path:
    """Where a rank's store is."""
    return Path(template.replace(RANK, str(rank)))


def copy_boundary(source: ActivationStore, target: ActivationStore, boundary: Hex) -> int:
    """Let another store have a complete boundary too, with its rows; what it has of it already stays.

    Returns:
        The bytes written.

    Raises:
        ChunkDamage: A chunk is not what was written.
        NoSpaceError: The other disk is full; calling again goes on.
    """
    info = source.boundary(boundary)
    copy_rows(source, target, info.rowset)
    with source.reader(boundary) as reader, target.writer(spec_of(info)) as writer:
        before = writer.info.stored_bytes
        for chunk in writer.missing:
            writer.put(chunk, reader.stored(chunk))
        return writer.finish(info.cost).stored_bytes - before


def copy_rows(source: ActivationStore, target: ActivationStore, rowset: Hex) -> None:
    """Let another store have a rowset and its masks too."""
    with contextlib.suppress(NotFound):
        target.rowset(rowset)
        return
    rows = source.rowset(rowset)
    for first in range(0, rows.rows, _SLICE):
        target.put_masks(source.masks(rows.mask_ids[first : first + _SLICE]))
    target.put_rowset(rows.sample_ids, rows.mask_ids)


class Reshard:
    """Moves the groups of rows in the stores of one path to the ranks that are to keep them.

    Args:
        template: A path with {rank} in it; the stores are on this host.
        ranks: How many ranks are to share the rows.

    Raises:
        UsageError: The path has no {rank}; there is no store; the ranks do not divide the groups.
    """

    def __init__(self, template: str, ranks: int) -> None:
        if RANK not in template or "{host}" in template:
            raise UsageError(
                f"{template}: rows are moved between stores of ranks, and this path has no {RANK}"
                if RANK not in template
                else f"{template}: a host sees its own disk alone",
                hint="name the stores as store.path does (--store 'DIR/{rank}'); between hosts, the run moves the rows",
            )
        if ranks < 1:
            raise UsageError(f"--ranks: {ranks} ranks keep no rows", hint="give 1 or more")
        self._template, self._ranks, self._paths = template, ranks, sibling_stores(template)
        if not self._paths:
            raise NotFound(f"there is no store at {template}", hint="--store DIR/{rank} names them, --run DIR a run")

    def run(self, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
        """Move them.

        Returns:
            `{"ranks", "moved": groups, "bytes", "dropped": groups, "stores": {rank: {"path", "bytes"}}}`.

        Raises:
            BusyError: A run reads or writes what is to go. What was moved stays; the same call goes on.
            DamageError: A group is damaged; the others stay as they are.
        """
        with contextlib.ExitStack() as stack:
            stores = {
                rank: stack.enter_context(ActivationStore(path, create=False)) for rank, path in self._paths.items()
            }
            groups = self._groups(stores)
            moves = [(owner, info) for owner, info, holders in groups if holders and owner not in holders]
            for rank in sorted({owner for owner, _ in moves} - stores.keys()):
                stores[rank] = stack.enter_context(ActivationStore(rank_store(self._template, rank)))
            written = 0
            holding = {info.id: holders for _, info, holders in groups}
            for done, (owner, info) in enumerate(moves):
                source = stores[holding[info.id][0]]
                # Before the rows: a store in which no run is registered is one that anybody may empty.
                for key, refs in source.runs().items():
                    if info.head in refs["boundaries"] and key not in stores[owner].runs():
                        stores[owner].register_run(key, recipes=refs["recipes"], boundaries=refs["boundaries"])
                written += copy_boundary(source, stores[owner], info.id)
                progress(done + 1, len(moves))
            dropped = 0
            for owner, info, holders in groups:  # all is where it belongs: what lies elsewhere goes
                for rank in sorted(stores):
                    if holders and rank != owner and stores[rank].has(info.id):
                        stores[rank].drop_one(info.id)
                        dropped += 1
            return {
                "ranks": self._ranks,
                "moved": len(moves),
                "bytes": written,
                "dropped": dropped,
                "stores": {
                    rank: {"path": str(store.path), "bytes": sum(info.disk_bytes for info in store.boundaries())}
                    for rank, store in sorted(stores.items())
                },
            }

    def _groups(self, stores: dict[int, ActivationStore]) -> list[tuple[int, BoundaryInfo, list[int]]]:
        """Of every group: the rank that is to keep it, the group, and the ranks that have the whole of it."""
        infos: dict[Hex, BoundaryInfo] = {}
        holders: dict[Hex, list[int]] = {}
        for rank, store in stores.items():
            for info in store.boundaries():
                if (group := info.group) is None:
                    continue
                if group[1] % self._ranks:
                    raise UsageError(
                        f"--ranks: {self._ranks} do not divide the {group[1]} groups of rows (training.row_groups)",
                        hint=f"nearest that do: {nearest(group[1], self._ranks)}",
                    )
                infos[info.id] = info
                if info.state == "complete":
                    holders.setdefault(info.id, []).append(rank)
        return [
            (group[0] % self._ranks, info, holders.get(info.id, []))
            for info in infos.values()
            if (group := info.group) is not None
        ]


def nearest(groups: int, ranks: int) -> str:
    """The numbers of ranks below and above one that divide so many groups, in words."""
    below = next(n for n in range(min(ranks, groups), 0, -1) if groups % n == 0)
    above = next((n for n in range(ranks + 1, groups + 1) if groups % n == 0), None)
    return f"{below}" if above is None else f"{below} and {above}"
