"""The linear layers of a block: weights in narrow formats, and low-rank adapters beside them.

A weight in training keeps its full precision, and the forward pass sees it as the format would store it
(quantization-aware training: `rounding.py`). Packed it gives
the same outputs, bit for bit, in the format's few bits: a stack is frozen without changing what it computes.

A layer with adapters (LoRA, arXiv 2106.09685; several to a layer) keeps the names of its weights
(`attention.q.weight`); an adapter adds `attention.q.adapters.NAME.a`, `.b` and `.scale`, which `adapter_state` and
`base_state` tell apart.

Shapes in names: I inputs, O outputs, R rank; `…` any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.adapters import AdapterSize
from stackwise.config.training import Quantization
from stackwise.errors import UsageError
from stackwise.identity import derive_seed
from stackwise.model.formats import Format, Integers, Layout, format_named
from stackwise.model.rounding import (
    FakeQuantized,
    Learned,
    Observer,
    RoundedTokens,
    learned_grid,
    rounded_in_range,
    torchao_rounding,
)

PACKED = ".codes"
"""How the names of packed weights end in a state dict."""
LEARNED = ".steps"
"""How the names of learned scales end."""
SPAN = ".span"
"""How the names of activations' fixed ranges end."""

WIDE = "stays_wide"
"""The mark on a linear layer that carries no adapters and no narrow format (see `Matrix.narrow`)."""


Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""From what enters […, I], a weight [O, I] and a bias [O] to […, O]."""


def projections(module: nn.Module) -> dict[str, Any]:
    """The linear layers inside a module that carry adapters and narrow formats, by dotted name."""
    layers = ((name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear))
    return {name: child for name, child in layers if not getattr(child, WIDE, False)}


class QuantizedLinear(nn.Linear):
    """A linear layer with its weight in a format.

    Until `pack` it has a `weight` that trains. Packed, it has the format's tensors as buffers instead, which state
    dicts, files and digests see; its input gets a gradient, and the weight is unpacked anew for each use, so at most
    one layer's is in memory.

    Args:
        base: The layer whose weight and bias it takes.
        form: The format's name (see `format_named`); None: the plain weight.

    Raises:
        UsageError: No such format.
    """

    def __init__(self, base: nn.Linear, form: str | None) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.form: str | None = None
        self.codec: Format | None = None
        """The format itself. Looked up once: a compiler cannot follow the look-up."""
        self.rounds: Integers | None = None
        """The grid of what enters; None: it is not rounded."""
        self.span: Tensor | None
        """Lowest and highest value of what enters, [2], where its range is fixed; both 0 until it was measured."""
        self.register_buffer("span", None)
        self.observer: Observer | None = None
        """Looks at what enters, which is then not rounded; None: the range is known, or not fixed."""
        self.rounding: Callable[[Tensor], Tensor] | None = None
        """What rounds the weight in training, where that is not the format itself."""
        self.multiply: Multiply | None = None
        """What multiplies by a weight in no format; None: torch."""
        self.steps: nn.Parameter | None = None
        self.offsets: nn.Parameter | None = None
        self.bias = base.bias
        self._names: tuple[str, ...] = ()
        if isinstance(base, QuantizedLinear) and base.packed:
            self.form, self.codec, self.rounds = base.form, base.codec, base.rounds
            self.span = base.span
            self._hold({name: getattr(base, name) for name in base._names})
        else:
            self.weight = base.weight
            if isinstance(base, QuantizedLinear):
                self.multiply = base.multiply
                self.steps, self.offsets, self.span = base.steps, base.offsets, base.span
            self.put_into(form)

    def put_into(self, form: str | None) -> None:
        """Let the forward pass see the weight in a format from now on; None: as it was.

        Learned scales begin where they span the weights' extremes. They are vectors [G], so that no optimizer takes
        them for matrices, and none lets them decay.

        Raises:
            UsageError: No such format.
        """
        self.form = form
        self.codec = codec = None if form is None else format_named(form)
        if not isinstance(codec, Integers):
            return
        if bits := codec.settings.activations:  # a token is a row
            self.rounds = Integers(Quantization(bits=bits, symmetric=codec.settings.activations_symmetric))
            if codec.settings.activations_range != "token" and self.span is None:
                self.span = torch.zeros(2, device=self.weight.device)
        if codec.settings.provider == "torchao":
            group = codec.settings.group
            self.rounding = torchao_rounding(codec.settings.bits, group if isinstance(group, int) else None)
        if codec.settings.scale != "learned" or self.steps is not None:
            return
        if self.weight.is_meta:
            rows, columns = codec.grid(self.out_features, self.in_features)
            scales = zeros = torch.empty(rows * columns, device="meta")
        else:
            scales, zeros = codec.scales(self.weight.detach())
        self.steps = nn.Parameter(scales)
        self.offsets = None if codec.settings.symmetric else nn.Parameter(zeros)

    @property
    def packed(self) -> bool:
        """Whether the weight is packed, and so frozen."""
        return bool(self._names)

    @property
    def layout(self) -> Layout:
        """Shape and dtype of each packed tensor."""
        assert self.codec is not None
        return self.codec.layout(self.out_features, self.in_features)

    def pack(self) -> None:
        """Replace the weight by its packed form; on the meta device, by tensors of its shapes."""
        if self.codec is None or self.packed:
            return
        weight = self.weight.detach()
        if weight.is_meta:
            packed = {
                name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in self.layout.items()
            }
        else:
            if self.steps is not None:
                assert isinstance(self.codec, Integers)
                packed = self.codec.pack_on(weight, *learned_grid(self.codec, self.steps.detach(), self.offsets))
            elif self.rounding is not None:
                assert isinstance(self.codec, Integers)
                packed = self.codec.pack_on(self.rounding(weight), *self.codec.scales(weight))
            else:
                packed = self.codec.pack(weight)
        self._hold(packed)

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        self.register_parameter("weight", None)
        self.steps = self.offsets = None
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._names = tuple(tensors)

    def train_scales(self) -> None:
        """Let the scales of packed integers be a parameter, under the name that they have as a buffer."""
        if self.packed and isinstance(self.codec, Integers):
            scales = self._buffers.pop("scales")
            assert scales is not None
            self.scales = nn.Parameter(scales)

    def effective(self, dtype: torch.dtype) -> Tensor:
        """The weight that the forward pass multiplies by, [O, I]; its gradient reaches a weight in training."""
        if self.packed:
            assert self.codec is not None
            tensors = {name: getattr(self, name) for name in self._names}
            return self.codec.unpack(tensors, self.out_features, self.in_features, dtype)
        if self.codec is None:
            weight = self.weight
        elif self.rounding is not None:
            weight = self.rounding(self.weight)
        elif self.steps is None:
            weight = FakeQuantized.apply(self.weight, self.codec)  # type: ignore[no-untyped-call]
        else:
            weight = Learned.apply(self.weight, self.steps, self.offsets, self.codec)  # type: ignore[no-untyped-call]
        assert isinstance(weight, Tensor)
        return weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[…, I] to […, O], in autocast's dtype where that is on, else in the input's."""
        if self.form is None:
            return super().forward(x) if self.multiply is None else self.multiply(x, self.weight, self.bias)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if self.observer is not None:
            self.observer.add(x)
        elif self.rounds is not None and self.span is not None:
            x = rounded_in_range(x, self.span, self.rounds)
        elif self.rounds is not None:
            x = RoundedTokens.apply(x, self.rounds)  # type: ignore[no-untyped-call]
        full = self._parameters["bias"]
        bias = None if full is None else full.to(dtype)
        # A compiler decides by itself what to keep for the backward pass and what to recompute.
        kept = self.packed and not any(getattr(self, name).requires_grad for name in self._names)
        if kept and torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
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
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        with torch.no_grad():
            total = self.whole(torch.float32)
            linear.weight = nn.Parameter(
                total.to(self.like.dtype), requires_grad=not self.packed and self.weight.requires_grad
            )
        linear.bias = self.bias
        return linear

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
    """x Wᵀ + b that keeps the packed weight for the backward pass, not the unpacked one, and gives it no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.effective(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (grad_y,) = gradients
        grad_bias = grad_y.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad_y @ ctx.layer.effective(ctx.dtype), None, grad_bias


def weight_of(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """All that a linear layer multiplies by, as one matrix [O, I], whatever its form."""
    return layer.whole(dtype) if isinstance(layer, QuantizedLinear) else layer.weight.to(dtype)


def quantize(module: nn.Module, form: str | None, *, pack: bool) -> nn.Module:
    """Put every linear layer inside a module into a format, in place. Returns the module.

    Args:
        module: A block, or a stack.
        form: The format's name; None: each layer stays in its own.
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
        if layer.form is None and form is not None:
            layer.put_into(form)
        if pack:
            layer.pack()
    return module


def multiply_by(module: nn.Module, multiply: Multiply) -> nn.Module:
    """Let every linear layer inside a module whose weight is in no format multiply in another way, in place."""
    for path, layer in projections(module).items():
        if not isinstance(layer, QuantizedLinear):
            layer = QuantizedLinear(layer, None)
            module.set_submodule(path, layer)
        layer.multiply = multiply
    return module


def train_scales(module: nn.Module) -> nn.Module:
    """Let the scales of packed integers train, and nothing else of a module (arXiv 2407.11062, section 3.3).

    Raises:
        UsageError: None of its layers has packed integers.
    """
    module.requires_grad_(False)
    layers = [layer for layer in projections(module).values() if isinstance(layer, QuantizedLinear)]
    for layer in layers:
        layer.train_scales()
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UsageError("there are no packed integers whose scales could train", hint="set training.quantization")
    return module


def plain_layers(module: nn.Module) -> nn.Module:
    """Replace every quantized or adapted layer by a plain one that computes the same, in place. Returns the module."""
    for path, layer in projections(module).items():
        if isinstance(layer, QuantizedLinear):
            module.set_submodule(path, layer.plain())
    return module


STACK = "stack"
"""Name of the adapters that a stack gets when it is made."""

_MARK = ".adapters."


class Adapter(nn.Module):
    """scale · B A, with A [R, I] drawn and B [O, R] zero: a fresh adapter changes nothing."""

    def __init__(self, a_RI: Tensor, b_OR: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.a, self.b = nn.Parameter(a_RI), nn.Parameter(b_OR)
        # In the state dict, so that a file of adapters says all that they do, and so does its digest.
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(scale, device=a_RI.device))

    def forward(self, x: Tensor) -> Tensor:
        """[…, I] to […, O]."""
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.a), self.b) * self.scale

    def delta(self) -> Tensor:
        """What it adds to the weight, float32 [O, I]."""
        return self.scale * (self.b.float() @ self.a.float())


class AdaptedLinear(QuantizedLinear):
    """A linear layer with adapters beside its weight, plain or in a narrow format, which is the base layer's own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base, base.form if isinstance(base, QuantizedLinear) else None)
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        """[…, I] to […, O]."""
        y = super().forward(x)
        for adapter in self.adapters.values():
            y = y + adapter(x)
        return y

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight and its adapters as one matrix [O, I]."""
        total = self.effective(torch.float32)
        for adapter in self.adapters.values():
            assert isinstance(adapter, Adapter)
            total = total + adapter.delta()
        return total.to(dtype)


def add_adapters(module: nn.Module, rank: int, alpha: float, seed: int, part: str, name: str = STACK) -> None:
    """Put an adapter scaled by alpha / rank on every linear layer inside a module: see `put_adapters`."""
    put_adapters(module, AdapterSize(name, rank, alpha), seed, part)


def put_adapters(module: nn.Module, size: AdapterSize, seed: int, part: str) -> None:
    """Put adapters on linear layers inside a module, in the dtype and on the device of each one's weight.

    A is uniform within ±1/sqrt(I), a pure function of (seed, part, layer, adapter).

    Args:
        module: A block, or a stack; changed in place.
        size: Their name, on which layers they are, and how large; a layer may have several.
        seed: The run's seed.
        part: Name of the part, such as "stack.3".

    Raises:
        UsageError: A rank above a matrix's own, or adapters of that name already there.
    """
    layers = {path: layer for path, layer in projections(module).items() if size.covers(path)}
    for path, layer in layers.items():
        limit = min(layer.in_features, layer.out_features)
        if size.rank > limit:
            text = f"adapter rank {size.rank} is above the rank of {part} {path} ({limit})"
            raise UsageError(text, hint="lower the rank")
        if isinstance(layer, AdaptedLinear) and size.name in layer.adapters:
            raise UsageError(f"{part} already has adapters named {size.name}")
    for path, layer in layers.items():
        adapted = layer if isinstance(layer, AdaptedLinear) else AdaptedLinear(layer)
        like, bound = adapted.like, 1.0 / math.sqrt(layer.in_features)
        generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "adapter", part, path, size.name))
        a_RI = torch.empty(size.rank, layer.in_features, device="cpu").uniform_(-bound, bound, generator=generator)
        b_OR = torch.zeros(layer.out_features, size.rank, device=like.device, dtype=like.dtype)
        adapted.adapters[size.name] = Adapter(a_RI.to(like), b_OR, size.scale, size.dropout)
        module.set_submodule(path, adapted)


def merge_adapters(module: nn.Module) -> nn.Module:
    """Fold every adapter into its weight, in place: afterwards these layers are plain. Returns the module."""
    for path, layer in projections(module).items():
        if isinstance(layer, AdaptedLinear):
            module.set_submodule(path, layer.plain())
    return module


def adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of every adapter inside a module."""
    return [p for child in module.modules() if isinstance(child, Adapter) for p in child.parameters()]


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters in a module's state dict, as `load_adapters` takes them."""
    return {name: tensor for name, tensor in state.items() if _MARK in name}


def base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's state dict without its adapters."""
    return {name: tensor for name, tensor in state.items() if _MARK not in name}


def load_adapters(module: nn.Module, tensors: Mapping[str, Tensor], dropout: float = 0.0) -> None:
    """Put adapters with given weights on a module's linear layers, in place.

    Args:
        module: A block, or a stack, without adapters of these names.
        tensors: What `adapter_state` gave.
        dropout: Share of what enters them that is dropped in training.
    """
    for key in tensors:
        path, _, rest = key.partition(_MARK)
        name, _, kind = rest.partition(".")
        if kind != "a":
            continue
        layer = module.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        if not isinstance(layer, AdaptedLinear):
            layer = AdaptedLinear(layer)
            module.set_submodule(path, layer)
        prefix = f"{path}{_MARK}{name}"
        scale = float(tensors[f"{prefix}.scale"])
        layer.adapters[name] = Adapter(tensors[key].clone(), tensors[f"{prefix}.b"].clone(), scale, dropout)
