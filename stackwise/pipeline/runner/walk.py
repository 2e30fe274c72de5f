"""The walk through the schedule: each stage reused, or trained in a worker, from the bottom up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from stackwise.durable import FileLock, is_locked
from stackwise.errors import DamageError, NotFound, StackWiseError, UsageError
from stackwise.pipeline.fit import state_bytes
from stackwise.pipeline.job import Versions, add_versions, with_parts
from stackwise.pipeline.planning.plan import Plan
from stackwise.pipeline.planning.windows import Superseded, gone
from stackwise.pipeline.recipe import recipe_id
from stackwise.pipeline.rows import HELD_OUT
from stackwise.pipeline.run import RunDirectory, held_by_live_process
from stackwise.pipeline.runner.boundaries import Boundaries
from stackwise.pipeline.runner.crew import Crew
from stackwise.pipeline.runner.events import Manifest
from stackwise.pipeline.runner.foresight import REUSED, Foreseen, committed_stage
from stackwise.pipeline.runner.remedy import remedy
from stackwise.pipeline.schedule import Stage
from stackwise.store import CommittedStage


class Walk:
    """Carries a plan out.

    Args:
        run: The run's directory.
        plan: The plan.
        manifest: Kept level with it.
        boundaries: What enters each stage.
        crew: The workers.
        tell: Told what happens, as an event's name and its values.
    """

    def __init__(
        self,
        run: RunDirectory,
        plan: Plan,
        manifest: Manifest,
        boundaries: Boundaries,
        crew: Crew,
        tell: Callable[..., None],
    ) -> None:
        self._run, self._plan, self._manifest, self._boundaries = run, plan, manifest, boundaries
        self._crew, self._tell = crew, tell
        self._damaged: set[str] = set()

    def begin(self, foreseen: list[Foreseen], *, whole: bool) -> None:
        """Take up what is foreseen: what is committed is done; what is to train again is dropped.

        Args:
            foreseen: The stages.
            whole: Whether all of them are to be carried out.
        """
        for each in foreseen:
            if each.recipe and (found := committed_stage(self._plan, each.recipe)) is not None:
                if each.action == "reuse":
                    self._manifest.committed(self._plan.stages[each.stage], found)
                elif whole:
                    self._plan.store.drop_stage(each.recipe)

    def chosen(self, only: int | None, window: int | None) -> list[int] | None:
        """The places of a stage in the schedule, one for each window; None: every stage's.

        Raises:
            NotFound: It has no such window.
        """
        if only is None:
            return None
        places = [s.place for s in self._plan.stages if s.depth == only and window in (None, s.window)]
        if not places:
            raise NotFound(f"stage {only} has no window {window}: there are 0 to {self._plan.config.windows - 1}")
        return places

    def go(self, chosen: list[int] | None = None) -> None:
        """Every stage in turn; or of the `chosen` places the first that is not committed, above committed stages."""
        while not self._went(chosen):
            pass  # a stage had to be dropped: from the bottom up again

    def _went(self, chosen: list[int] | None) -> bool:
        versions: Versions = {}
        superseded = Superseded(self._plan, str(self._run.path.resolve()))
        self._boundaries.idle = {}  # until it is known again
        for stage in self._plan.stages if chosen is None else self._plan.stages[: chosen[-1] + 1]:
            found = self._reused(stage, versions, chosen)
            if found is None and self._dropped(stage, versions, chosen):
                return False
            committed = self._train(stage, versions) if found is None else found
            add_versions(versions, committed)
            self._manifest.committed(stage, committed)
            self._boundaries.retain(stage, versions)
            superseded.committed(stage, committed, versions)
            if superseded.idle:
                self._boundaries.idle = superseded.idle
                self._boundaries.register()
            for recipe, freed in superseded.prune().items():
                self._tell("pruned", stage=stage.place, recipe=recipe, bytes=freed)
            if chosen is not None and found is None:
                break
        return True

    def _reused(self, stage: Stage, versions: Versions, chosen: list[int] | None) -> CommittedStage | None:
        """A stage as it is committed; None where it is to be trained."""
        key = recipe_id(self._plan.recipe(stage, versions))
        try:
            found = self._plan.store.stage(key)
        except DamageError as error:
            self._tell("warning", stage=stage.place, text=f"{error.message}: stage {stage.label} is trained again")
            self._plan.store.drop_stage(key)
            self._damaged.add(key)
            found = None
        if found is not None:
            shutil.rmtree(self._run.checkpoints(key), ignore_errors=True)  # of a kill just after the commit
            self._tell("reused", stage=stage.place, recipe=key, reason=REUSED)
            following = self._plan.following(stage)
            if chosen is not None and stage.place == chosen[-1] and following is not None:
                self._boundaries.made(following, with_parts(versions, found))
        elif chosen is not None and stage.place not in chosen:
            raise UsageError(
                f"stage {stage.label}, which stage {self._plan.stages[chosen[-1]].depth} stands on, is not committed",
                hint=f"run the same command with --depth {stage.depth} first",
            )
        return found

    def _dropped(self, stage: Stage, versions: Versions, chosen: list[int] | None) -> bool:
        """Drop committed stages whose weights gave way to a later window's, and which training one asks for."""
        lost = gone(self._plan, stage, versions)
        if lost and chosen is not None:
            raise UsageError(
                f"stage {stage.label} needs weights that gave way to those of a later window",
                hint="`stackwise run` trains again what it needs",
            )
        for recipe in lost:
            text = (
                f"stage {stage.label} needs weights that gave way to those of a later window: these are trained again"
            )
            self._tell("warning", stage=stage.place, text=text)
            self._plan.store.drop_stage(recipe)
        return bool(lost)

    def _train(self, stage: Stage, versions: Versions) -> CommittedStage:
        """Train a stage, and write the boundary above it where it can."""
        recipe = self._plan.recipe(stage, versions)
        key = recipe_id(recipe)
        damaged = key in self._damaged
        reason = "its committed files were damaged" if damaged else self._manifest.reason(stage, recipe)
        self._tell(
            "training",
            stage=stage.place,
            recipe=key,
            reason=reason,
            steps=self._plan.steps(stage),
            trunk=self._plan.trunk(stage, versions),
        )
        hands_on = self._plan.writes_above(stage)
        self._refuse_where_busy(stage, key)
        checkpoints = self._run.checkpoints(key)
        saves = state_bytes(self._plan.config, self._plan.vocabulary.size, stage, gradients=False)
        for attempt in (1, 2):
            entry = self._boundaries.entry(stage, versions)
            if hands_on or entry.fills:
                self._boundaries.make_room(stage, entry.reads)
            held_out = None
            if stage.reads_boundary and (self._plan.evaluates(stage) or self._plan.writes_held_out(stage)):
                held_out = self._boundaries.made(stage, versions, HELD_OUT)
            job = self._plan.job(
                stage,
                versions,
                checkpoints=checkpoints,
                train=committed_stage(self._plan, key) is None,
                entry=entry,
                writes=hands_on,
                held_out_reads=held_out,
            )
            try:
                self._crew.work(
                    job,
                    saves=saves if job.train else 0,
                    remedy=lambda measured: remedy(self._plan.config, self._plan.vocabulary.size, stage, measured),
                )
                break
            except StackWiseError as error:
                committed = committed_stage(self._plan, key)
                if error.exit_code != DamageError.exit_code or attempt == 2:
                    raise
                self._boundaries.heal(stage, versions, entry, held_out, error)
                if committed is not None:  # what failed was the boundary above: it is written when it is needed
                    return committed
        committed = self._plan.store.stage(key)
        assert committed is not None, "a worker that ended well has committed its stage"
        return committed

    def _refuse_where_busy(self, stage: Stage, key: str) -> None:
        """A stage that a living run's worker holds is refused at once; a dead run's worker saves and is waited for."""
        lock = self._plan.store.path / "locks" / f"work-{key}.lock"
        if not is_locked(lock):
            return
        mine = str(self._run.path.resolve())
        others = [Path(run) for run, refs in self._plan.store.runs().items() if run != mine and key in refs["recipes"]]
        if any(held_by_live_process(RunDirectory(other)) for other in others):
            FileLock(lock, f"stage {stage.depth}").acquire().release()
