"""The rows of the table: schedules of one rack, and the budget that each of them gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stackwise.config import StackWiseConfig
from stackwise.pipeline.recipe import known_steps
from stackwise.pipeline.schedule import FRONT, HEAD, Stage, block_number, schedule

Budget = Literal["rows", "fresh", "steps", "half"]

BUDGETS: dict[Budget, str] = {
    "rows": "equal block updates on equal rows: each stage sees the rows that end to end saw",
    "fresh": "equal block updates: each stage sees rows of its own",
    "steps": "equal steps on equal rows: a rack that is shallow for a while computes less",
    "half": "half the block updates on equal rows: half of the compute of end to end",
}

PLAIN = "end to end, plain PyTorch"
WSD = "end to end, wsd"
"""End to end under the schedule of rates that growth has."""

BASE: dict[str, Any] = {
    "model.d_model": 96,
    "model.n_heads": 4,
    "model.init_std": 0.1,
    "model.architecture.n_stacks": 8,
    "model.architecture.blocks_per_stack": 1,
    "data.tokenizer": "bytes",
    "training.batch_size": 4,
    "training.checkpoint_minutes": 60.0,
    "device": "cpu",
}
"""The rack: 8 blocks of width 96 on the demo's corpus, by bytes, and its samples of 128 tokens."""

DEPTH = "model.architecture.n_stacks"
WIDTH: int = BASE["model.d_model"]


@dataclass(frozen=True)
class Size:
    """What the racks of a table have in common: their width, and the updates of each block."""

    width: int
    steps: int

    def base(self, depth: int = BASE[DEPTH]) -> dict[str, Any]:
        """The rack of so many blocks, the data and the batch; fresh weights of 1/sqrt(width)."""
        narrow = {} if self.width == WIDTH else {"model.d_model": self.width, "model.init_std": self.width**-0.5}
        return BASE | narrow | {DEPTH: depth}

    def file(self, docs: Path, depth: int = BASE[DEPTH]) -> Path:
        """Where results are: of 8 blocks those of `benchmarks.quality`."""
        parts = [str(self.steps)] if self.steps != 800 else []
        parts += [f"width-{self.width}"] if self.width != WIDTH else []
        parts += [f"{depth}-blocks"] if depth != BASE[DEPTH] else []
        return docs / ("-".join(["quality", *parts]) + ".json")


@dataclass(frozen=True)
class Row:
    """A schedule.

    Args:
        name: What the table calls it.
        overrides: What makes it, as dotted keys.
        budgets: Those that differ for it: a schedule of one stage sees its rows once either way.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    budgets: tuple[Budget, ...] = ("rows", "fresh")


def _blockwise(size: int, **more: Any) -> dict[str, Any]:
    return {"training.mode": "blockwise", "training.block_size": size} | {
        f"training.{key}": value for key, value in more.items()
    }


def _progressive(**more: Any) -> dict[str, Any]:
    return {
        "training.progressive.enabled": True,
        "model.architecture.n_stacks": 4,
        "model.architecture.blocks_per_stack": 2,
    } | {f"training.progressive.{key}": value for key, value in more.items()}


def _fusion(strategy: str) -> dict[str, Any]:
    return _blockwise(2) | {"training.fusion.strategy": strategy}


def _grown(*phases: tuple[int, float], **more: Any) -> dict[str, Any]:
    growth = [{"blocks": blocks, "until": until} | more for blocks, until in phases]
    return {"training.mode": "end_to_end", "training.growth": growth}


def _joint(share: float) -> dict[str, Any]:
    return {"strategy": "trainable", "share": share}


GROWS: tuple[Budget, ...] = ("rows", "steps", "half")

ROWS = (
    Row(PLAIN, {"training.mode": "end_to_end"}, ("rows",)),
    Row("end to end", {"training.mode": "end_to_end"}, ("rows",)),
    Row("end to end, swapped", {"training.mode": "end_to_end", "training.swap": "always"}, ("rows",)),
    Row("end to end, 1/t weights", {"training.mode": "end_to_end", "training.loss_weight": "inverse_time"}, ("rows",)),
    Row(WSD, {"training.mode": "end_to_end", "training.lr_schedule": "wsd"}, ("rows",)),
    Row("end to end, Muon", {"training.mode": "end_to_end", "training.optimizer": "muon"}, ("rows",)),
    *(
        Row(f"grown from {blocks} at {until:g}", _grown((blocks, until)), GROWS)
        for blocks in (1, 2, 4)
        for until in (0.5, 0.8)
    ),
    *(Row(f"grown from 2 at {until:g}", _grown((2, until)), GROWS) for until in (0.65, 0.9)),
    Row("grown from 2 at 0.5 and 4 at 0.8", _grown((2, 0.5), (4, 0.8)), GROWS),
    Row("grown from 1 at 0.5 and 2 at 0.8", _grown((1, 0.5), (2, 0.8)), GROWS),
    Row("grown from 2 at 0.8, decay 0.1", _grown((2, 0.8)) | {"training.decay": 0.1}, GROWS),
    Row("grown from 2 at 0.8, Muon", _grown((2, 0.8)) | {"training.optimizer": "muon"}, GROWS),
    Row("grown from 2 at 0.8, new blocks warmed up", _grown((2, 0.8), warmup=0.05), GROWS),
    Row("grown from 2 at 0.8, copied", _grown((2, 0.8), new="copy"), GROWS),
    Row("grown from 2 at 0.8, doubled", _grown((2, 0.8), new="double"), GROWS),
    Row("grown from 2 at 0.8, fresh", _grown((2, 0.8), new="fresh"), GROWS),
    Row("grown from 2 at 0.8, between the ends", _grown((2, 0.8), ends=True), GROWS),
    Row("grown from 2 at 0.8, swapped", _grown((2, 0.8)) | {"training.swap": "always"}, GROWS),
    Row("stages of 1", _blockwise(1)),
    Row("stages of 2", _blockwise(2)),
    Row("stages of 4", _blockwise(4)),
    Row("stages of 4, 2, 1, 1", {"training.mode": "blockwise", "training.block_sizes": [4, 2, 1, 1]}),
    *(
        Row(f"stages of {size}, then joint for {share:g}", _blockwise(size) | {"training.fusion": _joint(share)})
        for size, share in ((2, 0.2), (2, 0.5), (4, 0.2))
    ),
    Row("stages of 1, tail of 1", _blockwise(1, lookahead="tail")),
    Row("stages of 2, tail of 1", _blockwise(2, lookahead="tail")),
    Row("stages of 2, tail of 2", _blockwise(2, lookahead="tail", lookahead_blocks=2)),
    Row("stages of 4, tail of 1", _blockwise(4, lookahead="tail")),
    Row("stages of 1, auxiliary head of 1", _blockwise(1, lookahead="auxiliary")),
    Row("stages of 2, auxiliary head of 1", _blockwise(2, lookahead="auxiliary")),
    Row("stages of 2, own head", _blockwise(2) | {"model.tie_embeddings": False}),
    Row("stages of 2, tied head frozen", _blockwise(2, tied_head="frozen")),
    Row("stages of 2, 1/t weights", _blockwise(2, loss_weight="inverse_time")),
    Row("stages of 2, time as depth", _blockwise(2, mask_schedule_over="depth")),
    Row("stages of 2, fused after: head", _fusion("frozen")),
    Row("stages of 2, fused after: all", _fusion("trainable")),
    Row("stages of 2, fused after: neighbours first", _fusion("hierarchical")),
    Row("fused, trainable, by 2", _blockwise(2, mode="fused", fusion_mode="trainable")),
    Row("independent stages of 2", _blockwise(2, mode="independent")),
    Row("prepended stacks of 2", _progressive(building_mode="prepend")),
    Row("stacks of 2 over a QLoRA trunk", _progressive(trunk_strategy="qlora")),
    Row("stages of 2, boundaries in fp32", _blockwise(2) | {"store.codec": "fp32"}, ("rows",)),
    Row("stages of 2, boundaries in fp8", _blockwise(2) | {"store.codec": "fp8"}, ("rows",)),
    Row("stages of 2, boundaries in int8", _blockwise(2) | {"store.codec": "int8"}, ("rows",)),
)


def configuration(
    base: dict[str, Any], row: Row, budget: Budget, *, steps: int, rate: float, seed: int
) -> StackWiseConfig:
    """A row's configuration under a budget.

    Args:
        base: The rack, the data and the batch that all rows share.
        row: The row.
        budget: The budget.
        steps: Steps of end-to-end training: as many updates of each block are what every row spends.
        rate: The peak learning rate.
        seed: The seed.
    """
    given = base | row.overrides | {"seed": seed, "training.learning_rate": rate, "training.steps": steps}
    config = StackWiseConfig.from_preset("stages", given)
    # As many block updates as end to end, whatever a step of each stage updates.
    share = config.model.n_blocks * steps / updates(config)
    own = steps if budget == "steps" else max(1, round(steps * share * (0.5 if budget == "half" else 1.0)))
    batch = config.training.batch_size * config.training.accumulation
    rows = own * batch if budget == "fresh" else steps * batch
    fresh = budget == "fresh" and config.n_stages > 1
    return StackWiseConfig.from_preset(
        "stages", given | {"training.steps": own, "training.rows": rows, "training.fresh_masks": fresh}
    )


def updates(config: StackWiseConfig) -> int:
    """Updates of blocks that a run makes."""
    return sum(updated(stage) * (known_steps(config, stage) or 0) for stage in schedule(config))


def updated(stage: Stage) -> int:
    """Blocks that a step of a stage updates; a block's adapters count as one."""
    return sum(part not in (FRONT, HEAD) for part in stage.trains)


def flops(config: StackWiseConfig, vocab_size: int) -> float:
    """Floating-point operations of a run's training and forward passes, of its matrices alone.

    Two a parameter and token forward, two for the gradient that goes down, two for the weight's own (Kaplan et al.,
    arXiv 2001.08361, section 2.1). The head is asked at the masked positions, or at all.
    """
    return sum(_flops_by_stage(config, vocab_size))


def whole_share(config: StackWiseConfig, vocab_size: int) -> float:
    """The share of a run's operations during which every block of the rack is in memory at once."""
    if config.training.swap == "always":
        return 0.0
    by_stage = _flops_by_stage(config, vocab_size)
    whole = (len(_blocks(stage)) == config.model.n_blocks for stage in schedule(config))
    return sum(count for count, all_blocks in zip(by_stage, whole, strict=True) if all_blocks) / sum(by_stage)


def _blocks(stage: Stage) -> list[str]:
    return [part for part in stage.holds if part not in (FRONT, HEAD)]


def _flops_by_stage(config: StackWiseConfig, vocab_size: int) -> list[float]:
    training, stages = config.training, schedule(config)
    masked = (training.min_mask_fraction + training.max_mask_fraction) / 2 if training.objective.masks else 1.0
    head = vocab_size * config.model.d_model * masked
    counts = []
    for stage in stages:
        tokens = (known_steps(config, stage) or 0) * training.batch_size * training.accumulation
        tokens *= training.seq_len
        inner = _blocks(stage)
        lowest = next((place for place, part in enumerate(inner) if part in stage.trains), len(inner))
        total = tokens * head * (4 + 2 * (HEAD in stage.trains))
        for place, part in enumerate(inner):
            block = config.model.at(block_number(part)).active_parameters
            total += tokens * block * (2 + 2 * (place >= lowest) + 2 * (part in stage.trains))
        above = stages[stage.place + 1] if stage.place + 1 < len(stages) else None
        if above is not None and above.reads_boundary:
            passed = range(above.first) if config.fresh_masks else range(stage.first, stage.last + 1)
            blocks = config.model.total(lambda block: block.active_parameters, passed)
            total += (training.rows or 0) * training.seq_len * blocks * 2
        counts.append(total)
    return counts
