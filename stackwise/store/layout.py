"""Where things lie in a store, and whether a directory is a store that this version may open.

    STORE/format.json                 format version and algorithms, written last at creation
    STORE/index/                      one LMDB environment, and `rowsets/<rowset id>` beside it
    STORE/boundaries/<boundary id>/   a Zarr v3 group
    STORE/stages/<recipe id>/         committed stages
    STORE/locks/                      leases, freed by the kernel
    STORE/reserve                     bytes set aside so that a full disk can still be cleaned

Every path of a store is made here, and only from checked ids: no name from a file becomes a path.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from stackwise import durable, identity
from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.files import IrregularFile, read_json

FORMAT = 1
_LAST_FORMAT = 1000
"""A version beyond this is damage, not a store of the future."""
"""Raised when an older StackWise could misread what this one writes."""

_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs"}
    | {"gpfs", "ocfs2", "gfs2", "orangefs", "pvfs2", "davfs", "fuse.sshfs", "fuse.glusterfs", "fuse.s3fs"}
    | {"fuse.gcsfuse", "fuse.rclone", "fuse.ceph", "fuse.davfs"}
)


def checked_id(text: object, what: str) -> str:
    """`text` where it is a well-formed id (32 hex digits).

    Raises:
        NotFound: It is not: nothing can bear that name.
    """
    if not identity.is_hex_id(text):
        raise NotFound(f"{what} {str(text)[:80]!r} is not an id (32 lower-case hex digits)")
    return str(text)


class Layout:
    """The paths of one store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.format = root / "format.json"
        self.index = root / "index"
        self.rowsets = self.index / "rowsets"
        self.boundaries = root / "boundaries"
        self.stages = root / "stages"
        self.locks = root / "locks"
        self.reserve = root / "reserve"
        self.presence = self.locks / "open.lock"

    def boundary(self, boundary_id: str) -> Path:
        """The Zarr group of a boundary."""
        return self.boundaries / checked_id(boundary_id, "boundary")

    def rowset(self, rowset_id: str) -> Path:
        """The file that holds a rowset's ids and its look-up table."""
        return self.rowsets / checked_id(rowset_id, "rowset")

    def stage(self, recipe_id: str) -> Path:
        """The directory of a committed stage."""
        return self.stages / checked_id(recipe_id, "recipe")

    def lock(self, name: str) -> Path:
        """The lock file of a boundary or, as `stage-<recipe id>`, of a stage."""
        checked_id(name.removeprefix("stage-"), "lock")
        return self.locks / f"{name}.lock"


def file_system(path: Path) -> str | None:
    """The type of the file system that holds `path` ("ext4", "nfs4"); None where the system does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    target = os.path.realpath(path)
    best, kind = -1, None
    for line in lines:
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        mount = fields[4].encode().decode("unicode_escape").rstrip("/")
        # The later of two mounts at one place hides the earlier, hence >=.
        if (target + "/").startswith(mount + "/") and len(mount) >= best:
            best, kind = len(mount), after.split()[0]
    return kind


def refuse_network(path: Path) -> None:
    """Refuse a place where LMDB's locks and memory map do not work.

    Raises:
        UsageError: `path` is on a network file system.
    """
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    kind = file_system(existing)
    if kind in _NETWORK:
        raise UsageError(
            f"{path} is on a network file system ({kind}), where the store's index would be damaged",
            hint="put the store on a local disk (store.path); its boundaries can live in an object store",
        )


def refuse_links(layout: Layout) -> None:
    """Refuse a store whose own directories are links: what lies behind them is not the store's to remove.

    Raises:
        UsageError: One is.
    """
    for path in (layout.index, layout.rowsets, layout.boundaries, layout.stages, layout.locks):
        if path.is_symlink():
            raise UsageError(
                f"{path} is a link; a store's directories must lie in it", hint="link or move the whole store instead"
            )


def create(layout: Layout) -> None:
    """Make the directories of a new store; `format.json` comes later, by `seal`."""
    with durable.explain_full_disk(layout.root):
        for path in (layout.root, layout.index, layout.rowsets, layout.boundaries, layout.stages, layout.locks):
            path.mkdir(parents=True, exist_ok=True)
        durable.fsync_directory(layout.index)
        durable.fsync_directory(layout.root)
        durable.fsync_directory(layout.root.parent)


def seal(layout: Layout) -> None:
    """Write `format.json`: from here on the directory is a store."""
    durable.write_json(
        layout.format,
        {"format": FORMAT, "ids": identity.ALGORITHM, "row_digests": "xxh3-64", "boundaries": "zarr-3"},
    )


def read_format(layout: Layout) -> int | None:
    """The format version of the store, or None where there is no store.

    Raises:
        UsageError: The store is of a newer format, or it is a file.
        DamageError: `format.json` is damaged.
    """
    try:
        value: Any = read_json(layout.format, limit=65536)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise UsageError(f"{layout.root} is a file, not a store") from None
    except (ValueError, IrregularFile) as error:
        raise _damaged_format(layout, "is not readable as a store's format") from error
    version = value.get("format") if isinstance(value, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= _LAST_FORMAT:
        raise _damaged_format(layout, "names no format version")
    if version > FORMAT:
        raise UsageError(
            f"{layout.root} is a store of format {version}; this version reads up to format {FORMAT}",
            hint="upgrade StackWise, or use another store",
        )
    if value.get("ids") != identity.ALGORITHM:
        raise _damaged_format(
            layout, f"names contents by {str(value.get('ids'))[:60]!r}, which format {version} does not"
        )
    return version


def _damaged_format(layout: Layout, what: str) -> DamageError:
    return DamageError(
        f"{layout.format} {what}", hint="if what lies beside it is a store, `stackwise cache repair` writes it anew"
    )
