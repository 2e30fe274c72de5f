"""Whether an index may be handed to LMDB, which believes what it maps.

A crafted, damaged or truncated file can crash the process that opens it. So whoever opens a store first looks whether
the file's content is what this user's StackWise left: a mark beside it, which nobody else can make, is bound to a
digest of every byte. Any other file (made elsewhere, damaged in place, or left by a writer that was killed) is walked
page by page by a verifier that maps nothing, and marked where it is sound.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
from pathlib import Path

import xxhash

from stackwise.errors import DamageError
from stackwise.files import IrregularFile, open_regular, read_bytes
from stackwise.store.leases import READ_ONLY, hold_alone

_KEY_BYTES = 32
_PIECE = 16 << 20


def enter(index: Path, presence: int) -> None:
    """Hold the store's presence lock shared, having checked an index whose content does not bear this user's mark.

    Args:
        index: The directory of the environment.
        presence: An open file whose lock is held shared by whoever has the store open.

    Raises:
        DamageError: It is not a sound LMDB file.
    """
    # Alone first, so that nobody writes during the walk. While another process has the store open a walk would see two
    # states at once; and that one has checked it.
    try:
        fcntl.flock(presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(presence, fcntl.LOCK_SH)
        _check_regular(index / "data.mdb")
        return
    _check(index)
    fcntl.flock(presence, fcntl.LOCK_SH)


def _check(index: Path) -> None:
    data = index / "data.mdb"
    try:
        content = _digest(data)
    except FileNotFoundError:
        return
    except IrregularFile as error:
        raise _refused(data, [error.message]) from None
    _drop_reader_table(index / "lock.mdb")
    key = _key()
    if key is not None and _is_marked(index, key, content):
        return
    if faults := find_faults(data):
        raise _refused(data, faults)
    _write_mark(index, content)


def mark(index: Path, presence: int) -> None:
    """Mark an index that this process has changed, if nobody else has the store open.

    Whoever closes it last does this. After a crash the mark is an old one, and the next to open it checks the file.
    """
    if not hold_alone(presence):
        return
    with contextlib.suppress(OSError):
        _write_mark(index, _digest(index / "data.mdb"))


def _check_regular(path: Path) -> None:
    try:
        os.close(open_regular(path))
    except FileNotFoundError:
        pass
    except IrregularFile as error:
        raise _refused(path, [error.message]) from None


def _drop_reader_table(lock: Path) -> None:
    """Remove LMDB's table of readers, which is of no use once nobody has the store open, and may be damaged."""
    try:
        lock.unlink(missing_ok=True)
    except IsADirectoryError:
        raise _refused(lock, ["it is a directory"]) from None
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        _check_regular(lock)


def _digest(data: Path) -> str:
    """xxh3-128 of every byte of an index, read in pieces."""
    state = xxhash.xxh3_128()
    with os.fdopen(open_regular(data), "rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_PIECE, max(1, os.fstat(file.fileno()).st_size))))
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def _write_mark(index: Path, content: str) -> None:
    key = _key()
    if key is None:
        return
    path = index / "checked"
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with os.fdopen(fd, "w") as file:
            file.write(_token(key, content))


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
        key = read_bytes(path, limit=_KEY_BYTES)
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
        key = read_bytes(path, limit=_KEY_BYTES)
    except OSError:
        return None
    return key if len(key) == _KEY_BYTES else None


def _token(key: bytes, content: str) -> str:
    return hmac.new(key, f"content {content}".encode(), hashlib.sha256).hexdigest()


def _is_marked(index: Path, key: bytes, content: str) -> bool:
    try:
        mark = read_bytes(index / "checked", limit=128)
    except OSError:
        return False
    return hmac.compare_digest(mark, _token(key, content).encode())


def _refused(path: Path, faults: list[str]) -> DamageError:
    return DamageError(
        f"the index {path} is damaged or was not made by StackWise ({faults[0][:160]})",
        hint="`stackwise cache repair` sets it aside and rebuilds it from the boundaries",
    )
