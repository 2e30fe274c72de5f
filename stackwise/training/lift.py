"""The forward-only pass of a stage that does not fit: many batches go up together, group by group of its parts."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor, nn

from stackwise.batch import Batch
from stackwise.store import Codec
from stackwise.training.forward import Outputs, through
from stackwise.training.parts import Group, Parts, in_turn, make_groups
from stackwise.training.stage import StageModel


def lifted(parts: Parts, groups: int, *, row_bytes: int, memory: int, below: Sequence[StageModel] = ()) -> Outputs:
    """What makes a stage's outputs (see `forward.outputs`) with one group of its parts in memory, bit for bit the same.

    Batches are gathered until their activations fill the memory; then every group takes its turn.

    Args:
        parts: The stage's parts, without its head.
        groups: Groups that its blocks make.
        row_bytes: Bytes of the activations of a row.
        memory: Bytes of activations held at once; a batch is held in any case.
        below: Frozen stages on the device that the rows go through before.
    """
    turns = make_groups(parts, groups)

    def load(group: Group) -> dict[str, nn.Module]:
        return {name: parts.make(name, None) for name in group.names}

    def up(batches: list[Batch], device: torch.device) -> list[Tensor]:
        carried: list[Tensor] = []
        for loaded in in_turn(load, turns):
            model = parts.model(loaded).to(device).eval()
            for number, cpu_batch in enumerate(batches):
                batch = cpu_batch.above(carried[number]) if len(carried) > number else cpu_batch
                with torch.no_grad(), model.numerics(device):
                    x_BSD = model.activations(batch.to(device)).cpu()
                carried[number : number + 1] = [x_BSD]
        return carried

    def outputs(batches: Iterator[Batch], codec: Codec, device: torch.device) -> Generator[Tensor]:
        gathered: list[Batch] = []
        held = 0
        for batch in batches:
            with torch.no_grad():
                x_BSD = codec.round_trip(through(below, batch.to(device), codec)).cpu() if below else None
            gathered.append(batch if x_BSD is None else batch.above(x_BSD))
            held += row_bytes * len(batch.rows_B)
            if held >= memory:
                yield from up(gathered, device)
                gathered, held = [], 0
        if gathered:
            yield from up(gathered, device)

    return outputs
