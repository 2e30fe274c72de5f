"""The rack: front, stacks, head, whole in memory; and one stage's part of it.

Shapes in names: B batch, S sequence, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from stackwise.model.block import Block, Stack
from stackwise.model.ends import Front, Head


class Rack(nn.Module):
    """The whole model.

    Args:
        front: Tokens to vectors.
        stacks: Lowest first.
        head: Vectors to logits.
    """

    def __init__(self, front: Front, stacks: Iterable[Stack], head: Head) -> None:
        super().__init__()
        self.front = front
        self.stacks: Iterable[Stack] = nn.ModuleList(stacks)  # type: ignore[assignment]
        self.head = head

    @property
    def blocks(self) -> list[nn.Module]:
        """Every block, lowest first, whatever stack it is in."""
        return [block for stack in self.stacks for block in stack.blocks]

    def hidden(self, ids_BS: Tensor, causal: bool = False, segments_BS: Tensor | None = None) -> Tensor:
        """The vectors that enter the head, [B, S, D]; the arguments are those of `forward`."""
        x_BSD: Tensor = self.front(ids_BS)
        for stack in self.stacks:
            x_BSD = stack(x_BSD, causal=causal, segments_BS=segments_BS)
        return x_BSD

    def forward(self, ids_BS: Tensor, causal: bool = False, segments_BS: Tensor | None = None) -> Tensor:
        """Token ids [B, S] to logits [B, S, V].

        Args:
            ids_BS: Token ids.
            causal: No position sees those after it; otherwise attention is bidirectional.
            segments_BS: Integers; a position sees only those with its own value. None: it sees all.

        Raises:
            UsageError: A sample longer than the model takes.
        """
        logits_BSV: Tensor = self.head(self.hidden(ids_BS, causal, segments_BS))
        return logits_BSV


@dataclass(frozen=True)
class StageModules:
    """What evaluation and inference need of one stage, loaded. Drop it, and its memory is free."""

    depth: int
    """Its place in the schedule."""
    blocks: Sequence[nn.Module] = field(repr=False)
    """The blocks it holds, lowest first; only StackWise's own are told the direction and the documents."""
    head: Head = field(repr=False)
    """The head it trained with."""
    causal: bool = False
    """Whether it was trained with causal attention."""
    front: Front | None = field(default=None, repr=False)
    """Where the stage does not go on from the one before it: the front that it starts from."""
    beyond: Sequence[nn.Module] = field(default=(), repr=False)
    """Blocks between its own and its head, which nothing above it goes through."""

    def forward(self, x_BSD: Tensor, segments_BS: Tensor | None = None) -> Tensor:
        """The vectors that leave the stage, [B, S, D] to [B, S, D]."""
        return self._through(self.blocks, x_BSD, segments_BS)

    def features(self, x_BSD: Tensor, segments_BS: Tensor | None = None) -> Tensor:
        """The vectors that enter its head, of those that leave it."""
        return self._through(self.beyond, x_BSD, segments_BS)

    def _through(self, blocks: Sequence[nn.Module], x_BSD: Tensor, segments_BS: Tensor | None) -> Tensor:
        for block in blocks:
            if isinstance(block, Block | Stack):
                x_BSD = block(x_BSD, causal=self.causal, segments_BS=segments_BS)
            else:
                x_BSD = block(x_BSD)
        return x_BSD


def stages_of(rack: Rack, causal: bool = False) -> list[StageModules]:
    """A whole rack as a single stage, for what takes stages."""
    return [StageModules(0, rack.blocks, rack.head, causal)]
