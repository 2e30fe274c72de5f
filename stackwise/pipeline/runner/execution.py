"""Carries out what was decided: each stage reused, or trained in a worker; what enters it made, kept and dropped."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from stackwise.durable import FileLock, is_locked
from stackwise.errors import BusyError, DamageError, NoSpaceError, NotFound, StackWiseError, UsageError
from stackwise.pipeline.costs import boundary_budget
from stackwise.pipeline.decisions import REUSED, Decision, RunPreview, decide
from stackwise.pipeline.division import disks
from stackwise.pipeline.job import Versions, with_parts
from stackwise.pipeline.plan import Entry, Plan
from stackwise.pipeline.recipe import boundary_bytes, codec_name, whole_boundary
from stackwise.pipeline.rows import HELD_OUT
from stackwise.pipeline.run import RunDirectory, held_by_live_process
from stackwise.pipeline.runner.manifest import RunContext
from stackwise.pipeline.schedule import Stage, stage_below
from stackwise.store import CommittedStage

SECONDS = 0.05  # between two looks at a stage that another run trains


class Execution:
    """Carries a plan out.

    Args:
        waits: Wait for a stage that another run trains, rather than refuse it.
    """

    def __init__(self, context: RunContext, boundaries: Boundaries, *, waits: bool = False) -> None:
        self._waits = waits
        self._run, self._plan, self._history = context.run, context.plan, context.history
        self._manifest = context.manifest
        self._pool, self._emit, self._boundaries = context.pool, context.emit, boundaries
        self._again: set[str] = set()

    def begin(self, preview: RunPreview) -> None:
        """Note in the manifest what is committed already."""
        for decision in preview.decisions:
            if decision.action == "reuse" and decision.committed is not None:
                self._manifest.committed(decision.stage, decision.committed)

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

    def go(self, preview: RunPreview, chosen: list[int] | None = None) -> None:
        """Every stage in turn; or of the `chosen` places the first that is not committed, above committed stages.

        Args:
            chosen: See `chosen`; stages that train again because others need them do so in a run of all stages alone.
        """
        self._again = set(preview.again) if chosen is None else set()
        while not self._pass(chosen):
            pass  # weights turned out to be needed that are gone: from the bottom up again

    def _pass(self, chosen: list[int] | None) -> bool:
        """From the bottom up; False where a stage below has to train again first."""
        superseded = Superseded(self._plan, str(self._run.path.resolve()))
        self._boundaries.idle = {}  # until it is known again
        for decision in decide(self._plan, self._history, again=self._again, check=True):
            stage = decision.stage
            if chosen is not None and stage.place > chosen[-1]:
                break
            if decision.damage is not None:
                text = f"{decision.damage}: stage {stage.label} is trained again"
                self._emit("warning", stage=stage.place, text=text)
                self._plan.store.drop_stage(decision.id)  # or the worker would find it committed
                self._history.damaged.add(decision.id)
            trains = decision.action == "train"
            if trains and chosen is not None:
                self._check_chosen(decision, chosen)
            if decision.lost:
                text = f"stage {stage.label} needs weights that a later window's replaced: these are trained again"
                self._emit("warning", stage=stage.place, text=text)
                self._again |= decision.lost
                return False
            with self._turn(decision) if trains else contextlib.nullcontext(decision) as decision:
                trains = decision.action == "train"
                committed = self._train(decision) if trains else self._reuse(decision, chosen)
            versions = with_parts(decision.versions, committed)
            self._manifest.committed(stage, committed)
            self._boundaries.retain(stage, versions)
            superseded.committed(stage, committed, versions)
            if superseded.idle:
                self._boundaries.idle = superseded.idle
                self._boundaries.register()
            for recipe, freed in superseded.prune().items():
                self._emit("pruned", stage=stage.place, recipe=recipe, bytes=freed)
            if trains and chosen is not None:
                break  # one stage was asked for
        return True

    def _check_chosen(self, decision: Decision, chosen: list[int]) -> None:
        """Where one stage is asked for, no other is trained."""
        stage = decision.stage
        if stage.place not in chosen:
            raise UsageError(
                f"stage {stage.label}, which stage {self._plan.stages[chosen[-1]].depth} stands on, is not committed",
                hint=f"run the same command with --depth {stage.depth} first",
            )
        if decision.lost:
            raise UsageError(
                f"stage {stage.label} needs weights that those of a later window replaced",
                hint="`stackwise run` trains again what it needs",
            )

    def _reuse(self, decision: Decision, chosen: list[int] | None) -> CommittedStage:
        """A stage as it is committed."""
        stage, committed = decision.stage, decision.committed
        assert committed is not None, "what is reused is in the store"
        shutil.rmtree(self._run.checkpoints(decision.id), ignore_errors=True)  # of a kill just after the commit
        self._emit("reused", stage=stage.place, recipe=decision.id, reason=decision.reason)
        following = self._plan.following(stage)
        if chosen is not None and stage.place == chosen[-1] and following is not None:
            self._boundaries.made(following, with_parts(decision.versions, committed))
        return committed

    def _train(self, decision: Decision) -> CommittedStage:
        """Train a stage, and write the boundary above it where it can."""
        stage, versions, key = decision.stage, decision.versions, decision.id
        if decision.again:
            self._plan.store.drop_stage(key)  # the record of weights that are gone
        self._emit(
            "training",
            stage=stage.place,
            recipe=key,
            reason=decision.reason,
            steps=decision.steps,
            trunk=self._plan.trunk(stage, versions),
        )
        writes = self._plan.writes_above(stage)
        checkpoints = self._run.checkpoints(key)
        for attempt in (1, 2):  # once more where what entered the stage was damaged and had to be made anew
            entry = self._boundaries.entry(stage, versions)
            if writes or entry.fills:  # only what writes a boundary needs room for one
                self._boundaries.make_room(stage, entry.reads)
            if stage.reads_boundary and (self._plan.evaluates(stage) or self._plan.writes_held_out(stage)):
                entry = replace(entry, held_out=self._boundaries.made(stage, versions, HELD_OUT))
            job = self._plan.job(
                stage,
                versions,
                checkpoints=checkpoints,
                train=self._plan.committed(key) is None,  # else a boundary alone was left to write
                entry=entry,
                writes=writes,
            )
            try:
                self._pool.work(job)
                break
            except StackWiseError as error:
                committed = self._plan.committed(key)
                if error.exit_code != DamageError.exit_code or attempt == 2:
                    raise
                self._boundaries.heal(stage, versions, entry, error)
                if committed is not None:  # what failed was the boundary above: it is written when it is needed
                    self._again.discard(key)
                    return committed
        committed = self._plan.store.stage(key)
        assert committed is not None, "a worker that ended well has committed its stage"
        self._again.discard(key)
        return committed

    @contextlib.contextmanager
    def _turn(self, decision: Decision) -> Iterator[Decision]:
        """Be the one that trains a stage; where another run did meanwhile, it is reused.

        Of runs that wait for each other the first to come holds the stage for as long as its job takes.
        """
        stage, key = decision.stage, decision.id
        if not self._waits:
            self._refuse_where_busy(stage, key)
            yield decision
            return
        lock, reported = FileLock(self._plan.store.path / "locks" / f"turn-{key}.lock", f"stage {stage.depth}"), False
        while not lock.held:
            try:
                lock.acquire()
            except BusyError:
                if not reported:
                    self._emit(
                        "waiting", stage=stage.place, text="waits for another run over the same store, which trains it"
                    )
                reported = True
                self._pool.check()
                time.sleep(SECONDS)
        with lock:
            # The one that had the turn may have trained it: what was decided before the wait is looked at again.
            committed = None if decision.again else self._plan.committed(key)
            if committed is not None:
                decision = replace(decision, action="reuse", reason=REUSED, committed=committed)
            yield decision

    def _refuse_where_busy(self, stage: Stage, key: str) -> None:
        """A stage that a living run's worker holds is refused at once; a dead run's worker saves and is waited for."""
        lock = self._plan.store.path / "locks" / f"work-{key}.lock"
        if not is_locked(lock):
            return
        mine = str(self._run.path.resolve())
        others = [Path(run) for run, refs in self._plan.store.runs().items() if run != mine and key in refs["recipes"]]
        if any(held_by_live_process(RunDirectory(other)) for other in others):
            FileLock(lock, f"stage {stage.depth}").acquire().release()


class Boundaries:
    """Sees to it that what enters a stage is there."""

    def __init__(self, context: RunContext) -> None:
        self._run, self._plan, self._manifest = context.run, context.plan, context.manifest
        self._pool, self._emit = context.pool, context.emit
        self.idle: dict[str, list[str]] = {}  # parts of committed stages, by recipe, that the run needs no more

    def entry(self, stage: Stage, versions: Versions, rowset: int | None = None, *, train: bool = True) -> Entry:
        """How rows come to a stage; the boundary to read is made first where it is gone.

        The nearest boundary below that is to be stored is read, or one that happens to lie nearer. Where passes are
        fused, the stage below is not waited for: its output is made, and written, while this one trains.
        """
        number = stage.rowset if rowset is None else rowset
        at, recomputed, reads = stage, list[Stage](), None
        while at.reads_boundary and reads is None:
            info = self._plan.boundary(at, versions, number)
            if info is not None:
                reads = info.id
            elif self._plan.reads_stored(at, fused=train and at is stage):
                reads = self.made(at, versions, number)
            else:
                at = stage_below(self._plan.stages, at)
                recomputed.insert(0, at)
        return Entry(reads, tuple(recomputed), fills=bool(recomputed) and train and self._plan.fuses_passes(stage))

    def made(self, stage: Stage, versions: Versions, rowset: int | None = None) -> str:
        """The boundary that enters a stage; made by forward passes from the nearest one below where it is gone."""
        number = stage.rowset if rowset is None else rowset
        info = self._plan.boundary(stage, versions, number)
        if info is not None:
            return info.id
        known = tuple(self.made(stage, versions, earlier) for earlier in self._plan.lenders(stage, number))
        below = stage_below(self._plan.stages, stage)
        entry = replace(self.entry(below, versions, number, train=False), known=known)
        self.make_room(below, entry.reads)
        self._emit(
            "recomputing", stage=below.place, text=f"boundary {stage.depth} is not in the store: made by forward passes"
        )
        checkpoints = self._run.path / "checkpoints"
        self._pool.work(
            self._plan.job(
                below, versions, checkpoints=checkpoints, train=False, entry=entry, writes=True, rowset=number
            )
        )
        info = self._plan.boundary(stage, versions, number)
        assert info is not None, "a worker that ended well has written its boundary"
        return info.id

    def heal(self, stage: Stage, versions: Versions, entry: Entry, error: StackWiseError) -> None:
        """Drop a boundary that turned out damaged, so that it is recomputed from the trunk."""
        at_hand = [boundary for boundary in (entry.reads, entry.held_out) if boundary is not None]
        trunk = self._plan.trunk(stage, versions)
        if entry.fills and trunk is not None:
            codec = codec_name(self._plan.config.store)
            filled = self._plan.store.find(trunk=trunk, rowset=self._plan.head_rowset(stage.rowset), codec=codec)
            at_hand += [filled.id] if filled is not None else []
        # Of rows in groups a group alone may be damaged; the first says that the others are there, so it goes too.
        groups = {info.id: info.head for info in self._plan.store.boundaries() if info.head in at_hand}
        damaged = [boundary for boundary in groups if boundary in error.message]
        heads = list(dict.fromkeys(groups[boundary] for boundary in damaged)) or at_hand
        if not heads:
            raise error
        for head in heads:
            depth = self._plan.store.boundary(head).depth
            self._emit("warning", stage=stage.place, text=f"{error.message}: boundary {depth} is made again")
        for boundary in dict.fromkeys((*heads, *damaged)):
            self._plan.store.drop_one(boundary)

    def retain(self, stage: Stage, versions: Versions) -> None:
        """Drop the boundaries that `store.keep` does not keep, once nothing in this run reads or writes them."""
        self._manifest.note_boundaries(self._plan.store.boundaries())
        self.register()
        keep = self._plan.config.store.keep
        following = self._plan.stages[stage.place + 1] if stage.place + 1 < len(self._plan.stages) else None
        window_done = following is not None and following.window != stage.window
        if keep == "all" and not window_done:
            return
        needed = set()
        if following is not None:
            read = [self._plan.nearest(following, versions)]
            read += [self._plan.boundary(following, versions, HELD_OUT)] if self._plan.evaluates(following) else []
            needed = {info.id for info in read if info is not None} | self._plan.lent(versions)
        others = {
            boundary
            for key, refs in self._plan.store.runs().items()
            if key != str(self._run.path.resolve())
            for boundary in refs["boundaries"]
        }
        mine = [
            info
            for info in self._plan.store.boundaries()
            if info.id in self._manifest.boundaries  # of rows in groups the first: the others go with it
            and (window_done or info.depth <= stage.depth + 1)
            and info.id not in others
        ]
        idle = sorted((i for i in mine if i.id not in needed), key=lambda i: (i.depth, i.created))
        kept = 0 if window_done or keep == "none" else int(keep)  # a finished window's go, whatever is kept within one
        for info in idle[: len(idle) - kept or None]:
            with contextlib.suppress(StackWiseError):  # someone else reads it: it goes another time
                self._plan.store.drop(info.id)
                why = "its window is finished" if window_done else "store.keep"
                self._emit("dropped", stage=info.depth, boundary=info.id, bytes=info.disk_bytes, why=why)

    def make_room(self, stage: Stage, reads: str | None) -> None:
        """Under a quota, evict what is cheapest to compute again until the boundary above a stage fits."""
        limit = boundary_budget(self._plan, stage)
        if limit is None:
            return
        present = self._plan.store.boundaries()
        states = {info.id: info.state for info in present}
        begun = [info for info in present if states.get(info.head) != "complete"]
        config, rows = self._plan.config, self._plan.rowset(stage.rowset)[1]
        rows = -(-rows // disks(config))
        whole = boundary_bytes(config, rows) if config.windows == 1 else whole_boundary(config, rows)
        need = max(0, whole - sum(info.disk_bytes for info in begun))
        protect = [info.id for info in begun] + ([reads] if reads is not None else [])
        quota = self._plan.store.enforce_quota(limit, need=need, protect=protect)
        for info in present:
            if info.id in quota["evicted"]:
                self._emit("dropped", stage=info.depth, boundary=info.id, bytes=info.disk_bytes)
        if not quota["fits"]:
            most, several = config.store.max_bytes, config.windows > 1
            beside = f"{most - limit} of them are for committed stages, " if several and most is not None else ""
            raise NoSpaceError(
                f"store.max_bytes is {most}: {beside}boundaries in use take {quota['bytes']} and the next needs {need}",
                hint="raise store.max_bytes, or set training.windows: auto",
            )

    def register(self) -> None:
        """Let the store know what this run refers to, and what of it is idle."""
        recipes, boundaries = self._manifest.recipes(), self._manifest.boundaries
        self._plan.store.register_run(
            str(self._run.path.resolve()), recipes=recipes, boundaries=boundaries, idle=self.idle
        )


class Superseded:
    """Frees the weights and states of stages that a later window's have taken the place of; their records stay.

    Args:
        run: The run, as it is registered with the store: what other runs refer to stays.
    """

    def __init__(self, plan: Plan, run: str) -> None:
        self._plan, self._run = plan, run
        self._files: dict[str, dict[str, Path]] = {}
        self.idle: dict[str, list[str]] = {}  # parts by recipe that no later stage of this run starts from

    def committed(self, stage: Stage, committed: CommittedStage, versions: Versions) -> None:
        """A stage is committed, or was: what no later one starts from is idle."""
        if self._plan.next_window(stage) is not None:
            self._files[committed.recipe] = {part: committed.path(part) for part in committed.parts}
        needed = {source.path for source in versions.values()}
        self.idle = {
            recipe: parts
            for recipe, files in self._files.items()
            if (parts := [part for part, path in files.items() if str(path) not in needed])
        }

    def prune(self) -> dict[str, int]:
        """Remove the files of what is idle, where no other run may still ask for them.

        Returns:
            By recipe, the bytes that were freed.
        """
        others = [refs for key, refs in self._plan.store.runs().items() if key != self._run] if self.idle else []

        def is_free(recipe: str, part: str) -> bool:
            # One that a kill left, though its record says that it is gone, goes now.
            asked_for = (
                part not in refs.get("idle", {}).get(recipe, ()) for refs in others if recipe in refs["recipes"]
            )
            return self._files[recipe][part].exists() and not any(asked_for)

        free = {recipe: [part for part in parts if is_free(recipe, part)] for recipe, parts in self.idle.items()}
        return {recipe: self._plan.store.prune_stage(recipe, parts) for recipe, parts in free.items() if parts}
