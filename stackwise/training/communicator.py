"""What ranks say to each other: one interface of collectives, here over torch.distributed, in `mpi.py` over MPI.

Every call is made by all ranks, in one order (`send` and `recv` by two). N ranks, numbered from 0.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

Operation = Literal["sum", "max", "min"]

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
"""What travels between ranks. Of `torch.bool` a sum is "any"."""


PATIENCE = timedelta(days=30)
"""How long a rank waits for another: for hours while one writes what a stage has become. One that is gone breaks the
connection; one that hangs is found by whoever started them."""


class Communicator(Protocol):
    """Collectives over tensors that are contiguous, and of one shape and dtype on all ranks."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor, operation: Operation = "sum") -> None:
        """Let `tensor` become, element by element, the sum (or the like) of every rank's; in place."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's `tensor`, by rank: [N, *shape]."""

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Of the sum of every rank's `tensor` [N, *shape] the entry of this rank: [*shape]."""

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Entry r of `tensor` [N, *shape] goes to rank r; what came from each rank: [N, *shape]."""

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Let `tensor` become the root's; in place."""

    def send(self, tensor: Tensor, to: int) -> None:
        """Send it to a rank that calls `recv`."""

    def recv(self, tensor: Tensor, source: int) -> None:
        """Let `tensor` become what `source` sends; in place."""

    def barrier(self) -> None:
        """Return when every rank has called it."""

    def close(self) -> None:
        """Leave the group."""


class TorchCommunicator(Communicator):
    """Over torch.distributed: gloo for tensors on the CPU, NCCL for those on a GPU.

    Args:
        store: Where the ranks meet.
        device: Where tensors are computed; with a GPU both backends are there.
    """

    def __init__(self, store: Store, rank: int, size: int, *, device: torch.device) -> None:
        self.rank, self.size = rank, size
        gpu = device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
            device_id=device if gpu else None,
        )

    def all_reduce(self, tensor: Tensor, operation: Operation = "sum") -> None:
        if tensor.dtype is torch.bool:  # of which gloo and NCCL make different things
            number = tensor.to(torch.uint8)
            dist.all_reduce(number, _OPERATIONS["max" if operation == "sum" else operation])
            tensor.copy_(number)
            return
        dist.all_reduce(tensor, _OPERATIONS[operation])

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((self.size * tensor.numel(),))
        dist.all_gather_single(gathered, tensor.reshape(-1))
        return gathered.view(self.size, *tensor.shape)

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        number = tensor.to(torch.int32) if tensor.dtype is torch.bool else tensor
        mine = number.new_empty(tensor.shape[1:])
        dist.reduce_scatter_single(mine.view(-1), number.reshape(-1))
        return mine.to(tensor.dtype)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor)
        return received

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        dist.broadcast(tensor, root)

    def send(self, tensor: Tensor, to: int) -> None:
        dist.send(tensor, to)

    def recv(self, tensor: Tensor, source: int) -> None:
        dist.recv(tensor, source)

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, dtype=torch.int32))  # on the CPU: a GPU's barrier would wait for its kernels

    def close(self) -> None:
        dist.destroy_process_group()


_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
