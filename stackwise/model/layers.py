"""The layers that a block is made of beside attention: norms, rotary positions, feed-forward.

Shapes in names: B batch, S sequence, D d_model, H heads, E width of a head, F feed-forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.kinds import RopeScaling
from stackwise.config.model import ModelConfig
from stackwise.errors import UsageError
from stackwise.model import kinds
from stackwise.model.scalings import Unscaled

FUSED_NORMS = {"cuda"}
"""Kinds of device on which a norm under autocast gives what the layers behind it take, and keeps what it was given."""


class RMSNorm(nn.RMSNorm):
    """Root mean square norm (arXiv 1910.07467): computed in the wider of input and weight, given in the weight's dtype.

    So a stack in half precision normalises a float32 residual stream in float32, and its matrices get half.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D] in the weight's dtype; see `FUSED_NORMS`."""
        return _normed(x, self.weight, None, self._wide)

    def _wide(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm (arXiv 1607.06450), with or without a bias, with the dtypes of `RMSNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D] in the weight's dtype; see `FUSED_NORMS`."""
        return _normed(x, self.weight, self.bias, self._wide)

    def _wide(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


Normalize = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, normalize: Normalize) -> Tensor:
    wide, kind = torch.promote_types(x.dtype, weight.dtype), x.device.type
    if kind in FUSED_NORMS and x.dtype != wide and torch.is_autocast_enabled(kind):
        # A compiler decides by itself what to keep.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return normalize(x.to(wide), weight, bias).to(x.dtype)
        y: Tensor = _NarrowNorm.apply(x, weight, bias, normalize)  # type: ignore[no-untyped-call]
        return y
    y = normalize(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return y.to(weight.dtype)


class _NarrowNorm(torch.autograd.Function):
    """A norm from and to 16 bits, computed in the weight's dtype, that keeps its 16-bit input alone.

    The wide copies of input and output live while it runs; the backward pass makes others. Its gradient has a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, normalize: Normalize) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.normalize = normalize
        return normalize(x.to(weight.dtype), weight, bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # a gradient of this gradient is wanted
        inputs_needed = list(zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True))
        with torch.enable_grad():
            x, weight, bias = (
                t if again or t is None else t.detach().requires_grad_(need) for t, need in inputs_needed
            )
            y = ctx.normalize(x.to(weight.dtype), weight, bias).to(x.dtype)
            inputs = [t for t, (_, need) in zip((x, weight, bias), inputs_needed, strict=True) if need]
            gradients = iter(torch.autograd.grad(y, inputs, slopes, create_graph=again))
        return *(next(gradients) if need else None for _, need in inputs_needed), None


class _Root(torch.autograd.Function):
    """A scalar zero whose gradient in a tensor is what is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.slope = slope
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return ctx.slope, None


def pull(roots: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
    """`torch.autograd.backward` from tensors with their gradients, of the same shapes, as they come.

    From scalars: with gradients given, torch checks their shapes by its compiler's symbols, whose import (sympy) is
    half a second of CPU in every worker.
    """
    with torch.enable_grad():
        scalars = [
            _Root.apply(root, slope)  # type: ignore[no-untyped-call]
            for root, slope in zip(roots, slopes, strict=True)
        ]
    torch.autograd.backward(scalars)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm of the residual stream, as this is divided."""
    return config.stream.norm(config)


def norm_of(config: ModelConfig) -> RMSNorm | LayerNorm:
    """The norm that the configuration names, over d_model."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.norm_bias)


MOST_POSITIONS = 1 << 16
"""Positions that rotary tables have from the start, at most."""


class Rotary(nn.Module):
    """Rotary positions (RoFormer, arXiv 2104.09864), the half-rotation convention of Hugging Face's LLaMA.

    The tables are float32 whatever the module is cast to, and are no part of the state dict.

    Args:
        width: Width of a head; even.
        theta: Base of the wavelengths.
        max_positions: Longest sequence; None: the tables grow as needed.
        scaling: How they reach beyond the length that the model was trained with; None: not.

    Raises:
        UsageError: The width is odd.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, theta: float, max_positions: int | None, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        if width % 2:
            raise UsageError(f"rotary positions need heads of even width, not {width}")
        self.width, self.theta, self.max_positions = width, theta, max_positions
        self.scaling = scaling or Unscaled()
        self.reach = self.scaling.reach(1)
        """What the tables were made for (see `RopeScaling.reach`)."""
        device = torch.get_default_device()
        positions = min(max_positions or 512, MOST_POSITIONS)  # beyond that they grow as they are needed
        # On the meta device there is nothing to compute: `_apply` or `rebuild` makes the tables.
        shape = (positions, width)
        cos_SE, sin_SE = self._tables(positions) if device.type != "meta" else (torch.empty(shape), torch.empty(shape))
        self.register_buffer("cos", cos_SE.to(device), persistent=False)
        self.register_buffer("sin", sin_SE.to(device), persistent=False)

    def _tables(self, positions: int) -> tuple[Tensor, Tensor]:
        frequencies, factor = self.scaling.frequencies(self.width, self.theta, self.reach)
        angle = torch.outer(torch.arange(positions, dtype=torch.float32, device="cpu"), frequencies)
        cos, sin = angle.cos(), angle.sin()
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def _fill(self, positions: int, device: torch.device | str) -> None:
        cos_SE, sin_SE = self._tables(positions)
        self.cos, self.sin = cos_SE.to(device), sin_SE.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # `fn` may have cast the tables: make them anew where they are now.
        if self.cos.device.type != "meta":
            self.rebuild(self.cos.device)
        return self

    def rebuild(self, device: torch.device | str) -> None:
        """Make the tables anew on a device: for a module from the meta device, whose tables no file holds."""
        self._fill(self.cos.shape[0], device)

    def tables(self, length: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of `length` positions from `start` on, [S, 1, E] each, float32.

        Raises:
            UsageError: The sequence is longer than the model takes.
        """
        end = start + length
        if end > self.cos.shape[0]:
            if self.max_positions is not None and end > self.max_positions:
                raise too_long(end, self.max_positions)
            self.reach = self.scaling.reach(end)
            self._fill(1 << (end - 1).bit_length(), self.cos.device)
        elif (reach := self.scaling.reach(end)) != self.reach:
            self.reach = reach
            self._fill(self.cos.shape[0], self.cos.device)
        return self.cos[start:end, None], self.sin[start:end, None]

    def copies(self, length: int, start: int, paired: bool) -> tuple[Tensor, Tensor]:
        """The tables of a row; of a paired row, whose halves are two copies of a sample, both from position 0 on.

        Raises:
            UsageError: The sequence is longer than the model takes.
        """
        if not paired:
            return self.tables(length, start)
        cos_S1E, sin_S1E = self.tables(length // 2)
        return cos_S1E.repeat(2, 1, 1), sin_S1E.repeat(2, 1, 1)

    def rotate(self, x_BSHE: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate each head by its position; computed in float32 (or wider), given in the input's dtype."""
        cos_S1E, sin_S1E = tables
        return torch.addcmul(x_BSHE * cos_S1E, x_BSHE.roll(self.width // 2, -1), sin_S1E).to(x_BSHE.dtype)


def too_long(length: int, limit: int) -> UsageError:
    """The error for a sample that is longer than the model takes."""
    return UsageError(
        f"a sample of {length} tokens is longer than the model takes ({limit})",
        hint="raise model.max_seq_len, or lower training.seq_len",
    )


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
"""By the names that `kinds.Activation` lists, and SwiGLU's."""


class GatedFeedForward(nn.Module):
    """Gated feed-forward (arXiv 2002.05202): down(activation(gate x) · up x); by default with SiLU, SwiGLU."""

    def __init__(self, d: int, f: int, activation: str = "silu", *, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(d, f, bias=bias)
        self.up = nn.Linear(d, f, bias=bias)
        self.down = nn.Linear(f, d, bias=bias)
        self.activation = activation

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        y_BSD: Tensor = self.down(ACTIVATIONS[self.activation](self.gate(x_BSD)) * self.up(x_BSD))
        return y_BSD


class GELUFeedForward(nn.Module):
    """Plain feed-forward: down(activation(up x)); by default the exact GELU (arXiv 1606.08415)."""

    def __init__(self, config: ModelConfig, kind: kinds.GELU) -> None:
        super().__init__()
        d, f, bias = config.d_model, config.ffn_width, kind.has_bias(config)
        self.up = nn.Linear(d, f, bias=bias)
        self.down = nn.Linear(f, d, bias=bias)
        self.activation = kind.activation

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        y_BSD: Tensor = self.down(ACTIVATIONS[self.activation](self.up(x_BSD)))
        return y_BSD
