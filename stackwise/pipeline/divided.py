"""The memory that one rank takes of a stage which ranks divide (`parallel`)."""

from __future__ import annotations

from stackwise.pipeline.estimate import WEIGHT_BYTES, WIDE, Estimate
from stackwise.pipeline.schedule import FRONT, HEAD, block_number

GATHERED = 2  # blocks whose weights are whole at once: the one that computes, and the one that comes


def rank_bytes(estimate: Estimate) -> dict[str, int]:
    """By what it is for (`planning.trace.PARTS`), about the bytes of the rank that takes most; "peak" is their sum.

    Of state a rank has a slice of the blocks of its place (`pipeline`): matrices divided by `tensor`, what is left by
    `shard`. Beside that stand blocks that are whole while they compute, their gradients before they are divided, the
    ends of the stage in the same way, and activations of as many microbatches as are between their two passes.
    """
    places = [_place(estimate, place) for place in range(estimate.config.parallel.pipeline)]
    return max(places, key=lambda place: place["peak"])


def _place(estimate: Estimate, place: int) -> dict[str, int]:
    config, stage = estimate.config, estimate.stage
    parallel, settings = config.parallel, config.stage_training(stage.depth)
    names = [*stage.blocks, *stage.lookahead]
    parts = parallel.pipeline * (2 if parallel.schedule == "interleaved" else 1)
    bounds = [round(len(names) * at / parts) for at in range(parts + 1)]
    mine = [name for at in range(place, parts, parallel.pipeline) for name in names[bounds[at] : bounds[at + 1]]]
    last = place == parallel.pipeline - 1
    ends = [FRONT] if FRONT in stage.holds and (place == 0 or (last and config.model.tie_embeddings)) else []
    ends += [HEAD] if HEAD in stage.holds and last else []
    half = config.precision not in WIDE
    wide = WEIGHT_BYTES * (2 if config.precision == "fp64" else 1)

    blocks = [estimate.parameters(name) / parallel.tensor for name in mine]
    at_ends = sum(estimate.parameters(name) for name in ends)
    held = (sum(blocks) + at_ends) / parallel.shard
    trained = max(1, estimate.trained_parameters)
    moments = (estimate.state_bytes(gradients=False) - wide * trained) / trained
    largest = max(blocks, default=0.0)
    together = min(len(blocks), GATHERED) * largest if parallel.zero == 3 else sum(blocks)
    undivided = sum(blocks) if parallel.zero == 1 else largest
    gathered = (2 if half else wide) * together + wide * at_ends + wide * (undivided + at_ends)

    count = settings.accumulation // parallel.shares
    waiting = 1
    if parallel.pipeline > 1:
        waiting = count if parallel.schedule == "gpipe" else min(count, parts - place)
    rows = settings.batch_size * config.row_positions
    kept = sum(estimate.kept_bytes(config.model.at(block_number(name))) for name in mine) / parallel.tensor
    scored = rows * (config.training.max_mask_fraction if config.objective.masks else 1.0)
    at_head = scored * config.model.d_model * (10 if half else 16) + rows * config.model.d_model * (2 if half else 4)
    by_part = {
        "weights": wide * held,
        "gradients": wide * held,
        "optimizer": moments * held,
        "activations": waiting * rows * kept,
        "head": at_head + estimate.loss_bytes(scored, half) if HEAD in ends else 0,
        "buffers": gathered,
    }
    sizes = {name: int(size) for name, size in by_part.items()}
    return sizes | {"peak": sum(sizes.values())}
