"""`stackwise cache repair`, `gc`, `unlock`: what changes a store. Each can say what it would do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from stackwise import words
from stackwise.cli.drawing import Table, progress
from stackwise.cli.options import find_run
from stackwise.cli.output import Styled, note, print_json, say, say_all
from stackwise.cli.stores import opened, store_path, where
from stackwise.errors import DamageError, UsageError

if TYPE_CHECKING:
    from stackwise.store import BoundaryInfo, Recompute

dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
NAMED = 10
"""Ids that are listed one by one."""


@click.command()
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

    with progress("repairing") as tell:
        recompute = None if store else _recompute(run)
        found = repair_store(path, recompute, dry_run=dry_run, drop_stages=drop_stages, progress=tell)
    if as_json:
        print_json(found)
    else:
        _show_repaired(found, dry_run)
    if found["gone"]:
        gone = words.plural(len(found["gone"]), "thing")
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


def _show_repaired(found: dict[str, Any], dry_run: bool) -> None:
    would = "would be " if dry_run else ""
    if found.get("index", "sound") != "sound":
        say(f"index: {'damaged' if dry_run else 'set aside and rebuilt'}")
    for name in found["rebuilt"]:
        say(f"{would}rebuilt: {name}")
    for item in found["repaired"]:
        say(f"{would}repaired: {_place(item)}: {item['fault']}")
    for item in found["gone"]:
        say(Styled(f"{would}gone", "red"), f": {_place(item)}: {item['fault']}")
    for name in found["dropped_stages"]:
        say(f"{would}removed: stage {name}")
    for name in found["busy"]:
        note(f"in use, left alone: {name}")
    if not any(found[key] for key in ("rebuilt", "repaired", "gone")):
        say(f"{words.plural(found['checked_chunks'], 'chunk')} checked: nothing to repair")


def _place(item: dict[str, Any]) -> str:
    return item["boundary"] if item["chunk"] is None else f"{item['boundary']}, {_chunk(item['chunk'])}"


def _chunk(name: int | str) -> str:
    return f"chunk {name}" if isinstance(name, int) else name


@click.command()
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
    with opened(run, store) as it, progress("collecting") as tell:
        found = it.gc(dry_run=dry_run, all=everything, forget_missing=forget_missing, progress=tell)
    if as_json:
        print_json(found)
        return
    would = "would go" if dry_run else "removed"
    shown = Table("", would, right=(1,))
    for name, value in found.items():
        if name not in ("dry_run", "busy", "freed", "missing_runs"):
            shown.add_row(name, f"{value if isinstance(value, int) else len(value):,}")
    say_all(shown.lines())
    say(f"{words.size(found['freed'])} {'would be freed' if dry_run else 'freed'}")
    for name in found["busy"][:NAMED]:
        note(f"in use, left alone: {name}")
    for name in found["missing_runs"][:NAMED]:
        note(f"the directory of this run is gone: {name}")
    if found["missing_runs"]:
        forgotten = "they would be forgotten" if dry_run else "they were forgotten"
        note(forgotten if forget_missing else "`--forget-missing` forgets them, and collects what was theirs alone")


@click.command()
@where
def unlock(run: str | None, store: str | None, as_json: bool) -> None:
    """Free what dead processes left. A living holder's locks stay, and are named."""
    with opened(run, store) as it:
        found = it.unlock()
    if as_json:
        print_json(found)
        return
    removed, readers = len(found["removed"]), found["stale_readers"]
    say(f"{words.plural(removed, 'lock')} that nobody held and {words.plural(readers, 'stale reader')} removed")
    for name in found["held"]:
        note(f"held by a living process: {name}")
