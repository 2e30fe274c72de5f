"""Stores of ranks: one for all, or several (`store.path` with `{rank}` or `{host}`), each with all of the rows.

With several, only gradients cross the wire while a stage trains. Rank 0's store is the one that a run knows. Before
each job the others are brought level with it: rows and masks follow from the data and are made again; what was
committed, and chunks of a boundary that a store lacks (of a host that is new, or lost its disk), come over the wire as
they are stored.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.errors import StackWiseError
from stackwise.pipeline.job import Frozen, Source, StageJob
from stackwise.pipeline.rows import HELD_OUT, put_rows
from stackwise.pipeline.run import store_place
from stackwise.store import ActivationStore, BoundarySpec
from stackwise.training.ranks import Ranks, SingleProcess

PIECE = 64 << 20  # bytes of a file that travel at once


@dataclass(frozen=True)
class Place:
    """Where a rank's store is, and who shares it.

    Args:
        path: The directory.
        share: (k, n): this is the k-th of the n ranks that share it; each writes every n-th chunk.
        stores: How many stores the ranks have.
    """

    path: Path
    share: tuple[int, int] = (0, 1)
    stores: int = 1

    @property
    def leads(self) -> bool:
        """Whether this rank does for its store what one alone has to."""
        return self.share[0] == 0


def place_of(job: StageJob, config: StackWiseConfig, ranks: Ranks) -> Place:
    """The store of this rank. Every rank calls it."""
    template = config.store.path or ""
    path = Path(job.store) if ranks.rank == 0 or "{" not in template else store_place(template, ranks.rank)
    path.mkdir(parents=True, exist_ok=True)
    every = ranks.gathered([socket.gethostname(), str(path.resolve())])
    mine = [rank for rank, other in enumerate(every) if other == every[ranks.rank]]
    return Place(path, (mine.index(ranks.rank), len(mine)), len({tuple(other) for other in every}))


class Stores:
    """The stores of all ranks, where they are several; with one, nothing has to be done.

    Args:
        store: This rank's.
    """

    def __init__(self, store: ActivationStore, place: Place, ranks: Ranks | None = None) -> None:
        self._store, self.place, self._ranks = store, place, ranks or SingleProcess()

    def level(self, job: StageJob, config: StackWiseConfig) -> StageJob:
        """Bring them level with rank 0's as far as a job needs it; the job as this rank has to do it.

        Raises:
            StackWiseError: A rank's data gives other rows.
            NoSpaceError: A rank's disk is full.
        """
        if self.place.stores == 1:
            return job
        self._mirror()
        if self.place.leads:
            self._rows(job, config)
        self._ranks.wait()
        sources = [*job.initial.values(), *(s for below in job.recomputed for s in below.initial.values())]
        recipes = {
            s.recipe for source in [*sources, job.embedding] if source is not None for s in (source, *source.merged)
        }
        for recipe in sorted(recipes - {""}):
            self.share_stage(recipe)
        if not job.train:
            self.share_stage(job.recipe_id)
        for boundary in (job.reads, job.held_out_reads, *job.known):
            if boundary is not None:
                self._move(boundary)
        here = partial(_moved, Path(job.store), self.place.path)
        return replace(
            job,
            store=str(self.place.path),
            initial={part: here(source) for part, source in job.initial.items()},
            embedding=job.embedding and here(job.embedding),
            recomputed=tuple(
                Frozen(below.stage, {part: here(source) for part, source in below.initial.items()})
                for below in job.recomputed
            ),
        )

    def share_stage(self, recipe: str) -> None:
        """Let every store have a committed stage, where rank 0's has it. Every rank calls it."""
        if self.place.stores == 1:
            return
        stage, main = self._store.stage(recipe, check=False), self._ranks.main
        about: dict[str, Any] | None = None
        if main and stage is not None:
            files = {part: stage.path(part).stat().st_size for part in stage.parts if stage.path(part).exists()}
            about = {"record": stage.record, "files": files}
        about = self._ranks.shared(about)
        if about is None or all(self._ranks.gathered(_has(stage, about["files"]))):
            return

        def send(part: str) -> None:
            assert stage is not None
            with stage.path(part).open("rb") as file:
                while piece := file.read(PIECE):
                    self._ranks.shared_tensors({"": torch.frombuffer(bytearray(piece), dtype=torch.uint8)})

        def receive(part: str, path: Path | None) -> None:
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(path.open("wb")) if path is not None else None
                left = about["files"][part]
                while left > 0:
                    piece = self._ranks.shared_tensors(None)[""].numpy().tobytes()
                    left -= len(piece)
                    if file is not None:
                        file.write(piece)

        if main:
            for part in about["files"]:
                send(part)
        elif self.place.leads and not _has(stage, about["files"]):
            writes: dict[str, Callable[[Path], None]] = {part: partial(receive, part) for part in about["files"]}
            self._store.commit_stage(recipe, writes, about["record"])
        else:
            for part in about["files"]:
                receive(part, None)
        self._ranks.wait()

    def _mirror(self) -> None:
        """Let no other store keep boundaries that rank 0's has dropped, and let it know the same runs."""
        ours = self._ranks.shared([info.id for info in self._store.boundaries()])
        runs = self._ranks.shared(self._store.runs())
        if not self.place.leads or self._ranks.main or not set(self._store.runs()) <= set(runs):
            return  # runs that rank 0's store does not know have boundaries of their own here
        for info in self._store.boundaries():
            if info.id not in ours:
                with contextlib.suppress(StackWiseError):  # somebody reads it: another time
                    self._store.drop(info.id)
        for run, refs in runs.items():
            self._store.register_run(run, recipes=refs["recipes"], boundaries=refs["boundaries"])

    def _rows(self, job: StageJob, config: StackWiseConfig) -> None:
        data = PreparedData.open(Path(job.data))
        needed = [(data.train, job.rowset_number, job.rowset)] if job.rowset_number != HELD_OUT else []
        needed += [(data.held_out, HELD_OUT, rowset)] if (rowset := _held_out(job)) is not None else []
        for split, number, rowset in needed:
            if put_rows(config, split, self._store, number)[0] != rowset:
                raise StackWiseError(f"rank {self._ranks.rank} has other rows than rank 0, from the same data")

    def _move(self, boundary: str) -> None:
        """Let every store have the chunks of a boundary that rank 0's has."""
        with contextlib.ExitStack() as stack:
            info = self._store.boundary(boundary) if self._ranks.main else None
            about = self._ranks.shared(info and {one.name: getattr(info, one.name) for one in fields(BoundarySpec)})
            leads = self.place.leads and not self._ranks.main
            writer = stack.enter_context(self._store.writer(**about)) if leads else None
            lacks = set(writer.missing) if writer is not None else set()
            union = sorted(set().union(*self._ranks.gathered(sorted(lacks))))
            reader = stack.enter_context(self._store.reader(boundary)) if self._ranks.main and union else None
            for chunk in union:
                arrays = reader.stored(chunk) if reader is not None else None
                named = {str(i): torch.from_numpy(array.copy()) for i, array in enumerate(arrays or [])}
                tensors = self._ranks.shared_tensors(named or None)
                if writer is not None and chunk in lacks:
                    writer.put(chunk, [tensors[str(i)].numpy() for i in range(len(tensors))])
            if writer is not None and writer.info.state != "complete":
                writer.finish(0.0)
        self._ranks.wait()


def _has(stage: Any, files: Sequence[str]) -> bool:
    return stage is not None and all(part in stage.parts and stage.path(part).exists() for part in files)


def _held_out(job: StageJob) -> str | None:
    return job.rowset if job.rowset_number == HELD_OUT else job.held_out


def _moved(store: Path, here: Path, source: Source) -> Source:
    """The same weights in another store."""
    path = source.path
    if source.recipe and path is not None and Path(path).is_relative_to(store):
        path = str(here / Path(path).relative_to(store))
    return replace(source, path=path, merged=tuple(_moved(store, here, inner) for inner in source.merged))
