"""A run's boundaries: found or made when a stage needs them, kept or dropped afterwards, made again when damaged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from stackwise.errors import NoSpaceError, StackWiseError
from stackwise.pipeline.job import Versions
from stackwise.pipeline.planning.plan import Entry, Plan
from stackwise.pipeline.planning.windows import boundary_budget
from stackwise.pipeline.recipe import boundary_bytes, codec_name, whole_boundary
from stackwise.pipeline.rows import HELD_OUT
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.crew import Crew
from stackwise.pipeline.runner.events import Manifest
from stackwise.pipeline.schedule import Stage, stage_below


class Boundaries:
    """Sees to it that what enters a stage is there.

    Args:
        run: Whose they are.
        plan: The plan that is carried out.
        manifest: Knows which of them this run wrote.
        crew: Makes those that are missing.
        tell: Told what happens, as an event's name and its values.
    """

    def __init__(
        self, run: RunDirectory, plan: Plan, manifest: Manifest, crew: Crew, tell: Callable[..., None]
    ) -> None:
        self._run, self._plan, self._manifest, self._crew, self._tell = run, plan, manifest, crew, tell
        self.idle: dict[str, list[str]] = {}
        """Parts of committed stages, by recipe, that the run has let go of."""

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
        return Entry(reads, tuple(recomputed), fills=bool(recomputed) and train and self._plan.fuses(stage))

    def made(self, stage: Stage, versions: Versions, rowset: int | None = None) -> str:
        """The boundary that enters a stage; made by forward passes from the nearest one below where it is gone."""
        number = stage.rowset if rowset is None else rowset
        info = self._plan.boundary(stage, versions, number)
        if info is not None:
            return info.id
        below = stage_below(self._plan.stages, stage)
        entry = self.entry(below, versions, number, train=False)
        self.make_room(below, entry.reads)
        self._tell(
            "recomputing", stage=below.place, text=f"boundary {stage.depth} is not in the store: made by forward passes"
        )
        checkpoints = self._run.path / "checkpoints"
        self._crew.work(
            self._plan.job(
                below, versions, checkpoints=checkpoints, train=False, entry=entry, writes=True, rowset=number
            )
        )
        info = self._plan.boundary(stage, versions, number)
        assert info is not None, "a worker that ended well has written its boundary"
        return info.id

    def heal(
        self,
        stage: Stage,
        versions: Versions,
        entry: Entry,
        held_out: str | None,
        error: StackWiseError,
    ) -> None:
        """Drop a boundary that turned out damaged, so that it is recomputed from the trunk."""
        at_hand = [boundary for boundary in (entry.reads, held_out) if boundary is not None]
        trunk = self._plan.trunk(stage, versions)
        if entry.fills and trunk is not None:
            codec = codec_name(self._plan.config.store)
            filled = self._plan.store.find(trunk=trunk, rowset=self._plan.rowset(stage.rowset)[0], codec=codec)
            at_hand += [filled.id] if filled is not None else []
        damaged = [boundary for boundary in at_hand if boundary in error.message] or at_hand
        if not damaged:
            raise error
        for boundary in damaged:
            depth = self._plan.store.boundary(boundary).depth
            self._tell("warning", stage=stage.place, text=f"{error.message}: boundary {depth} is made again")
            self._plan.store.drop(boundary)

    def retain(self, stage: Stage, versions: Versions) -> None:
        """Drop the boundaries that `store.keep` does not keep, once nothing in this run reads or writes them."""
        self._manifest.note_boundaries(self._plan.store.boundaries())
        self.register()
        keep = self._plan.config.store.keep
        following = self._plan.stages[stage.place + 1] if stage.place + 1 < len(self._plan.stages) else None
        turned = following is not None and following.window != stage.window
        if keep == "all" and not turned:
            return
        needed = set()
        if following is not None:
            found = [self._plan.nearest(following, versions)]
            found += [self._plan.boundary(following, versions, HELD_OUT)] if self._plan.evaluates(following) else []
            needed = {info.id for info in found if info is not None}
        others = {
            boundary
            for key, refs in self._plan.store.runs().items()
            if key != str(self._run.path.resolve())
            for boundary in refs["boundaries"]
        }
        mine = [
            info
            for info in self._plan.store.boundaries()
            if info.id in self._manifest.boundaries()
            and (turned or info.depth <= stage.depth + 1)
            and info.id not in others
        ]
        idle = sorted((i for i in mine if i.id not in needed), key=lambda i: (i.depth, i.created))
        kept = 0 if turned or keep == "none" else int(keep)  # a finished window's go, whatever is kept within one
        for info in idle[: len(idle) - kept or None]:
            with contextlib.suppress(StackWiseError):  # someone else reads it: it goes another time
                self._plan.store.drop(info.id)
                why = "its window is finished" if turned else "store.keep"
                self._tell("dropped", stage=info.depth, boundary=info.id, bytes=info.disk_bytes, why=why)

    def make_room(self, stage: Stage, reads: str | None) -> None:
        """Under a quota, evict what is cheapest to compute again until the boundary above a stage fits."""
        limit = boundary_budget(self._plan, stage)
        if limit is None:
            return
        present = self._plan.store.boundaries()
        begun = [info for info in present if info.state != "complete"]
        config, rows = self._plan.config, self._plan.rowset(stage.rowset)[1]
        whole = boundary_bytes(config, rows) if config.windows == 1 else whole_boundary(config, rows)
        need = max(0, whole - sum(info.disk_bytes for info in begun))
        protect = [info.id for info in begun] + ([reads] if reads is not None else [])
        made = self._plan.store.enforce_quota(limit, need=need, protect=protect)
        for info in present:
            if info.id in made["evicted"]:
                self._tell("dropped", stage=info.depth, boundary=info.id, bytes=info.disk_bytes)
        if not made["fits"]:
            most, several = config.store.max_bytes, config.windows > 1
            beside = f"{most - limit} of them are for committed stages, " if several and most is not None else ""
            raise NoSpaceError(
                f"store.max_bytes is {most}: {beside}boundaries in use take {made['bytes']} and the next needs {need}",
                hint="raise store.max_bytes, or set training.windows: auto",
            )

    def register(self) -> None:
        """Tell the store what this run refers to, and what of it has given way."""
        recipes, boundaries = self._manifest.recipes(), self._manifest.boundaries()
        self._plan.store.register_run(
            str(self._run.path.resolve()), recipes=recipes, boundaries=boundaries, idle=self.idle
        )
