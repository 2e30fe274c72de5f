"""Parts with fresh weights, which are a pure function of (seed, part, tensor, shape): the same on every machine.

Each tensor draws from a generator of its own, so neither PyTorch's global generator nor the order of construction
plays a part, and a large block's tensors are drawn side by side.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stackwise.config.model import ModelConfig
from stackwise.errors import UsageError
from stackwise.identity import Hex, content_id, derive_seed, digest
from stackwise.model.block import Block, Stack
from stackwise.model.rack import Front, Head, Rack

LARGE = 1 << 22
"""Elements of a part from which on its tensors are drawn by several threads."""


class _NoFills(TorchFunctionMode):
    """PyTorch's own initialisation is passed over: for a tensor without values it would import PyTorch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Modules that are made here have shapes and no values."""
    with torch.device("meta"), _NoFills():
        yield


def draw(shape: torch.Size | tuple[int, ...], std: float, *key: int | str) -> Tensor:
    """A float32 tensor of normal values on the CPU, a pure function of its arguments."""
    generator = torch.Generator("cpu").manual_seed(derive_seed(*key))
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


def residual_scale(index: int) -> float:
    """Factor on the fresh weights of block `index` that write into the residual stream: 1/sqrt(2 (index + 1)).

    GPT-2 scales all of them by the rack's depth. By the block's own place, as torchtitan has it, a block's fresh
    weights do not change when blocks are stacked above it, and so neither do the stages that are trained already.
    """
    return 1.0 / math.sqrt(2 * (index + 1))


@torch.no_grad()
def initialise(
    module: nn.Module, seed: int, part: str, std: float, scale: float = 1.0, scaled: Collection[str] = ()
) -> None:
    """Fill a part: matrices normal(0, std), some of them times `scale`; norms one, biases zero.

    Args:
        module: The part, on any device, in any dtype.
        seed: The run's seed.
        part: Its name, such as "block.3".
        std: Standard deviation.
        scale: Factor on some matrices.
        scaled: Their names.
    """

    def fill(item: tuple[str, nn.Parameter]) -> None:
        name, parameter = item
        if parameter.ndim >= 2:
            width = std * (scale if name in scaled else 1.0)
            values = draw(parameter.shape, width, seed, "init", part, name)
            with torch.no_grad():  # a setting of the thread
                parameter.copy_(values)

    matrices = [
        (name, p) for name, p in module.named_parameters() if p.ndim >= 2 and not p.is_meta
    ]  # which hold nothing
    if sum(p.numel() for _, p in matrices) >= LARGE:
        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(fill, matrices))
    else:
        for item in matrices:
            fill(item)
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)


def build_front(
    config: ModelConfig,
    vocab_size: int,
    seed: int,
    seq_len: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Front:
    """A front with fresh weights.

    Args:
        config: The rack's configuration.
        vocab_size: Token ids it knows.
        seed: The run's seed.
        seq_len: Longest sample, where `config.max_seq_len` is None.
        device: Where it lives; None: the default device.
        dtype: Of its weights; None: float32.
    """
    with on_meta():
        front: Front = config.stream.front(config, vocab_size, seq_len)
    _materialise(front, device, dtype)
    initialise(front, seed, "front", config.init_std)
    return front


def build_block(
    config: ModelConfig,
    index: int,
    seed: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    silent: bool = False,
    held: Callable[[str], bool] | None = None,
) -> Block:
    """Block `index` of the rack with fresh weights; its residual matrices are scaled by 1/sqrt(2 (index + 1)).

    Args:
        silent: Let these matrices be zero: the block then hands on what it gets, until it has learnt.
        held: Says by a parameter's name whether it gets its values, the same as in a whole block; None: all do.

    Raises:
        UsageError: Heads that do not divide the width.
    """
    config = config.at(index)
    with on_meta():
        block = Block(config)
    if held is None:
        _materialise(block, device, dtype)
    else:
        allocate_some(block.to(dtype), held, torch.get_default_device() if device is None else device)
    kinds = {"attention": config.attention, "ffn": config.ffn}
    patterns = [f"{part}.{name}" for part, kind in kinds.items() for name in kind.residual]
    scaled = {name for name, _ in block.named_parameters() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    initialise(block, seed, f"block.{index}", config.init_std, 0.0 if silent else residual_scale(index), scaled)
    return block


def build_head(
    config: ModelConfig,
    vocab_size: int,
    seed: int,
    embedding: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Head:
    """A head with fresh weights; with `embedding` it shares that tensor (see `Head`).

    Raises:
        UsageError: An embedding of another shape.
    """
    if embedding is None:
        with on_meta():
            head: Head = config.head.build(config, vocab_size)
        _materialise(head, device, dtype)
    else:  # `allocate` would take the values of the given tensor
        head = config.head.build(config, vocab_size, embedding).to(device=device, dtype=dtype)
    initialise(head, seed, "head", config.init_std)
    return head


def build_match(width: int, d_model: int, seed: int) -> nn.Linear:
    """A fresh layer from the student's width to the teacher's, without a bias: drawn orthogonal, as it keeps sizes."""
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "match", width, d_model))
    layer = nn.Linear(d_model, width, bias=False, device="meta")
    allocate(layer, "cpu")
    nn.init.orthogonal_(layer.weight, generator=generator)
    return layer


def build_rack(
    config: ModelConfig,
    vocab_size: int,
    seed: int,
    seq_len: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Rack:
    """The whole rack with fresh weights: the same as its parts built one by one.

    Raises:
        UsageError: Heads that do not divide the width; a vocabulary of no tokens.
    """
    if vocab_size < 1:
        raise UsageError(f"a vocabulary of {vocab_size} tokens")
    front = build_front(config, vocab_size, seed, seq_len, device, dtype)
    per_stack = config.architecture.blocks_per_stack
    stacks = [
        Stack((build_block(config, i, seed, device, dtype) for i in range(first, first + per_stack)), stack_id=k)
        for k, first in enumerate(range(0, config.n_blocks, per_stack))
    ]
    shared = front.embedding.weight if config.tie_embeddings else None
    return Rack(front, stacks, build_head(config, vocab_size, seed, shared, device, dtype))


def _materialise(module: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    # Built on the meta device first: PyTorch's own initialisation would cost time and draw from the global generator.
    for name, child in module.named_modules():
        if next(child.buffers(recurse=False), None) is not None and not hasattr(child, "rebuild"):
            raise UsageError(
                f"{name} ({type(child).__name__}) has buffers and no way to make them",
                hint="give it a method `rebuild(device)` that computes them",
            )
    if dtype is not None:
        module.to(dtype)
    allocate(module, torch.get_default_device() if device is None else device)


def part_digest(part: nn.Module | Mapping[str, Tensor]) -> Hex:
    """The id of a part's weights: xxh3-128 over (name, dtype, shape, bytes) of each tensor, in the order of names.

    A tied projection counts in the front, which owns it: it is not in a head's state dict. Tables that follow from
    the configuration (rotary positions) do not count.

    Args:
        part: A module, or a state dict.
    """
    state = part.state_dict() if isinstance(part, nn.Module) else part
    entries = []
    for name in sorted(state):
        tensor = state[name].detach()
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        entries.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), digest(raw)])
    return content_id("part", entries)


def allocate(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Give what of a module is on the meta device memory, whose values are still to come, and tables. Returns it."""
    # `Module.to_empty` without torch's compiler, which `empty_like` of a meta tensor imports: a second of every worker.
    module._apply(  # type: ignore[no-untyped-call]
        lambda t: torch.empty(t.shape, dtype=t.dtype, device=device) if t.is_meta else t
    )
    rebuild_tables(module, device)
    return module


def allocate_some(module: nn.Module, held: Callable[[str], bool], device: torch.device | str) -> nn.Module:
    """As `allocate`, of some parameters, by their names, and all tables; the others stay on the meta device."""
    for name, parameter in list(module.named_parameters()):
        if held(name):
            owner, _, leaf = name.rpartition(".")
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(values, parameter.requires_grad))
    rebuild_tables(module, device)
    return module


def rebuild_tables(module: nn.Module, device: torch.device | str) -> None:
    """Let every module inside make the tables that follow from its settings, which no file holds, on a device."""
    for child in module.modules():
        rebuild = getattr(child, "rebuild", None)
        if callable(rebuild):
            rebuild(device)
