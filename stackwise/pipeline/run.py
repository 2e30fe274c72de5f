"""A run's directory: the resolved configuration, the manifest, the log of events, checkpoints.

RUN/stackwise.yaml     the configuration, every value resolved
RUN/run.json           the manifest: each stage's recipe, state and figures
RUN/events.jsonl       what happened, one JSON object a line
RUN/tensorboard/       event files
RUN/tracking/          what each tracker has taken of the log
RUN/checkpoints/       stages in training, by recipe
RUN/logs/              what workers print
RUN/jobs.json, jobs/   the jobs of a batch system, and what each said of itself
RUN/evaluation.json    held-out results
RUN/store/             the store, unless `store.path` says otherwise
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise import durable
from stackwise.config import StackWiseConfig
from stackwise.durable import FileLock
from stackwise.errors import NotFound, UsageError
from stackwise.store import ActivationStore

if TYPE_CHECKING:
    from stackwise.pipeline.schedule import Stage

FORMAT = 1
PREPARING = "preparing"
"""In the manifest of a run that has no plan yet: `phase`, `done` of `total`, and what it `failed` by."""


class RunDirectory:
    """The paths and the manifest of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "stackwise.yaml"
        self.manifest_file = path / "run.json"
        self.events_file = path / "events.jsonl"
        self.evaluation_file = path / "evaluation.json"
        self.report_file = path / "report.html"
        self.tracking = path / "tracking"
        self.jobs_file = path / "jobs.json"
        self.jobs = path / "jobs"
        self.logs = path / "logs"
        self.export = path / "export"

    def checkpoints(self, recipe_id: str) -> Path:
        """Where a recipe's checkpoints are."""
        return self.path / "checkpoints" / recipe_id

    def lock(self) -> FileLock:
        """Held while a runner works on this directory."""
        return FileLock(self.path / "run.lock", f"run {self.path}")

    def create(self) -> None:
        """Make the directory.

        Raises:
            UsageError: It cannot be made or written.
            NoSpaceError: The disk is full.
        """
        self.check()
        with durable.explain_full_disk(self.path):
            try:
                self.logs.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise UsageError(f"run directory {self.path} cannot be used: {error.strerror}") from None
        if not self.manifest_file.exists() and self.config_file.exists() and self.earlier_config() is None:
            raise UsageError(f"{self.config_file} is not a run's", hint="name another directory with --run")

    def check(self) -> None:
        """Look whether the directory is there, or can be made, and can be written.

        Raises:
            UsageError: It cannot.
        """
        if fault := durable.unusable(self.path):
            raise UsageError(f"run directory {self.path} cannot be used: {fault}", hint="name another with --run")

    def earlier_config(self) -> StackWiseConfig | None:
        """The configuration of the run that was here before; None where there was none that can be read."""
        try:
            return self.config()
        except UsageError:
            return None

    def store_path(self, config: StackWiseConfig) -> Path:
        """Where the run's store is."""
        return Path(config.store.path).expanduser() if config.store.path else self.path / "store"

    def open_store(self, config: StackWiseConfig) -> ActivationStore:
        """The run's store, which is there already.

        Raises:
            NotFound: It is not where it was.
        """
        path = self.store_path(config)
        if not (path / "format.json").exists():
            raise NotFound(
                f"store.path: the store of {self.path} is not at {path}",
                hint=f"where it was moved, `stackwise run --run {self.path} -o store.path=DIR` takes it up from there",
            )
        return ActivationStore(path, create=False)

    def config(self) -> StackWiseConfig:
        """The run's resolved configuration.

        Raises:
            NotFound: There is no run here.
        """
        if not self.config_file.exists():
            raise NotFound(f"{self.path}: there is no run here", hint=f"`stackwise run --run {self.path}` makes one")
        return StackWiseConfig.from_yaml(str(self.config_file))

    def manifest(self) -> dict[str, Any]:
        """The manifest; empty stages for a run that has not begun.

        Raises:
            NotFound: There is no run here.
            UsageError: The manifest is broken, or of a newer format.
        """
        try:
            manifest = durable.read_json(self.manifest_file)
            if manifest["format"] > FORMAT:
                raise UsageError(f"{self.manifest_file} is of a newer format ({manifest['format']})")
        except FileNotFoundError:
            self.config()
            return {"format": FORMAT, "stages": []}
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"{self.manifest_file} is broken: {error}",
                hint="remove it and run again: committed stages are recognised by their content",
            ) from None
        return dict(manifest)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Publish the manifest."""
        durable.write_json(self.manifest_file, {"format": FORMAT, **manifest})


def with_absolute_paths(config: StackWiseConfig) -> StackWiseConfig:
    """A copy whose paths do not depend on the current directory, so that a run can be used from anywhere."""
    config = config.model_copy(deep=True)

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    config.data.paths = [absolute(path) for path in config.data.paths]
    if config.data.tokenizer not in ("bpe", "bytes"):
        config.data.tokenizer = absolute(config.data.tokenizer)
    if config.tracking.mlflow:
        scheme, colon, rest = config.tracking.mlflow.partition("://")
        if not colon and scheme != "databricks":
            config.tracking.mlflow = absolute(scheme)
        elif scheme == "sqlite" and rest.startswith("/") and not rest.startswith("//"):
            config.tracking.mlflow = f"sqlite:///{absolute(rest[1:])}"
    if config.data.cache_dir is not None:
        config.data.cache_dir = absolute(config.data.cache_dir)
    if config.store.path is not None:
        config.store.path = absolute(config.store.path)
        if config.training.cache_dir is not None:
            config.training.cache_dir = config.store.path
    return config


def held_by_live_process(run: RunDirectory) -> bool:
    """Whether a runner works on this directory now."""
    return durable.is_locked(run.path / "run.lock")


def status(run: RunDirectory) -> dict[str, Any]:
    """The run's state, in the shape of `stackwise status --json`. Reads files alone.

    While data is prepared or an `auto` setting is tried, and where that was as far as a run came, `preparing` says what
    of it; stages are then those of the run before, or none.
    """
    manifest, live = run.manifest(), held_by_live_process(run)
    preparing = manifest.get(PREPARING)
    stages = []
    for stage in manifest["stages"]:
        shown = {key: stage.get(key) for key in STATUS_KEYS}
        if chosen := stage.get("unfrozen"):  # by adaptive fusion
            blocks = (f"{first}" if first == last else f"{first}–{last}" for first, last in chosen)
            shown["reason"] = f"{shown['reason']}; trained blocks {', then '.join(blocks)}"
        if shown["state"] == "running" and (preparing or not live):
            shown["state"] = "interrupted"
        stages.append(shown)
    states = {stage["state"] for stage in stages}
    if live:
        state = "running"
    elif preparing:
        state = "failed" if "failed" in preparing else "interrupted"
    elif stages and states == {"done"}:
        state = "done"
    else:
        state = next((s for s in ("failed", "interrupted") if s in states), "pending")
    value = {"run": str(run.path), "state": state, "stages": stages}
    return value | ({PREPARING: preparing} if preparing else {}) | _jobs(run)


def job_file(run: RunDirectory, job: Mapping[str, Any]) -> Path:
    """Where the job of a `stage` and `window` (stage None: of the evaluation) keeps its state."""
    stage, window = job["stage"], job.get("window")
    if stage is None:
        return run.jobs / "finish.json"
    return run.jobs / f"stage-{stage:03d}{'' if window is None else f'-window-{window:03d}'}.json"


def job_state(path: Path) -> str:
    """What a job last said of itself; `submitted` before it said anything."""
    try:
        return str(durable.read_json(path)["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return "submitted"


def _jobs(run: RunDirectory) -> dict[str, list[dict[str, Any]]]:
    """The jobs of a run that was submitted to a batch system, each with what it last said of itself."""
    try:
        jobs = durable.read_json(run.jobs_file)
    except (OSError, ValueError):
        return {}
    keys = ("stage", "window", "job", "engine")
    return {
        "jobs": [
            {key: job[key] for key in keys if key in job} | {"state": job_state(job_file(run, job))} for job in jobs
        ]
    }


STATUS_KEYS = (
    "depth",
    "window",
    "blocks",
    "state",
    "step",
    "steps",
    "loss",
    "trunk",
    "weights",
    "recipe",
    "reason",
    "wait_fraction",
    "peak_memory_bytes",
)


def pending(stage: Stage, steps: int) -> dict[str, Any]:
    """A stage in the manifest before anything is known of it but the schedule."""
    blocks = [stage.first, stage.last]
    known = {
        "depth": stage.depth,
        "window": stage.window,
        "blocks": blocks,
        "state": "pending",
        "step": 0,
        "steps": steps,
    }
    return dict.fromkeys(STATUS_KEYS) | known
