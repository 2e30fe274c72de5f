"""Low-rank adapters on linear layers (LoRA, arXiv 2106.09685), several to a layer, and their merge.

A layer keeps the names of its weights (`attention.q.weight`); an adapter adds `attention.q.adapters.NAME.a` and `.b`.
Shapes in names: I inputs, O outputs, R rank; `…` any leading dimensions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.schema import ProgressiveConfig
from stackwise.errors import UsageError
from stackwise.identity import derive_seed
from stackwise.model.layers import projections

STACK = "stack"
"""Name of the adapters that a stack gets when it is made."""


class Adapter(nn.Module):
    """scale · B A, with A [R, I] drawn and B [O, R] zero: a fresh adapter changes nothing."""

    def __init__(self, a_RI: Tensor, b_OR: Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a_RI), nn.Parameter(b_OR), scale

    def forward(self, x: Tensor) -> Tensor:
        """[…, I] to […, O]."""
        return F.linear(F.linear(x, self.a), self.b) * self.scale

    def delta(self) -> Tensor:
        """What it adds to the weight, float32 [O, I]."""
        return self.scale * (self.b.float() @ self.a.float())


class AdaptedLinear(nn.Linear):
    """A linear layer with adapters beside its weight. It shares the weight and bias of the layer it is made from."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        """[…, I] to […, O]."""
        y = super().forward(x)
        for adapter in self.adapters.values():
            y = y + adapter(x)
        return y

    def merged(self) -> nn.Linear:
        """A plain linear layer with the adapters added into its weight; the weight itself is left as it was."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        with torch.no_grad():
            total = self.weight.float()
            for adapter in self.adapters.values():
                assert isinstance(adapter, Adapter)
                total = total + adapter.delta()
            plain.weight = nn.Parameter(total.to(self.weight.dtype), requires_grad=self.weight.requires_grad)
        plain.bias = self.bias
        return plain


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
        weight, bound = layer.weight, 1.0 / math.sqrt(layer.in_features)
        generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "adapter", part, path, name))
        a_RI = torch.empty(rank, layer.in_features, device="cpu").uniform_(-bound, bound, generator=generator)
        b_OR = torch.zeros(layer.out_features, rank, device=weight.device, dtype=weight.dtype)
        adapted.adapters[name] = Adapter(a_RI.to(weight), b_OR, alpha / rank)
        module.set_submodule(path, adapted)


def merge_adapters(module: nn.Module) -> nn.Module:
    """Fold every adapter into its weight, in place: afterwards the layers are plain ones. Returns the module."""
    for path, layer in projections(module).items():
        if isinstance(layer, AdaptedLinear):
            module.set_submodule(path, layer.merged())
    return module


def adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of every adapter inside a module."""
    return [p for child in module.modules() if isinstance(child, Adapter) for p in child.parameters()]


def adapter_sizes(progressive: ProgressiveConfig, stack: int, max_stacks: int) -> tuple[int, float]:
    """Rank and alpha of the adapters of a stack.

    `simplified`: the same everywhere. `progressive`: by pattern over the stacks, from `qlora_rank` (`qlora_alpha`):
    `increasing` doubles each time, `decreasing` halves (to no less than 1), `linear` adds itself each time, `constant`
    stays. `variable`: `qlora_configs`, by stack.

    Args:
        progressive: The settings.
        stack: Index of the stack, in the order of making.
        max_stacks: How many there may be.

    Raises:
        UsageError: `variable` without an entry for this stack.
    """
    if progressive.qlora_strategy == "variable":
        own = progressive.qlora_configs.get(stack)
        if own is None:
            raise UsageError(
                f"training.progressive.qlora_configs has no entry for stack {stack}",
                hint=f"give it entries 0 to {max_stacks - 1}, or set qlora_strategy to simplified",
            )
        return own.rank, own.alpha
    rank, alpha = progressive.qlora_rank, progressive.qlora_alpha
    if progressive.qlora_strategy == "simplified":
        return rank, alpha
    return (
        max(1, int(_pattern(progressive.qlora_rank_pattern, rank, stack))),
        _pattern(progressive.qlora_alpha_pattern, alpha, stack),
    )


def _pattern(pattern: str, first: float, stack: int) -> float:
    factor = {"increasing": 2.0**stack, "decreasing": 0.5**stack, "linear": 1.0 + stack, "constant": 1.0}
    return first * factor[pattern]
