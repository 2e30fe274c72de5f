"""Stores of ranks: one for all, or several (`store.path` with `{rank}` or `{host}`).

With several, only gradients cross the wire while a stage trains. Rows are in groups (`division.py`), and a store has
those of its ranks' batches; where they are in one, each store has all rows. Rank 0's store is the one that a run knows.
Before each job the others are brought level with it: rows and masks follow from the data and are made again; what was
committed, and chunks of held-out rows that a store lacks, come over the wire as they are stored; and so do groups,
where there are other ranks than before.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.errors import DamageError, StackWiseError
from stackwise.files import expanded
from stackwise.pipeline.division import edges, groups_of, put_groups
from stackwise.pipeline.job import Frozen, Source, StageJob
from stackwise.pipeline.rows import HELD_OUT, put_rows
from stackwise.pipeline.run import store_place
from stackwise.store import ActivationStore, boundary_id_of, complete, copy_boundary, sibling_stores, spec_of
from stackwise.store.reshard import RANK
from stackwise.training.feed import RowGroups
from stackwise.training.ranks import Ranks, SingleProcess

PIECE = 64 << 20  # bytes of a file that travel at once


@dataclass(frozen=True)
class Place:
    """Where a rank's store is, and who shares it.

    Args:
        path: The directory.
        share: (k, n): this is the k-th of the n ranks that share it; each writes every n-th chunk.
        alike: (k, n): this is the k-th of the n of these that take the same share of the rows.
        kept: Which shares of the rows the ranks that share it take; of so many in all.
        stores: How many stores the ranks have.
        others: What other ranks on this host have.
    """

    path: Path
    share: tuple[int, int] = (0, 1)
    alike: tuple[int, int] = (0, 1)
    kept: tuple[frozenset[int], int] = (frozenset((0,)), 1)
    stores: int = 1
    others: frozenset[Path] = frozenset()
    first_of_host: bool = True

    @property
    def leads(self) -> bool:
        """Whether this rank does for its store what one alone has to."""
        return self.share[0] == 0

    def keeps(self, group: int) -> bool:
        """Whether the rows of a group are kept in this store."""
        return group % self.kept[1] in self.kept[0]


def place_of(job: StageJob, config: StackWiseConfig, ranks: Ranks) -> Place:
    """The store of this rank. Every rank calls it."""
    template = config.store.path or ""
    path = Path(job.store) if ranks.rank == 0 or "{" not in template else store_place(template, ranks.rank)
    path.mkdir(parents=True, exist_ok=True)
    every = ranks.gathered([[socket.gethostname(), str(path.resolve())], ranks.share])
    (host, here), share = every[ranks.rank]
    mine = [rank for rank, (place, _) in enumerate(every) if place == [host, here]]
    alike = [rank for rank in mine if every[rank][1] == share]
    return Place(
        path,
        (mine.index(ranks.rank), len(mine)),
        (alike.index(ranks.rank), len(alike)),
        (frozenset(every[rank][1] for rank in mine), ranks.shares),
        len({tuple(place) for place, _ in every}),
        frozenset(Path(other) for (name, other), _ in every if name == host and other != here),
        next(rank for rank, ((name, _), _) in enumerate(every) if name == host) == ranks.rank,
    )


class Stores:
    """The stores of all ranks, where they are several; with one, little has to be done.

    Args:
        store: This rank's.
    """

    def __init__(self, store: ActivationStore, place: Place, ranks: Ranks | None = None) -> None:
        self.store, self.place, self._ranks = store, place, ranks or SingleProcess()
        self._template = ""

    def level(self, job: StageJob, config: StackWiseConfig) -> StageJob:
        """Bring them level with rank 0's as far as a job needs it; the job as this rank has to do it.

        Rows in groups are another matter: see `collect`.

        Raises:
            StackWiseError: A rank's data gives other rows.
            NoSpaceError: A rank's disk is full.
        """
        self._template = config.store.path or ""
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
        whole = [job.held_out_reads, *job.known, *([job.reads] if groups_of(config, job.rowset_number) == 1 else [])]
        for boundary in filter(None, whole):
            self._travel(boundary, 0, self.place.leads and not self._ranks.main)
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

    def groups(self, job: StageJob, config: StackWiseConfig) -> RowGroups | None:
        """The groups of a job's rows, which every store then knows; None: they are in one. Every rank calls it."""
        count = groups_of(config, job.rowset_number)
        if count == 1:
            return None
        if self.place.leads:
            put_groups(self.store, job.rowset, count)
        self._ranks.wait()
        rowsets = tuple(self.store.rowset(one) for one in put_groups(self.store, job.rowset, count))
        return RowGroups(rowsets, tuple(edges(job.rows, count)))

    def group_boundaries(self, groups: RowGroups, boundary: str) -> list[str]:
        """The boundaries of all groups, by that of the first, which rank 0's store has. Every rank calls it."""
        info = self.store.boundary(boundary) if self._ranks.main else None
        trunk, codec = self._ranks.shared(info and [info.trunk, info.codec])
        return [boundary_id_of(trunk, rowset.id, codec) for rowset in groups.rowsets]

    def collect(self, boundaries: list[str], *, needed: bool) -> None:
        """Let every store have the groups that its ranks keep, and no others. Every rank calls it.

        They may be in other stores, where the number of ranks was another: on this host, of ranks that are no more too;
        else over the wire. Nothing is dropped before it is where it belongs.

        Args:
            boundaries: Of all groups, in order.
            needed: Whether what no store has is an error.

        Raises:
            DamageError: It is, and a group is in no store; the run makes the boundary again, as far as it is lacking.
        """
        leads = self.place.alike[0] == 0
        lacks = [
            boundary
            for group, boundary in enumerate(boundaries)
            if leads and group % self._ranks.shares == self._ranks.share and not complete(self.store, boundary)
        ]
        lost: set[str] = set()
        if any(self._ranks.gathered(lacks)):
            self._copy_here(lacks)
            lacks = [boundary for boundary in lacks if not complete(self.store, boundary)]
            every = self._ranks.gathered(lacks)
            have = self._ranks.gathered([one for one in boundaries if complete(self.store, one)])
            for boundary in sorted(set().union(*every)):
                source = next((rank for rank, held in enumerate(have) if boundary in held), None)
                if source is not None:
                    self._travel(boundary, source, boundary in lacks)
            every = self._ranks.gathered([boundary for boundary in lacks if not complete(self.store, boundary)])
            lost = set().union(*every)
            if lost and needed:
                rank = next(rank for rank, left in enumerate(every) if left)
                raise DamageError(f"boundary {boundaries[0]}: rank {rank}'s store lacks rows that it is to keep")
        self._trim(boundaries, lost)
        self._ranks.wait()

    def _copy_here(self, lacks: Sequence[str]) -> None:
        """Copy what other stores on this host have."""
        left = set(lacks)
        for path in self._others() if left else ():
            with contextlib.suppress(StackWiseError), ActivationStore(path, create=False) as other:
                for boundary in sorted(left):
                    if complete(other, boundary):
                        copy_boundary(other, self.store, boundary)
                        left.discard(boundary)

    def _others(self) -> list[Path]:
        """The stores on this host that the path of the stores stands for, beside this rank's."""
        if RANK not in self._template:
            return []
        template = self._template.replace("{host}", socket.gethostname())
        paths = [path.resolve() for path in sibling_stores(str(expanded(template))).values()]
        return [path for path in paths if path != self.place.path.resolve()]

    def _trim(self, boundaries: Sequence[str], lost: Collection[str]) -> None:
        """Drop the groups that are kept elsewhere: in this store, and in those of ranks that are no more."""
        there = [boundary for boundary in boundaries if boundary not in lost]
        if self.place.leads:
            _drop(self.store, [one for one in there if not self.place.keeps(boundaries.index(one))])
        if self.place.first_of_host:
            for path in self._others():
                if path not in self.place.others:
                    with contextlib.suppress(StackWiseError), ActivationStore(path, create=False) as other:
                        _drop(other, there)

    def share_stage(self, recipe: str) -> None:
        """Let every store have a committed stage, where rank 0's has it. Every rank calls it."""
        if self.place.stores == 1:
            return
        stage, main = self.store.stage(recipe, check=False), self._ranks.main
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
            self.store.commit_stage(recipe, writes, about["record"])
        else:
            for part in about["files"]:
                receive(part, None)
        self._ranks.wait()

    def _mirror(self) -> None:
        """Let no other store keep boundaries that rank 0's has dropped, and let it know the same runs."""
        ours = self._ranks.shared([info.id for info in self.store.boundaries() if info.head == info.id])
        runs = self._ranks.shared(self.store.runs())
        if not self.place.leads or self._ranks.main or not set(self.store.runs()) <= set(runs):
            return  # runs that rank 0's store does not know have boundaries of their own here
        for info in self.store.boundaries():
            if info.head not in ours:
                _drop(self.store, [info.id])
        for run, refs in runs.items():
            self.store.register_run(run, recipes=refs["recipes"], boundaries=refs["boundaries"])

    def _rows(self, job: StageJob, config: StackWiseConfig) -> None:
        data = PreparedData.open(Path(job.data))
        needed = [(data.train, job.rowset_number, job.rowset)] if job.rowset_number != HELD_OUT else []
        needed += [(data.held_out, HELD_OUT, rowset)] if (rowset := _held_out(job)) is not None else []
        for split, number, rowset in needed:
            if put_rows(config, split, self.store, number)[0] != rowset:
                raise StackWiseError(f"rank {self._ranks.rank} has other rows than rank 0, from the same data")

    def _travel(self, boundary: str, source: int, lacking: bool) -> None:
        """Let stores have the chunks of a boundary that a rank's store has. Every rank calls it.

        Args:
            source: That rank.
            lacking: Whether this rank's store is to have them.
        """
        with contextlib.ExitStack() as stack:
            gives = self._ranks.rank == source
            info = self.store.boundary(boundary) if gives else None
            about = self._ranks.shared(info and asdict(spec_of(info)), source)
            writer = stack.enter_context(self.store.writer(**about)) if lacking else None
            lacks = set(writer.missing) if writer is not None else set()
            union = sorted(set().union(*self._ranks.gathered(sorted(lacks))))
            reader = stack.enter_context(self.store.reader(boundary)) if gives and union else None
            for chunk in union:
                arrays = reader.stored(chunk) if reader is not None else None
                named = {str(i): torch.from_numpy(array.copy()) for i, array in enumerate(arrays or [])}
                tensors = self._ranks.shared_tensors(named or None, root=source)
                if writer is not None and chunk in lacks:
                    writer.put(chunk, [tensors[str(i)].numpy() for i in range(len(tensors))])
            if writer is not None and writer.info.state != "complete":
                writer.finish(0.0)
        self._ranks.wait()


def _drop(store: ActivationStore, boundaries: Sequence[str]) -> None:
    for boundary in boundaries:
        if store.has(boundary):
            with contextlib.suppress(StackWiseError):  # somebody reads it: another time
                store.drop_one(boundary)


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
