"""How the residual stream is divided: not at all, or into columns, one a task (progressive networks).

No torch here but where a kind builds something.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from stackwise.config.fields import Small
from stackwise.config.kinds import Attention, Fault, FeedForward, Matrix, Stream
from stackwise.model.kinds import LinearHead

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stackwise.config.model import ModelConfig


class Whole(Stream):
    """One stream, that every block reads and writes."""

    def norm(self, model: ModelConfig) -> nn.Module:
        from stackwise.model.layers import norm_of

        return norm_of(model)

    def front(self, model: ModelConfig, vocab_size: int, seq_len: int) -> Any:
        from stackwise.model.rack import Front

        return Front(model, vocab_size, seq_len)

    def head(self, model: ModelConfig, vocab_size: int, embedding: Tensor | None) -> Any:
        from stackwise.model.rack import Head

        return Head(model, vocab_size, embedding)


class Columns(Stream):
    """Progressive networks (arXiv 1606.04671): x = [x_1 | x_2 | …], of which block l writes x_k by its column k alone.

    Each column is a rack of width d_model / count. Column k reads x_1 … x_k: the lower ones by an adapter beside its
    feed-forward, U gelu(V h), with h their normed vectors (equation 2; the norms stand for its scale alpha). A row of
    task j has zeros in the columns above j, which stay zeros: it is answered by the highest column that it has.
    """

    caches: ClassVar[bool] = False

    count: Small = Field(description="columns; with training.continual: columns, one for each task")

    @property
    def columns(self) -> int:
        return self.count

    def parts(self, attention: Attention, ffn: FeedForward) -> tuple[Attention, FeedForward]:
        return ColumnAttention(inner=attention), ColumnFeedForward(inner=ffn)

    def column_parameters(self, model: ModelConfig, column: int) -> int:
        inner = model.column
        lateral = _lateral(inner.d_model, column)
        matrices = sum(matrix.outputs * matrix.inputs for matrix in lateral.values())
        return inner.block_parameters + matrices

    def specification(self) -> dict[str, Any]:
        return self.plain()

    def norm(self, model: ModelConfig) -> nn.Module:
        from stackwise.model.columns import ColumnNorm

        return ColumnNorm(model)

    def front(self, model: ModelConfig, vocab_size: int, seq_len: int) -> Any:
        from stackwise.model.columns import ColumnFront

        return ColumnFront(model, vocab_size, seq_len)

    def head(self, model: ModelConfig, vocab_size: int, embedding: Tensor | None) -> Any:
        from stackwise.model.columns import ColumnHead

        return ColumnHead(model, vocab_size)

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        if model.d_model % self.count:
            above = -(-model.d_model // self.count) * self.count
            yield "d_model", f"{self.count} columns do not divide d_model {model.d_model}: take {above}"
            return
        if model.tie_embeddings:
            yield "tie_embeddings", "each column projects by its own matrix: set model.tie_embeddings: false"
        if model.positions != "rope":
            yield "positions", f"{model.positions} positions cannot be divided into columns: set model.positions: rope"
        if model.embedding_norm or model.token_types or model.time_embedding.parameters(1):
            key = "embedding_norm" if model.embedding_norm else "token_types" if model.token_types else "time_embedding"
            yield key, "columns have only token embeddings: leave it out"
        if not isinstance(model.head, LinearHead) or not model.head.norm:
            yield "head", "each column has its own norm and projection: leave model.head out"
        if model.ffn.upcycles:
            yield "ffn", f"{model.ffn.name}: a column has no experts: take swiglu, geglu or gelu"


class ColumnAttention(Attention):
    """An attention of each column; a column sees itself alone."""

    caches: ClassVar[bool] = False

    inner: Attention

    @property
    def name(self) -> str:
        """That of the columns' attention."""
        return self.inner.name

    @property
    def residual(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `BlockPart.residual`."""
        return tuple(f"columns.*.{name}" for name in self.inner.residual)

    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        return _by_column(self.inner.matrices(model.column), model.stream.columns)

    def other_parameters(self, model: ModelConfig) -> int:
        return model.stream.columns * self.inner.other_parameters(model.column)

    def kept(self, model: ModelConfig) -> int:
        """What the column in training keeps; the others are frozen, and the stream is kept whole before each norm."""
        column = model.column
        return self.inner.kept(column) + 4 * (model.d_model - column.d_model)

    def build(self, model: ModelConfig) -> nn.Module:
        from stackwise.model.columns import ColumnAttention as Module

        return Module(model, self)


class ColumnFeedForward(FeedForward):
    """A feed-forward of each column, and an adapter beside it that reads the columns below."""

    inner: FeedForward

    @property
    def name(self) -> str:
        """That of the columns' feed-forward."""
        return self.inner.name

    @property
    def residual(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `BlockPart.residual`."""
        return (*(f"columns.*.{name}" for name in self.inner.residual), "lateral.*.out.weight")

    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        count, width = model.stream.columns, model.column.d_model
        lateral = {
            f"lateral.{k}.{name}": matrix for k in range(1, count) for name, matrix in _lateral(width, k).items()
        }
        return _by_column(self.inner.matrices(model.column), count) | lateral

    def other_parameters(self, model: ModelConfig) -> int:
        return model.stream.columns * self.inner.other_parameters(model.column)

    def kept(self, model: ModelConfig) -> int:
        """What the column in training keeps: its feed-forward's, and its adapter's input, width and activation."""
        column = model.column
        return self.inner.kept(column) + model.d_model + 2 * column.d_model

    def build(self, model: ModelConfig) -> nn.Module:
        from stackwise.model.columns import ColumnFeedForward as Module

        return Module(model, self)


def _by_column(matrices: dict[str, Matrix], count: int) -> dict[str, Matrix]:
    """The layers of every column; none carries adapters or narrow formats."""
    return {
        f"columns.{k}.{name}": Matrix(m.outputs, m.inputs, m.bias, narrow=False)
        for k in range(count)
        for name, m in matrices.items()
    }


def _lateral(width: int, column: int) -> dict[str, Matrix]:
    """The adapter of a column, counted from 0: from all columns below it to its own width, and on."""
    if not column:
        return {}
    return {"into": Matrix(width, column * width, narrow=False), "out": Matrix(width, width, narrow=False)}
