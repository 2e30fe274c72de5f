"""Writing a boundary, chunk by chunk: each is on disk before the index says that it exists.

A chunk is staged (written and fsynced under a temporary name); then, in one LMDB transaction, it gets its name
and its record. LMDB's write lock spans processes, so of two writers of one chunk exactly one publishes it, and
the other's copy is thrown away. Before the commit nothing happened; after it, the chunk survives anything.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from stackwise.errors import NoSpaceError, NotFound, UsageError
from stackwise.store import disk
from stackwise.store.chunks import Background, Publisher
from stackwise.store.columns import write_metadata
from stackwise.store.disk import LocalBackend
from stackwise.store.index import Index, Writing
from stackwise.store.layout import Lease
from stackwise.store.records import (
    BoundaryInfo,
)
from stackwise.store.rows import Masks, Rowset

if TYPE_CHECKING:
    import torch


class BoundaryWriter:
    """Writes the chunks of one boundary; made by `ActivationStore.writer`.

    Several writers, in threads or processes, may write other chunks of one boundary at the same time. It holds a
    lease, so the boundary is never dropped meanwhile. A later writer of the same boundary goes on where this one
    stopped: see `missing`.
    """

    def __init__(
        self, index: Index, backend: LocalBackend, masks: Masks, rowset: Rowset, info: BoundaryInfo, lease: Lease
    ) -> None:
        self._index, self._backend, self._masks, self._rowset = index, backend, masks, rowset
        self._info, self._lease = info, lease
        self._publisher = Publisher(index, backend, info)
        self._background: Background | None = None
        self._began, self._lacked = time.monotonic(), info.chunks - info.published

    @property
    def info(self) -> BoundaryInfo:
        """The boundary, as the index has it now."""
        with self._index.read() as view:
            raw = view.get("boundaries", bytes.fromhex(self._info.id))
        if raw is None:
            raise NotFound(f"boundary {self._info.id} is no longer in the store")
        return BoundaryInfo.decode(bytes.fromhex(self._info.id), raw)

    @property
    def missing(self) -> list[int]:
        """Indices of the chunks that are not published yet, in order."""
        with self._index.read() as view:
            keys = view.keys("chunks", bytes.fromhex(self._info.id))
        have = {int.from_bytes(key[16:], "big") for key in keys}
        return [chunk for chunk in range(self._info.chunks) if chunk not in have]

    def chunk_rows_of(self, chunk: int) -> tuple[int, int]:
        """(first row, row after the last) of a chunk."""
        if not 0 <= chunk < self._info.chunks:
            raise UsageError(f"boundary {self._info.id} has chunks 0 to {self._info.chunks - 1}, not {chunk}")
        return self._info.chunk_span(chunk)

    def write_chunk(self, chunk: int, x: torch.Tensor | npt.NDArray[Any]) -> bool:
        """Encode, write and publish a chunk; on return it survives kill -9 and power loss.

        Args:
            chunk: Its index.
            x: Its rows [n, seq_len, d_model], floating point, on any device.

        Returns:
            Whether this call published it; False where it was published before, which stays as it is.

        Raises:
            UsageError: Wrong index or shape, or a number that the codec cannot store.
            NoSpaceError: The disk is full; what was published before stays, and a later call goes on.
        """
        arrays = self._encoded(chunk, x)
        with self._explained():
            return self._publisher.publish([self._publisher.stage(chunk, arrays)])[0]

    def submit(self, chunk: int, x: torch.Tensor | npt.NDArray[Any], *, copy: bool = True) -> None:
        """As `write_chunk`, but written behind: a thread writes while the caller computes the next chunk.

        Chunks that come fast share a transaction, so this is the fast way to write many. A chunk is published, and
        survives anything, when `flush` or `finish` returns; a kill before loses the last few alone.

        Args:
            chunk: Its index.
            x: Its rows [n, seq_len, d_model].
            copy: Make `x` the caller's again on return (encoding copies it anyway, unless it is on the CPU and of
                the stored type already). Without, `x` must stay as it is until `flush`.

        Raises:
            UsageError, NoSpaceError: As `write_chunk`, of this chunk or of one submitted before.
        """
        arrays = self._encoded(chunk, x)
        memory = (x if isinstance(x, np.ndarray) else _memory(x)) if copy else None
        if memory is not None and np.may_share_memory(arrays[0], memory):
            arrays = [array.copy() for array in arrays]
        if self._background is None:
            self._background = Background(self._publisher)
        with self._explained():
            self._background.put(chunk, arrays)

    def flush(self) -> None:
        """Wait until every submitted chunk is published.

        Raises:
            NoSpaceError: The disk is full; what was published before stays.
        """
        if self._background is not None:
            with self._explained():
                self._background.flush()

    def _encoded(self, chunk: int, x: torch.Tensor | npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        info = self._info
        start, stop = self.chunk_rows_of(chunk)
        if tuple(x.shape) != (stop - start, info.seq_len, info.d_model):
            expected = [stop - start, info.seq_len, info.d_model]
            raise UsageError(f"chunk {chunk} of boundary {info.id} is {expected}, not {list(x.shape)}")
        return info.codec_object.encode(x)

    def finish(self, cost: float | None = None) -> BoundaryInfo:
        """Make the boundary complete: its columns and Zarr metadata are written, then its state changes.

        Args:
            cost: Seconds that computing it took, where the writer did other things in between; by default the time
                since the writer was made.

        Raises:
            UsageError: Chunks are missing.
            NoSpaceError: The disk is full; calling again goes on.
        """
        self.flush()
        info, missing = self.info, self.missing
        if missing:
            raise UsageError(f"boundary {info.id} lacks {len(missing)} of its {info.chunks} chunks")
        if info.state == "complete":
            return info
        with self._explained():
            write_metadata(self._index, self._backend, self._masks, self._rowset, info)

        # What this writer did not write is taken to have cost as much a chunk.
        measured = (time.monotonic() - self._began) * info.chunks / max(1, self._lacked) if cost is None else cost

        def complete(view: Writing) -> BoundaryInfo:
            raw = view.get("boundaries", bytes.fromhex(info.id))
            if raw is None:
                raise NotFound(f"boundary {info.id} is no longer in the store")
            now = BoundaryInfo.decode(bytes.fromhex(info.id), raw)
            done = replace(now, state="complete", cost=now.cost or measured)
            view.put("boundaries", bytes.fromhex(info.id), done.encode())
            return done

        with self._explained():
            return self._index.update(complete)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of a full disk what the boundary still needs."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error, NoSpaceError):
                raise
            missing = len(self.missing)
            info = self._info
            need = missing * info.chunk_rows * info.codec_object.row_bytes(info.seq_len, info.d_model)
            root = getattr(self._backend, "root", None)
            free = f"; {disk.free_bytes(root):,} are free" if root is not None else ""
            raise NoSpaceError(
                f"no space left for boundary {info.id}: {missing} of its {info.chunks} chunks are still to be "
                f"written, up to {need:,} bytes{free}",
                hint="`stackwise cache gc` frees what no run needs; then run the same command again: it goes on",
            ) from error

    def close(self) -> None:
        """Publish what was submitted, and let go of the lease. What was published stays.

        Raises:
            NoSpaceError: As `flush`.
        """
        background, self._background = self._background, None
        try:
            if background is not None:
                background.stop()
                with self._explained():
                    background.flush()
        finally:
            self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # what went wrong before is what is to be seen
            with contextlib.suppress(Exception):
                self.close()


def _memory(x: torch.Tensor) -> npt.NDArray[np.uint8] | None:
    """The memory of a CPU tensor; None where it lies elsewhere or is strided, and encoding copied it anyway."""
    if x.device.type != "cpu" or not x.is_contiguous():
        return None
    import torch

    return x.detach().reshape(-1).view(torch.uint8).numpy()
