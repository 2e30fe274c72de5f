"""`stackwise cache …`: the activation store. Each command calls one of the store's functions."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import click

from stackwise import words
from stackwise.cli.app import Subcommands
from stackwise.cli.commands.cache_upkeep import gc, repair, unlock
from stackwise.cli.drawing import Table, progress, state
from stackwise.cli.options import find_run
from stackwise.cli.output import Line, Styled, note, print_json, say, say_all
from stackwise.cli.stores import opened, where
from stackwise.errors import DamageError

if TYPE_CHECKING:
    from stackwise.config import StackWiseConfig
    from stackwise.pipeline.run import RunDirectory
    from stackwise.store import ActivationStore, CommittedStage


@click.group(cls=Subcommands, short_help="The activation store: look, check, mend, clean.")
def cache() -> None:
    """The activation store: look, check, mend, clean.

    Without --run and --store it is the store of the latest run under runs/.
    """


for _command in (repair, gc, unlock):
    cache.add_command(_command)


@cache.command()
@where
def inspect(run: str | None, store: str | None, as_json: bool) -> None:
    """What the store holds: masks, boundaries, index; and what the run's next boundary needs."""
    if run is None and store is None:
        run = str(find_run(None).path)
    with opened(run, store) as it:
        found, path = it.inspect(), it.path
        found["planned"] = None if run is None else _planned(find_run(run), it)
    if as_json:
        print_json(found)
        return
    masks, index = found["masks"], found["index"]
    say(f"{path}: format {found['format']}")
    say(f"masks       {masks['unique']:,} distinct, {masks['referenced']:,} rows name one")
    say(f"index       {index['entries']:,} entries, {words.size(index['bytes'])}")
    total = sum(boundary["disk_bytes"] for boundary in found["boundaries"])
    say(f"boundaries  {len(found['boundaries'])}, {words.size(total)} on disk")
    if found["planned"] is not None:
        say(f"planned     {_said(found['planned'])}")
    if found["boundaries"]:
        say_all(_boundaries(found["boundaries"]))


@cache.command(name="ls")
@where
def list_entries(run: str | None, store: str | None, as_json: bool) -> None:
    """Every boundary and every committed stage, and the runs that refer to them."""
    with opened(run, store) as it:
        boundaries = it.inspect()["boundaries"]
        stages = _committed(it)
        runs = it.runs()
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
    with opened(run, store) as it:
        found, path = it.usage(), it.path
    if as_json:
        print_json(found)
        return
    shown = Table("", "bytes", right=(1,))
    for name in ("boundaries", "stages", "index", "reserve", "total", "free"):
        style = "bold" if name == "total" else "dim" if name == "free" else ""
        shown.add_row("free on this disk" if name == "free" else name, words.size(found[name]), style=style)
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
        with opened(run, store) as it, progress("verifying") as tell:
            found = it.verify(progress=tell, fast=fast, subset=subset, max_duration=max_duration)
    except DamageError as error:  # it does not even open
        if as_json:
            fault = {"boundary": "index", "chunk": None, "fault": error.message}
            print_json({"checked_chunks": 0, "checked_stages": 0, "damaged": [fault], "orphans": [], "complete": False})
        raise
    if as_json:
        print_json(found)
    else:
        _show_verified(found)
    if found["damaged"]:
        raise DamageError(
            f"{words.plural(len(found['damaged']), 'fault')} found",
            hint="`stackwise cache repair` mends what can be, `stackwise run` makes again what it needs",
        )


def _show_verified(found: dict[str, Any]) -> None:
    if found["damaged"]:
        shown = Table("boundary", "chunk", "fault")
        for damage in found["damaged"]:
            chunk = "" if damage["chunk"] is None else str(damage["chunk"])
            shown.add_row(damage["boundary"], chunk, Styled(damage["fault"], "red"))
        say_all(shown.lines())
    stages = found.get("checked_stages", 0)
    checked = f"{words.plural(found['checked_chunks'], 'chunk')} and {words.plural(stages, 'committed stage')} checked"
    verdict = words.plural(len(found["damaged"]), "fault") if found["damaged"] else "no damage"
    say(f"{checked}: {verdict}")
    for name in found.get("unreadable", ()):
        note(f"not checked, as it may not be read: {name}")
    if not found.get("complete", True):
        note("time ran out before all was checked")
    if found["orphans"]:
        note(f"{words.plural(len(found['orphans']), 'orphan')} (files that belong to nothing):")
        for name in found["orphans"][:10]:
            note(f"  {name}")


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
            written = store.find(trunk=trunk, rowset=rowset, codec=codec_name(config.store))
        if written is not None and written.state == "complete":
            continue
        begun = written.disk_bytes if written is not None else 0
        needed = None if rows is None else max(0, boundary_bytes(config, rows) - begun)
        return {"stage": stage.depth, "rows": rows, "needed": needed}
    return {}


def _said(planned: dict[str, Any]) -> str:
    if planned["stage"] is None:
        return "no boundary is to come"
    needed, free = planned["needed"], planned["free"]
    said = f"the next boundary (for stage {planned['stage']}) needs "
    said += "what its rows will take: they are not chosen yet" if needed is None else words.size(needed)
    allowed = "" if planned["allowed"] is None else f" of {words.size(planned['allowed'])} allowed"
    said += f"; the store has {words.size(planned['stored'])}{allowed}, the disk {words.size(free)} free"
    return f"{said}: too little" if needed is not None and needed > free else said


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


def _committed(opened: ActivationStore) -> list[dict[str, Any]]:
    """The committed stages as plain data; a damaged one is named and left to `verify`."""
    found = []
    for recipe in opened.stages():
        try:
            stage = opened.stage(recipe, check=False)
        except DamageError as error:
            note(error.message)
            continue
        if stage is not None:
            record = {key: stage.record.get(key) for key in ("depth", "blocks", "steps", "seconds", "device")}
            size = sum(part.bytes for part in stage.parts.values() if not part.pruned)
            found.append({"recipe": recipe, **record, "parts": sorted(stage.parts), "bytes": size})
    return sorted(found, key=lambda stage: (-1 if stage["depth"] is None else stage["depth"], stage["recipe"]))
