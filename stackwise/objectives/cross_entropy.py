"""Cross entropy of a head's logits, in slices: memory for logits is bounded whatever the vocabulary.

Shapes in names: n scored positions, D d_model, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SLICE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Bytes of float32 logits that exist at once. On a CPU so small a slice is also the fastest."""


_WHOLE: ContextVar[bool] = ContextVar("whole graph", default=False)


@contextlib.contextmanager
def whole_graph() -> Iterator[None]:
    """Within it the loss is one graph over all logits, which stay in memory: its gradient has a gradient."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


@runtime_checkable
class ProjectionHead(Protocol):
    """A head that is features followed by a matrix: its gradients are taken slice by slice, with nothing recomputed.

    An attribute `bias`, [V] or None, is added to the logits.
    """

    @property
    def weight(self) -> Tensor:
        """The matrix [V, D]."""

    def features(self, x: Tensor) -> Tensor:
        """What the matrix is applied to: […, D] to […, D]."""


def slice_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits in a slice: a function of the vocabulary and the kind of device alone, so that sums repeat."""
    budget = SLICE_BYTES.get(device.type, SLICE_BYTES["cuda"])
    return max(16, budget // (4 * vocab_size))


class _Aims(NamedTuple):
    """What positions are scored against: token ids, factors of each position (None: 1), and smoothing."""

    targets_n: Tensor
    factors_n: Tensor | None
    smoothing: float


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of h Wᵀ; gradients are made in the forward, while a slice's logits are there.

    d loss / d logits = softmax(logits) - onehot(target), written over the logits. Compare arXiv 2410.10989 (Liger)
    and 2411.09009 (cut cross-entropy).
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_nD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        aims: _Aims,
        needs: bool,
    ) -> Tensor:
        targets_n, factors_n, smoothing = aims
        ctx.set_materialize_grads(False)
        total = torch.zeros((), dtype=torch.float32, device=h_nD.device)
        want_h, want_weight, want_bias = (needs and needed for needed in ctx.needs_input_grad[:3])
        gradient_h = torch.empty_like(h_nD) if want_h else None
        wide, rows = torch.promote_types(weight_VD.dtype, torch.float32), slice_rows(len(weight_VD), h_nD.device)
        gradient_weight: Tensor | None = None
        gradient_bias = None if bias_V is None or not want_bias else torch.zeros_like(bias_V, dtype=wide)
        for start in range(0, len(h_nD), rows):
            h, targets = h_nD[start : start + rows], targets_n[start : start + rows, None]
            logits = (h @ weight_VD.T).to(wide)
            if bias_V is not None:
                logits.add_(bias_V)
            log_z = torch.logsumexp(logits, -1, keepdim=True)
            factors = None if factors_n is None else factors_n[start : start + rows, None]
            aimed = logits.gather(1, targets)
            if smoothing:
                aimed = torch.lerp(aimed, logits.mean(-1, keepdim=True), smoothing)
            nats = log_z - aimed
            total = total + (nats if factors is None else nats * factors).sum(dtype=wide)
            if gradient_h is None and gradient_bias is None and not want_weight:
                del logits  # of two slices only one is alive
                continue
            slope = logits.sub_(log_z).exp_()
            # scatter_add_ has no fixed order on a GPU
            slope.scatter_(1, targets, slope.gather(1, targets) - (1.0 - smoothing))
            if smoothing:
                slope.sub_(smoothing / slope.shape[-1])
            if factors is not None:
                slope.mul_(factors)
            if gradient_bias is not None:
                gradient_bias += slope.sum(0)
            narrow = slope.to(h.dtype)
            if gradient_h is not None:
                torch.mm(narrow, weight_VD, out=gradient_h[start : start + rows])
            if want_weight:
                if gradient_weight is None:
                    gradient_weight = (narrow.T @ h).to(wide)
                elif h.dtype == wide:
                    gradient_weight.addmm_(narrow.T, h)
                else:
                    gradient_weight += narrow.T @ h
            del logits, slope, narrow
        ctx.gradients = (gradient_h, gradient_weight, gradient_bias)
        ctx.dtypes = (h_nD.dtype, weight_VD.dtype, wide if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (slope,) = grads
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was already taken, and freed")
        gradients, ctx.gradients = ctx.gradients, None
        if slope is None:
            return (None,) * 5
        scaled = [None if g is None else g.mul_(slope).to(t) for g, t in zip(gradients, ctx.dtypes, strict=True)]
        return *scaled, None, None


def head_cross_entropy(
    head: Callable[[Tensor], Tensor],
    x_nD: Tensor,
    targets_n: Tensor,
    factors_n: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Sum over positions of the cross entropy of `head(x)` against targets, in nats.

    A `ProjectionHead` is worked through in slices that leave their gradients behind; another head's logits are made
    in slices that are recomputed in the backward pass. Slicing changes gradients by rounding alone. The gradient can
    be taken once.

    Args:
        head: From […, D] to logits […, V].
        x_nD: The vectors at the scored positions.
        targets_n: Token ids, int64.
        factors_n: What each position's cross entropy is multiplied by, float32; None: 1.
        smoothing: Share of each target that is spread evenly over all ids (arXiv 1512.00567, section 7).

    Returns:
        A float32 scalar (float64 for float64 inputs); its graph leads to `x_nD` and the head's parameters.
    """
    if not len(x_nD):
        return x_nD.sum(dtype=torch.promote_types(x_nD.dtype, torch.float32))
    kind: object = head
    if isinstance(kind, ProjectionHead) and not _WHOLE.get():
        h_nD, weight_VD = kind.features(x_nD), kind.weight
        if torch.is_autocast_enabled(h_nD.device.type):
            narrow = torch.get_autocast_dtype(h_nD.device.type)
            h_nD, weight_VD = h_nD.to(narrow), weight_VD.to(narrow)
        else:
            h_nD = h_nD.to(weight_VD.dtype)
        # Half precision keeps its gradients in range by scaling the loss, which gradients made ahead would not see.
        if h_nD.dtype != torch.float16:
            with torch.autocast(x_nD.device.type, enabled=False):
                apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
                bias_V = getattr(head, "bias", None)
                aims = _Aims(targets_n, factors_n, smoothing)
                return apply(h_nD, weight_VD, bias_V, aims, torch.is_grad_enabled())
    return _sliced(head, x_nD, targets_n, factors_n, smoothing)


def _sliced(
    head: Callable[[Tensor], Tensor], x_nD: Tensor, targets_n: Tensor, factors_n: Tensor | None, smoothing: float
) -> Tensor:
    def loss(x: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
        logits = head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if factors is None:
            return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        return (F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing) * factors).sum()

    def part(values: Tensor | None, start: int) -> Tensor | None:
        return None if values is None else values[start : start + rows]

    if _WHOLE.get():
        return loss(x_nD, targets_n, factors_n)
    # The width of the logits is known after the first row.
    with torch.no_grad():
        rows = slice_rows(head(x_nD[:1]).shape[-1], x_nD.device)
    if len(x_nD) <= rows:
        return loss(x_nD, targets_n, factors_n)
    parts = [
        cast(
            Tensor,
            checkpoint(loss, x_nD[i : i + rows], targets_n[i : i + rows], part(factors_n, i), use_reentrant=False),
        )
        for i in range(0, len(x_nD), rows)
    ]
    return torch.stack(parts).sum()
