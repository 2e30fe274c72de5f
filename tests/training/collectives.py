"""Every collective against its definition, on ranks that are processes, and a training by them.

mpiexec -n 2 python -m tests.training.collectives mpi
python -m tests.training.collectives torch FILE SIZE
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from stackwise.config import StageTraining
from stackwise.training.communicator import DTYPES, Communicator, Operation, TorchCommunicator
from stackwise.training.compression import PowerSGD, compressed
from stackwise.training.engine import ResidentEngine
from stackwise.training.ranks import RankGroup, Ranks, SingleProcess
from tests.training.test_trainer import CPU, batch, model

SHAPES = [(), (5,), (3, 4), (0,)]
COMBINE: dict[Operation, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What a rank brings: small whole numbers, whose sums no dtype rounds."""
    draw = torch.Generator().manual_seed(rank)
    number = torch.randint(0, 2 if dtype is torch.bool else 9, shape, generator=draw)
    return number.to(dtype)


def combined(parts: list[Tensor], operation: Operation) -> Tensor:
    """The definition of a reduction."""
    result = parts[0].clone()
    for other in parts[1:]:
        if result.dtype is torch.bool:
            result = result & other if operation == "min" else result | other
        else:
            result = COMBINE[operation](result, other)
    return result


def check(communicator: Communicator) -> None:
    """Every collective, every shape, every dtype."""
    rank, size = communicator.rank, communicator.size
    for dtype in DTYPES:
        for shape in SHAPES:
            parts = [part(r, shape, dtype) for r in range(size)]
            for operation in COMBINE:
                one = parts[rank].clone()
                communicator.all_reduce(one, operation)
                same(one, combined(parts, operation))
            same(communicator.all_gather(parts[rank]), torch.stack(parts))
            whole = [part(10 + r, (size, *shape), dtype) for r in range(size)]
            same(communicator.reduce_scatter(whole[rank]), combined(whole, "sum")[rank])
            same(communicator.all_to_all(whole[rank]), torch.stack([other[rank] for other in whole]))
            one = parts[rank].clone()
            communicator.broadcast(one, size - 1)
            same(one, parts[-1])
            if rank == 0:
                communicator.send(parts[0], 1)
            elif rank == 1:
                one = torch.empty_like(parts[0])
                communicator.recv(one, 0)
                same(one, parts[0])
    communicator.barrier()


def same(left: Tensor, right: Tensor) -> None:
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert torch.equal(left, right)


def trained(ranks: Ranks) -> dict[str, Tensor]:
    """The weights after four steps of six microbatches."""
    settings = StageTraining(batch_size=2, accumulation=6, grad_clip=0.1)
    torch.manual_seed(0)
    engine = ResidentEngine(model(), settings, seed=(7, 0), device=CPU, ranks=ranks)
    for step in range(4):
        mine = [batch(6 * step + ranks.microbatch(n), 2) for n in range(6 // ranks.size)]
        engine.step(mine, step, 1e-2)
    return engine.state()


def compressions(communicator: Communicator) -> None:
    """Rounded sums are those of rounded parts; PowerSGD is torch's, with its errors."""
    rank, size = communicator.rank, communicator.size
    gradients = [
        [torch.randn(24, 40, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(size)]
        for step in range(5)
    ]
    p = torch.nn.Parameter(torch.zeros(24, 40))
    for name, dtype, scale in (("bf16", torch.bfloat16, 1.0), ("fp16", torch.float16, 1e9)):
        make = compressed(name, 0)
        assert make is not None
        p.grad = gradients[0][rank] * scale  # in fp16 far out of range
        reducer = make(RankGroup(communicator), [p])
        reducer.finish(1.0)
        exact = torch.stack(gradients[0]).sum(0) * scale
        assert p.grad is not None
        assert (p.grad - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert not torch.equal(p.grad, exact)

    linear = torch.nn.Linear(40, 24, bias=False)
    oracle = torch.nn.parallel.DistributedDataParallel(linear)
    state = PowerSGDState(None, matrix_approximation_rank=3, start_powerSGD_iter=2, random_seed=0)
    oracle.register_comm_hook(state, powerSGD_hook)
    reducer = PowerSGD(RankGroup(communicator), [p], rank=3)
    with torch.random.fork_rng():
        torch.manual_seed(np.random.RandomState(0).randint(1_000_000_000))
        basis = torch.randn(1, 40, 3)[0]
    reducer.restore({"compression/error/0": torch.zeros(size, 24, 40), "compression/basis/0": basis})
    for step, by_rank in enumerate(gradients):
        linear.zero_grad()
        (oracle(torch.eye(40)) * by_rank[rank].T).sum().backward()
        if step < 2:  # torch's first steps are plain
            continue
        p.grad = 4 * by_rank[rank]
        reducer.finish(0.25)
        assert p.grad is not None
        assert linear.weight.grad is not None
        torch.testing.assert_close(p.grad / 4 / size, linear.weight.grad, rtol=1e-4, atol=1e-5)
    p.grad = torch.full_like(p, torch.inf if rank else 1.0)
    kept = reducer.outline()["compression/basis/0"].clone()
    reducer.finish(1.0)
    assert not p.grad.isfinite().all()
    assert torch.equal(reducer.outline()["compression/basis/0"], kept)


def main(kind: str, *place: str) -> None:
    communicator: Communicator
    torch.set_num_threads(1)
    if kind == "mpi":
        from mpi4py import MPI

        from stackwise.training.mpi import MpiCommunicator

        communicator = MpiCommunicator(MPI.COMM_WORLD)
    else:
        file, size = place[0], int(place[1])
        rank = next((rank for rank in range(1, size) if os.fork() == 0), 0)  # what was imported is there already
        communicator = TorchCommunicator(FileStore(file, size), rank, size, device=torch.device("cpu"))
    check(communicator)
    together, alone = trained(RankGroup(communicator)), trained(SingleProcess())
    for name, tensor in alone.items():
        assert torch.equal(tensor, together[name]), name
    if kind == "torch":
        compressions(communicator)
    assert RankGroup(communicator).gathered(communicator.rank) == list(range(communicator.size))
    communicator.close()
    if kind == "torch":
        if rank:
            os._exit(0)
        assert all(os.wait()[1] == 0 for _ in range(1, size))


if __name__ == "__main__":
    main(*sys.argv[1:])
