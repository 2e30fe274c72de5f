"""What travels beside computation: buffers that are used again, and the order of copies on a device that is a fake."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stackwise.identity import derive_seed
from stackwise.training import swap
from stackwise.training.lanes import Buffers, CudaLane, Lane, seed_generator
from stackwise.training.stage import StageModel
from stackwise.training.swap_loader import PartLoader
from stackwise.training.swap_parts import Loaded
from tests.training.swapping import CPU, RackParts, engine, microbatches


def test_buffers_are_used_again_when_no_tensor_is_left_in_them() -> None:
    pinned: dict[int, int] = {}
    buffers = Buffers(lambda address, size: pinned.setdefault(address, size) == size, pinned.pop)
    first, second = buffers.lend(5000), buffers.lend(5000)
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    assert all(place % 4096 == 0 for place in places)
    assert set(pinned) == places
    view = first.view(torch.float32)[10:]
    at = first.data_ptr()
    del first
    assert buffers.lend(5000).data_ptr() not in places, "a view of it is in use"
    del view
    assert buffers.lend(4500).data_ptr() in {at, *pinned}
    assert buffers.most == 3 * 8192
    del second
    large = buffers.lend(3 * 8192)
    assert sum(pinned.values()) <= buffers.most, "what is idle goes before more is taken than ever was"
    assert len(large) == 3 * 8192


class FakeLane(Lane):
    """A device whose clock is the number of passes that it has computed."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.clock, self.moves, self.turn, self.downs = 0, 0, 0, 0
        self.moved = threading.Condition()

    def mark(self) -> int:
        return self.clock

    def down(self, tensors: Mapping[str, Tensor], mark: Any) -> dict[str, Tensor]:
        assert mark <= self.clock, "what is copied is computed"
        with self.moved:
            self.downs += 1
        return super().down(tensors, mark)


@pytest.mark.parametrize("ahead", [True, False])
def test_the_next_group_comes_while_one_computes_or_when_it_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    lane, turns = FakeLane(), 5 + 4  # up: front, three groups, head; down: all but the head
    monkeypatch.setattr(swap, "lane_to", lambda device: lane)
    run, to, receive = StageModel.run, Loaded.to, PartLoader.receive
    thread = threading.current_thread()

    def computing(self: StageModel, *given: Any) -> Any:
        with lane.moved:
            if ahead:  # the next one arrives before this one is done: else this would wait for ever
                assert lane.moved.wait_for(lambda: lane.moves >= min(lane.turn + 1, turns), 20)
            lane.clock += 1
        return run(self, *given)

    def moving(self: Loaded, device: torch.device) -> None:
        with lane.moved:
            assert (threading.current_thread() is thread) != ahead
            if not ahead and lane.turn > 1:  # two groups are never there: the one before has been copied
                assert all(left.is_set() for left in swapped.log._left.values())
            lane.moves += 1
            lane.moved.notify_all()
        to(self, device)

    def received(self: PartLoader, loaded: Loaded) -> None:
        lane.turn += 1
        receive(self, loaded)

    monkeypatch.setattr(StageModel, "run", computing)
    monkeypatch.setattr(Loaded, "to", moving)
    monkeypatch.setattr(PartLoader, "receive", received)
    swapped = engine(RackParts(3), tmp_path / "swap", groups=3, ahead=ahead)
    for step in range(2):
        lane.moves = lane.turn = lane.downs = 0
        swapped.step(microbatches(step, 3), step, 1e-3)
        assert (lane.moves, lane.turn) == (turns, turns)
        assert lane.downs >= 5 * (1 + step)
    swapped.close()


class Device(FakeLane):
    """One with memory of its own, which counts bytes of groups in it: now, at most, and of the largest one."""

    def __init__(self) -> None:
        super().__init__()
        self.used = self.most = self.largest = 0

    def count(self, nbytes: int) -> None:
        with self.moved:
            self.used += nbytes
            self.most = max(self.most, self.used)

    def up(self, loaded: Loaded) -> None:
        taken = list[Tensor]()

        def copied(tensor: Tensor) -> Tensor:
            memory = np.empty(tensor.nbytes, np.uint8)
            self.count(tensor.nbytes)
            weakref.finalize(memory, self.count, -tensor.nbytes)
            taken.append(torch.from_numpy(memory).view(tensor.dtype).view(tensor.shape).copy_(tensor))
            return taken[-1]

        for module in loaded.parts.values():
            module._apply(copied)
        for tensors in (*loaded.states.values(), *loaded.gradients.values()):
            tensors |= {name: copied(tensor) for name, tensor in tensors.items()}
        self.largest = max(self.largest, sum(tensor.nbytes for tensor in taken))

    def down(self, tensors: Mapping[str, Tensor], mark: Any) -> dict[str, Tensor]:
        time.sleep(0.02)  # it is slower than what computes: a group that is not waited for would still be there
        return {name: tensor.clone() for name, tensor in super().down(tensors, mark).items()}


@pytest.mark.parametrize("clip", [0.5, 0.0])
@pytest.mark.parametrize(("ahead", "groups"), [(False, 1), (True, 3)])
def test_so_many_groups_are_on_the_device_also_while_they_are_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool, groups: int, clip: float
) -> None:
    device = Device()
    monkeypatch.setattr(swap, "lane_to", lambda where: device)
    monkeypatch.setattr(Loaded, "to", lambda loaded, where: device.up(loaded))
    swapped = engine(RackParts(4, width=32), tmp_path / "swap", groups=4, ahead=ahead, grad_clip=clip)
    works: list[Callable[[], object]] = [
        *(partial(swapped.step, microbatches(step, 2), step, 1e-3) for step in range(3)),
        swapped.settle,
        lambda: swapped.evaluate(microbatches(5, 2)),
        lambda: swapped.squared_gradients(microbatches(6, 2)),
    ]
    for work in works:
        device.most = device.largest = 0
        work()
        assert device.largest <= device.most <= groups * device.largest
    swapped.close()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_copies_on_streams_of_its_own() -> None:
    device = torch.device("cuda")
    lane = CudaLane(device)
    host = lane.buffers.like(torch.empty(1 << 20)).normal_()
    assert host.is_pinned()
    with lane.sending():
        there = host.to(device, non_blocking=True)
    lane.use([there])
    made = there * 2
    landed = lane.down({"made": made}, lane.mark())["made"]
    assert torch.equal(landed, host * 2)


@pytest.mark.parametrize("seed", [0, 5, derive_seed(7, 0, "dropout"), (1 << 63) - 1])
@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.cuda)], ids=str)
def test_a_seeded_generator_draws_the_numbers_of_torch(device: torch.device, seed: int) -> None:
    torch.manual_seed(seed)
    want = [torch.rand(9), torch.rand(9, device=device)]
    torch.manual_seed(1)
    seed_generator(device, seed)
    assert torch.equal(torch.rand(9), want[0])
    assert torch.equal(torch.rand(9, device=device), want[1])
