"""Linear layers whose weights are in a narrow format: packed and frozen, or full while they train.

A weight in training keeps its full precision, and the forward pass sees it as the format would store it
(quantization-aware training, arXiv 1712.05877; the gradient passes straight through, arXiv 1308.3432). Packed it gives
the same outputs, bit for bit, in the format's few bits: a stack is frozen without changing what it computes.

Shapes in names: I inputs, O outputs; `…` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.errors import UsageError
from stackwise.model.formats import FORMATS, Layout
from stackwise.model.layers import projections

PACKED = ".codes"
"""How the names of packed weights end in a state dict."""


class QuantizedLinear(nn.Linear):
    """A linear layer with its weight in a format.

    Until `pack` it has a `weight` that trains. Packed, it has the format's tensors as buffers instead, which state
    dicts, files and digests see; its input gets a gradient, and the weight is unpacked anew for each use, so at most
    one layer's is in memory.

    Args:
        base: The layer whose weight and bias it takes.
        form: The format, a key of `FORMATS`; None: the plain weight.

    Raises:
        UsageError: No such format.
    """

    def __init__(self, base: nn.Linear, form: str | None) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        if form is not None and form not in FORMATS:
            raise UsageError(f"weight format {form!r} is unknown; choose one of {', '.join(FORMATS)}")
        self.form = form
        self.bias = base.bias
        self._names: tuple[str, ...] = ()
        if isinstance(base, QuantizedLinear) and base.packed:
            self._hold({name: getattr(base, name) for name in base._names})
        else:
            self.weight = base.weight

    @property
    def packed(self) -> bool:
        """Whether the weight is packed, and so frozen."""
        return bool(self._names)

    @property
    def layout(self) -> Layout:
        """Shape and dtype of each packed tensor."""
        assert self.form is not None
        return FORMATS[self.form].layout(self.out_features, self.in_features)

    def pack(self) -> None:
        """Replace the weight by its packed form; on the meta device, by tensors of its shapes."""
        if self.form is None or self.packed:
            return
        weight = self.weight.detach()
        if weight.is_meta:
            made = {
                name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in self.layout.items()
            }
        else:
            made = FORMATS[self.form].pack(weight)
        self._hold(made)

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        self.register_parameter("weight", None)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._names = tuple(tensors)

    def effective(self, dtype: torch.dtype) -> Tensor:
        """The weight that the forward pass multiplies by, [O, I]; its gradient reaches a weight in training."""
        if self.packed:
            assert self.form is not None
            tensors = {name: getattr(self, name) for name in self._names}
            return FORMATS[self.form].unpack(tensors, self.out_features, self.in_features, dtype)
        weight = self.weight if self.form is None else _FakeQuantized.apply(self.weight, self.form)  # type: ignore[no-untyped-call]
        assert isinstance(weight, Tensor)
        return weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[…, I] to […, O], in autocast's dtype where that is on, else in the input's."""
        if self.form is None:
            return super().forward(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        own = self._parameters["bias"]
        bias = None if own is None else own.to(dtype)
        # A compiler decides by itself what to keep for the way back and what to compute anew.
        if self.packed and torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
            y = _PackedLinear.apply(x.to(dtype), self, bias)  # type: ignore[no-untyped-call]
            assert isinstance(y, Tensor)
            return y
        return F.linear(x.to(dtype), self.effective(dtype), bias)

    @property
    def like(self) -> Tensor:
        """An empty tensor of the dtype and on the device of the weight (packed: float32)."""
        if self.packed:
            return torch.empty(0, device=getattr(self, self._names[0]).device)
        return torch.empty(0, device=self.weight.device, dtype=self.weight.dtype)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """All that the layer multiplies by, as one matrix [O, I]."""
        return self.effective(dtype)

    def plain(self) -> nn.Linear:
        """A plain linear layer that computes the same, in the weight's dtype (packed: float32)."""
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        with torch.no_grad():
            total = self.whole(torch.float32)
            made.weight = nn.Parameter(
                total.to(self.like.dtype), requires_grad=not self.packed and self.weight.requires_grad
            )
        made.bias = self.bias
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in self._names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():  # a cast of the module must not recode what is packed
            moved = getattr(self, name)
            if moved.dtype != old.dtype:
                setattr(self, name, old.to(moved.device))
        return self

    def extra_repr(self) -> str:
        """As that of a linear layer, with the format."""
        return f"{super().extra_repr()}, form={self.form}{', packed' if self.packed else ''}"


class _PackedLinear(torch.autograd.Function):
    """x Wᵀ + b that keeps the packed weight for the way back, not the unpacked one, and gives it no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.effective(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (grad_y,) = gradients
        grad_bias = grad_y.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad_y @ ctx.layer.effective(ctx.dtype), None, grad_bias


class _FakeQuantized(torch.autograd.Function):
    """A weight as its format would store it; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, form: str) -> Tensor:
        codec = FORMATS[form]
        outputs, inputs = weight_OI.shape
        return codec.unpack(codec.pack(weight_OI), outputs, inputs, weight_OI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def weight_of(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """All that a linear layer multiplies by, as one matrix [O, I], whatever its form."""
    return layer.whole(dtype) if isinstance(layer, QuantizedLinear) else layer.weight.to(dtype)


def quantize(module: nn.Module, form: str | None, *, pack: bool) -> nn.Module:
    """Put every linear layer inside a module into a format, in place. Returns the module.

    Args:
        module: A block, or a stack.
        form: The format, a key of `FORMATS`; None: each layer stays in its own.
        pack: Pack the weights, which freezes them; otherwise they train, seen as the format stores them.

    Raises:
        UsageError: No such format, or a layer that is in another one.
    """
    for path, layer in projections(module).items():
        if form is not None and not isinstance(layer, QuantizedLinear):
            layer = QuantizedLinear(layer, form)
            module.set_submodule(path, layer)
        if not isinstance(layer, QuantizedLinear):
            continue
        if form is not None and layer.form not in (None, form):
            raise UsageError(f"{path} is in format {layer.form} already, not {form}")
        layer.form = layer.form or form
        if pack:
            layer.pack()
    return module


def plain_layers(module: nn.Module) -> nn.Module:
    """Replace every quantized or adapted layer by a plain one that computes the same, in place. Returns the module."""
    for path, layer in projections(module).items():
        if isinstance(layer, QuantizedLinear):
            module.set_submodule(path, layer.plain())
    return module
