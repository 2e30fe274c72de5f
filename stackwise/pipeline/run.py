"""A run's directory (docs/architecture.md, "On disk"): its configuration, manifest, log of events, jobs, evaluation.

The directory may be a copy from elsewhere: what is read from it is checked here (`shapes.py`), and it is written into
only where its entries are files and directories of its own. `status` costs what reading the manifest costs: whatever
needs more than that imports it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stackwise import durable, shapes
from stackwise.durable import FileLock
from stackwise.errors import NotFound, UsageError
from stackwise.files import expanded, irregular, open_to_write, read_json, read_text
from stackwise.shapes import (
    array,
    array_of,
    check_shape,
    count,
    either,
    hex_id,
    integer,
    mapping,
    number,
    optional,
    record,
    string,
    text,
)
from stackwise.text import has_control

if TYPE_CHECKING:
    from stackwise.config import StackWiseConfig
    from stackwise.pipeline.schedule import Stage
    from stackwise.store import ActivationStore

FORMAT = 1
PREPARING = "preparing"
"""In the manifest of a run that has no plan yet: `phase`, `done` of `total`, and what it `failed` by."""
FILES = ("stackwise.yaml", "run.json", "events.jsonl", "evaluation.json", "report.html", "jobs.json", "run.lock")
DIRECTORIES = ("logs", "tracking", "tensorboard", "checkpoints", "jobs", "export", "wandb", "clearml", "suites")
LINKED = ("jobs", "wandb")  # directories in which packages make links of their own: submitit under `logs`, and W&B
STATES = ("pending", "running", "done", "failed", "interrupted")
JOB_STATES = ("submitted", "running", "done", "failed", "interrupted", "not run")

_STAGE = {
    "depth": count,
    "window": count,
    "blocks": array(count, count),
    "state": shapes.one_of(*STATES),
    "step": optional(count),
    "steps": count,
    "loss": optional(number),
    "trunk": optional(hex_id),
    "weights": optional(hex_id),
    "recipe": optional(hex_id),
    "reason": optional(text),
    "wait_fraction": optional(number),
    "peak_memory_bytes": optional(count),
}
STATUS_KEYS = tuple(_STAGE)
_USED = record({}, dict.fromkeys(("entropy", "least", "most", "dropped"), number) | {"shares": array_of(number)})
_ROUTES = record(
    {"first": count, "reached": number, "of": count, "by_chance": optional(number), "bytes": optional(count)}
)
_READ = record({"reached": number, "bytes": number})
_FIGURES = dict.fromkeys(("loss", "accuracy", "f1", "bleu"), mapping(optional(number)))
_SCORES = {"bits_per_byte": optional(number), "bits_per_byte_error": optional(number), "bytes": count, "depth": count}
_SCORES |= {"tokens": count, "samples": count, "likelihood": optional(text)}
_SCORES |= {"figures": mapping(optional(number)), "of": text}
_FIGURE_SHAPES = {**_FIGURES, **_SCORES}
_PARTS = {"stages": array_of(record({}, _FIGURE_SHAPES)), "baselines": mapping(record({}, _FIGURE_SHAPES))}
_BY_SAMPLE = record({"nats": array_of(optional(number)), "of": array_of(count), "unit": shapes.one_of("byte", "token")})
SCORES = record({}, {**_FIGURE_SHAPES, **_PARTS})  # what of an evaluation becomes figures
_EVALUATION = record({"loss": _FIGURES["loss"], "tokens": count}, {**_FIGURE_SHAPES, **_PARTS, "by_sample": _BY_SAMPLE})
_FILL = record({"before": string, "after": string, "spans": array_of(array(string, string))})
_RANK = {
    **dict.fromkeys(("step", "pid", "memory"), count),
    **{key: optional(number) for key in ("tokens_per_second", "wait_fraction", "sync_fraction")},
}
_TASKS = record({"names": array_of(text), "after": array_of(number)}, {"before": optional(array_of(number))})
_MANIFEST = record(
    {"stages": array_of(record(_STAGE, {
        "held_out": optional(record({"step": count, "nats": optional(number), "best": optional(number)})),
        "divergences": count,
        "unfrozen": array_of(array(count, count)),
        "experts": mapping(_USED),
        "routes": _ROUTES,
        "pieces": _READ,
        "adaptation": array_of(number),
        "tasks": optional(_TASKS),
        "last": optional(hex_id),
    }))},
    {
        "name": text,
        "data": record({"id": hex_id, "directory": text}),
        "vocabulary": record({"size": count, "mask": optional(count)}),
        "store": text,
        "rowsets": mapping(either(array(hex_id, count), array(hex_id, count, count))),
        "auto": mapping(record({"conditions": text}, {"rows": count, "blocks": count, "losses": mapping(number)})),
        "group": record({"ranks": array_of(record({"rank": count}, _RANK)), "slowest": count}),
        "boundaries": array_of(hex_id),
        "evaluation": optional(record({"key": text, "result": _EVALUATION}, {"fill": optional(_FILL)})),
        PREPARING: record({"phase": text, "done": integer, "total": optional(integer)}, {"failed": text}),
    },
)  # fmt: skip
_JOBS = array_of(
    record(
        {"stage": optional(count), "job": text, "engine": shapes.one_of("slurm", "local", "ray")},
        {"window": optional(count), "log": text},
    )
)


def _check_entries(directory: Path) -> None:
    """Refuse links and whatever else is neither a file nor a directory: it would be written through."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in LINKED:
                    _check_entries(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                raise irregular(Path(entry.path), "a symbolic link" if entry.is_symlink() else "no file")


def store_place(path: str, rank: int = 0) -> Path:
    """Where `store.path` is for a rank, on this host."""
    return expanded(path.replace("{rank}", str(rank)).replace("{host}", socket.gethostname()))


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
        self.job_states = path / "jobs"
        self.logs = path / "logs"
        self.export = path / "export"

    def checkpoints(self, recipe_id: str) -> Path:
        """Where a recipe's checkpoints are."""
        return self.path / "checkpoints" / recipe_id

    def lock(self) -> FileLock:
        """Held while a runner works on this directory."""
        return FileLock(self.path / "run.lock", f"run {self.path}")

    def open_log(self, name: str) -> IO[bytes]:
        """A log file, to be appended to."""
        return open_to_write(self.logs / name, append=True, root=self.path)

    def create(self) -> None:
        """Make the directory.

        Raises:
            UsageError: It cannot be made or written.
            IrregularFile: An entry of it is a link, or not what it should be: it would be written through.
            NoSpaceError: The disk is full.
        """
        self.check()
        with durable.explain_full_disk(self.path):
            try:
                self.logs.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a full disk has an exit code of its own
                    raise
                raise UsageError(f"run directory {self.path} cannot be used: {error.strerror}") from None
        # Nothing is written over a file of that name that no run has made.
        if not self.manifest_file.exists() and self.config_file.exists() and self.earlier_config() is None:
            raise UsageError(f"{self.config_file} is not a run's", hint="name another directory with --run")

    def check(self) -> None:
        """Look whether the directory is there, or can be made, and can be written; raises as `create` does."""
        if fault := durable.unusable(self.path):
            raise UsageError(f"run directory {self.path} cannot be used: {fault}", hint="name another with --run")
        for name in (*FILES, *DIRECTORIES):
            with contextlib.suppress(FileNotFoundError):
                mode = os.lstat(self.path / name).st_mode
                if not (stat.S_ISREG(mode) if name in FILES else stat.S_ISDIR(mode)):
                    kind = "no file" if name in FILES else "no directory"
                    raise irregular(self.path / name, "a symbolic link" if stat.S_ISLNK(mode) else kind)
                if name in DIRECTORIES and name != "wandb":  # which W&B fills with links of its own
                    _check_entries(self.path / name)

    def earlier_config(self) -> StackWiseConfig | None:
        """The configuration of the run that was here before; None where there was none that can be read."""
        try:
            return self.config()
        except UsageError:
            return None

    def store_path(self, config: StackWiseConfig) -> Path:
        """Where the run's store is: of several ranks' stores the first."""
        return store_place(config.store.path) if config.store.path else self.path / "store"

    def store_settings(self) -> tuple[Path, int | None]:
        """Where the run's store is, and its `store.max_bytes`; the rest of its configuration is not looked at."""
        import yaml

        # The file was written by a run, with every value resolved. Whatever is odd about it the full reading explains.
        with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError, KeyError, TypeError):
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            store = yaml.load(read_text(self.config_file, limit=1 << 20), loader)["store"]
            path, most = store["path"], store["max_bytes"]
            plain = path is None or (isinstance(path, str) and path and not has_control(path))
            if plain and (most is None or type(most) is int):
                return self.path / "store" if path is None else store_place(path), most
        config = self.config()
        return self.store_path(config), config.store.max_bytes

    def open_store(self, config: StackWiseConfig) -> ActivationStore:
        """The run's store, which is there already. Raises NotFound: it is not where it was."""
        from stackwise.store import ActivationStore

        path = self.store_path(config)
        if not (path / "format.json").exists():
            raise NotFound(
                f"store.path: the store of {self.path} is not at {path}",
                hint=f"where it was moved, `stackwise run --run {self.path} -o store.path=DIR` takes it up from there",
            )
        return ActivationStore(path, create=False)

    def config(self) -> StackWiseConfig:
        """The run's resolved configuration. Raises NotFound: there is no run here."""
        from stackwise.config import StackWiseConfig

        if not self.config_file.exists():
            raise NotFound(f"{self.path}: there is no run here", hint=f"`stackwise run --run {self.path}` makes one")
        return StackWiseConfig.from_yaml(str(self.config_file))

    def manifest(self) -> dict[str, Any]:
        """The manifest; empty stages for a run that has not begun.

        Raises:
            NotFound: There is no run here.
            UsageError: The manifest is broken, or of a newer format.
        """
        file, hint = self.manifest_file, "remove it and run again: committed stages are recognised by their content"
        manifest: dict[str, Any] | None = _read(file, record({"format": count}), hint)
        if manifest is None:
            self.config()
            return {"format": FORMAT, "stages": []}
        if manifest["format"] > FORMAT:
            raise UsageError(f"{file} is of a newer format ({manifest['format']})")
        check_shape(manifest, _MANIFEST, file, hint)
        done = [stage for stage in manifest["stages"] if stage["state"] == "done"]
        check_shape(done, array_of(record({"recipe": hex_id, "weights": hex_id})), f"{file}, of stages done,", hint)
        if done:  # what was committed is of some data
            check_shape(manifest, record({"data": shapes.anything, "vocabulary": shapes.anything}), file, hint)
        return manifest

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Publish the manifest."""
        durable.write_json(self.manifest_file, {"format": FORMAT, **shapes.finite(manifest)})

    def evaluation(self) -> dict[str, Any] | None:
        """The held-out results, as the last evaluation wrote them; None: there are none."""
        hint = "remove it: `stackwise run` writes it again"
        result: dict[str, Any] | None = _read(self.evaluation_file, _EVALUATION, hint)
        return result

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs that the run was submitted as; none where it was not."""
        hint = "remove it; jobs that are still queued are the batch system's to show"
        jobs: list[dict[str, Any]] = _read(self.jobs_file, _JOBS, hint) or []
        for job in jobs:  # an id becomes part of a command
            if not job["job"].replace("_", "").isalnum() or (job["engine"] != "slurm" and not job["job"].isdecimal()):
                raise UsageError(f"{self.jobs_file} is broken: a job's id is none", hint=hint)
        return jobs


def _read(file: Path, shape: shapes.Shape, hint: str) -> Any:
    """A file of JSON of some shape; None: there is none. Raises UsageError where it is broken."""
    try:
        value = read_json(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{file} is broken: {error}", hint=hint) from None
    check_shape(value, shape, file, hint)
    return value


def with_absolute_paths(config: StackWiseConfig) -> StackWiseConfig:
    """A copy whose paths do not depend on the current directory, so that a run can be used from anywhere."""
    from stackwise.config.schema import CHAT_TEMPLATES  # `status` does without the configuration

    config = config.model_copy(deep=True)
    data, store = config.data, config.store

    def absolute(path: str) -> str:
        return str(expanded(path).absolute())

    data.paths = [absolute(path) for path in data.paths]
    for task in data.tasks:
        task.paths = [absolute(path) for path in task.paths]
    if data.tokenizer not in ("bpe", "bytes"):
        data.tokenizer = absolute(data.tokenizer)
    if data.chat_template is not None and data.chat_template not in CHAT_TEMPLATES:
        data.chat_template = absolute(data.chat_template)
    data.cache_dir = None if data.cache_dir is None else absolute(data.cache_dir)
    store.path = None if store.path is None else absolute(store.path)
    config.tracking.trackers = [tracker.placed(absolute) for tracker in config.tracking.trackers]
    if config.init.weights is not None:
        config.init.weights = absolute(config.init.weights)
    config.init.experts = None if config.init.experts is None else [absolute(path) for path in config.init.experts]
    if (objective := config.objective.placed(absolute)) is not config.objective:
        config.training.objective = objective
    if config.distillation.teacher is not None:
        config.distillation.teacher = absolute(config.distillation.teacher)
    for settings in (config.training, *(entry.training for entry in config.stages.values())):
        if settings.curriculum is not None and settings.curriculum.model is not None:
            settings.curriculum.model = absolute(settings.curriculum.model)
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
        shown = {key: stage[key] for key in STATUS_KEYS}
        if stage.get("tasks"):  # the held-out loss of each
            shown["tasks"] = dict(zip(stage["tasks"]["names"], stage["tasks"]["after"], strict=False))
        # How a router used experts, by block; what a step was predicted to reach; what one reads of a swapped
        # stage; query loss on tasks held out before the inner steps and after each.
        shown |= {key: stage[key] for key in ("experts", "routes", "pieces", "adaptation") if key in stage}
        if chosen := stage.get("unfrozen"):  # by adaptive fusion
            blocks = (f"{first}" if first == last else f"{first}–{last}" for first, last in chosen)
            shown["reason"] = f"{shown['reason']}; trained blocks {', then '.join(blocks)}"
        if shown["state"] == "running" and (preparing or not live):  # its runner was killed
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
    tasks = task_figures(manifest["stages"])
    group = manifest.get("group", {"ranks": []})
    value: dict[str, Any] = {"run": str(run.path), "state": state, "ranks": len(group["ranks"]) or 1, "stages": stages}
    if group["ranks"]:
        value["group"] = group
    if tasks is not None:
        value["tasks"] = tasks
    keys = ("stage", "window", "job", "engine")
    jobs = [{k: job[k] for k in keys if k in job} | {"state": job_state(job_file(run, job))} for job in run.jobs()]
    return value | ({PREPARING: preparing} if preparing else {}) | ({"jobs": jobs} if jobs else {})


def job_file(run: RunDirectory, job: Mapping[str, Any]) -> Path:
    """Where the job of a `stage` and `window` (stage None: of the evaluation) keeps its state."""
    stage, window = job["stage"], job.get("window")
    if stage is None:
        return run.job_states / "finish.json"
    return run.job_states / f"stage-{stage:03d}{'' if window is None else f'-window-{window:03d}'}.json"


def job_state(path: Path) -> str:
    """What a job last wrote of its state; `submitted` before it wrote anything."""
    with contextlib.suppress(OSError, ValueError):
        value = read_json(path)
        if record({"state": shapes.one_of(*JOB_STATES)})(value) is None:
            return str(value["state"])
    return "submitted"


def pending(stage: Stage, steps: int) -> dict[str, Any]:
    """A stage in the manifest before anything is known of it but the schedule."""
    known = {"depth": stage.depth, "window": stage.window, "blocks": [stage.first, stage.last]}
    return dict.fromkeys(STATUS_KEYS) | known | {"state": "pending", "step": 0, "steps": steps}


def recent_loss(losses: list[float | None]) -> float | None:
    """The mean of the last steps' losses: one step's alone is mostly noise."""
    recent = [loss for loss in losses[-20:] if loss is not None]
    return sum(recent) / len(recent) if recent else None


def task_figures(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Average loss, forgetting and forward transfer of the highest stage, in nats.

    With L[t][j] the loss of task j after task t, of T tasks, and b[j] that of the stage before the first one: the
    average is the mean of L[T-1]; forgetting the mean over all but the last task of L[T-1][j] less the lowest L[t][j]
    from j on (arXiv 1801.10112, of losses); forward transfer the mean over all but the first of b[j] - L[j-1][j]
    (arXiv 1706.08840).

    Args:
        stages: Entries of a manifest; those that know the losses of tasks have `tasks`: `names`, `after`, `before`.

    Returns:
        `tasks` names, `losses` a row a task that is learned, `before` where it is known; and the figures, None where
        one cannot be: forgetting and transfer of tasks that were not learned one after the other. None: no stage has
        learned tasks.
    """
    known = [stage for stage in stages if stage.get("tasks") and stage["state"] == "done"]
    if not known:
        return None
    top = max(stage["depth"] for stage in known)
    in_turn = sorted((stage for stage in known if stage["depth"] == top), key=lambda stage: stage["window"])
    losses = [stage["tasks"]["after"] for stage in in_turn]
    before, last, learned = in_turn[0]["tasks"].get("before"), losses[-1], len(losses)
    forgetting = transfer = None
    if learned > 1:
        forgetting = _mean([last[j] - min(row[j] for row in losses[j:]) for j in range(learned - 1)])
        transfer = before and _mean([before[j] - losses[j - 1][j] for j in range(1, learned)])
    return {
        "tasks": in_turn[0]["tasks"]["names"],
        "losses": losses,
        "before": before,
        "average_loss": _mean(last),
        "forgetting": forgetting,
        "forward_transfer": transfer,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
