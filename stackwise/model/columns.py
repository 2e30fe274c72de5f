"""The modules of a stream in columns (`stackwise.model.streams.Columns`): each holds one module a column.

A column whose vector is zero at a position is not there: it stays zero through every block, and the head passes it
over. Shapes in names: B batch, S sequence, D d_model, V vocabulary, d the width of a column.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.model import Direction
from stackwise.model.attention import Cache
from stackwise.model.layers import make_norm, too_long
from stackwise.model.rack import Front, Head

if TYPE_CHECKING:
    from stackwise.config.model import ModelConfig
    from stackwise.model import streams


class ByColumn(nn.ModuleList):
    """One module a column, the first column's first."""

    learned: int | None = None
    """Columns that are learned, or being learned: those above are not computed. None: all."""

    def split(self, x: Tensor) -> list[Tensor]:
        """The vectors of the learned columns, […, D] to […, d] each; those that are frozen ask for no gradient."""
        parts = list(torch.split(x, x.shape[-1] // len(self), -1))
        if self.learned is None:
            return parts
        return [*(part.detach() for part in parts[: self.learned - 1]), parts[self.learned - 1]]

    def together(self, parts: list[Tensor]) -> Tensor:
        """Vectors of the learned columns as those of all, the others zero."""
        missing = len(self) - len(parts)
        return torch.cat([*parts, *(torch.zeros_like(parts[0]) for _ in range(missing))], -1)


def learn_column(module: nn.Module, column: int, *, trains: bool) -> None:
    """Let a part of the rack compute the columns up to one, and train that one alone, if any.

    Args:
        column: Its number, from 0.
        trains: Whether it trains; the others never do.
    """
    for child in module.modules():
        if isinstance(child, ByColumn):
            child.learned = column + 1
            for number, of_column in enumerate(child):
                of_column.requires_grad_(trains and number == column)


class ColumnNorm(nn.Module):
    """A norm of each column."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.columns = ByColumn(nn.ModuleDict({"norm": make_norm(model.column)}) for _ in range(model.stream.columns))

    @property
    def weight(self) -> Tensor:
        """That of the first column, which says the dtype of all."""
        weight: Tensor = self.columns[0]["norm"].weight  # type: ignore[index]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] to […, D]."""
        parts = self.columns.split(x)
        normed = [column["norm"](part) for column, part in zip(self.columns, parts, strict=False)]  # type: ignore[index]
        return self.columns.together([_where_present(y, part) for y, part in zip(normed, parts, strict=True)])


class ColumnAttention(nn.Module):
    """An attention of each column."""

    def __init__(self, model: ModelConfig, kind: streams.ColumnAttention) -> None:
        super().__init__()
        self.columns = ByColumn(kind.inner.build(model.column) for _ in range(model.stream.columns))

    def forward(
        self, x_BSD: Tensor, *, causal: Direction, segments_BS: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """[B, S, D] to [B, S, D]; no column keeps a cache."""
        parts = self.columns.split(x_BSD)
        seen = [
            column(part, causal=causal, segments_BS=segments_BS, cache=None)
            for column, part in zip(self.columns, parts, strict=False)
        ]
        return self.columns.together([_where_present(y, part) for y, part in zip(seen, parts, strict=True)])


class Lateral(nn.Module):
    """What a column reads of those below: U gelu(V h), with h all of theirs (arXiv 1606.04671, equation 2)."""

    def __init__(self, below: int, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(below, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, below: Tensor) -> Tensor:
        """[…, columns below x d] to […, d]."""
        y: Tensor = self.out(F.gelu(self.into(below)))
        return y


class ColumnFeedForward(nn.Module):
    """A feed-forward of each column, with what it reads of those below it."""

    def __init__(self, model: ModelConfig, kind: streams.ColumnFeedForward) -> None:
        super().__init__()
        count, width = model.stream.columns, model.column.d_model
        self.columns = ByColumn(kind.inner.build(model.column) for _ in range(count))
        self.lateral = ByColumn(Lateral(k * width, width) if k else nn.Identity() for k in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] to […, D]."""
        parts = self.columns.split(x)
        made = [column(part) for column, part in zip(self.columns, parts, strict=False)]
        for k in range(1, len(parts)):
            made[k] = _where_present(made[k] + self.lateral[k](torch.cat(parts[:k], -1)), parts[k])
        return self.columns.together([_where_present(made[0], parts[0]), *made[1:]])


class ColumnFront(Front):
    """A token embedding of each column."""

    def __init__(self, model: ModelConfig, vocab_size: int, seq_len: int) -> None:
        nn.Module.__init__(self)
        self.max_seq_len = model.max_seq_len or seq_len
        self.columns = ByColumn(nn.Embedding(vocab_size, model.column.d_model) for _ in range(model.stream.columns))

    def forward(
        self,
        ids_BS: Tensor,
        time: Tensor | None = None,
        *,
        start: int = 0,
        paired: bool = False,
        tasks: Tensor | None = None,
    ) -> Tensor:
        """See `Front.forward`; a row has the columns up to its task's, or to the newest one that is learned."""
        length = ids_BS.shape[-1] // 2 if paired else ids_BS.shape[-1]
        if start + length > self.max_seq_len:
            raise too_long(start + length, self.max_seq_len)
        ids_BS, learned = ids_BS.long(), self.columns.learned or len(self.columns)
        parts = [self.columns[k](ids_BS) for k in range(learned)]
        if tasks is not None:
            of_row = tasks.to(ids_BS.device)[:, None, None]
            parts = [part * (of_row >= k) for k, part in enumerate(parts)]
        return self.columns.together(parts)


class HeadColumn(nn.Module):
    """The norm and the projection of one column."""

    def __init__(self, column: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.norm = make_norm(column)
        self.projection = nn.Parameter(torch.empty(vocab_size, column.d_model))
        nn.init.normal_(self.projection, std=column.init_std)


class ColumnHead(Head):
    """A norm and a projection of each column; the highest column that a position has answers."""

    def __init__(self, model: ModelConfig, vocab_size: int) -> None:
        nn.Module.__init__(self)
        self.columns = ByColumn(HeadColumn(model.column, vocab_size) for _ in range(model.stream.columns))
        self.register_parameter("projection", None)
        self.register_parameter("bias", None)
        self.register_buffer("fixed", None, persistent=False)
        self.match = None

    @property
    def tied(self) -> bool:
        return False

    @property
    def weight(self) -> Tensor:
        """The projections of all columns, [V, D]: of a vector that is zero but for one column, that one's counts."""
        return torch.cat([column.projection for column in self.columns], 1)  # type: ignore[misc]

    def features(self, x: Tensor) -> Tensor:
        """See `Head.features`: zero but for the column that answers."""
        parts, answered = self.columns.split(x), torch.zeros_like(x[..., :1], dtype=torch.bool)
        made = list[Tensor]()
        for column, part in reversed(list(zip(self.columns, parts, strict=False))):
            answers = _present(part) & ~answered
            made.insert(0, column.norm(part) * answers)  # type: ignore[operator]
            answered = answered | answers
        return self.columns.together(made)


def _present(part: Tensor) -> Tensor:
    return (part != 0).any(-1, keepdim=True)


def _where_present(y: Tensor, part: Tensor) -> Tensor:
    """What a column makes of its vectors, zero where it is not there: biases and lower columns must not wake it."""
    return y * _present(part)
