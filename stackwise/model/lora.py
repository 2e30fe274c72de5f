"""Low-rank adapters on linear layers (LoRA, arXiv 2106.09685), several to a layer, and their merge.

A layer keeps the names of its weights (`attention.q.weight`); an adapter adds `attention.q.adapters.NAME.a`, `.b` and
`.scale`, which `adapter_state` and `base_state` tell apart.
Shapes in names: I inputs, O outputs, R rank; `…` any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.errors import UsageError
from stackwise.identity import derive_seed
from stackwise.model.layers import projections
from stackwise.model.quantized import QuantizedLinear

STACK = "stack"
"""Name of the adapters that a stack gets when it is made."""

_MARK = ".adapters."


class Adapter(nn.Module):
    """scale · B A, with A [R, I] drawn and B [O, R] zero: a fresh adapter changes nothing."""

    def __init__(self, a_RI: Tensor, b_OR: Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a_RI), nn.Parameter(b_OR)
        # In the state dict, so that a file of adapters says all that they do, and so does its digest.
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(scale, device=a_RI.device))

    def forward(self, x: Tensor) -> Tensor:
        """[…, I] to […, O]."""
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
    """Put an adapter on every linear layer inside a module, in the dtype and on the device of its weight.

    A is uniform within ±1/sqrt(I), a pure function of (seed, part, layer, adapter); the scale is alpha / rank.

    Args:
        module: A block, or a stack; changed in place.
        rank: Rank of each adapter.
        alpha: Its scale times the rank.
        seed: The run's seed.
        part: Name of the part, such as "stack.3".
        name: Name of the adapters; a layer may have several.

    Raises:
        UsageError: A rank above a matrix's own, or adapters of that name already there.
    """
    layers = projections(module)
    for path, layer in layers.items():
        limit = min(layer.in_features, layer.out_features)
        if rank > limit:
            raise UsageError(f"adapter rank {rank} is above the rank of {part} {path} ({limit})", hint="lower the rank")
        if isinstance(layer, AdaptedLinear) and name in layer.adapters:
            raise UsageError(f"{part} already has adapters named {name}")
    for path, layer in layers.items():
        adapted = layer if isinstance(layer, AdaptedLinear) else AdaptedLinear(layer)
        like, bound = adapted.like, 1.0 / math.sqrt(layer.in_features)
        generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "adapter", part, path, name))
        a_RI = torch.empty(rank, layer.in_features, device="cpu").uniform_(-bound, bound, generator=generator)
        b_OR = torch.zeros(layer.out_features, rank, device=like.device, dtype=like.dtype)
        adapted.adapters[name] = Adapter(a_RI.to(like), b_OR, alpha / rank)
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


def load_adapters(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put adapters with given weights on a module's linear layers, in place.

    Args:
        module: A block, or a stack, without adapters of these names.
        tensors: What `adapter_state` gave.
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
        layer.adapters[name] = Adapter(tensors[key].clone(), tensors[f"{prefix}.b"].clone(), scale)
