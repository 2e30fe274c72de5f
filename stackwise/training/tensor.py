"""Blocks whose matrices are split over ranks (Megatron, arXiv 1909.08053) by DTensor, as their kinds say.

A pair of matrices, the first by its outputs and the second by its inputs, is one sum over ranks in each direction. The
residual stream is the same on all of them, or, with `sequence`, each has some of its positions (arXiv 2205.05198).
Shapes: B rows, S positions, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

POSITIONS, HEADS = 1, 2  # dimensions of [B, S, D] and of [B, S, H, E]

Plan = Mapping[str, Mapping[str, str]]
"""Of a block: by the module that a part of it is in, how each of its layers is split (`TensorPlan.layers`)."""


def split(block: nn.Module, plan: Plan, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Split a block's matrices over the ranks of a mesh of one dimension; in place."""
    stream = Shard(POSITIONS) if sequence else Replicate()
    styles: dict[str, ParallelStyle] = {}
    for part, layers in plan.items():
        # What enters is gathered once for all layers that read it, and so are its gradients.
        styles[part] = PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),))
        for layer, way in layers.items():
            styles[f"{part}.{layer}"] = _style(way, stream)
        if sequence:
            styles[f"{part}_norm"] = SequenceParallel(sequence_dim=POSITIONS, use_local_output=True)
    parallelize_module(block, mesh, styles)


def divide_positions(blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Let blocks that follow each other work on some positions each: they are divided before the first, and gathered
    after the last."""

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_laid(arguments[0], Replicate(), Shard(POSITIONS), mesh), *arguments[1:])

    def leave(module: nn.Module, arguments: tuple[Any, ...], x_BSD: Tensor) -> Tensor:
        return _laid(x_BSD, Shard(POSITIONS), Replicate(), mesh)

    blocks[0].register_forward_pre_hook(enter)
    blocks[-1].register_forward_hook(leave)


def _style(way: str, stream: Replicate | Shard) -> ParallelStyle:
    if way == "column":
        return ColwiseParallel()
    if way == "row":
        return RowwiseParallel(output_layouts=stream)
    return SequenceParallel(sequence_dim=HEADS, use_local_output=True)


def _laid(x_BSD: Tensor, before: Replicate | Shard, after: Replicate | Shard, mesh: DeviceMesh) -> Tensor:
    return DTensor.from_local(x_BSD, mesh, [before], run_check=False).redistribute(placements=[after]).to_local()
