"""The bytes of every tensor that is alive, as real code runs on tensors without values."""

from __future__ import annotations

import collections
import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stackwise.model import Head, fp8, layers
from stackwise.objectives import cross_entropy
from stackwise.training.stage import StageModel

ROUNDED = 512  # bytes that CUDA's allocator rounds a tensor up to
CPU_ROUNDED = 64
MULTIPROCESSORS = 132  # of an H100 or H200: what the ordered backward pass of flash attention divides its sums by


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages as they are made and as they die. Entered within a `FakeTensorMode`.

    What has values (tokens, masks) is computed for real; where a number would be read off a tensor without values,
    it is 1.

    Attributes:
        tag: What is being done; a storage belongs to what it was made in, unless it is named by `own`.
        peak: The most bytes that were alive, since it was last set to 0.
        at_peak: Bytes by tag or name at that moment.
    """

    def __init__(self, rounded: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tag, self.now, self.peak, self.at_peak = "weights", 0, 0, dict[str, int]()
        self._alive: dict[int, tuple[int, str]] = {}
        self._names: dict[int, str] = {}
        self._rounded = rounded

    def own(self, name: str, *tensors: Tensor) -> None:
        """Name the storages of some tensors; what is cast from "weights" is a copy, whatever it is made in."""
        self._names |= {tensor.untyped_storage()._cdata: name for tensor in tensors}

    def note_peak(self) -> None:
        """Note the peak, if it is now: bytes only grow until one dies."""
        if self.now > self.peak:
            sums: collections.Counter[str] = collections.Counter()
            for key, (size, tag) in self._alive.items():
                sums[self._names.get(key, tag)] += size
            self.peak, self.at_peak = self.now, dict(sums)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, and count what it makes."""
        kwargs, packet = kwargs or {}, func.overloadpacket
        if func.namespace == "prim":  # a tensor asks for its own device: two operations of three
            return func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if inputs and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if packet is torch.ops.aten._local_scalar_dense:
            return 1.0 if inputs[0].is_floating_point() else 1
        if packet is torch.ops.aten.nonzero:  # as many as a mask of half the positions has
            return torch.empty((max(1, inputs[0].numel() // 2), inputs[0].dim()), dtype=torch.int64)
        if packet is torch.ops.aten.logsumexp:  # whose kernel holds the exponentials; they die at once
            self._add(torch.empty_like(inputs[0]), self.tag)
        result = func(*args, **kwargs)
        cast = packet is torch.ops.aten._to_copy and self._names.get(inputs[0].untyped_storage()._cdata) == "weights"
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self._add(leaf, "copies" if cast else self.tag)
        return result

    def _add(self, tensor: Tensor, tag: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // self._rounded) * self._rounded
        self._alive[key] = size, tag
        weakref.finalize(storage, self._drop, key)
        self.now += size

    def _drop(self, key: int) -> None:
        self.note_peak()
        size, _ = self._alive.pop(key)
        self._names.pop(key, None)  # its place may be another's next
        self.now -= size


def without_values(model: StageModel) -> None:
    """Let a model from the meta device have tensors without values in its place, which count. In a `FakeTensorMode`."""
    copies: dict[int, Tensor] = {}

    def one(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:  # a tied one is one
            copies[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return copies[id(tensor)]

    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                value = one(p)
                if not isinstance(value, nn.Parameter):
                    value = copies[id(p)] = nn.Parameter(value, requires_grad=p.requires_grad)
                module._parameters[name] = value
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else one(buffer)
    head, front = model.head, model.front
    if isinstance(head, Head) and head.tied and head.fixed is None and front is not None:
        head.share(front.get_parameter("embedding.weight"))


class _FlashAttention(torch.autograd.Function):
    """What CUDA's flash attention keeps, and what its backward pass takes (arXiv 2307.08691, as torch 2.13 has it)."""

    @staticmethod
    def forward(ctx: Any, q_BHSE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, ordered: bool) -> Tensor:
        B, H, S, _ = q_BHSE.shape
        out = q_BHSE.new_empty(B, S, H, v_BKTE.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q_BHSE, k_BKTE, v_BKTE, out, q_BHSE.new_empty((B, H, S), dtype=torch.float32))
        ctx.ordered = ordered
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        B, H, S, E = q.shape
        splits = max(1, -(-MULTIPROCESSORS // (B * H))) if ctx.ordered else 1
        wide = [k.new_empty(B, k.shape[2], H, E), v.new_empty(B, v.shape[2], H, E)] if k.shape[1] != H else []
        sums = q.new_empty((splits, B, S, H, E), dtype=torch.float32), q.new_empty((B, H, S), dtype=torch.float32)
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del wide, sums
        return *gradients, None


class _FusedDropout(torch.autograd.Function):
    """What CUDA's dropout keeps: a byte a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Tensor:
        result: Tensor = torch.empty_like(slopes[0])
        return result


class _FusedNorm(torch.autograd.Function):
    """What CUDA's fused RMS norm keeps: its input, the weight, a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Tensor, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextlib.contextmanager
def kernels_of_cuda(*, ordered: bool) -> Iterator[None]:
    """Let tensors without values, which are on the CPU, be computed as CUDA's kernels do.

    Args:
        ordered: Only kernels that repeat bit for bit.
    """

    def twice() -> bool:  # a gradient that has a gradient is made of plain operations
        return not torch._C._get_flash_sdp_enabled()

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any) -> Tensor:
        if twice():
            return kept[0](q, k, v, attn_mask, *rest, **more)
        if torch.is_autocast_enabled("cpu"):
            q, k, v = (t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
        if attn_mask is not None and q.shape[1] != k.shape[1]:  # as `attend` has it on a GPU
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        result: Tensor = _FlashAttention.apply(q, k, v, ordered)  # type: ignore[no-untyped-call]
        return result

    def norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if twice():
            return kept[1](x, shape, weight, eps)
        result: Tensor = _FusedNorm.apply(x, torch.ones(shape) if weight is None else weight)  # type: ignore[no-untyped-call]
        return result

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        result: Tensor = _FusedDropout.apply(x) if training and p else x  # type: ignore[no-untyped-call]
        return result

    def product(a_NK: Tensor, b_OK: Tensor, dtype: torch.dtype) -> Tensor:
        codes = [torch.empty_like(side, dtype=torch.float8_e4m3fn) for side in (a_NK, b_OK)]
        result = a_NK.new_empty((len(a_NK), len(b_OK)), dtype=dtype)
        del codes
        return result

    in_eight_bits = fp8.product
    kept = F.scaled_dot_product_attention, F.rms_norm, F.dropout, cross_entropy.SLICE_BYTES["cpu"]
    F.scaled_dot_product_attention, F.rms_norm, F.dropout = attention, norm, dropout  # type: ignore[assignment]
    cross_entropy.SLICE_BYTES["cpu"] = cross_entropy.SLICE_BYTES["cuda"]
    layers.FUSED_NORMS.add("cpu")
    fp8.product = product
    try:
        yield
    finally:
        layers.FUSED_NORMS.discard("cpu")
        fp8.product = in_eight_bits
        F.scaled_dot_product_attention, F.rms_norm, F.dropout, cross_entropy.SLICE_BYTES["cpu"] = kept
