"""Safetensors files: written as their tensors come, read tensor by tensor or many in one piece of memory.

Threads write and read large ones, several pieces at once, and past the page cache where that is asked for. Such a file
is one as any other: what goes past the cache is whole pages of it, from and to memory that begins with a page. Nothing
in it is moved for that, so a tensor lies in memory as it does in the file, or is copied where that is not aligned.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from stackwise import durable, files
from stackwise.training.lanes import Buffers
from stackwise.training.pinned import ALIGNED, PAGE
from stackwise.training.ranks import outlined

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
}  # fmt: skip
_NAMES = {name: dtype for dtype, name in _DTYPES.items()}
_WAITING = 16  # pieces that may wait for the disk
_PIECE = 8 << 20  # bytes that go at once: hashing, copying and writing them leave the interpreter to others
Views = list[memoryview]


def passes_cache(directory: Path) -> bool:
    """Whether files of a directory can be written and read past the page cache; tried with one of a page."""
    direct, path = getattr(os, "O_DIRECT", 0), durable.temporary(directory / "page")
    if not direct:
        return False
    page = mmap.mmap(-1, PAGE)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | direct, 0o600)
        try:
            return os.pwrite(fd, page, 0) == PAGE == os.preadv(fd, [page], 0)
        finally:
            os.close(fd)
    except OSError:  # some refuse it when a file is opened, some when it is used
        return False
    finally:
        path.unlink(missing_ok=True)


def aligned_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in an order in which most can be used where a file has them, without a copy."""
    return dict(sorted(tensors.items(), key=lambda one: one[1].nbytes % ALIGNED != 0))


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    threads: Executor | None = None,
    staging: Buffers | None = None,
    *,
    sync: bool = True,
) -> str:
    """Write a safetensors file; one tensor at a time is copied off its device.

    Args:
        threads: Write a large file, while this thread takes its digest; None: it does both.
        staging: Lends the memory from which it goes past the page cache (see `passes_cache`); None: it goes through it.
        sync: Flush it to the disk; else whoever publishes it does.

    Returns:
        xxh3-128 of the whole file.
    """
    size, flags = nbytes_of(tensors), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    fd = files.open_regular(path, flags | (os.O_DIRECT if staging is not None else 0))
    try:
        if staging is not None:
            with contextlib.suppress(OSError):  # a quarter faster; not every file system has it
                os.posix_fallocate(fd, 0, _whole(size, PAGE))
        written = write_within(fd, 0, tensors, threads, staging)
        if staging is not None:
            os.ftruncate(fd, size)  # what was written is whole pages
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
    return written


def nbytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a file of some tensors."""
    header, of_tensors = _header(tensors)
    return len(header) + of_tensors


def write_within(
    fd: int, begin: int, tensors: Mapping[str, Tensor], threads: Executor | None = None, staging: Buffers | None = None
) -> str:
    """Write what would be a file of its own into one that is open, from a page on (see `write_tensors`).

    Returns:
        xxh3-128 of what was written; the rest of its last page may be zeros then.
    """
    hashed, writing, size = xxhash.xxh3_128(), deque[Future[None]](), 0
    header, _ = _header(tensors)
    try:
        for views in _pieces(header, tensors):
            nbytes = sum(view.nbytes for view in views)
            if threads is not None and size + nbytes >= _PIECE:
                writing.append(threads.submit(_write, fd, views, begin + size, staging))
            else:
                _write(fd, views, begin + size, staging)
            for view in views:
                hashed.update(view)
            size += nbytes
            while len(writing) > _WAITING:  # a tensor that is made for this goes once it is written
                writing.popleft().result()
        for piece_written in writing:
            piece_written.result()
    finally:
        wait(writing)  # all of them, before the file is closed
    return hashed.hexdigest()


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """What stands before the tensors of a file, and the bytes that they take."""
    table: dict[str, Any] = {}
    offset = 0
    for name, tensor in outlined(tensors).items():
        end = offset + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(table).encode()
    header += b" " * (-(8 + len(header)) % ALIGNED)
    return struct.pack("<Q", len(header)) + header, offset


def _pieces(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[Views]:
    """The bytes of a file, as many at a time as go at once."""
    of_tensors = (memoryview(_bytes(tensor.detach().cpu().contiguous())) for tensor in tensors.values())
    views, room = Views(), _PIECE
    for whole in itertools.chain([memoryview(header)], of_tensors):
        left = whole
        while left.nbytes:
            views.append(left[:room])
            left, room = left[room:], room - views[-1].nbytes
            if not room:
                yield views
                views, room = [], _PIECE
    if views:
        yield views


def _write(fd: int, views: Views, place: int, staging: Buffers | None) -> None:
    if staging is not None:  # whole pages, of memory that begins with one
        memory, at = staging.lend(_whole(sum(view.nbytes for view in views), PAGE)).numpy(), 0
        for view in views:
            memory[at : at + view.nbytes] = np.frombuffer(view, np.uint8)  # other threads go on meanwhile
            at += view.nbytes
        memory[at:] = 0
        views = [memoryview(memory.data)]
    for whole in views:
        left = whole
        while left.nbytes:
            count = os.pwrite(fd, left, place)
            left, place = left[count:], place + count


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for.

    The file may come from elsewhere: it is a regular file, every tensor lies within it, and nothing is taken on trust.

    Args:
        root: A directory above it, below which there may be no links (see `files.open_regular`).
        begin: Where in the file it begins (see `write_within`).

    Raises:
        ValueError: It is no safetensors file, or it is cut off.
        IrregularFile: It is a link, a FIFO, a device, a directory.
    """

    def __init__(self, path: Path, root: Path | None = None, *, begin: int = 0) -> None:
        self._path, self._root = path, root
        with self._opened() as file:
            size = os.fstat(file.fileno()).st_size - file.seek(begin)
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, files.METADATA_BYTES):
                raise ValueError(f"{path} is cut off, or no safetensors file")
            table = files.parse_json(file.read(length))
            self._begin = begin + 8 + length
        if not isinstance(table, dict):
            raise ValueError(f"{path} is no safetensors file")
        table.pop("__metadata__", None)
        self._table: dict[str, tuple[torch.dtype, list[int], int]] = {}
        for name, entry in table.items():
            self._table[name] = self._checked(name, entry, size - 8 - length)

    @property
    def outline(self) -> dict[str, Tensor]:
        """Tensors of the same shapes and dtypes on the meta device."""
        return {name: torch.empty(s, dtype=d, device="meta") for name, (d, s, _) in self._table.items()}

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, which is not read."""
        return list(self._table[name][1])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, which is not read."""
        return self._table[name][0]

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, begin = self._table[name]
        tensor = torch.empty(shape, dtype=dtype)
        view = memoryview(_bytes(tensor))
        with self._opened() as file:
            self._fill(file.fileno(), view, self._begin + begin, view.nbytes)
        return tensor

    def read(
        self,
        names: Sequence[str],
        lend: Callable[[int], Tensor],
        threads: Executor | None = None,
        *,
        direct: bool = False,
    ) -> dict[str, Tensor]:
        """Some of its tensors, in one piece of memory.

        Args:
            lend: Gives memory, uint8 of so many bytes, that begins with a page.
            threads: Read large tensors, several pieces at once; None: this thread does.
            direct: Past the page cache (see `passes_cache`).
        """
        # What lies side by side in the file is read as one: where it comes to in memory, from which page of the file,
        # and up to where.
        spans, places, end = list[tuple[int, int, int]](), dict[str, int](), 0
        for name in sorted(names, key=lambda name: self._table[name][2]):
            begin = self._begin + self._table[name][2]
            if not spans or begin > spans[-1][2] + PAGE:
                spans.append((end, begin // PAGE * PAGE, begin))
            at, first, _ = spans[-1]
            spans[-1] = at, first, begin + self._size(name)
            places[name], end = at + begin - first, at + _whole(begin + self._size(name) - first, PAGE)
        moved = dict[str, int]()
        for name, place in places.items():
            if place % ALIGNED:  # what is computed may depend on it, in its last bit
                moved[name], end = end, end + _whole(self._size(name), ALIGNED)
        memory = lend(end)
        view = memoryview(_bytes(memory))
        pieces: list[tuple[memoryview, int, int]] = []
        for at, first, until in spans:
            for place in range(first, until, _PIECE):
                nbytes, begun = min(_PIECE, until - place), at + place - first
                pieces.append((view[begun : begun + _whole(nbytes, PAGE)], place, nbytes))
        with self._opened(os.O_DIRECT if direct else 0) as file:
            fill = partial(self._fill, file.fileno())
            if threads is None or len(pieces) < 2:
                for one in pieces:
                    fill(*one)
            else:
                reading = [threads.submit(fill, *one) for one in pieces]
                wait(reading)  # all of them, before the file is closed
                for piece_read in reading:
                    piece_read.result()
        tensors: dict[str, Tensor] = {}
        for name in names:
            (dtype, shape, _), size, place = self._table[name], self._size(name), moved.get(name, places[name])
            flat = memory[place : place + size]
            if name in moved:
                flat.copy_(memory[places[name] : places[name] + size])
            tensors[name] = flat.view(dtype).view(shape)
        return tensors

    def _fill(self, fd: int, view: memoryview, place: int, least: int) -> None:
        """Read from a place on, so many bytes at least: of the file's last page no more is there."""
        done = 0
        while done < least:
            at = done // PAGE * PAGE
            count = os.preadv(fd, [view[at:]], place + at)
            if at + count <= done:
                raise ValueError(f"{self._path} is cut off")
            done = at + count

    def _size(self, name: str) -> int:
        dtype, shape, _ = self._table[name]
        return math.prod(shape) * dtype.itemsize

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def _opened(self, flags: int = 0) -> io.FileIO:
        return io.FileIO(files.open_regular(self._path, os.O_RDONLY | flags, root=self._root), "rb")

    def _checked(self, name: str, entry: Any, size: int) -> tuple[torch.dtype, list[int], int]:
        try:
            dtype, shape, (begin, end) = _NAMES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{self._path} says of {name} what no tensor can be") from None
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"{self._path} says of {name} what no tensor can be")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{self._path}: {name} takes other bytes than its shape and dtype say")
        if end > size:
            raise ValueError(f"{self._path} is cut off")
        return dtype, shape, begin


def _whole(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor on the CPU, shared with it."""
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
