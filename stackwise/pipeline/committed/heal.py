"""Chunks of a run's boundaries made again from its committed weights, bit for bit as they were written."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from stackwise.errors import NotFound
from stackwise.model import enter
from stackwise.pipeline.committed.load import CommittedRack, load_rack
from stackwise.pipeline.device import resolve_device
from stackwise.pipeline.recipe import forward_specification, trunk_id
from stackwise.pipeline.rows import choose_samples
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import HEAD
from stackwise.store import CODECS, ActivationStore, BoundaryInfo, Recompute
from stackwise.training.forward import forward_rows

GROUP = 16
"""Chunks that go up together, so that each stage is loaded once for all of them."""


def recomputer(run: RunDirectory, store: ActivationStore, device: str = "auto") -> Recompute:
    """What `ActivationStore.repair` and `ensure` call to have chunks made again.

    The rows go up from their tokens stage by stage, in the same batches as when the boundary was written, and through
    the codec at each boundary between: so the same machine gives the same bytes.

    Args:
        run: The run whose committed stages make the boundaries.
        store: Where masks and rowsets are.
        device: Where to compute.

    Raises:
        UsageError: The run has no committed stage.
    """
    whole = load_rack(run, resolve_device(device), whole=False)

    def recompute(info: BoundaryInfo, chunks: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        rack = _below(whole, info)
        samples_R = _samples(whole, store, info)
        for first in range(0, len(chunks), GROUP):
            group = chunks[first : first + GROUP]
            yield from zip(group, _raised(rack, store, info, group, samples_R), strict=True)

    return recompute


def _below(rack: CommittedRack, info: BoundaryInfo) -> CommittedRack:
    """The part of a rack that made a boundary, with the weights of that time."""
    forward = forward_specification(rack.config, rack.vocab_size, rack.mask_token)
    for stage, versions in zip(rack.stages, rack.versions, strict=True):
        parts = stage.makes
        if not all(part in versions for part in parts):
            continue
        digests = [str(versions[part].digest) for part in parts]
        if trunk_id(forward, digests, stage.precisions(parts)) == info.trunk:
            below = rack.up_to(stage)
            return dataclasses.replace(below, parts={part: versions[part] for part in (*parts, HEAD)})
    why = ": that of an earlier window is gone with its weights" if rack.config.windows > 1 else ""
    raise NotFound(f"no committed stage of this run makes boundary {info.id}{why}")


def _samples(rack: CommittedRack, store: ActivationStore, info: BoundaryInfo) -> np.ndarray:
    """For each row its sample in the run's data."""
    split, seq_len = rack.data.train, rack.config.training.seq_len
    wanted = store.rowset(info.rowset).sample_ids
    for number in sorted({stage.rowset for stage in rack.stages}):
        samples_R = choose_samples(rack.config, split, number)
        if len(samples_R) == len(wanted) and (split.sample_ids(seq_len)[samples_R] == wanted).all():
            return samples_R
    raise NotFound(f"boundary {info.id} is of other rows than this run's")


@torch.no_grad()
def _raised(
    rack: CommittedRack,
    store: ActivationStore,
    info: BoundaryInfo,
    chunks: Sequence[int],
    samples_R: np.ndarray,
) -> list[torch.Tensor]:
    """The rows of some chunks, taken up from their tokens through the rack."""
    seq_len = rack.config.training.seq_len
    size, codec = forward_rows(seq_len), CODECS[info.codec]
    stream = rack.autocast or torch.float32
    masks = store.rowset(info.rowset).mask_ids
    ranges = [(chunk * info.chunk_rows, min((chunk + 1) * info.chunk_rows, info.rows)) for chunk in chunks]
    rows = [range(a, min(a + size, stop)) for start, stop in ranges for a in range(start, stop, size)]
    front, objective = rack.front(), rack.objective
    narrow = torch.autocast(rack.device.type, rack.autocast, enabled=rack.autocast is not None)
    carried: list[torch.Tensor] = []
    for stage in rack.modules():
        for place, part in enumerate(rows):
            index = np.arange(part.start, part.stop)
            with narrow:
                if stage.depth == 0:
                    tokens = torch.from_numpy(rack.data.train.samples(samples_R[index], seq_len)).to(rack.device)
                    shown = torch.from_numpy(store.masks(masks[index], seq_len))
                    ids = store.rowset(info.rowset).sample_ids[index]
                    entering = objective.inputs(tokens, shown, ids)
                    x_BSD = enter(front, entering, objective.times(shown), causal=objective.causal).to(stream)
                    carried.append(torch.empty(0))
                else:
                    x_BSD = codec.round_trip(carried[place]).to(rack.device, stream)
                carried[place] = stage.forward(x_BSD, _segments(rack, samples_R[index], seq_len)).cpu()
    per_chunk = [len(range(start, stop, size)) for start, stop in ranges]
    edges = np.cumsum([0, *per_chunk])
    return [torch.cat(carried[a:b]) for a, b in itertools.pairwise(edges)]


def _segments(rack: CommittedRack, samples_B: np.ndarray, seq_len: int) -> torch.Tensor | None:
    if not rack.config.data.within_documents:
        return None
    return torch.from_numpy(rack.data.train.segments(samples_B, seq_len)).to(rack.device)
