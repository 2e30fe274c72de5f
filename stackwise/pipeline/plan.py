"""A configuration over prepared data and a store: recipes and jobs of its stages, and what they read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.continual import Replay
from stackwise.config.yaml_files import dump
from stackwise.data import PreparedData, require_samples
from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.identity import content_id
from stackwise.pipeline.division import groups_of, put_groups
from stackwise.pipeline.initial import MOST_ADDED
from stackwise.pipeline.job import Frozen, Source, StageJob, Versions, starts
from stackwise.pipeline.recipe import (
    Reads,
    Recipe,
    Span,
    codec_name,
    forward_specification,
    recipe_id,
    stage_recipe,
    stage_span,
    trunk_id,
)
from stackwise.pipeline.rows import HELD_OUT, check_tasks, drawn_rows, put_rows, rows_key, tasks_digest
from stackwise.pipeline.schedule import FRONT, Stage, drawn_and_window, schedule, stage_below, window_rowset
from stackwise.pipeline.teacher import Judge, judge_of, reference_sources, rollout_inputs, score_model, teacher_of
from stackwise.store import ActivationStore, BoundaryInfo, CommittedStage


@dataclass(frozen=True)
class Entry:
    """How rows come to a stage.

    Args:
        recomputed: The committed stages between that and the stage, lowest first: their output is made as the stage
            asks for it.
        held_out: The held-out rows' boundary that enters a stage to train; None: tokens, or none is needed.
        known: Boundaries above a stage that does not train which have the rows that it replays.
    """

    reads: str | None = None  # the boundary that is read; None: tokens
    recomputed: tuple[Stage, ...] = ()
    fills: bool = False  # whether the boundary that enters the stage is written as they make it
    held_out: str | None = None
    known: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """The model's ids: how many, and which one stands for a masked token."""

    size: int
    mask: int


def vocabulary(config: StackWiseConfig, data: PreparedData) -> Vocabulary:
    """Settle the vocabulary of a configuration over prepared data.

    Raises:
        UsageError: The tokenizer's ids do not fit the model, or the mask token occurs in the data.
    """
    tokenizer = data.tokenizer
    size = config.model.vocab_size or tokenizer.vocab_size
    mask = tokenizer.mask_id if config.training.mask_token_id is None else config.training.mask_token_id
    highest = max((int(split.counts.nonzero()[0][-1]) for split in (data.train, data.held_out)), default=0)
    if not config.objective.masks:
        needed, what = highest + 1, "the data's ids"
    else:
        needed, what = max(highest, mask) + 1, "the tokenizer's vocabulary with a mask token"
    if config.init.weights is not None and size < needed <= size + MOST_ADDED:
        size = needed  # embedding and head get rows (`build.load_part`)
    if needed > size:
        raise UsageError(
            f"model.vocab_size {size} does not fit {what}: {needed} ids are needed",
            hint=f"set model.vocab_size to {needed} or more (or null), or prepare the data with a smaller tokenizer",
        )
    if config.objective.masks:
        for split, name in ((data.train, "training"), (data.held_out, "held-out")):
            if mask < len(split.counts) and split.counts[mask]:
                raise UsageError(
                    f"training.mask_token_id {mask} occurs {int(split.counts[mask])} times in the {name} data",
                    hint="leave training.mask_token_id null: the tokenizer's mask token occurs in no text",
                )
    return Vocabulary(size, mask)


def check_data(config: StackWiseConfig, data: PreparedData) -> Vocabulary:
    """Check that prepared data fits a configuration.

    Raises:
        UsageError: The vocabulary does not fit, the mask token occurs in the data, a side is shorter than one sample
            or lacks a column that the objective needs.
    """
    for split, name in ((data.train, "training"), (data.held_out, "held-out")):
        require_samples(split, config.training.seq_len, name)
        for column in config.objective.inputs:
            if column not in split.columns:
                raise UsageError(
                    f"the {name} data has no column {column}, which training.objective needs",
                    hint="prepare rows of input_ids that bring it, one value a token; data.columns names what is kept",
                )
        config.objective.check_samples(split, config.training.seq_len)
    return vocabulary(config, data)


class Plan:
    """A configuration over prepared data and a store.

    Args:
        known_rowsets: Ids by `rows_key`, from an earlier run.
        sources: Weights that parts start from before any stage is committed: of a pretrained model, or grown. A part
            that is not named starts fresh.

    Raises:
        UsageError: The data does not fit the configuration.
    """

    def __init__(
        self,
        config: StackWiseConfig,
        data: PreparedData,
        store: ActivationStore,
        *,
        device: str,
        memory: int | None = None,
        known_rowsets: dict[str, list[Any]] | None = None,
        sources: Mapping[str, Source] | None = None,
    ) -> None:
        self.config, self.data, self.store, self.device = config, data, store, device
        self.memory = memory
        self.stages = schedule(config)
        self.vocabulary = check_data(config, data)
        self.forward = forward_specification(config, self.vocabulary.size, self.vocabulary.mask, data.id)
        self.known_rowsets = known_rowsets if known_rowsets is not None else {}
        self.sources = dict(sources or {})
        self.teacher = teacher_of(config, self.vocabulary.size, self.vocabulary.mask, data.id)
        self._score_model = score_model(config, data)
        if self.teacher is not None:
            self.teacher.check(self.stages, data)
        self._heads: dict[str, str] = {}
        self._judges: dict[int, Judge] = {}
        for stage in self.stages:  # its windows have the same
            judge = judge_of(config, stage, self.vocabulary.size, self.vocabulary.mask, data.id)
            if judge is not None and stage.depth not in self._judges:
                judge.check_ids(data)
                self._judges[stage.depth] = judge
        check_tasks(config, data, self.stages)

    def rowset(self, number: int) -> tuple[str, int]:
        """Id and rows of a rowset; it is put into the store where it is not there yet."""
        entry = self._rowset(number)
        return str(entry[0]), int(entry[1])

    def head_rowset(self, number: int) -> str:
        """The rowset that the boundaries of a rowset are found by: its first group's (`division.py`), or itself."""
        rowset, groups = self.rowset(number)[0], groups_of(self.config, number)
        if groups == 1:
            return rowset
        if rowset not in self._heads or not self._stored(self._heads[rowset]):
            self._heads[rowset] = put_groups(self.store, rowset, groups)[0]
        return self._heads[rowset]

    def span(self, stage: Stage) -> Span:
        """The steps of a stage in its window. Raises UsageError: there is none."""
        return stage_span(self.config, stage, self.drawn(stage))

    def steps(self, stage: Stage) -> int:
        """How many steps a stage takes in its window."""
        return self.span(stage).length

    def rows_seen(self, stage: Stage) -> int:
        """Rows that a stage reads as it trains in its window, those of later epochs again."""
        settings = self.config.stage_training(stage.depth)
        return self.steps(stage) * settings.batch_size * settings.accumulation

    def drawn(self, stage: Stage) -> int:
        """Rows of all windows of a stage together; of tasks in turn those of its task, without what is replayed."""
        return int(self._rowset(stage.rowset)[-1])

    def _rowset(self, number: int) -> list[Any]:
        """A rowset's id, its rows, and the rows of all windows where there are several."""
        key = rows_key(self.config, self.data.id, number)
        entry = self.known_rowsets.get(key)
        if entry is None or not self._stored(entry[0]):
            split = self.data.held_out if number == HELD_OUT else self.data.train
            entry = list(put_rows(self.config, split, self.store, number))
            if self.config.windows > 1 and number != HELD_OUT:
                entry.append(drawn_rows(self.config, split, number))
            self.known_rowsets[key] = entry
        return entry

    def trunk(self, stage: Stage, versions: Versions) -> str | None:
        """The id of what the stage reads; None where it reads tokens."""
        if not stage.reads_boundary:
            return None
        return trunk_id(self.forward, self._digests(stage.trunk, versions), stage.precisions(stage.trunk))

    def recipe(self, stage: Stage, versions: Versions) -> Recipe:
        """The recipe of a stage above committed ones."""
        rowset, rows = self.rowset(stage.rowset)
        uses_held_out = self.config.uses_held_out(stage.depth)
        reads = Reads(
            rowset,
            rows,
            {part: source.digest for part, source in starts(stage, versions).items()},
            self.trunk(stage, versions),
            self._inputs(stage, held_out=uses_held_out),
            self.rowset(HELD_OUT)[0] if uses_held_out else None,
        )
        return stage_recipe(self.config, stage, self.forward, self.span(stage), reads)

    def _inputs(self, stage: Stage, *, held_out: bool) -> dict[str, str]:
        """Digests of what is read: columns (held-out ones where the result depends on them), a teacher, tasks."""
        names = self.config.objective.inputs
        inputs = {name: self.data.train.column_digest(name) for name in names}
        if held_out:
            inputs |= {f"held-out {name}": self.data.held_out.column_digest(name) for name in names}
        if (meta := self.config.stage_training(stage.depth).meta) is not None:
            inputs |= {"tasks": tasks_digest(meta, self.data)}
        if self.config.objective.rolls_out:
            inputs |= rollout_inputs(stage, self.sources, self._score_model)
        if (judge := self._judges.get(stage.depth)) is not None:
            inputs |= judge.inputs(stage)
        return inputs | (self.teacher.inputs(stage) if self.teacher is not None else {})

    def committed(self, recipe: str) -> CommittedStage | None:
        """A committed stage, its files unchecked; None where there is none, or its record is damaged."""
        try:
            return self.store.stage(recipe, check=False)
        except DamageError:
            return None

    def boundary(self, stage: Stage, versions: Versions, rowset: int | None = None) -> BoundaryInfo | None:
        """The boundary that enters a stage, where it is complete; of the stage's own rowset, or of another."""
        trunk = self.trunk(stage, versions)
        if trunk is None:
            return None
        number = stage.rowset if rowset is None else rowset
        info = self.store.find(trunk=trunk, rowset=self.head_rowset(number), codec=codec_name(self.config.store))
        return info if info is not None and info.state == "complete" else None

    def nearest(self, stage: Stage, versions: Versions) -> BoundaryInfo | None:
        """The complete boundary that enters the stage, or that enters the nearest stage below it; None: tokens."""
        number = stage.rowset
        while stage.reads_boundary:
            info = self.boundary(stage, versions, number)
            if info is not None:
                return info
            stage = stage_below(self.stages, stage)
        return None

    def base(self, stage: Stage, *, train: bool = True) -> tuple[Stage | None, tuple[Stage, ...]]:
        """What a stage reads from, where all boundaries that are to be stored are there.

        Args:
            train: To train it, passes may be fused; the pass that writes the boundary above reads what is stored.

        Returns:
            The stage whose boundary is read (itself, or one below it; None: tokens), and the stages whose output is
            made on demand, lowest first.
        """
        at, recomputed = stage, list[Stage]()
        while at.reads_boundary and not self.reads_stored(at, fused=train and at is stage):
            at = stage_below(self.stages, at)
            recomputed.insert(0, at)
        return at if at.reads_boundary else None, tuple(recomputed)

    def reads_stored(self, stage: Stage, *, fused: bool) -> bool:
        """Whether the boundary that enters a stage is stored before it is read; with `fused`, it may be filled."""
        return self.stores(stage) and not (fused and self.config.store.fuse_passes and not self.lends_rows(stage))

    def lends_rows(self, stage: Stage) -> bool:
        """Whether later tasks read, of the boundary that enters a stage, the rows that they replay.

        So it is where all blocks below are frozen, in every task: what they made of a row is what they would make.
        """
        standing = stage.reads_boundary and stage.first == self.config.bottom
        return standing and isinstance(self.config.training.continual, Replay) and self.stores(stage)

    def lenders(self, stage: Stage, rowset: int) -> list[int]:
        """The rowsets of the earlier tasks whose boundaries have what a rowset replays, as it enters a stage."""
        drawn, window = drawn_and_window(self.config, rowset)
        if not window or not self.lends_rows(stage):
            return []
        return [window_rowset(self.config, drawn, earlier) for earlier in range(window)]

    def lent(self, versions: Versions) -> set[str]:
        """The boundaries that later tasks read rows of, as far as they are there."""
        lowest = self.stages[0]
        if not self.lends_rows(lowest):
            return set()
        stages = {stage.rowset for stage in self.stages}
        there = (self.boundary(lowest, versions, rowset) for rowset in sorted(stages))
        return {info.id for info in there if info is not None}

    def stores(self, stage: Stage) -> bool:
        """Whether the boundary that enters a stage is one of those that are stored."""
        return stage.reads_boundary and self.config.stores_boundary(stage.depth)

    def fuses_passes(self, stage: Stage) -> bool:
        """Whether a stage itself writes the boundary that enters it, while it trains.

        One that nobody would read again is not written at all: no later stage, no later epoch, no later run.
        """
        if not self.config.store.fuse_passes or not self.stores(stage) or self.lends_rows(stage):
            return False
        rows = self.rowset(stage.rowset)[1]
        above = any(later.rowset == stage.rowset for later in self.stages[stage.place + 1 :])
        return above or self.rows_seen(stage) > rows or self.config.store.keep not in ("none", 0)

    def following(self, stage: Stage) -> Stage | None:
        """The stage after one, where it reads its own boundary, made by a pass before it."""
        for above in self.stages[stage.place + 1 : stage.place + 2]:
            return above if self.base(above)[0] is above else None
        return None

    def next_window(self, stage: Stage) -> Stage | None:
        """The same stage in its next window, where it has one; what a shared budget commits on its way is kept."""
        if stage.share is not None:
            return None
        return next((later for later in self.stages[stage.place + 1 :] if later.depth == stage.depth), None)

    def writes_above(self, stage: Stage) -> bool:
        """Whether a worker that has trained a stage writes the boundary above it."""
        above = self.following(stage)
        return above is not None and above.rowset == stage.rowset and above.first == stage.last + 1

    def evaluates(self, stage: Stage) -> bool:
        """Whether a stage is evaluated on held-out rows as it trains."""
        return (
            self.config.stage_training(stage.depth).evaluates or bool(stage.candidates) or bool(self.config.data.tasks)
        )

    def writes_held_out(self, stage: Stage) -> bool:
        """Whether a worker that has trained a stage writes the held-out rows' boundary above it."""
        above = self.stages[stage.place + 1 : stage.place + 2]
        return any(s.reads_boundary and s.first == stage.last + 1 and self.evaluates(s) for s in above)

    def job(
        self,
        stage: Stage,
        versions: Versions,
        *,
        checkpoints: Path,
        train: bool,
        entry: Entry,
        writes: bool,
        rowset: int | None = None,
    ) -> StageJob:
        """A worker's job at one stage.

        Args:
            versions: What is committed below it (to train it), or with it (to write the boundary above).
            rowset: The number of the rowset, where it is not the stage's own.
        """
        writes_held_out = rowset is None and self.writes_held_out(stage)
        held_out = self.rowset(HELD_OUT)[0] if rowset is None and (self.evaluates(stage) or writes_held_out) else None
        recipe = self.recipe(stage, versions) if train else {}
        number = stage.rowset if rowset is None else rowset
        rowset_id, rows = self.rowset(number)
        embedding = versions.get(FRONT) if stage.reads_boundary and self.config.model.tie_embeddings else None
        initial = starts(stage, versions) if train else {part: versions[part] for part in stage.forward_parts}
        return StageJob(
            config=dump(self.config),
            stage=stage,
            store=str(self.store.path),
            data=str(self.data.directory),
            vocab_size=self.vocabulary.size,
            mask_token=self.vocabulary.mask,
            device=self.device,
            checkpoints=str(checkpoints),
            recipe=recipe,
            recipe_id=recipe_id(recipe) if train else self._maker(stage, versions),
            forward=self.forward,
            rows=rows,
            rowset=rowset_id,
            rowset_number=number,
            span=self.span(stage),
            initial=initial,
            embedding=embedding,
            trunk_digests=self._digests(stage.trunk, versions),
            train=train,
            reads=entry.reads,
            writes=writes,
            recomputed=tuple(
                Frozen(below, {part: versions[part] for part in below.forward_parts}) for below in entry.recomputed
            ),
            fills=entry.fills,
            held_out=held_out,
            held_out_reads=entry.held_out,
            writes_held_out=writes_held_out,
            match=self._match(stage) if train else None,
            reference=reference_sources(stage, self.sources) if self.config.objective.rolls_out else {},
            replayed=rows - int(self._rowset(number)[-1]) if self.config.tasks_in_turn and number != HELD_OUT else 0,
            known=entry.known,
        )

    def _match(self, stage: Stage) -> int | None:
        """The width of the head's layer beside its logits: scores, or a teacher's hidden states."""
        if (width := self.config.objective.score_width) is not None:
            return width
        return None if self.teacher is None else self.teacher.match(stage)

    def _maker(self, stage: Stage, versions: Versions) -> str:
        """What the work on the boundary above a committed stage is known by."""
        return versions[stage.blocks[-1]].recipe or content_id("standing", self._digests(stage.forward_parts, versions))

    def _stored(self, rowset: str) -> bool:
        try:
            self.store.rowset(rowset)
        except NotFound:
            return False
        return True

    def _digests(self, parts: tuple[str, ...], versions: Versions) -> list[str]:
        return [str(versions[part].digest) for part in parts]
