"""The rack: front, stacks, head, whole in memory; and one stage's part of it.

Shapes in names: B batch, S sequence, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from stackwise.config.direction import Direction
from stackwise.errors import UsageError
from stackwise.model.attention import is_paired
from stackwise.model.block import Block, Stack
from stackwise.model.cache import Cache
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

    def hidden(
        self, ids_BS: Tensor, causal: Direction = False, segments_BS: Tensor | None = None, time: Tensor | None = None
    ) -> Tensor:
        """The vectors that enter the head, [B, S, D]; the arguments are those of `forward`."""
        x_BSD = enter(self.front, ids_BS, time, causal=causal)
        for stack in self.stacks:
            x_BSD = stack(x_BSD, causal=causal, segments_BS=segments_BS)
        return x_BSD

    def forward(
        self, ids_BS: Tensor, causal: Direction = False, segments_BS: Tensor | None = None, time: Tensor | None = None
    ) -> Tensor:
        """Token ids [B, S] to logits [B, S, V].

        Args:
            ids_BS: Token ids.
            causal: False: attention is bidirectional; True: no position sees those after it; or another direction.
            segments_BS: Integers; a position sees only those with its own value. None: it sees all.
            time: The masked share of each row, [B], where the front takes it.

        Raises:
            UsageError: A sample longer than the model takes; no time where one is needed.
        """
        logits_BSV: Tensor = self.head(self.hidden(ids_BS, causal, segments_BS, time))
        return logits_BSV


def enter(
    front: nn.Module, ids_BS: Tensor, time: Tensor | None = None, *, causal: Direction = False, start: int = 0
) -> Tensor:
    """Token ids through a front, [B, S, D]; another module than StackWise's own is told the ids alone.

    Args:
        front: Tokens to vectors.
        ids_BS: Token ids.
        time: The masked share of each row [B], or at each position [B, S].
        causal: The direction of attention, which says whether rows are pairs of copies.
        start: The first position.
    """
    if not isinstance(front, Front):
        x_BSD: Tensor = front(ids_BS)
        return x_BSD
    time = None if time is None else time.to(ids_BS.device)
    return front(ids_BS, time, start=start, paired=is_paired(causal))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class StageModules:
    """What evaluation and inference need of one stage, loaded. Drop it, and its memory is free."""

    depth: int
    """Its place in the schedule."""
    blocks: Sequence[nn.Module] = field(repr=False)
    """The blocks it holds, lowest first; only StackWise's own are told the direction and the documents."""
    head: Head = field(repr=False)
    """The head it trained with."""
    causal: Direction = False
    """The direction of attention that it was trained with."""
    front: Front | None = field(default=None, repr=False)
    """Where the stage does not go on from the one before it: the front that it starts from."""
    beyond: Sequence[nn.Module] = field(default=(), repr=False)
    """Blocks between its own and its head, which nothing above it goes through."""

    def forward(
        self,
        x_BSD: Tensor,
        segments_BS: Tensor | None = None,
        *,
        direction: Direction | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """The vectors that leave the stage, [B, S, D] to [B, S, D].

        Args:
            x_BSD: Those that enter it.
            segments_BS: Attention stays within equal values.
            direction: Another than it was trained with: without the pairs of training, say.
            caches: One for each block, of the positions in front.

        Raises:
            UsageError: Caches, and blocks that are not StackWise's own.
        """
        return self._through(self.blocks, x_BSD, segments_BS, direction, caches)

    def features(
        self, x_BSD: Tensor, segments_BS: Tensor | None = None, *, direction: Direction | None = None
    ) -> Tensor:
        """The vectors that enter its head, of those that leave it."""
        return self._through(self.beyond, x_BSD, segments_BS, direction, None)

    def _through(
        self,
        blocks: Sequence[nn.Module],
        x_BSD: Tensor,
        segments_BS: Tensor | None,
        direction: Direction | None,
        caches: Sequence[Cache] | None,
    ) -> Tensor:
        causal = self.causal if direction is None else direction
        if caches is not None:
            for block, cache in zip(blocks, caches, strict=True):
                if not isinstance(block, Block):
                    raise UsageError("a cache needs StackWise's own blocks", hint="pass cache=False")
                x_BSD = block(x_BSD, causal=causal, segments_BS=segments_BS, cache=cache)
            return x_BSD
        for block in blocks:
            if isinstance(block, Block | Stack):
                x_BSD = block(x_BSD, causal=causal, segments_BS=segments_BS)
            else:
                x_BSD = block(x_BSD)
        return x_BSD


def stages_of(rack: Rack, causal: Direction = False) -> list[StageModules]:
    """A whole rack as a single stage, for what takes stages."""
    return [StageModules(0, rack.blocks, rack.head, causal)]
