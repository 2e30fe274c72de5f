"""Logits from a rack or from stages that take turns in memory.

Shapes in names: B rows, S positions, D d_model, n positions asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from stackwise.errors import UsageError
from stackwise.identity import derive_seed
from stackwise.model.mode import evaluating
from stackwise.model.rack import Rack, StageModules, stages_of

Stages = Rack | Sequence[StageModules] | Callable[[], Iterable[StageModules]]
"""A whole rack, loaded stages, or a function that gives a fresh generator of stages loaded one by one."""


def each_stage(stages: Stages, causal: bool) -> Iterator[StageModules]:
    """The stages, lowest first. `causal` is how a whole rack attends, and how stages must have been trained.

    Raises:
        UsageError: There are none, or one was trained the other way.
    """
    count = 0
    for stage in stages_of(stages, causal) if isinstance(stages, Rack) else stages() if callable(stages) else stages:
        if stage.causal and not causal:
            raise UsageError(
                "this rack was trained with causal attention: it cannot fill holes",
                hint="continue a prompt instead, or train it with training.objective: mask_diffusion",
            )
        if causal and not stage.causal:
            raise UsageError(
                "this rack was trained with bidirectional attention: it cannot continue a prompt token by token",
                hint="fill masked positions behind the prompt instead, or train it with training.objective: clm",
            )
        count += 1
        yield stage
        del stage
    if not count:
        raise UsageError("there are no stages to run")


def logits_at(
    front: nn.Module,
    stages: Stages,
    ids_BS: Tensor,
    index_n: Tensor,
    *,
    causal: bool,
    segments_BS: Tensor | None = None,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Logits of the last stage's head at some positions.

    Args:
        front: Tokens to vectors.
        stages: The rack, or its stages.
        ids_BS: Token ids, on the device of the modules.
        index_n: Indices into the flattened positions.
        causal: Whether attention is causal.
        segments_BS: Attention stays within equal values.
        autocast: Narrow dtype to compute in, the residual stream too, as in training; None: none.

    Returns:
        float32 [n, V].

    Raises:
        UsageError: Stages that were trained the other way, or none; a sample too long.
    """
    head: nn.Module | None = None
    with torch.autocast(ids_BS.device.type, autocast, enabled=autocast is not None):
        with evaluating(front):
            x_BSD = front(ids_BS)
        x_BSD = x_BSD if autocast is None else x_BSD.to(autocast)
        for stage in each_stage(stages, causal):
            head = stage.head
            with evaluating(*stage.blocks):
                x_BSD = stage.forward(x_BSD, segments_BS)
            del stage
        assert head is not None
        with evaluating(head):
            logits_nV: Tensor = head(x_BSD.flatten(0, 1).index_select(0, index_n))
    return logits_nV.float()


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
