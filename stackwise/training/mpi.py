"""What ranks say to each other, over MPI: for a program of one's own whose processes `mpirun` has started.

    from mpi4py import MPI
    ranks = RankGroup(MpiCommunicator(MPI.COMM_WORLD))
    engine = ResidentEngine(model, settings, seed=(0,), device=torch.device("cpu"), ranks=ranks)

The ranks of `stackwise run` are workers that the processes of `mpirun` start, which MPI does not know: they speak over
torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from stackwise.training.communicator import Communicator, Operation

_TYPES = {
    torch.float64: MPI.DOUBLE,
    torch.float32: MPI.FLOAT,
    torch.int64: MPI.INT64_T,
    torch.int32: MPI.INT32_T,
    torch.uint8: MPI.UINT8_T,
    torch.bool: MPI.C_BOOL,
}
_OPERATIONS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
_TRUTHS = {"sum": MPI.LOR, "max": MPI.LOR, "min": MPI.LAND}
_HALVES: dict[Operation, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


class MpiCommunicator(Communicator):
    """See `stackwise.training.communicator.Communicator`; tensors on a GPU travel by way of host memory.

    Args:
        world: The processes; it stays the caller's.
    """

    def __init__(self, world: MPI.Intracomm) -> None:
        self._world = world.Dup()  # so that nothing which the caller sends is taken for ours
        self.rank, self.size = world.rank, world.size
        self._half = MPI.BYTE.Create_contiguous(2).Commit()  # MPI has no numbers of 16 bits
        self._operations: dict[tuple[torch.dtype, Operation], MPI.Op] = {}

    def all_reduce(self, tensor: Tensor, operation: Operation = "sum") -> None:
        here = _host(tensor)
        self._world.Allreduce(MPI.IN_PLACE, self._numbers(here), self._operation(tensor.dtype, operation))
        _back(here, tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype)
        self._world.Allgather(_bytes(_host(tensor)), _bytes(gathered))
        return gathered.to(tensor.device)

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        mine = torch.empty(tensor.shape[1:], dtype=tensor.dtype)
        whole = self._numbers(_host(tensor), mine.numel())  # mpi4py wants the count of a block
        self._world.Reduce_scatter_block(whole, self._numbers(mine), self._operation(tensor.dtype, "sum"))
        return mine.to(tensor.device)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        received = torch.empty(tensor.shape, dtype=tensor.dtype)
        self._world.Alltoall(_bytes(_host(tensor)), _bytes(received))
        return received.to(tensor.device)

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        here = _host(tensor)
        self._world.Bcast(_bytes(here), root)
        _back(here, tensor)

    def send(self, tensor: Tensor, to: int) -> None:
        self._world.Send(_bytes(_host(tensor)), to)

    def recv(self, tensor: Tensor, source: int) -> None:
        here = _host(tensor)
        self._world.Recv(_bytes(here), source)
        _back(here, tensor)

    def barrier(self) -> None:
        self._world.Barrier()

    def close(self) -> None:
        for operation in self._operations.values():
            operation.Free()
        self._half.Free()
        self._world.Free()

    def _numbers(self, here: Tensor, count: int | None = None) -> list[Any]:
        """A tensor as MPI takes it where it counts with its elements."""
        return [_bytes(here), here.numel() if count is None else count, _TYPES.get(here.dtype, self._half)]

    def _operation(self, dtype: torch.dtype, operation: Operation) -> MPI.Op:
        if dtype is torch.bool:
            return _TRUTHS[operation]
        if dtype in _TYPES:
            return _OPERATIONS[operation]
        known = self._operations.get((dtype, operation))
        if known is None:
            combine = _HALVES[operation]

            def call(one: Any, other: Any, _: MPI.Datatype) -> None:
                into = torch.frombuffer(other, dtype=dtype)
                combine(torch.frombuffer(one, dtype=dtype), into, out=into)  # type: ignore[call-arg]

            known = self._operations[dtype, operation] = MPI.Op.Create(call, commute=True)
        return known


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def _back(here: Tensor, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        tensor.copy_(here)


def _bytes(here: Tensor) -> Any:
    return here.reshape(-1).view(torch.uint8).numpy()
