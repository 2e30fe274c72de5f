"""What a stage that is swapped hands on: rows go up through groups of its parts, one in memory at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from stackwise.batch import Batch
from stackwise.store import Codec
from stackwise.training.engine import WEIGHT
from stackwise.training.forward import MakeOutputs, pass_through
from stackwise.training.stage import StageModel
from stackwise.training.swap_parts import Loaded, PartGroup, Parts, in_turn, lend, make_groups, pieces_of
from stackwise.training.swap_pieces import Lender


def grouped_outputs(
    parts: Parts,
    groups: int,
    row_bytes: int,
    memory: int,
    below: Sequence[StageModel] = (),
    *,
    most_pieces: int | None = None,
) -> MakeOutputs:
    """What makes a stage's outputs (see `forward.outputs`) with one group of its parts in memory, bit for bit the same.

    Batches are gathered until their activations fill the memory; then every group takes its turn. A piece that none of
    their rows reaches is not read.

    Args:
        memory: Bytes of activations held at once; a batch is held in any case.
        below: Frozen stages on the device that the rows go through before.
        most_pieces: See `PartLoader`.
    """
    turns, pieces = make_groups(parts, groups), pieces_of(parts)

    def load(device: torch.device, group: PartGroup) -> Loaded:
        loaded = Loaded(group, {name: parts.make(name, None, whole=name not in pieces) for name in group.names})
        for name in pieces.keys() & loaded.parts.keys():
            part, read = loaded.parts[name], partial(_as_it_starts, parts, name)
            lend(part, Lender(part, pieces[name], read, None, device, most=most_pieces, name=name))
        return loaded

    def up(batches: list[Batch], device: torch.device) -> list[Tensor]:
        leaving: list[Tensor] = []
        for loaded in in_turn([partial(load, device, group) for group in turns]):
            loaded.to(device)
            model = parts.model(loaded.parts).eval()
            for number, cpu_batch in enumerate(batches):
                batch = cpu_batch.above(leaving[number]) if len(leaving) > number else cpu_batch
                with torch.no_grad(), model.numerics(device):
                    x_BSD = model.activations(batch.to(device)).cpu()
                leaving[number : number + 1] = [x_BSD]
            del loaded, model
        return leaving

    def outputs(batches: Iterator[Batch], codec: Codec, device: torch.device) -> Generator[Tensor]:
        gathered: list[Batch] = []
        held = 0
        for batch in batches:
            with torch.no_grad():
                x_BSD = codec.round_trip(pass_through(below, batch.to(device), codec)).cpu() if below else None
            gathered.append(batch if x_BSD is None else batch.above(x_BSD))
            held += row_bytes * len(batch.rows_B)
            if held >= memory:
                yield from up(gathered, device)
                gathered, held = [], 0
        if gathered:
            yield from up(gathered, device)

    return outputs


def _as_it_starts(parts: Parts, name: str, path: str) -> dict[str, Tensor]:
    return {f"{WEIGHT}{key}": value for key, value in parts.piece(name, path).items()}
