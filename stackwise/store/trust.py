"""Whether an index may be handed to LMDB, which believes what it maps.

A crafted or truncated file can crash the process that opens it. An index that this user's StackWise made, or has
checked, bears a mark that nobody else can make; any other is first walked page by page by a verifier that maps
nothing. The mark is bound to the very file, so a store that was copied here is checked once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from stackwise.errors import DamageError

_KEY_BYTES = 32


def check_index(index: Path, presence: int) -> None:
    """Check an index that may come from a stranger, unless it bears this user's mark.

    Args:
        index: The directory of the environment.
        presence: An open file whose lock is held shared by whoever has the store open.

    Raises:
        DamageError: It is not a sound LMDB file.
    """
    data = index / "data.mdb"
    try:
        status = os.stat(data, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise _refused(data, ["it is not a plain file"])
    lock = index / "lock.mdb"
    if lock.is_symlink() or (lock.exists() and not lock.is_file()):
        raise _refused(lock, ["it is not a plain file"])
    key = _key()
    if key is not None and _is_marked(index, key, status):
        return
    # While another process of this user writes, a walk would see two states at once; and that one has checked it.
    try:
        fcntl.flock(presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    try:
        faults = find_faults(data)
    finally:
        fcntl.flock(presence, fcntl.LOCK_SH)
    if faults:
        raise _refused(data, faults)
    mark(index)


def mark(index: Path) -> None:
    """Mark an index as made or checked by this user."""
    key = _key()
    if key is None:
        return
    with contextlib.suppress(OSError):
        path = index / "checked"
        path.unlink(missing_ok=True)
        path.write_text(_token(key, os.stat(index / "data.mdb", follow_symlinks=False)))


def find_faults(data: Path) -> list[str]:
    """What is wrong with an LMDB file, found without mapping it; nothing where it is sound."""
    try:
        from lmdb import verify
    except ImportError:  # lmdb before 3 has no verifier
        return []
    try:
        return [str(fault) for fault in verify.verify(str(data), subdir=False)][:20]  # type: ignore[no-untyped-call]
    except verify.VerifyError as error:
        return [str(error)]
    except (ValueError, IndexError, OverflowError, RecursionError, MemoryError, ArithmeticError, LookupError) as error:
        return [f"{type(error).__name__}: {error}"]
    except Exception as error:  # struct.error among others: whatever it stumbles over is a fault
        return [f"{type(error).__name__}: {error}"]


def is_cut_off(data: Path, last_page: int, page_size: int) -> bool:
    """Whether the file ends before its last page: reading there would kill the process."""
    try:
        size = os.stat(data).st_size
    except OSError:
        return True
    # The last pages of a transaction may never have been written where they were freed in it; the walk decides.
    return size < (last_page + 1) * page_size and bool(find_faults(data))


def _key() -> bytes | None:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(home) / "stackwise" / "store-key"
    try:
        key = path.read_bytes()
        if len(key) == _KEY_BYTES:
            return key
    except OSError:
        pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, secrets.token_bytes(_KEY_BYTES))
        finally:
            os.close(fd)
        # Whoever comes first wins; the others take theirs.
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
        key = path.read_bytes()
    except OSError:
        return None
    return key if len(key) == _KEY_BYTES else None


def _token(key: bytes, status: os.stat_result) -> str:
    return hmac.new(key, f"{status.st_dev}:{status.st_ino}".encode(), hashlib.sha256).hexdigest()


def _is_marked(index: Path, key: bytes, status: os.stat_result) -> bool:
    try:
        with (index / "checked").open("rb") as file:
            found = file.read(128)
    except OSError:
        return False
    return hmac.compare_digest(found, _token(key, status).encode())


def _refused(path: Path, faults: list[str]) -> DamageError:
    return DamageError(
        f"the index {path} is damaged or was not made by StackWise ({faults[0][:160]})",
        hint="`stackwise cache repair` sets it aside and rebuilds it from the boundaries",
    )
