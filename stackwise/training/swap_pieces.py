"""Pieces of a part that is swapped: experts that are in memory only while rows go through them.

Where no more than some of a part's pieces may be in memory at once, one that goes leaves its gradient among the
tensors of the step, and its rows alone behind: in the backward pass it is brought again, goes forward again from them,
and so has the gradient that it would have had. A piece draws no random numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.model.layers import pull
from stackwise.training.engine import MEAN, OPTIMIZER, WEIGHT
from stackwise.training.swap_spill import Spill
from stackwise.training.swap_state import Tensors


def piece_name(part: str, path: str) -> str:
    """What a piece is called in the log."""
    return f"{part}.{path}"


def parameter_of(key: str) -> str:
    """The name in its part of the parameter that a tensor of a state is of."""
    kind, _, rest = key.partition("/")
    return rest.partition("/")[2] if f"{kind}/" == OPTIMIZER else rest


class Lender:
    """Brings the pieces of a part when rows reach them.

    Args:
        part: The part's module, its pieces without values.
        paths: Of its pieces.
        current: Gives the state of a piece, by its path, up to date.
        spill: Holds the gradients of those that are away; None: nothing trains.
        most: Pieces in memory at once; None: all that rows have reached.
        name: The part's.
    """

    def __init__(
        self,
        part: nn.Module,
        paths: Sequence[str],
        current: Callable[[str], Mapping[str, Tensor]],
        spill: Spill | None,
        device: torch.device,
        *,
        most: int | None,
        name: str,
    ) -> None:
        self._pieces = {path: part.get_submodule(path) for path in paths}  # not the part: there would be a circle
        self._paths = {id(module): path for path, module in self._pieces.items()}
        self._current, self._spill, self._device, self._most, self._name = current, spill, device, most, name
        self._held: OrderedDict[str, None] = OrderedDict()  # those in memory, the one that waited longest first
        self._spilled: dict[str, dict[str, Any]] = {}  # of those away that have gradients, the keys of these by name
        self._anchor = torch.empty(0, requires_grad=True)  # rows that need no gradient reach a piece that does

    def __call__(self, module: nn.Module, rows: Tensor) -> Tensor:
        """What a piece makes of rows."""
        kind = rows.device.type
        numerics: dict[str, Any] = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        # A cast that is kept would hold the weights of a piece that goes, and add up gradients of its rows in bf16.
        with torch.autocast(kind, **numerics, cache_enabled=self._most is None):
            if torch.is_grad_enabled() and self._most is not None:
                outputs: Tensor = _Lent.apply(rows, self._anchor, self, module, numerics)  # type: ignore[no-untyped-call]
            else:
                outputs = self.bring(module)(rows)
        return outputs

    def bring(self, module: nn.Module) -> nn.Module:
        """The piece, in memory."""
        path = self._paths[id(module)]
        if path not in self._held:
            while self._most is not None and len(self._held) >= self._most:
                self._let_go(next(iter(self._held)))
            with torch.autocast(self._device.type, enabled=False):  # an optimizer may multiply matrices
                state = self._current(path)
            keys = self._spilled.pop(path, {})
            for within, parameter in list(module.named_parameters()):
                name = f"{path}.{within}"
                # The mean where it is evaluated and one is kept: no training step brings such a piece.
                value = state.get(f"{MEAN}{name}") if not module.training else None
                value = (state[f"{WEIGHT}{name}"] if value is None else value).to(self._device)
                fresh = nn.Parameter(value, parameter.requires_grad)
                if within in keys and self._spill is not None:
                    fresh.grad = self._spill.take(keys[within]).to(self._device)
                _put(module, within, fresh)
        self._held[path] = None
        self._held.move_to_end(path)
        return module

    def _let_go(self, path: str) -> None:
        module = self._pieces[path]
        for within, parameter in list(module.named_parameters()):
            if parameter.grad is not None and self._spill is not None:
                key = ("gradient", self._name, path, within)
                self._spill.put(key, parameter.grad)
                self._spilled.setdefault(path, {})[within] = key
            _put(module, within, nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad))
        del self._held[path]

    def take_gradients(self, path: str) -> Tensors:
        """The gradients of a piece by the parameters' names in the part, on the device; it keeps none of them."""
        gradients: Tensors = {}
        assert self._spill is not None, "something trains"
        for within, key in self._spilled.pop(path, {}).items():
            gradients[f"{path}.{within}"] = self._spill.take(key).to(self._device)
        for within, parameter in self._pieces[path].named_parameters():
            if parameter.grad is not None:
                gradients[f"{path}.{within}"], parameter.grad = parameter.grad, None
        return gradients


class _Lent(torch.autograd.Function):
    """A piece over rows, of which these alone are kept."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, anchor: Tensor, lender: Lender, module: nn.Module, numerics: dict[str, Any]
    ) -> Tensor:
        ctx.lender, ctx.module, ctx.rows, ctx.numerics = lender, module, rows.detach(), numerics
        with torch.enable_grad():  # the same operations as in the backward pass: kernels may round differently without
            outputs: Tensor = lender.bring(module)(ctx.rows.requires_grad_(rows.requires_grad))
        return outputs.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows: Tensor = ctx.rows.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad(), torch.autocast(rows.device.type, **ctx.numerics, cache_enabled=False):
            outputs = ctx.lender.bring(ctx.module)(rows)
        pull([outputs], [gradients[0]])
        return rows.grad, None, None, None, None


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)
