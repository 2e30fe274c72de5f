"""Committed stages: what training a stage came to, under its recipe's id, whole or not there at all.

    STORE/stages/<recipe id>/front.safetensors, block.3.safetensors, …, stage.json

The directory is built under a temporary name with `stage.json` written last, then renamed. Every file's size and
digest stand in `stage.json`, so a file that was deleted or altered by hand is noticed and named.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise import durable
from stackwise.errors import DamageError, UsageError
from stackwise.files import IrregularFile, file_digest, open_regular, read_json, remove_tree
from stackwise.identity import Hex, content_id, digest, is_hex_id
from stackwise.store import disk
from stackwise.store.index import Index
from stackwise.store.layout import Layout, Lease, checked_id
from stackwise.store.records import parse_run

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,100}")
_RECORD_BYTES = 256 << 20


@dataclass(frozen=True)
class PartFile:
    """The file of a part: its name in the stage's directory, its size in bytes, xxh3-128 of its bytes.

    A pruned one was removed on purpose: the record stays, and says what it was.
    """

    file: str
    bytes: int
    digest: Hex
    pruned: bool = False

    def plain(self) -> dict[str, Any]:
        """As `stage.json` has it."""
        plain = {"file": self.file, "bytes": self.bytes, "digest": self.digest}
        return plain | ({"pruned": True} if self.pruned else {})


@dataclass(frozen=True)
class CommittedStage:
    """A committed stage.

    Attributes:
        recipe: The recipe's id.
        directory: Where its files lie.
        record: The plain data that it was committed with.
        parts: Each part ("front", "block.3", "head") and its file.
    """

    recipe: Hex
    directory: Path
    record: dict[str, Any]
    parts: dict[str, PartFile]

    def path(self, part: str) -> Path:
        """The safetensors file of a part.

        Raises:
            UsageError: The stage has no such part.
        """
        if part not in self.parts:
            raise UsageError(f"stage {self.recipe} has no part {part!r}; it has {', '.join(self.parts)}")
        return self.directory / self.parts[part].file

    def check(self) -> None:
        """Compare every file with its size and digest.

        Raises:
            DamageError: A file is missing or was changed; it is named.
        """
        for fault in self.faults():
            raise DamageError(
                f"committed stage {self.recipe}: {self.directory / fault[0]} {fault[1]}",
                hint="`stackwise run` trains that stage again from its upstream",
            )

    def faults(self) -> Iterator[tuple[str, str]]:
        """(file, what is wrong with it) of every file that is missing or was changed."""
        for part in (part for part in self.parts.values() if not part.pruned):
            path = self.directory / part.file
            try:
                with open(open_regular(path), "rb", buffering=0) as file:
                    size = os.fstat(file.fileno()).st_size
                if size != part.bytes:
                    yield part.file, f"has {size} bytes instead of {part.bytes}"
                elif file_digest(path) != part.digest:
                    yield part.file, "was changed"
            except PermissionError:
                raise  # not damaged: it may not be read
            except IrregularFile:
                yield part.file, "is no regular file"
            except OSError as error:
                missing = isinstance(error, FileNotFoundError | NotADirectoryError)
                yield part.file, "is missing" if missing else f"is unreadable ({error.strerror})"


class Stages:
    """The committed stages of one store."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def commit(
        self, recipe: Hex, write_parts: Mapping[str, Callable[[Path], None]], record: dict[str, Any]
    ) -> CommittedStage:
        """Commit a stage: its parts are written, fsynced, digested, and appear together or not at all.

        Committing a recipe again replaces what was committed.

        Args:
            recipe: Id of the stage's recipe.
            write_parts: For each part ("front", "block.3", "head") a function that writes its safetensors file
                to the path it is given.
            record: Plain data kept with it, such as the digests of the parts' tensors.

        Raises:
            UsageError: A part's name is not one, or the id.
            BusyError: Another process is committing the same recipe.
            NoSpaceError: The disk is full; nothing was changed.
        """
        final = self._layout.stage(recipe)
        for part in write_parts:
            if not _PART.fullmatch(part) or part == "stage":
                raise UsageError(f"{part!r} cannot name a part of a stage")
        text = json.dumps(record)  # fails before anything is written where the record is not plain
        with self._lease(recipe), durable.explain_full_disk(final):
            temporary = durable.temporary(final)
            temporary.mkdir()
            try:
                parts = {part: _write_part(temporary, part, write) for part, write in write_parts.items()}
                plain = {name: part.plain() for name, part in parts.items()}
                value = {"format": 1, "recipe": recipe, "parts": plain, "record": json.loads(text)}
                # Last: with it the directory is a stage.
                durable.write_json(temporary / "stage.json", value | {"digest": _record_digest(value)})
                replaced = final.with_name(f"{temporary.name}-replaced")
                if final.exists():
                    os.rename(final, replaced)
                os.rename(temporary, final)
            except BaseException:
                remove_tree(temporary)
                raise
            durable.fsync_directory(final.parent)
            remove_tree(replaced)
        return CommittedStage(recipe, final, json.loads(text), parts)

    def get(self, recipe: Hex, check: bool = True) -> CommittedStage | None:
        """The committed stage of a recipe; None where it was not committed.

        Args:
            recipe: Id of the recipe.
            check: Compare every file's size and digest.

        Raises:
            DamageError: A file is missing or was changed; it is named.
        """
        directory = self._layout.stage(recipe)
        path = directory / "stage.json"
        try:
            stage = _parse(recipe, directory, read_json(path, limit=_RECORD_BYTES))
        except FileNotFoundError as error:
            if not directory.exists():
                return None
            raise _damaged(path, "is missing") from error
        except PermissionError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
            raise _damaged(path, f"is damaged ({str(error)[:100]})") from error
        if check:
            stage.check()
        return stage

    def names(self) -> list[Hex]:
        """Recipe ids of all committed stages, damaged ones included."""
        try:
            return sorted(entry.name for entry in os.scandir(self._layout.stages) if is_hex_id(entry.name))
        except FileNotFoundError:
            return []

    def prune(self, recipe: Hex, parts: Collection[str]) -> int:
        """Remove the files of some parts of a committed stage; its record stays, and they count as no damage.

        Args:
            recipe: Id of the recipe.
            parts: Names of the parts.

        Returns:
            The bytes freed.

        Raises:
            BusyError: Another process is committing the same recipe.
            NoSpaceError: The disk is too full to say so; nothing was changed.
        """
        with self._lease(recipe):
            stage = self.get(recipe, check=False)
            if stage is None:
                return 0
            path = stage.directory / "stage.json"
            value = read_json(path, limit=_RECORD_BYTES)
            for name in parts:
                value["parts"][name]["pruned"] = True
            value["digest"] = _record_digest(value)
            # First the record: whatever happens between, what is missing is known to be.
            with durable.explain_full_disk(path):
                durable.write_json(path, value)
            freed = 0
            for name, part in stage.parts.items():
                file = stage.directory / part.file
                if (name in parts or part.pruned) and file.exists():
                    freed += file.stat().st_size
                    file.unlink()
            return freed

    def drop(self, recipe: Hex) -> int:
        """Remove a committed stage; returns the bytes freed."""
        final = self._layout.stage(recipe)
        lease = self._lease(recipe)
        try:
            if not final.exists():
                return 0
            # Under a temporary name first: a stage is there whole or not at all.
            doomed = durable.temporary(final)
            freed = disk.tree_bytes(final)
            os.rename(final, doomed)
            durable.fsync_directory(final.parent)
            remove_tree(doomed)
            return freed
        finally:
            lease.remove()

    def _lease(self, recipe: Hex) -> Lease:
        return Lease(self._layout.lock(f"stage-{recipe}"), f"stage {recipe}", alone=True)


def _write_part(directory: Path, part: str, write: Callable[[Path], None]) -> PartFile:
    path = directory / f"{part}.safetensors"
    durable.write_durably(path, write)
    return PartFile(path.name, path.stat().st_size, file_digest(path))


def _record_digest(value: Mapping[str, Any]) -> Hex:
    """The digest of all that a `stage.json` says, which it carries itself."""
    content = {key: value[key] for key in ("format", "recipe", "parts", "record")}
    return digest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _parse(recipe: Hex, directory: Path, value: Any) -> CommittedStage:
    if not set(value) <= {"format", "recipe", "parts", "record", "digest"}:
        raise ValueError("it has other keys than a stage's record")
    if value["recipe"] != recipe or value["format"] != 1:
        raise ValueError("it is that of another stage, or of another format")
    parts = {}
    for name, part in value["parts"].items():
        if not _PART.fullmatch(name) or part["file"] != f"{name}.safetensors":
            raise ValueError("a part's name is not one")
        if not isinstance(part["bytes"], int) or not is_hex_id(part["digest"]):
            raise ValueError(f"part {name}")
        parts[name] = PartFile(part["file"], part["bytes"], part["digest"], part.get("pruned") is True)
    record = value["record"]
    if not isinstance(record, dict):
        raise ValueError("no record")
    if isinstance(record.get("recipe"), dict):  # a stage of a run; others commit records of their own
        if content_id("recipe", record["recipe"]) != recipe:
            raise ValueError("its recipe is another")
        digests = record.get("parts")
        if not isinstance(digests, dict) or set(digests) != set(parts) or not all(map(is_hex_id, digests.values())):
            raise ValueError("the digests of its parts")
    if "digest" in value and value["digest"] != _record_digest(value):  # those of earlier versions have none
        raise ValueError("it is not what was written")
    return CommittedStage(recipe, directory, value["record"], parts)


def _damaged(path: Path, fault: str) -> DamageError:
    return DamageError(f"{path} {fault}", hint="`stackwise run` trains that stage again from its upstream")


class Runs:
    """What registered runs refer to: `gc` keeps it."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def register(
        self,
        run_key: str,
        *,
        recipes: list[Hex],
        boundaries: list[Hex],
        idle: Mapping[Hex, Sequence[str]] | None = None,
    ) -> None:
        """Say what a run refers to, instead of what was said of it before: `gc` keeps that.

        Args:
            run_key: The run's name, such as its directory; 1 to 400 bytes.
            recipes: Ids of the recipes whose committed stages it needs.
            boundaries: Ids of the boundaries that it needs.
            idle: Parts, by recipe, whose weights it will not ask for: others may prune them. `gc` takes no part.

        Raises:
            UsageError: An id or the key is not one.
        """
        key = run_key.encode()
        if not 0 < len(key) <= 400:
            raise UsageError("a run's key has 1 to 400 bytes")
        for name in (*recipes, *boundaries):
            checked_id(name, "recipe or boundary")
        refers: dict[str, Any] = {"recipes": recipes, "boundaries": boundaries, "at": time.time()}
        refers |= {"idle": {recipe: list(parts) for recipe, parts in idle.items()}} if idle else {}
        value = json.dumps(refers).encode()
        self._index.update(lambda view: view.put("runs", key, value))

    def forget(self, run_key: str) -> bool:
        """Forget a registered run; whether there was one. What it alone referred to is then `gc`'s."""
        return self._index.update(lambda view: view.delete("runs", run_key.encode()))

    def all(self) -> dict[str, dict[str, Any]]:
        """Registered runs by key: `{"recipes": [...], "boundaries": [...], "at": seconds since 1970}`.

        `idle` beside them, where a run has let go of parts.
        """
        with self._index.read() as view:
            records = list(view.scan("runs"))
        return dict(entry for key, raw in records if (entry := parse_run(key, raw)) is not None)
