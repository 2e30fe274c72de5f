"""Logits from a rack or from stages that take turns in memory.

Shapes in names: B rows, S positions, D d_model, n positions asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stackwise.config.model import BlockCausal, Direction
from stackwise.errors import UsageError
from stackwise.identity import derive_seed
from stackwise.model.attention import Caches
from stackwise.model.block import evaluating
from stackwise.model.rack import Rack, StageModules, enter, stages_of

Stages = Rack | Sequence[StageModules] | Callable[[], Iterable[StageModules]]
"""A whole rack, loaded stages, or a function that returns a fresh generator, which loads the stages one by one."""


def each_stage(stages: Stages, direction: Direction) -> Iterator[StageModules]:
    """The stages, lowest first. `direction` is how a whole rack attends, and how stages must have been trained.

    Raises:
        UsageError: There are none, or one was trained another way.
    """
    count = 0
    rack = isinstance(stages, Rack)
    for stage in stages_of(stages, direction) if isinstance(stages, Rack) else stages() if callable(stages) else stages:
        if not rack:
            _check(stage.causal, direction)
        count += 1
        yield stage
        del stage
    if not count:
        raise UsageError("there are no stages to run")


def _check(trained: Direction, direction: Direction) -> None:
    if trained is True and direction is not True:
        raise UsageError(
            "this rack was trained with causal attention: it cannot fill holes",
            hint="continue a prompt instead, or train it with training.objective: mask_diffusion",
        )
    if direction is True and trained is not True:
        raise UsageError(
            "this rack was trained with bidirectional attention: it cannot continue a prompt token by token",
            hint="fill masked positions behind the prompt instead, or adapt it with training.adaptation: causal",
        )
    blocks = (trained.size if isinstance(trained, BlockCausal) else None) if trained is not True else None
    if blocks != (direction.size if isinstance(direction, BlockCausal) else None):
        raise UsageError(f"this rack was trained in {_said(trained)}, not in {_said(direction)}")


def _said(direction: Direction) -> str:
    return f"blocks of {direction.size} tokens" if isinstance(direction, BlockCausal) else "whole samples"


@dataclass(frozen=True)
class LoadedModel:
    """A model, as generation uses it: whole in memory, or its stages one by one.

    Args:
        front: Tokens to vectors.
        stages: The rack, its stages, or a function that loads them one by one for each pass.
        direction: How a whole rack attends, and how stages must have been trained.
        autocast: Narrow dtype to compute in, the residual stream too, as in training; None: none.
        keeps_cache: Whether its attention can keep a cache; otherwise every pass goes over all positions.
    """

    front: nn.Module
    stages: Stages
    direction: Direction = False
    autocast: torch.dtype | None = None
    keeps_cache: bool = True

    @property
    def max_seq_len(self) -> int | None:
        """Positions that its front takes; None: any number."""
        return getattr(self.front, "max_seq_len", None)

    def logits_at(
        self,
        ids_BS: Tensor,
        index_n: Tensor,
        *,
        segments_BS: Tensor | None = None,
        time: Tensor | None = None,
        caches: Caches | None = None,
        exit_depth: int | None = None,
    ) -> Tensor:
        """Logits of the last stage's head, or of an earlier one's, at some positions. Terms of the loss are dropped.

        Args:
            ids_BS: Token ids, on the device of the modules; with caches those of the new positions alone.
            index_n: Indices into the flattened positions; none: only the caches are wanted, no logits are made.
            segments_BS: Attention stays within equal values.
            time: The masked share of each row [B], or at each position [B, S], for a front that takes it.
            caches: What the blocks keep of the positions in front; the new ones join.
            exit_depth: The stage whose head answers, and beyond which nothing runs; None: the last.

        Returns:
            float32 [n, V].

        Raises:
            UsageError: Stages that were trained another way, or none; a sample too long.
        """
        with torch.autocast(ids_BS.device.type, self.autocast, enabled=self.autocast is not None):
            h_BSD, head = self.features(
                ids_BS, segments_BS=segments_BS, time=time, caches=caches, exit_depth=exit_depth
            )
            if not len(index_n):
                return torch.empty(0, 0, device=ids_BS.device)
            with evaluating(head):
                logits_nV: Tensor = head(h_BSD.flatten(0, 1).index_select(0, index_n))
        return logits_nV.float()

    def features(
        self,
        ids_BS: Tensor,
        *,
        segments_BS: Tensor | None = None,
        time: Tensor | None = None,
        caches: Caches | None = None,
        exit_depth: int | None = None,
    ) -> tuple[Tensor, nn.Module]:
        """What enters the head of the stage that answers, [B, S, D], and that head; see `logits_at`."""
        head: nn.Module | None = None
        causal, autocast, stages = self.direction, self.autocast, self.stages
        first, start = 0, 0 if caches is None else caches.length
        if exit_depth is not None and isinstance(stages, Sequence):
            stages = _way_to(stages, exit_depth)
        with torch.autocast(ids_BS.device.type, autocast, enabled=autocast is not None):
            with evaluating(self.front):
                x_BSD = enter(self.front, ids_BS, time, causal=causal, start=start)
            x_BSD = x_BSD if autocast is None else x_BSD.to(autocast)
            for stage in each_stage(stages, causal):
                head = stage.head
                with evaluating(*stage.blocks, *stage.beyond):
                    if stage.front is not None:
                        with evaluating(stage.front):
                            x_BSD = enter(stage.front, ids_BS, time, causal=causal).to(x_BSD.dtype)
                    of_stage = None if caches is None else caches.of(first, len(stage.blocks))
                    x_BSD = stage.forward(x_BSD, segments_BS, direction=causal, caches=of_stage)
                    h_BSD = stage.features(x_BSD, segments_BS, direction=causal)
                first += len(stage.blocks)
                if exit_depth is not None and stage.depth >= exit_depth:
                    break
                del stage
        assert head is not None
        return h_BSD, head


def _way_to(stages: Sequence[StageModules], depth: int) -> list[StageModules]:
    """The stages that lead to the one that answers: from the last before it that begins with a front of its own."""
    way: list[StageModules] = []
    for stage in stages:
        if stage.depth <= depth:
            way = [stage] if stage.front is not None else [*way, stage]
    return way


def forbid(logits_nV: Tensor, forbidden: Collection[int]) -> Tensor:
    """Logits with some ids made impossible.

    Raises:
        UsageError: No id is left.
    """
    wrong = sorted(i for i in set(forbidden) if 0 <= i < logits_nV.shape[1])
    if len(wrong) == logits_nV.shape[1]:
        raise UsageError("every token id is forbidden: there is nothing to generate")
    return logits_nV.index_fill(1, torch.tensor(wrong, dtype=torch.int64, device=logits_nV.device), -torch.inf)


def choose(logits_nV: Tensor, temperature: float, *key: int | str) -> Tensor:
    """A token for each row: the likeliest at temperature 0, else drawn, as a pure function of `key`. int64 [n].

    Drawing is the Gumbel-max trick in float64 on the CPU: the same on every device. (In float32 the noise's short
    tail would lower the effective temperature; arXiv 2409.02908.)

    Raises:
        UsageError: A negative temperature.
    """
    if temperature < 0:
        raise UsageError(f"temperature {temperature} is negative")
    if temperature == 0:
        return logits_nV.argmax(-1)
    generator = torch.Generator("cpu").manual_seed(derive_seed(*key))
    noise = torch.empty(logits_nV.shape, dtype=torch.float64, device="cpu").exponential_(generator=generator).log_()
    return (logits_nV.cpu().double() / temperature - noise).argmax(-1).to(logits_nV.device)
