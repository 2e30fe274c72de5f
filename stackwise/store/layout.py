"""Where things lie in a store, who uses what, and the room it takes.

    STORE/format.json                 format version and algorithms, written last at creation
    STORE/index/                      one LMDB environment, and `rowsets/<rowset id>` beside it
    STORE/boundaries/<boundary id>/   a Zarr v3 group
    STORE/stages/<recipe id>/         committed stages
    STORE/locks/                      leases, freed by the kernel
    STORE/reserve                     bytes set aside so that a full disk can still be cleaned

Every path of a store is made here, and only from checked ids: no name from a file becomes a path.

Who reads or writes a boundary holds its lock shared, who removes it needs it alone; the kernel frees a dead holder's. A
lock file may be removed by whoever holds it alone, so a lease checks that the file it locked still bears the name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from stackwise import durable, files, identity
from stackwise.errors import BusyError, DamageError, NoSpaceError, NotFound, UsageError
from stackwise.files import remove_tree
from stackwise.store import disk

T = TypeVar("T")

FORMAT = 1
"""Raised when an older StackWise could misread what this one writes."""
_LAST_FORMAT = 1000  # a version beyond this is damage, not a store of the future
_RESERVE_BYTES = 8 << 20

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
    kind = file_system(next(place for place in (path, *path.parents) if place.exists()))
    if kind in _NETWORK:
        raise UsageError(
            f"{path} is on a network file system ({kind}), where the store's index would be damaged",
            hint="put the store on a local disk (store.path)",
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


def restore_directories(layout: Layout) -> None:
    """Make those of a store's directories that are gone: whatever was in them is then missed by name."""
    for path in (layout.boundaries, layout.stages, layout.locks):
        with contextlib.suppress(PermissionError):
            try:
                path.mkdir(exist_ok=True)
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise


def seal(layout: Layout) -> None:
    """Write `format.json`: from here on the directory is a store."""
    durable.write_json(
        layout.format,
        {"format": FORMAT, "ids": identity.ALGORITHM, "row_digests": "xxh3-64", "boundaries": "zarr-3"},
    )


def read_format(layout: Layout) -> int | None:
    """The format version of the store, or None where there is no store.

    Raises:
        UsageError: The store is of a newer format.
        DamageError: `format.json` is not one.
    """
    fault = "is not readable as a store's format"
    try:
        value: Any = files.read_json(layout.format, limit=1 << 16)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise UsageError(f"{layout.root} is a file, not a store") from None
    except (ValueError, files.IrregularFile):
        value = None
    version = value.get("format") if isinstance(value, dict) else None
    if isinstance(version, int) and FORMAT < version <= _LAST_FORMAT:
        raise UsageError(
            f"{layout.root} is a store of format {version}; this version reads up to format {FORMAT}",
            hint="upgrade StackWise, or use another store; if the file is damaged, remove it and run again",
        )
    if version != FORMAT or isinstance(version, bool):
        fault = f"is damaged: {fault}" if value is None else "is damaged: it names no format version"
    elif value.get("ids") != identity.ALGORITHM:
        fault = f"is damaged: it names contents by {str(value.get('ids'))[:60]!r}, which format {FORMAT} does not know"
    else:
        return FORMAT
    raise DamageError(f"{layout.format} {fault}", hint="`stackwise cache repair` writes it anew")


class Lease:
    """A `flock` on `path`, shared or alone; released by `release`, by `with`, or by the holder's death.

    Args:
        path: The lock file; made when missing.
        what: What it protects, as the refusal calls it.
        alone: Exclusive instead of shared.

    Raises:
        BusyError: Another holder is in the way.
        UsageError: `alone`, in a store that this user may only read.
    """

    def __init__(self, path: Path, what: str, *, alone: bool = False) -> None:
        self.path = path
        self._fd: int | None = None
        while self._fd is None:
            opened = open_lock(path)
            if opened is None or (alone and not opened[1]):
                if opened is not None:
                    os.close(opened[0])
                if alone:
                    raise UsageError(f"{what} cannot be changed: its store can only be read here")
                return
            fd = opened[0]
            try:
                fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                if _is_still(fd, path):  # else its holder removed it meanwhile: the new one is to be locked
                    self._fd = fd
            except BlockingIOError:
                who = "read or written" if alone else "removed"
                raise BusyError(
                    f"{what} is being {who} by another process, or by another reader or writer of this one",
                    hint="wait for it to end; its lock frees itself when its holder ends",
                ) from None
            finally:
                if self._fd is None:
                    os.close(fd)

    def remove(self) -> None:
        """Remove the lock file (a holder alone may) and let go."""
        if self._fd is not None:
            self.path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Let go; a second time does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def open_lock(path: Path) -> tuple[int, bool] | None:
    """A lock file's descriptor, and whether the store can be written; None where it is missing and cannot be made.

    Raises:
        IrregularFile: It is a link, or anything but a file of its own.
    """
    try:
        return files.open_regular(path, os.O_RDWR | os.O_CREAT, 0o644), True
    except files.IrregularFile:
        raise
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    try:
        return files.open_regular(path), False
    except OSError:  # missing, or for its owner alone: nothing protects this reader
        return None


def hold_alone(fd: int) -> bool:
    """Turn a shared lock into an exclusive one if nobody else holds it; whether that was so.

    A conversion that fails loses the lock it had (flock(2)), so the shared one is taken anew.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        hold_shared(fd)
        return False
    return True


def hold_shared(fd: int) -> None:
    """Lock a file beside other shared holders; waits for one that holds it alone."""
    fcntl.flock(fd, fcntl.LOCK_SH)


def _is_still(fd: int, path: Path) -> bool:
    """Whether an open file still bears its name."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


class Reserve:
    """A file of real blocks that is given up when even removing needs room, and taken again after."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self) -> None:
        """Make sure of it, where the disk has room to spare."""
        try:
            with contextlib.suppress(FileNotFoundError):
                there = os.lstat(self.path)
                if stat.S_ISREG(there.st_mode) and there.st_blocks > 0:
                    return
                if not stat.S_ISREG(there.st_mode):
                    remove_tree(self.path)  # it is nobody's data, whatever lies there
            # On a small disk a share of what is free: the store must not fill it by itself.
            size = max(1, min(_RESERVE_BYTES, disk.free_bytes(self.path.parent) // 16))
            fd = files.open_regular(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(fd, 0, size)
                else:
                    os.write(fd, bytes(size))
            finally:
                os.close(fd)
        except OSError:
            self.release()

    def release(self) -> None:
        """Give it up."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def run(self, action: Callable[..., T], *args: Any) -> T:
        """Run what frees space; where the disk is too full even for that, give the reserve up and run it again.

        Raises:
            NoSpaceError: The disk is full to the last block even so.
        """
        try:
            return action(*args)
        except NoSpaceError:
            if not self.path.exists():
                raise
        self.release()
        return action(*args)
