"""The index: one LMDB environment a store, opened once a process, whatever forks or grows.

LMDB's traps are handled here and nowhere else. An environment must not be opened twice in a process, so stores
of one path share it. It must not cross a fork, so a child opens its own. A reader must be short, so nothing here
hands a transaction out for longer than a `with`. The map starts large and grows when another process needs it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import itertools
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import xxhash

from stackwise import durable, files
from stackwise.errors import DamageError, StackWiseError, UsageError
from stackwise.files import user_cache
from stackwise.store import disk

Transaction = Any


class Reading:
    """One state of the tables. Keys and values are bytes."""

    def __init__(self, transaction: Transaction, tables: dict[str, Any]) -> None:
        self._transaction, self._tables = transaction, tables

    def get(self, table: str, key: bytes) -> bytes | None:
        """The value of `key`, or None."""
        value: bytes | None = self._transaction.get(key, db=self._tables[table])
        return value

    def get_many(self, table: str, keys: list[bytes]) -> list[bytes | None]:
        """The values of `keys`, in order."""
        get, database = self._transaction.get, self._tables[table]
        return [get(key, None, database) for key in keys]

    def scan(self, table: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """The records whose key begins with `prefix`, in order of their keys."""
        with self._transaction.cursor(db=self._tables[table]) as cursor:
            if not (cursor.set_range(prefix) if prefix else cursor.first()):
                return
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key, value

    def keys(self, table: str, prefix: bytes = b"") -> list[bytes]:
        """The keys that begin with `prefix`, in order; their values are not touched."""
        with self._transaction.cursor(db=self._tables[table]) as cursor:
            if not (cursor.set_range(prefix) if prefix else cursor.first()):
                return []
            keys = cursor.iternext(keys=True, values=False)
            return list(itertools.takewhile(lambda key: key.startswith(prefix), keys))

    def count(self, table: str) -> int:
        """Number of records."""
        return int(self._transaction.stat(self._tables[table])["entries"])


class Writing(Reading):
    """The tables inside a write transaction."""

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Set `key`."""
        self._transaction.put(key, value, db=self._tables[table])

    def delete(self, table: str, key: bytes) -> bool:
        """Remove `key`; whether it was there."""
        return bool(self._transaction.delete(key, db=self._tables[table]))

    def delete_prefix(self, table: str, prefix: bytes) -> None:
        """Remove every key that begins with `prefix`."""
        with self._transaction.cursor(db=self._tables[table]) as cursor:
            while cursor.set_range(prefix) and cursor.key().startswith(prefix):
                cursor.delete()


_KEY_BYTES = 32
_ATTEMPTS = 8
"""Walks of a file that another process commits to meanwhile."""
_WALKED_BYTES = 16 << 20
"""A walk of an index of this size takes under a second."""
_READERS = 1022
"""Readers at once; each takes 64 bytes of `lock.mdb`."""
_METADATA_BYTES = 1 << 17  # two pages of the largest size that LMDB has


def check_index(index: Path) -> None:
    """Check an index before LMDB maps it; nothing where there is none yet.

    Args:
        index: The directory of the environment.

    Raises:
        DamageError: It is not a sound LMDB file, or something else lies at its place.
    """
    data, lock = index / "data.mdb", index / "lock.mdb"
    try:
        os.close(files.open_regular(data))
    except FileNotFoundError:
        return
    except files.IrregularFile as error:
        raise _refused(data, [error.message]) from error
    # Not opened: to close it would give up the locks that LMDB has on it in this process.
    if os.path.lexists(lock) and not stat.S_ISREG(os.lstat(lock).st_mode):
        raise _refused(data, [f"{lock} is no regular file"])
    key = _key()
    for _ in range(_ATTEMPTS):
        before, digest = _metadata(data), _content_digest(data)
        if key is not None and _is_marked(index, _token(key, digest)):
            return
        faults = find_faults(data)
        if not faults:
            if key is not None:
                _mark(index, _token(key, digest))
            return
        # A commit during the walk shows two states at once; then the walk says nothing.
        if before == _metadata(data):
            raise _refused(data, faults)
    # Another process committed throughout every walk: it has the file mapped, and reads and writes it.


def mark_changed(index: Path) -> None:
    """Mark an index that this process alone has changed and closed, where a walk at the next open would take long.

    A small one is left to that walk, which then also finds what was damaged while it was open.
    """
    key, data = _key(), index / "data.mdb"
    with contextlib.suppress(OSError):
        if key is not None and os.lstat(data).st_size > _WALKED_BYTES:
            _mark(index, _token(key, _content_digest(data)))


def _metadata(data: Path) -> bytes:
    """The pages that LMDB writes at each commit."""
    with open(files.open_regular(data), "rb") as file:
        return file.read(_METADATA_BYTES)


def _content_digest(data: Path) -> str:
    state, buffer = xxhash.xxh3_128(), memoryview(bytearray(1 << 20))
    with open(files.open_regular(data), "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def _mark(index: Path, token: str) -> None:
    path = index / "checked"
    with contextlib.suppress(OSError):
        files.remove_tree(path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        with open(fd, "w") as file:
            file.write(token)


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
    except Exception as error:  # whatever it stumbles over (struct.error, RecursionError, …) is a fault
        return [f"{type(error).__name__}: {error}"]


def _key() -> bytes | None:
    """This user's secret, made where it is missing; None where it can be neither read nor made."""
    path = user_cache() / "store-key"
    with contextlib.suppress(OSError):
        if not path.exists() or path.stat().st_size != _KEY_BYTES:
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
        key = files.read_bytes(path, limit=_KEY_BYTES)
        return key if len(key) == _KEY_BYTES else None
    return None


def _token(key: bytes, digest: str) -> str:
    return hmac.new(key, digest.encode(), hashlib.sha256).hexdigest()


def _is_marked(index: Path, token: str) -> bool:
    try:
        return hmac.compare_digest(files.read_bytes(index / "checked", limit=128), token.encode())
    except OSError:
        return False


def _refused(path: Path, faults: list[str]) -> DamageError:
    return DamageError(
        f"the index {path} is damaged or was not made by StackWise ({faults[0][:160]})",
        hint="`stackwise cache repair` sets it aside and rebuilds it from the boundaries",
    )


TABLES = ("masks", "rowsets", "boundaries", "trunks", "chunks", "runs", "evicted")
MAP_SIZE = 1 << 36
"""Address space, not disk: the file is as large as what is in it."""

_NEARLY_FULL = 16 << 20

T = TypeVar("T")

_DAMAGE = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
    lmdb.PanicError,
    lmdb.IncompatibleError,
    lmdb.BadValsizeError,
)
_open: dict[str, Index] = {}
_open_lock = threading.Lock()


class Index:
    """Tables of bytes to bytes under `path`. Use `open_index`, which shares one a process."""

    def __init__(self, path: Path, map_size: int = MAP_SIZE, *, read_only: bool = False) -> None:
        self.path, self.read_only = path, read_only
        self.references = 0
        self.changed = False
        self._map_size = map_size
        self._env: Any = None
        self._tables: dict[str, Any] = {}
        self._new_locks()

    def _new_locks(self) -> None:
        self._opening = threading.RLock()
        self._writing = threading.Lock()  # LMDB's own lock is between processes; a resize must be alone in this one
        self._gate = threading.Condition()
        self._readers = 0

    def before_fork(self) -> None:
        """Wait until no thread of this process is inside a transaction, and let none begin one."""
        self._writing.acquire()
        self._gate.acquire()
        self._gate.wait_for(lambda: self._readers == 0, timeout=10)

    def after_fork(self) -> None:
        """In the parent: go on."""
        self._gate.release()
        self._writing.release()

    def after_fork_in_child(self) -> None:
        """In the child: leave the parent's environment behind; the next use opens an own one.

        LMDB forbids to use an environment across a fork. To close the child's copy is safe where no transaction
        is open, of which `before_fork` made sure: it unmaps and closes, and touches no slot of the parent's.
        """
        if self._env is not None:
            self._env.close()
        self._env, self._tables = None, {}
        self._new_locks()

    def _environment(self) -> Any:
        """The environment of this very process, opened when there is none."""
        if self._env is None:
            with self._opening, self._explained():
                if self._env is None:
                    check_index(self.path)
                    env = _open_environment(self.path, self._map_size, self.read_only)
                    self._tables = {name: env.open_db(name.encode(), create=not self.read_only) for name in TABLES}
                    env.reader_check()
                    self._env = env
        return self._env

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            raise DamageError(
                f"the index of the store {self.path.parent} is damaged ({error})",
                hint="`stackwise cache repair` rebuilds it from the boundaries",
            ) from error
        except (lmdb.Error, OSError) as error:
            if isinstance(error, StackWiseError):
                raise
            code = error.code if isinstance(error, lmdb.Error) else error.errno
            # LMDB calls a write that the full disk cut short an I/O error.
            cut_short = code == errno.EIO and disk.free_bytes(self.path) < _NEARLY_FULL
            if code in durable.FULL or cut_short:
                raise durable.no_space(self.path) from error
            if isinstance(error, lmdb.Error):
                raise StackWiseError(f"the index {self.path}: {error}") from error
            raise

    @contextlib.contextmanager
    def read(self) -> Iterator[Reading]:
        """A short read-only view of one state of the index; values are copies."""
        env = self._environment()
        with self._explained():
            while True:
                with self._gate:
                    self._readers += 1
                try:
                    with env.begin() as transaction:
                        yield Reading(transaction, self._tables)
                    return
                except lmdb.MapResizedError:
                    pass
                except lmdb.ReadersFullError:
                    if not env.reader_check():
                        raise
                    continue
                finally:
                    with self._gate:
                        self._readers -= 1
                        self._gate.notify_all()
                with self._writing:
                    self._resize(env, 0)

    def update(self, change: Callable[[Writing], T]) -> T:
        """Run `change` in one write transaction and commit it; nothing of it is seen before, all of it after.

        `change` runs again where the map had to grow, so it must bear that.

        Raises:
            NoSpaceError: The disk is full; nothing was changed.
            DamageError: The index is damaged.
            UsageError: It can only be read.
        """
        if self.read_only:
            raise UsageError(f"the store {self.path.parent} can only be read here")
        env = self._environment()
        with self._explained(), self._writing:
            while True:
                try:
                    self.changed = True  # before the commit: one that fails half-way changes the file as well
                    with env.begin(write=True) as transaction:
                        return change(Writing(transaction, self._tables))
                except lmdb.MapResizedError:
                    self._resize(env, 0)
                except lmdb.MapFullError:
                    self._resize(env, env.info()["map_size"] * 2)

    def _resize(self, env: Any, size: int) -> None:
        # The map must not be pulled from under this process's other threads: wait until none of them reads.
        with self._gate:
            self._gate.wait_for(lambda: self._readers == 0)
            env.set_mapsize(size)

    def statistics(self) -> dict[str, int]:
        """`{"entries", "bytes"}`: records in all tables, and the bytes of the files of the index."""
        with self.read() as view:
            entries = sum(view.count(name) for name in TABLES)
        paths = [self.path / "data.mdb", *(self.path / "rowsets").glob("*")]
        return {"entries": entries, "bytes": sum(path.lstat().st_size for path in paths if path.exists())}

    def clear_stale_readers(self) -> int:
        """Free the slots of readers that died; returns how many there were."""
        return int(self._environment().reader_check())

    def close(self) -> None:
        """Close the environment."""
        with self._opening:
            if self._env is not None:
                self._env.close()
            self._env, self._tables = None, {}


def _before_fork() -> None:
    _open_lock.acquire()
    for index in _open.values():
        index.before_fork()


def _after_fork() -> None:
    for index in _open.values():
        index.after_fork()
    _open_lock.release()


def _after_fork_in_child() -> None:
    global _open_lock
    _open_lock = threading.Lock()
    for index in _open.values():
        index.after_fork_in_child()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _open_environment(path: Path, map_size: int, read_only: bool) -> Any:
    lock = path / "lock.mdb"
    if not read_only and not os.path.lexists(lock) and hasattr(os, "posix_fallocate"):
        # LMDB maps this file: a page that finds no room on a full disk would end the process by SIGBUS.
        fd = files.open_regular(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.posix_fallocate(fd, 0, 64 * _READERS)
        finally:
            os.close(fd)
    size = map_size
    while True:
        try:
            return lmdb.open(
                str(path),
                map_size=size,
                max_dbs=len(TABLES),
                max_readers=_READERS,
                readahead=False,
                meminit=True,
                writemap=False,
                readonly=read_only,
                lock=not read_only,
                max_spare_txns=0,  # an idle cached reader would keep a slot across a fork
            )
        except (lmdb.MemoryError, MemoryError, lmdb.Error) as error:
            # Where address space is limited (ulimit -v), a smaller map does; it grows when it must.
            if getattr(error, "code", errno.ENOMEM) != errno.ENOMEM or size <= 1 << 26:
                raise
            size >>= 2


def open_index(path: Path, map_size: int = MAP_SIZE, *, read_only: bool = False) -> Index:
    """The index under `path`, shared with every other store of this process that has it open."""
    key = os.path.realpath(path)
    with _open_lock:
        index = _open.get(key)
        if index is None:
            index = _open[key] = Index(path, map_size, read_only=read_only)
        index.references += 1
        try:
            if index._env is not None:
                check_index(path)  # it may have been damaged since this process opened it
            index._environment()
        except BaseException:
            _release(key, index)
            raise
        return index


def close_index(index: Index) -> bool:
    """Give back what `open_index` gave; the last one closes it.

    Returns:
        Whether it is closed now, and was changed by this process.
    """
    with _open_lock:
        _release(os.path.realpath(index.path), index)
        return index.references <= 0 and index.changed


def _release(key: str, index: Index) -> None:
    index.references -= 1
    if index.references <= 0:
        index.close()
        if _open.get(key) is index:
            del _open[key]
