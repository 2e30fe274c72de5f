"""What travels between host and GPU, without one: exact memory, refusals, and the order on streams by a fake clock."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stackwise.config import StageTraining
from stackwise.model import layers
from stackwise.training import pinned
from stackwise.training.engine import ResidentEngine
from stackwise.training.feed import ahead
from stackwise.training.pinned import Arrivals, HostCopy
from tests.training.test_trainer import CPU, batch, model

SHAPES = {"matrix": (torch.Size([3, 5]), torch.float32), "step": (torch.Size([]), torch.float64)}


def test_a_host_copy_is_pinned_in_whole_pages_of_its_own_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: dict[int, int] = {}

    def pin(address: int, size: int) -> bool:
        assert address % pinned.PAGE == size % pinned.PAGE == 0
        alive[address] = size
        return True

    monkeypatch.setattr(pinned, "pin_memory", pin)
    monkeypatch.setattr(pinned, "unpin_memory", alive.pop)
    one = HostCopy(SHAPES, pin=True, warn=pytest.fail)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in one.items()} == SHAPES
    assert list(alive.values()) == [pinned.PAGE]
    one["matrix"].fill_(2.0)
    one["step"].fill_(7.0)
    assert one["matrix"].sum() == 30.0
    one.close()
    assert not alive
    HostCopy(SHAPES, pin=True, warn=pytest.fail)
    assert not alive, "one that nobody has any more is given back too"


def test_memory_that_cannot_be_pinned_is_ordinary_memory_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(pinned, "pin_memory", lambda address, size: False)
    one = HostCopy(SHAPES, pin=True, warn=said.append)
    assert not one.pinned
    assert len(said) == 1
    assert not one["matrix"].any()

    class Refused:
        tries = 0

        def pinned(self) -> None:
            self.tries += 1
            raise RuntimeError("CUDA error: out of memory")

    batches = [Refused(), Refused()]
    assert list(pinned.pinned(iter(batches), said.append)) == batches  # type: ignore[arg-type]
    assert [one.tries for one in batches] == [1, 0]
    assert len(said) == 2


def test_one_batch_is_pinned_while_another_thread_reads_the_next() -> None:
    """Of large rows both take long."""
    reads, threads = [threading.Event() for _ in range(4)], set[tuple[str, int]]()

    class Read:
        nbytes = 1

        def __init__(self, number: int) -> None:
            self.number = number

        def pinned(self) -> Any:
            threads.add(("pins", threading.get_ident()))
            assert self.number == 3 or reads[self.number + 1].wait(20)
            return self

    def batches() -> Iterator[Any]:
        for number, read in enumerate(reads):
            threads.add(("reads", threading.get_ident()))
            read.set()
            yield Read(number)

    with ahead(batches(), torch.device("cuda"), warn=pytest.fail) as ready:
        assert [read.number for read in ready] == list(range(4))  # type: ignore[attr-defined]
    assert len(threads) == len({thread for _, thread in threads}) == 2
    assert threading.get_ident() not in {thread for _, thread in threads}


COPY, COMPUTE, LAUNCH = 3.0, 10.0, 0.1


class Clock:
    """A device: what is launched on a stream begins when the stream is free; launching takes the host a moment."""

    def __init__(self) -> None:
        self.host, self.events = 0.0, list[tuple[str, float, float]]()
        self.computing = Stream(self)
        self.current = self.computing

    def launch(self, what: str, seconds: float) -> None:
        self.host += LAUNCH
        begun = max(self.host, self.current.free)
        self.current.free = begun + seconds
        self.events.append((what, begun, self.current.free))


class Stream:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.free = clock, 0.0

    def wait_stream(self, other: Stream) -> None:
        self.free = max(self.free, other.free)


class Event:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.at = clock, 0.0

    def record(self, stream: Stream) -> None:
        self.at = stream.free

    def synchronize(self) -> None:
        self.clock.host = max(self.clock.host, self.at)


class Travelling:
    """A batch whose copy takes the device some time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.tensors: dict[str, Tensor] = {}

    def to(self, device: torch.device) -> Travelling:
        self._clock.launch("copy", COPY)
        return self


@pytest.mark.parametrize("aside", [False, True])
def test_a_microbatch_travels_while_the_one_before_it_is_computed_on(
    monkeypatch: pytest.MonkeyPatch, aside: bool
) -> None:
    """Also where what computes is on a stream of its own."""
    clock = Clock()

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, clock.current = clock.current, stream
        yield
        clock.current = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(clock))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(clock))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: clock.current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    arrivals = Arrivals(torch.device("cuda"))
    with on(Stream(clock) if aside else clock.computing):
        for _ in range(2):  # steps
            for _ in arrivals.each(Travelling(clock) for _ in range(4)):  # type: ignore[misc]
                clock.launch("compute", COMPUTE)
    copies, computed = ([event[1:] for event in clock.events if event[0] == what] for what in ("copy", "compute"))
    assert all(end <= begun for (_, end), (begun, _) in zip(copies, computed, strict=True))
    assert [end for _, end in computed[:-1]] == [begun for begun, _ in computed[1:]], "the device never waits"
    for number, (begun, _) in enumerate(copies[pinned.AHEAD :]):
        assert begun >= computed[number][1], "no more lie on the device than may"


class Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the casts of some tensors to 16 bits, and of tensors of their shapes (their gradients) from it."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places, self.count = {tensor.data_ptr() for tensor in tensors}, 0
        self.shapes, self.widened = {tensor.shape for tensor in tensors}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket is torch.ops.aten._to_copy:
            to = (kwargs or {}).get("dtype")
            self.count += to is torch.bfloat16 and args[0].data_ptr() in self.places
            self.widened += to is torch.float32 and args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


def test_a_weight_is_cast_once_a_step_and_the_step_is_the_same() -> None:
    def engine() -> ResidentEngine:
        return ResidentEngine(model(precision="bf16"), StageTraining(), seed=(0,), device=CPU)

    one, other = engine(), engine()
    with Casts(*(block.ffn.down.weight for block in one.model.blocks)) as casts:
        for step in range(2):
            one.step([batch(4 * step + number) for number in range(4)], step, 1e-2)
    assert casts.count == 2 * len(one.model.blocks)
    assert casts.widened == 2 * len(one.model.blocks), "gradients are added as they are: the first is widened alone"
    for step in range(2):  # without: autocast forgets its copies after each microbatch
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stackwise.training.engine.casts_held", lambda device: contextlib.nullcontext())
            patch.setattr("stackwise.training.engine.narrow_weights", lambda model: contextlib.nullcontext())
            other.step([batch(4 * step + number) for number in range(4)], step, 1e-2)
    state = other.state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state().items())


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_a_norm_under_autocast_keeps_its_narrow_input_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = layers.RMSNorm(16, eps=1e-6) if kind == "rmsnorm" else layers.LayerNorm(16, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(6, 16, dtype=torch.bfloat16, requires_grad=True)
    slope = torch.randn(6, 16)
    plain = norm(x)
    assert plain.dtype is torch.float32
    wanted = torch.autograd.grad(plain, (x, norm.weight), slope.bfloat16().float())
    monkeypatch.setattr(layers, "FUSED_NORMS", {"cpu"})
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        narrow = norm(x)
    assert torch.equal(narrow, plain.bfloat16()), "what the layers behind it would cast it to"
    assert sum(tensor.nbytes for tensor in kept if tensor.shape == x.shape) == x.nbytes
    made = torch.autograd.grad(narrow, (x, norm.weight), slope.bfloat16(), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    (twice,) = torch.autograd.grad(made[0].float().square().sum(), norm.weight)
    wide = x.detach().float().requires_grad_()
    y = F.rms_norm(wide, (16,), norm.weight, 1e-6) if kind == "rmsnorm" else norm(wide)
    (first,) = torch.autograd.grad(y, wide, slope.bfloat16().float(), create_graph=True)
    (exact,) = torch.autograd.grad(first.square().sum(), norm.weight)
    torch.testing.assert_close(twice, exact, rtol=0.05, atol=0.05)
