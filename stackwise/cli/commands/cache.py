"""`stackwise cache …`: the activation store. Each command calls one of the store's functions."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stackwise import words
from stackwise.cli.app import Subcommands
from stackwise.cli.drawing import Table, progress, state
from stackwise.cli.options import COUNT, as_json, find_run, run_option
from stackwise.cli.output import Line, Styled, note, print_json, say, say_all
from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.files import expanded

if TYPE_CHECKING:
    from stackwise.config import StackWiseConfig
    from stackwise.pipeline.run import RunDirectory
    from stackwise.store import ActivationStore, BoundaryInfo, CommittedStage, Recompute

F = TypeVar("F", bound=Callable[..., Any])

dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
NAMED = 10
"""Ids that are listed one by one."""


def where(command: F) -> F:
    """The options that name a store: --run, --store, and --json."""
    for option in (as_json, click.option("--store", metavar="DIR", help="The store's directory."), run_option):
        command = option(command)
    return command


def store_path(run: str | None, store: str | None) -> Path:
    """The store that `--store` names, or that of the run.

    Raises:
        UsageError: Both are given.
        NotFound: There is no such store.
    """
    if run is not None and store is not None:
        raise UsageError("--run and --store both name a store; give one")
    path = expanded(store) if store is not None else find_run(run).store_settings()[0]
    if not path.is_dir():
        raise NotFound(f"there is no store at {path}", hint="--store DIR names one, --run DIR names a run")
    return path


@contextlib.contextmanager
def opened(run: str | None, store: str | None) -> Iterator[ActivationStore]:
    """The store, open.

    Raises:
        DamageError: Its index is missing or damaged.
    """
    path = store_path(run, store)
    from stackwise.store import ActivationStore

    with ActivationStore(path, create=False) as opened_store:
        yield opened_store


@click.group(cls=Subcommands, short_help="The activation store: look, check, mend, clean.")
def cache() -> None:
    """The activation store: look, check, mend, clean.

    Without --run and --store it is the store of the latest run under runs/.
    """


@cache.command()
@where
def inspect(run: str | None, store: str | None, as_json: bool) -> None:
    """What the store holds: masks, boundaries, index; and what the run's next boundary needs."""
    if run is None and store is None:
        run = str(find_run(None).path)
    with opened(run, store) as opened_store:
        report, path = opened_store.inspect(), opened_store.path
        report["planned"] = None if run is None else _planned(find_run(run), opened_store)
    if as_json:
        print_json(report)
        return
    masks, index = report["masks"], report["index"]
    say(f"{path}: format {report['format']}")
    say(f"masks       {masks['unique']:,} distinct, {masks['referenced']:,} rows name one")
    say(f"index       {index['entries']:,} entries, {words.size(index['bytes'])}")
    total = sum(boundary["disk_bytes"] for boundary in report["boundaries"])
    say(f"boundaries  {len(report['boundaries'])}, {words.size(total)} on disk")
    if report["planned"] is not None:
        say(f"planned     {_planned_line(report['planned'])}")
    if report["boundaries"]:
        say_all(_boundaries(report["boundaries"]))


@cache.command(name="ls")
@where
def list_entries(run: str | None, store: str | None, as_json: bool) -> None:
    """Every boundary and every committed stage, and the runs that refer to them."""
    with opened(run, store) as opened_store:
        boundaries = opened_store.inspect()["boundaries"]
        stages = _committed(opened_store)
        runs = opened_store.runs()
    if as_json:
        print_json({"boundaries": boundaries, "stages": stages, "runs": runs})
        return
    say(Styled("boundaries", "bold"))
    say_all(_boundaries(boundaries) if boundaries else [["  none"]])
    say(Styled("\ncommitted stages", "bold"))
    shown = Table("recipe", "stage", "blocks", "steps", "size", "runs", right=(1, 3, 4))
    for stage in stages:
        users = [key for key, refs in runs.items() if stage["recipe"] in refs["recipes"]]
        blocks = words.span(*stage["blocks"]) if stage["blocks"] else ""
        steps = f"{stage['steps']:,}" if stage["steps"] is not None else ""
        depth = "" if stage["depth"] is None else str(stage["depth"])
        shown.add_row(stage["recipe"], depth, blocks, steps, words.size(stage["bytes"]), ", ".join(users) or "none")
    say_all(shown.lines() if stages else [["  none"]])


@cache.command()
@where
def du(run: str | None, store: str | None, as_json: bool) -> None:
    """Bytes by what they are for."""
    with opened(run, store) as opened_store:
        report, path = opened_store.usage(), opened_store.path
    if as_json:
        print_json(report)
        return
    shown = Table("", "bytes", right=(1,))
    for name in ("boundaries", "stages", "index", "reserve", "total", "free"):
        style = "bold" if name == "total" else "dim" if name == "free" else ""
        shown.add_row("free on this disk" if name == "free" else name, words.size(report[name]), style=style)
    say(path)
    say_all(shown.lines())


@cache.command()
@where
@click.option("--fast", is_flag=True, help="Compare existence and sizes alone; read no data.")
@click.option(
    "--subset", type=float, default=1.0, metavar="F", help="Check this share of the chunks, another each time."
)
@click.option("--max-duration", type=float, metavar="SECONDS", help="Stop after so long.")
def verify(
    run: str | None, store: str | None, as_json: bool, fast: bool, subset: float, max_duration: float | None
) -> None:
    """Compare what lies on disk with what was published. Exit code 3 where something is damaged."""
    try:
        with opened(run, store) as opened_store, progress("verifying") as on_progress:
            report = opened_store.verify(progress=on_progress, fast=fast, subset=subset, max_duration=max_duration)
    except DamageError as error:  # it does not even open
        if as_json:
            fault = {"boundary": "index", "chunk": None, "fault": error.message}
            print_json({"checked_chunks": 0, "checked_stages": 0, "damaged": [fault], "orphans": [], "complete": False})
        raise
    if as_json:
        print_json(report)
    else:
        _show_verified(report)
    if report["damaged"]:
        raise DamageError(
            f"{words.plural(len(report['damaged']), 'fault')} found",
            hint="`stackwise cache repair` mends what can be, `stackwise run` makes again what it needs",
        )


def _show_verified(report: dict[str, Any]) -> None:
    if report["damaged"]:
        shown = Table("boundary", "chunk", "fault")
        for damage in report["damaged"]:
            chunk = "" if damage["chunk"] is None else str(damage["chunk"])
            shown.add_row(damage["boundary"], chunk, Styled(damage["fault"], "red"))
        say_all(shown.lines())
    stages = report.get("checked_stages", 0)
    checked = f"{words.plural(report['checked_chunks'], 'chunk')} and {words.plural(stages, 'committed stage')} checked"
    verdict = words.plural(len(report["damaged"]), "fault") if report["damaged"] else "no damage"
    say(f"{checked}: {verdict}")
    for name in report.get("unreadable", ()):
        note(f"not checked, as it may not be read: {name}")
    if not report.get("complete", True):
        note("time ran out before all was checked")
    if report["orphans"]:
        note(f"{words.plural(len(report['orphans']), 'orphan')} (files that belong to nothing):")
        for name in report["orphans"][:10]:
            note(f"  {name}")


@cache.command()
@where
@dry_run_option
@click.option("--drop-stages", is_flag=True, help="Remove damaged committed stages; the next run trains them again.")
def repair(run: str | None, store: str | None, as_json: bool, dry_run: bool, drop_stages: bool) -> None:
    """Heal what can be healed, say what is gone. Exit code 3 where something is.

    A lost or damaged index is rebuilt from the boundaries. A damaged chunk is computed again from the run's committed
    weights, and taken out where it does not come out bit for bit as it was (with --store alone: always), so that the
    next `stackwise run` that needs it makes it again. A damaged committed stage is named, and stays unless
    --drop-stages is given.
    """
    path = store_path(run, store)
    from stackwise.store import repair_store

    with progress("repairing") as on_progress:
        recompute = None if store else _recompute(run)
        report = repair_store(path, recompute, dry_run=dry_run, drop_stages=drop_stages, progress=on_progress)
    if as_json:
        print_json(report)
    else:
        _show_repaired(report, dry_run)
    if report["gone"]:
        gone = words.plural(len(report["gone"]), "thing")
        raise DamageError(
            f"{gone} could not be repaired"
            + (" (nothing was changed)" if dry_run else "; damaged chunks were taken out"),
            hint="`stackwise run` makes again what it needs",
        )


def _recompute(run: str | None) -> Recompute:
    """Recomputes from a run's weights; torch and the weights are loaded when a chunk is asked for, not before."""

    def recompute(info: BoundaryInfo, chunks: Sequence[int]) -> Iterator[tuple[int, Any]]:
        from stackwise.pipeline.committed.use import recomputer
        from stackwise.store import ActivationStore

        directory = find_run(run)
        with ActivationStore(directory.store_path(directory.config()), create=False) as store:
            try:
                yield from recomputer(directory, store)(info, chunks)
            except UsageError as error:  # another run's boundary, or a run without weights: it is taken out
                note(f"boundary {info.id}: {error.message}")

    return recompute


def _show_repaired(report: dict[str, Any], dry_run: bool) -> None:
    would = "would be " if dry_run else ""
    if report.get("index", "sound") != "sound":
        say(f"index: {'damaged' if dry_run else 'set aside and rebuilt'}")
    for name in report["rebuilt"]:
        say(f"{would}rebuilt: {name}")
    for item in report["repaired"]:
        say(f"{would}repaired: {_place(item)}: {item['fault']}")
    for item in report["gone"]:
        say(Styled(f"{would}gone", "red"), f": {_place(item)}: {item['fault']}")
    for name in report["dropped_stages"]:
        say(f"{would}removed: stage {name}")
    for name in report["busy"]:
        note(f"in use, left alone: {name}")
    if not any(report[key] for key in ("rebuilt", "repaired", "gone")):
        say(f"{words.plural(report['checked_chunks'], 'chunk')} checked: nothing to repair")


def _place(item: dict[str, Any]) -> str:
    chunk = f"chunk {item['chunk']}" if isinstance(item["chunk"], int) else item["chunk"]
    return item["boundary"] if chunk is None else f"{item['boundary']}, {chunk}"


@cache.command()
@where
@dry_run_option
@click.option("--all", "everything", is_flag=True, help="Collect even where no run is registered.")
@click.option(
    "--forget-missing", is_flag=True, help="Forget the runs whose directory is gone, and collect what was theirs alone."
)
def gc(
    run: str | None, store: str | None, as_json: bool, dry_run: bool, everything: bool, forget_missing: bool
) -> None:
    """Remove what no registered run refers to. It works on a full disk."""
    with opened(run, store) as opened_store, progress("collecting") as on_progress:
        report = opened_store.gc(dry_run=dry_run, all=everything, forget_missing=forget_missing, progress=on_progress)
    if as_json:
        print_json(report)
        return
    would = "would go" if dry_run else "removed"
    shown = Table("", would, right=(1,))
    for name, value in report.items():
        if name not in ("dry_run", "busy", "freed", "missing_runs"):
            shown.add_row(name, f"{value if isinstance(value, int) else len(value):,}")
    say_all(shown.lines())
    say(f"{words.size(report['freed'])} {'would be freed' if dry_run else 'freed'}")
    for name in report["busy"][:NAMED]:
        note(f"in use, left alone: {name}")
    for name in report["missing_runs"][:NAMED]:
        note(f"the directory of this run is gone: {name}")
    if report["missing_runs"]:
        forgotten = "they would be forgotten" if dry_run else "they were forgotten"
        note(forgotten if forget_missing else "`--forget-missing` forgets them, and collects what was theirs alone")


@cache.command()
@where
@click.option("--ranks", type=COUNT, required=True, metavar="N", help="How many ranks are to keep the rows.")
def reshard(run: str | None, store: str | None, as_json: bool, ranks: int) -> None:
    """Move the rows in stores of ranks (store.path with {rank}) to so many ranks.

    Rank r of N keeps every N-th group of rows (training.row_groups). What a rank lacks is copied and checked, then what
    others have of it is dropped: interrupted at any moment, the same command goes on. `stackwise run` does the same, as
    far as it reads them, when it finds another number of ranks. --store 'DIR/{rank}' names the stores.
    """
    from stackwise.store import Reshard

    if run is not None and store is not None:
        raise UsageError("--run and --store both name stores; give one")
    with contextlib.ExitStack() as stack:
        if store is None:
            directory = find_run(run)
            path = directory.config().store.path or str(directory.path / "store")
            stack.enter_context(directory.lock())
        else:
            path = store
        with progress("moving") as on_progress:
            report = Reshard(str(expanded(path).absolute()), ranks).run(on_progress)
    if as_json:
        print_json(report)
        return
    shown = Table("rank", "store", "boundaries", right=(0, 2))
    for rank, place in report["stores"].items():
        shown.add_row(str(rank), place["path"], words.size(place["bytes"]))
    say_all(shown.lines())
    moved = words.plural(report["moved"], "group")
    say(f"{moved} of rows moved, {words.size(report['bytes'])}; {report['dropped']:,} dropped where they were")


@cache.command()
@where
def unlock(run: str | None, store: str | None, as_json: bool) -> None:
    """Free what dead processes left. A living holder's locks stay, and are named."""
    with opened(run, store) as opened_store:
        report = opened_store.unlock()
    if as_json:
        print_json(report)
        return
    removed, readers = len(report["removed"]), report["stale_readers"]
    say(f"{words.plural(removed, 'lock')} that nobody held and {words.plural(readers, 'stale reader')} removed")
    for name in report["held"]:
        note(f"held by a living process: {name}")


def _planned(run: RunDirectory, store: ActivationStore) -> dict[str, Any]:
    """What the run will write next, by its own configuration.

    Returns:
        `stage`: who reads the next boundary (None: none is to come); `rows`, and `needed` bytes before compression,
        less what is written of it already (None: the rows are not chosen yet); `stored`: bytes of all boundaries;
        `allowed`: `store.max_bytes`; `free`: bytes on the disk.
    """
    manifest = run.manifest()
    stored = sum(info.disk_bytes for info in store.boundaries())
    planned = {"stage": None, "rows": None, "needed": 0, "stored": stored, "allowed": run.store_settings()[1]}
    planned["free"] = shutil.disk_usage(store.path).free
    done: list[CommittedStage] = []
    for entry in manifest["stages"]:
        committed = store.stage(entry["recipe"], check=False) if entry["state"] == "done" else None
        if committed is None:
            break
        done.append(committed)
    if done and len(done) == len(manifest["stages"]):
        return planned  # and nothing of the schedule has to be known, which takes longer than all of the above
    return planned | _next_boundary(run.config(), manifest, store, done)


def _next_boundary(
    config: StackWiseConfig, manifest: dict[str, Any], store: ActivationStore, done: list[CommittedStage]
) -> dict[str, Any]:
    """`stage`, `rows` and `needed` of the first boundary that is still to be written; empty where there is none."""
    from stackwise.pipeline.job import Versions, add_versions
    from stackwise.pipeline.recipe import boundary_bytes, codec_name, forward_specification, trunk_id
    from stackwise.pipeline.rows import rows_key
    from stackwise.pipeline.schedule import schedule

    versions: Versions = {}
    for committed in done:
        add_versions(versions, committed)
    stages = schedule(config)
    for stage in stages[len(done) :]:
        if not stage.reads_boundary:
            continue
        data = manifest.get("data", {}).get("id", "")
        rowset, rows, *_ = manifest.get("rowsets", {}).get(rows_key(config, data, stage.rowset), (None, None))
        written = None
        if stage.place == len(done) and rowset is not None:  # what it stands on is committed: its boundary has an id
            vocabulary = manifest["vocabulary"]
            forward = forward_specification(config, vocabulary["size"], vocabulary["mask"], data)
            trunk = trunk_id(
                forward, [str(versions[part].digest) for part in stage.trunk], stage.precisions(stage.trunk)
            )
            if (config.training.row_groups or 1) > 1:  # the first group, which is complete last
                written = next((one for one in store.boundaries() if one.trunk == trunk and one.head == one.id), None)
            else:
                written = store.find(trunk=trunk, rowset=rowset, codec=codec_name(config.store))
        if written is not None and written.state == "complete":
            continue
        begun = written.disk_bytes if written is not None else 0
        needed = None if rows is None else max(0, boundary_bytes(config, rows) - begun)
        return {"stage": stage.depth, "rows": rows, "needed": needed}
    return {}


def _planned_line(planned: dict[str, Any]) -> str:
    if planned["stage"] is None:
        return "no boundary is to come"
    needed, free = planned["needed"], planned["free"]
    line = f"the next boundary (for stage {planned['stage']}) needs "
    line += "what its rows will take: they are not chosen yet" if needed is None else words.size(needed)
    allowed = "" if planned["allowed"] is None else f" of {words.size(planned['allowed'])} allowed"
    line += f"; the store has {words.size(planned['stored'])}{allowed}, the disk {words.size(free)} free"
    return f"{line}: too little" if needed is not None and needed > free else line


def _boundaries(boundaries: list[dict[str, Any]]) -> list[Line]:
    shown = Table("boundary", "depth", "shape", "dtype", "codec", "chunks", "on disk", "state", right=(1, 5, 6))
    for item in boundaries:
        shown.add_row(
            item["id"],
            str(item["depth"]),
            " × ".join(map(str, item["shape"])),
            item["dtype"],
            item["codec"],
            f"{item['chunks']:,}",
            words.size(item["disk_bytes"]),
            state(item["state"]),
        )
    return shown.lines()


def _committed(store: ActivationStore) -> list[dict[str, Any]]:
    """The committed stages as plain data; a damaged one is named and left to `verify`."""
    stages = []
    for recipe in store.stages():
        try:
            stage = store.stage(recipe, check=False)
        except DamageError as error:
            note(error.message)
            continue
        if stage is not None:
            record = {key: stage.record.get(key) for key in ("depth", "blocks", "steps", "seconds", "device")}
            size = sum(part.bytes for part in stage.parts.values() if not part.pruned)
            stages.append({"recipe": recipe, **record, "parts": sorted(stage.parts), "bytes": size})
    return sorted(stages, key=lambda stage: (-1 if stage["depth"] is None else stage["depth"], stage["recipe"]))
