"""A worker as one of several ranks: it joins the others, is heard of every second, and leaves with them."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch._C._distributed_c10d import TCPStore

from stackwise.errors import StackWiseError, UsageError, line_of
from stackwise.pipeline.division import check_alike
from stackwise.training.communicator import TorchCommunicator
from stackwise.training.compression import compressed
from stackwise.training.ranks import RankGroup, Ranks, SingleProcess
from stackwise.version import __version__

Emit = Callable[[dict[str, Any]], None]
ALIVE_SECONDS = 0.5  # between two signs of life
MEETING_SECONDS = 120.0  # for all ranks to come together


@contextlib.contextmanager
def joined(place: Mapping[str, Any] | None, device: torch.device, emit: Emit) -> Iterator[Ranks]:
    """The ranks that a job is done by.

    Args:
        place: This one's `rank` of `size`, the `address` and `port` of rank 0 (whose port may be 0: it is emitted once
            known), `timeout` in seconds, whether sums are `deterministic`, how gradients are `compressed` (kind and
            rank), and how many ranks take the same rows, by `tensor` and `pipeline`; None: it is alone.

    Raises:
        UsageError: The port is in use; or the ranks are not of the same versions.
        StackWiseError: The ranks do not come together.
    """
    if place is None:
        yield SingleProcess()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    over = threading.Event()
    heart = threading.Thread(target=_live, args=(emit, over), name="alive", daemon=True)
    heart.start()
    try:
        store = _meeting_place(place, emit)
        try:
            communicator = TorchCommunicator(store, place["rank"], place["size"], device=device)
        except (RuntimeError, ValueError) as error:
            raise StackWiseError(f"rank {place['rank']} could not join the others: {line_of(error)}") from error
        ranks = RankGroup(
            communicator,
            ordered=place["deterministic"],
            tensor=place["tensor"],
            pipeline=place["pipeline"],
            compressed=compressed(*place["compressed"]),
        )
        check_alike(ranks.gathered(numerics()))
        yield ranks
        communicator.close()
    finally:
        over.set()


def _live(emit: Emit, over: threading.Event) -> None:
    while not over.wait(ALIVE_SECONDS):
        emit({"event": "alive"})


def _meeting_place(place: Mapping[str, Any], emit: Emit) -> TCPStore:
    main, address, port = place["rank"] == 0, place["address"], place["port"]
    try:
        store = TCPStore(address, port, None, main, timedelta(seconds=MEETING_SECONDS), wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        if main and any(phrase in str(error) for phrase in ("EADDRINUSE", errno.errorcode[errno.EADDRINUSE], "in use")):
            hint = "set parallel.port to another one, or leave it out: then a free one is taken"
            raise UsageError(f"parallel.port: {port} is in use on {address}", hint=hint) from None
        raise StackWiseError(
            f"rank {place['rank']} does not reach rank 0 at {address}:{port}: {line_of(error)}"
        ) from error
    if main:
        emit({"event": "meeting", "port": store.port})
    return store


def numerics() -> dict[str, Any]:
    """What shapes the numbers of this process, beside its job: the same on all ranks."""
    return {
        "StackWise": __version__,
        "PyTorch": torch.__version__,
        "numpy": np.__version__,
        "threads (OMP_NUM_THREADS)": torch.get_num_threads(),
    }
