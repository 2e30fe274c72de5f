"""A block (one transformer layer) and a stack of them. Plain modules: take them out and use them.

Shapes in names: B batch, S sequence, D d_model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.model import Direction, ModelConfig
from stackwise.errors import UsageError
from stackwise.model.attention import Cache, is_paired
from stackwise.model.layers import make_norm
from stackwise.model.projections import WIDE

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions that say what a block computes in; the others leave it to its surroundings."""

P = ParamSpec("P")


class _Computes(Protocol):
    compute: torch.dtype | None


B = TypeVar("B", bound=_Computes)
Forward = Callable[Concatenate[B, Tensor, P], Tensor]


def in_own_precision(forward: Forward[B, P]) -> Forward[B, P]:
    """Let a forward pass run under autocast to the module's `compute`; None: as its surroundings do.

    float32 switches the surroundings' autocast off. The residual stream keeps the dtype it came in either way.
    """

    @functools.wraps(forward)
    def wrapped(self: B, x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if self.compute is None:
            return forward(self, x, *args, **kwargs)
        narrow: Any = None if self.compute is torch.float32 else self.compute
        with torch.autocast(x.device.type, dtype=narrow, enabled=narrow is not None):
            return forward(self, x, *args, **kwargs)

    return wrapped


class Block(nn.Module):
    """One transformer layer: x + attention(norm x), then x + ffn(norm x); post-norm: norm(x + attention x), and so on.

    The residual stream keeps the dtype it came in; the branches compute in the weights' dtype, or in autocast's.
    Without a builder its weights are PyTorch's defaults; `build_block` gives seeded ones.

    Args:
        config: The rack's configuration, as this block has it (`ModelConfig.at`).

    Raises:
        UsageError: Heads that do not divide the width.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.without_norm = not config.first_norm
        # a norm that is not there has no parameters, and no place in files
        self.attention_norm = make_norm(config) if config.first_norm else nn.Identity()
        self.attention = config.attention.build(config)
        self.ffn_norm = make_norm(config)
        self.ffn = config.ffn.build(config)
        for kind, module in ((config.attention, self.attention), (config.ffn, self.ffn)):
            for name, matrix in kind.matrices(config).items():
                if not matrix.narrow:
                    setattr(module.get_submodule(name), WIDE, True)
        self.post_norm = config.norm_place == "post"
        self.keeps_cache = config.keeps_cache
        """Whether `forward` takes a cache."""
        self.dropout = config.dropout
        self.compute: torch.dtype | None = None
        """What it computes in; None: what its surroundings do."""

    @in_own_precision
    def forward(
        self,
        x_BSD: Tensor,
        *,
        causal: Direction = False,
        segments_BS: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """[B, S, D] to [B, S, D], in the input's dtype.

        Args:
            x_BSD: The residual stream.
            causal: True: no position sees those after it; or another direction.
            segments_BS: Integers; a position sees only those with its own value; of paired rows those of one copy.
                None: it sees all.
            cache: The positions in front of these, which these join; for generation, without gradients. None: there
                are none.

        Raises:
            UsageError: A sample longer than the model takes (rotary positions); a cache that cannot be used so.
        """
        if cache is not None and not self.keeps_cache:
            raise UsageError("this attention keeps no cache", hint="go over all positions: cache=False")
        if cache is not None and (segments_BS is not None or causal is False):
            raise UsageError("a cache serves attention that looks back, over one document")
        if segments_BS is not None and is_paired(causal):
            segments_BS = segments_BS.repeat(1, 2)
        if self.post_norm:
            y_BSD = self.attention(self._narrow(x_BSD), causal=causal, segments_BS=segments_BS, cache=cache)
            x_BSD = self.attention_norm(x_BSD + self._drop(y_BSD).to(x_BSD.dtype)).to(x_BSD.dtype)
            y_BSD = self.ffn(self._narrow(x_BSD))
            y_BSD = self.ffn_norm(x_BSD + self._drop(y_BSD).to(x_BSD.dtype))
            out_BSD: Tensor = y_BSD.to(x_BSD.dtype)
            return out_BSD
        # not behind a norm: on a GPU under autocast it gives 16 bits, which must not be widened again
        normed_BSD = self._narrow(x_BSD) if self.without_norm else self.attention_norm(x_BSD)
        y_BSD = self.attention(normed_BSD, causal=causal, segments_BS=segments_BS, cache=cache)
        x_BSD = x_BSD + self._drop(y_BSD).to(x_BSD.dtype)
        y_BSD = self.ffn(self.ffn_norm(x_BSD))
        return x_BSD + self._drop(y_BSD).to(x_BSD.dtype)

    def _narrow(self, x_BSD: Tensor) -> Tensor:
        """The residual stream in the weights' dtype, in which a norm gives it where norms come first."""
        weight: Tensor = self.ffn_norm.weight  # type: ignore[assignment]  # a norm's
        return x_BSD.to(weight.dtype)

    def _drop(self, y_BSD: Tensor) -> Tensor:
        return F.dropout(y_BSD, self.dropout) if self.training and self.dropout else y_BSD


class Stack(nn.Module):
    """Consecutive blocks.

    Args:
        blocks: The blocks, lowest first.
        stack_id: What the stack is called where it was made; its place in a rack is the rack's to say.
    """

    def __init__(self, blocks: Iterable[nn.Module], stack_id: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.stack_id = stack_id

    def forward(self, x_BSD: Tensor, *, causal: Direction = False, segments_BS: Tensor | None = None) -> Tensor:
        """[B, S, D] to [B, S, D]; the arguments are those of `Block`, which alone take a cache."""
        for block in self.blocks:
            x_BSD = block(x_BSD, causal=causal, segments_BS=segments_BS)
        return x_BSD

    def __len__(self) -> int:
        return len(self.blocks)


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards each module is in the mode it was in."""
    before = [(child, child.training) for module in modules for child in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in before:
            child.training = mode
