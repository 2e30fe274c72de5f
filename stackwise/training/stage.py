"""What a worker holds: the parts of one stage, and how a batch runs through them.

Shapes: B rows, S positions, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from stackwise.model import Block, Stack, enter
from stackwise.objectives import Objective

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions that are computed in by autocast."""


@dataclass(frozen=True)
class Batch:
    """Some rows: their tokens, their masks and, above the front, the activations that enter the stage."""

    rows_B: np.ndarray
    sample_ids_B16: np.ndarray
    tokens_BS: torch.Tensor
    masks_BS: torch.Tensor
    x_BSD: torch.Tensor | None = None
    segments_BS: torch.Tensor | None = None
    targets_BS: torch.Tensor | None = None
    step: int | None = None
    """The optimizer step that it is taken for: an objective may change as training goes. None: for no training."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; pinned tensors travel while the device computes."""

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            self.rows_B,
            self.sample_ids_B16,
            self.tokens_BS.to(device, non_blocking=True),
            self.masks_BS,  # which positions are scored is then known without waiting for the device
            move(self.x_BSD),
            move(self.segments_BS),
            move(self.targets_BS),
            self.step,
        )

    def above(self, x_BSD: torch.Tensor) -> Batch:
        """The same rows one stage higher: `x_BSD` is what enters there."""
        return replace(self, x_BSD=x_BSD)


class StageModel(nn.Module):
    """The front (in a stage that reads tokens), the blocks and the head of one stage.

    Args:
        front: Tokens to activations; None in a stage that reads a boundary.
        blocks: Those that the stage hands on, in order: StackWise's own, or any modules from [B, S, D] to the same.
            Only the former are told the attention's direction and the documents.
        head: Activations at scored positions to logits; None in a stage that only passes activations on.
        objective: What is shown, what is scored, and in which direction attention looks.
        precision: "fp32", or "bf16" or "fp16": autocast, with the residual stream in the same.
        beyond: Further blocks between `blocks` and the head, which only the loss goes through.
    """

    def __init__(
        self,
        front: nn.Module | None,
        blocks: Sequence[nn.Module],
        head: nn.Module | None,
        objective: Objective,
        precision: str,
        beyond: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.front, self.blocks, self.head = front, nn.ModuleList(blocks), head
        self.beyond = nn.ModuleList(beyond)
        self.objective, self.precision = objective, precision
        self.stream_dtype = NARROW.get(precision, torch.float32)

    @property
    def in_half(self) -> bool:
        """Whether something of it computes in fp16, whose gradients need a scale."""
        blocks = (*self.blocks, *self.beyond)
        return self.precision == "fp16" or any(getattr(block, "compute", None) is torch.float16 for block in blocks)

    def activations(self, batch: Batch) -> torch.Tensor:
        """The activations that leave the last block handed on, [B, S, D]."""
        if self.front is not None:
            objective = self.objective.at(batch.step)
            ids_BS = objective.inputs(batch.tokens_BS, batch.masks_BS, batch.sample_ids_B16)
            x_BSD = enter(self.front, ids_BS, objective.times(batch.masks_BS), causal=objective.causal)
        else:
            assert batch.x_BSD is not None, "a stage without a front reads a boundary"
            x_BSD = batch.x_BSD
        return self._through(self.blocks, x_BSD.to(self.stream_dtype), batch)

    def _through(self, blocks: nn.ModuleList, x_BSD: torch.Tensor, batch: Batch) -> torch.Tensor:
        causal = self.objective.at(batch.step).causal
        for block in blocks:
            if isinstance(block, Block | Stack):
                x_BSD = block(x_BSD, causal=causal, segments_BS=batch.segments_BS)
            else:
                x_BSD = block(x_BSD)
            assert isinstance(x_BSD, torch.Tensor)
        return x_BSD

    def forward(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """The sum of the losses over the scored positions of a batch, and how many those are."""
        assert self.head is not None, "a stage without a head has no loss"
        x_BSD = self._through(self.beyond, self.activations(batch), batch)
        objective = self.objective.at(batch.step)
        return objective.loss(x_BSD, self.head, batch.tokens_BS, batch.masks_BS, batch.targets_BS)

    @contextlib.contextmanager
    def numerics(self, device: torch.device) -> Iterator[None]:
        """The precision that the stage computes in."""
        with torch.autocast(device.type, dtype=NARROW.get(self.precision), enabled=self.precision in NARROW):
            yield
