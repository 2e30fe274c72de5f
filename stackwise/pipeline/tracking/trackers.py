"""The kinds of tracker, TensorBoard, Weights & Biases, MLflow, ClearML, and what takes their figures.

A package is imported when it is used.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

from pydantic import Field, model_validator

from stackwise.config import StackWiseConfig
from stackwise.config.fields import Text
from stackwise.config.kinds import Tracker
from stackwise.config.loading import flat
from stackwise.errors import UsageError
from stackwise.files import make_directory
from stackwise.pipeline.tracking.event_file import EventFile
from stackwise.text import printable

OPEN_WRITERS = 8  # event files of TensorBoard kept open at once
_STATES = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # schemes of URIs for which MLflow needs more packages


@dataclass(frozen=True, slots=True)
class Point:
    """One figure."""

    stage: int | None  # the stage's depth; None: a figure of the run by depth
    name: str
    step: int  # the stage's optimizer step, counted through all its windows; of a figure of the run, the depth
    value: float  # losses in nats, sizes in bytes, times in seconds, rates as they are
    time: float  # in seconds since 1970


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of the run; `parameters` is the configuration by dotted key."""

    name: str
    project: str
    group: str | None
    directory: str
    parameters: dict[str, Any]


class TrackerClient(Protocol):
    """What takes figures, as built by a kind of tracker. Any call may fail; what was not taken comes again."""

    name: str

    def open(self, run: RunInfo, number: int, known: str | None) -> str:
        """Begin a tracker run, or go on with the one whose id, by an earlier `open`, is `known`; returns its id.

        Args:
            number: 1, and one more each time that a changed configuration trains other stages in the same directory.
        """

    def log(self, points: list[Point]) -> None:
        """Take figures; they are safe when this returns."""

    def close(self, state: str) -> None:
        """The run ended: done, failed or interrupted."""


class TensorBoard(Tracker):
    """TensorBoard event files in the run directory."""

    inside: ClassVar[bool] = True
    named: ClassVar[bool] = False

    def build(self) -> TrackerClient:
        return _EventFiles()


class WeightsAndBiases(Tracker):
    """Weights & Biases."""

    mode: Literal["offline", "online"] = Field(
        "offline", description="online, or offline: kept in the run directory, to sync later"
    )

    def packages(self) -> dict[str, str]:
        return {"wandb": "stackwise[wandb]"}

    def build(self) -> TrackerClient:
        return _WandbRun(self.mode)


class MLflow(Tracker):
    """MLflow."""

    uri: Text = Field(description="a server, a database, or a directory")

    def packages(self) -> dict[str, str]:
        database = self.uri.split(":")[0].split("+")[0] in DATABASES
        return {"mlflow": "stackwise[mlflow]"} | (
            dict.fromkeys(("sqlalchemy", "alembic"), "mlflow") if database else {}
        )

    def placed(self, absolute: Callable[[str], str]) -> Self:
        scheme, colon, rest = self.uri.partition("://")
        if not colon and scheme != "databricks":
            return self.model_copy(update={"uri": absolute(scheme)})
        if scheme == "sqlite" and rest.startswith("/") and not rest.startswith("//"):
            return self.model_copy(update={"uri": f"sqlite:///{absolute(rest[1:])}"})
        return self

    def build(self) -> TrackerClient:
        return _MLflowRun(self.uri)


class ClearML(Tracker):
    """ClearML."""

    mode: Literal["offline", "online"] = Field(
        "offline",
        description="online, or offline: sessions in the run directory, for `clearml-task --import-offline-session`",
    )

    def packages(self) -> dict[str, str]:
        return {"clearml": "stackwise[clearml]"}

    def build(self) -> TrackerClient:
        return _ClearMLTask(self.mode)


class Neptune(Tracker):
    """Neptune, whose service ended in March 2026: named to be refused."""

    @model_validator(mode="after")
    def _ended(self) -> Self:
        raise ValueError("Neptune's service ended in March 2026: take clearml, wandb, mlflow or tensorboard")

    def build(self) -> TrackerClient:
        """None can be built: the settings are refused."""
        raise UsageError("Neptune's service ended in March 2026", hint="take clearml, wandb, mlflow or tensorboard")


class _EventFiles:
    """One folder of event files a stage (`stage-000`, …), and `depth` for held-out figures by depth."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._directory = Path()
        self._writers: dict[int | None, EventFile] = {}
        self._numbers = itertools.count()

    def open(self, run: RunInfo, number: int, known: str | None) -> str:
        """Use `RUN/tensorboard`; a changed configuration gets a folder of its own in it."""
        self._directory = Path(run.directory) / "tensorboard"
        if number > 1:
            self._directory = self._directory / f"changed-{number}"
        return known or str(number)

    def log(self, points: list[Point]) -> None:
        """Append to the event files."""
        for point in points:
            self._writer(point.stage).scalar(point.name, point.value, point.step, point.time)
        for writer in self._writers.values():
            writer.flush()

    def close(self, state: str) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, stage: int | None) -> EventFile:
        if stage not in self._writers:
            if len(self._writers) >= OPEN_WRITERS:
                self._writers.pop(next(iter(self._writers))).close()
            directory = self._directory / ("depth" if stage is None else f"stage-{stage:03d}")
            make_directory(directory)
            self._writers[stage] = EventFile(directory, f".{os.getpid()}-{next(self._numbers)}")
        return self._writers[stage]


class _WandbRun:
    """A run of Weights & Biases: a series a stage and figure, each over the stage's own steps."""

    name = "wandb"

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._run: Any = None
        self._defined: set[str] = set()

    def open(self, run: RunInfo, number: int, known: str | None) -> str:
        """Begin or resume the run."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._defined.clear()
        settings = wandb.Settings(silent=True, console="off", init_timeout=30, disable_git=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._run = wandb.init(
                mode="offline" if self._mode == "offline" else "online",
                id=known or uuid.uuid4().hex[:12],
                resume="allow",
                dir=run.directory,
                project=run.project,
                group=run.group,
                name=run.name if number == 1 else f"{run.name} ({number})",
                config=_nested(run.parameters),
                settings=settings,
            )
        return str(self._run.id)

    def log(self, points: list[Point]) -> None:
        """Record a row for each (stage, step), in the order of the steps."""
        rows: dict[tuple[str, int], dict[str, float]] = {}
        for point in points:
            series = "depth" if point.stage is None else f"stage_{point.stage:03d}"
            rows.setdefault((series, point.step), {})[f"{series}/{point.name}"] = point.value
        for (series, step), row in rows.items():
            if series not in self._defined:
                self._run.define_metric(f"{series}/step", hidden=True)
                self._run.define_metric(f"{series}/*", step_metric=f"{series}/step")
                self._defined.add(series)
            self._run.log({f"{series}/step": step, **row})

    def close(self, state: str) -> None:
        """End the run; online, what is left is uploaded."""
        if self._run is not None:
            self._run.finish(exit_code=0 if state == "done" else 1)
            self._run = None


class _MLflowRun:
    """A run of an MLflow experiment."""

    name = "mlflow"

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._client: Any = None
        self._id = ""

    def open(self, run: RunInfo, number: int, known: str | None) -> str:
        """Begin the run, or go on with it where it is still there."""
        # A server that is gone must show soon: what it misses is sent again anyway.
        settings = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
        settings |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
        for key, value in settings.items():
            os.environ.setdefault(key, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(tracking_uri=self._uri)
            if known is not None:
                try:
                    if self._client.get_run(known).info.lifecycle_stage == "active":
                        self._client.update_run(known, status="RUNNING")
                        self._id = known
                        return known
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
            self._id = self._create(run, number)
        return self._id

    def log(self, points: list[Point]) -> None:
        """Send the figures, a thousand a request (the most that a server takes)."""
        from mlflow.entities import Metric

        metrics = [
            Metric(
                f"held_out_by_depth/{point.name}" if point.stage is None else f"stage_{point.stage:03d}/{point.name}",
                point.value,
                int(1000 * point.time),
                point.step,
            )
            for point in points
        ]
        for batch in _batches(metrics, 1000):
            self._client.log_batch(self._id, metrics=batch)

    def close(self, state: str) -> None:
        """Say how it ended."""
        if self._id:
            self._client.set_terminated(self._id, _STATES.get(state, "KILLED"))

    def _create(self, run: RunInfo, number: int) -> str:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(run.project)
        if experiment is not None:
            key = experiment.experiment_id
        else:
            try:
                key = self._client.create_experiment(run.project)
            except MlflowException:  # another run made it just now
                key = self._client.get_experiment_by_name(run.project).experiment_id
        tags = {"mlflow.source.name": "stackwise", "stackwise.directory": run.directory}
        if run.group is not None:
            tags["group"] = run.group
        name = run.name if number == 1 else f"{run.name} ({number})"
        run_id = str(self._client.create_run(key, run_name=name, tags=tags).info.run_id)
        params = [Param(key, str(value)[:500]) for key, value in run.parameters.items()]
        for batch in _batches(params, 100):
            self._client.log_batch(run_id, params=batch)
        return run_id


class _ClearMLTask:
    """A task of a ClearML project; offline, a session of its own for each sitting, with all figures from the first on.

    A session of ClearML's offline mode ends with its process, and cannot be gone on with; so the last one has them all.
    """

    name = "clearml"

    def __init__(self, mode: str) -> None:
        self._offline = mode == "offline"
        self._task: Any = None

    def open(self, run: RunInfo, number: int, known: str | None) -> str:
        """Begin a task, or, online, go on with it."""
        if self._offline:
            os.environ["CLEARML_CACHE_DIR"] = str(Path(run.directory) / "clearml")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from clearml import Task

            if self._task is not None:
                self._task.close()
            Task.set_offline(self._offline)
            goes_on = False if self._offline or known is None else known
            self._task = Task.init(
                project_name=run.project,
                task_name=run.name if number == 1 else f"{run.name} ({number})",
                tags=None if run.group is None else [run.group],
                reuse_last_task_id=False,
                continue_last_task=goes_on,
                auto_connect_arg_parser=False,
                auto_connect_frameworks=False,
                auto_connect_streams=False,
                auto_resource_monitoring=False,
            )
            if not goes_on:
                self._task.connect(dict(run.parameters), name="configuration")
        return str(self._task.id)

    def log(self, points: list[Point]) -> None:
        """Report the figures; they are on the disk, or sent, when this returns."""
        logger = self._task.get_logger()
        for point in points:
            title = "held_out_by_depth" if point.stage is None else f"stage_{point.stage:03d}"
            logger.report_scalar(title, point.name, point.value, point.step)
        self._task.flush(wait_for_uploads=True)

    def close(self, state: str) -> None:
        """Say how it ended; a session offline becomes a zip file."""
        if self._task is not None:
            if state == "failed":
                self._task.mark_failed(ignore_errors=True)
            self._task.close()
            self._task = None


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def _nested(parameters: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings."""
    tree: dict[str, Any] = {}
    for dotted, value in parameters.items():
        *parents, last = dotted.split(".")
        section = tree
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    return tree


def check_installed(config: StackWiseConfig) -> None:
    """Check that the packages of the trackers in use are there. Imports none of them.

    Raises:
        UsageError: One is missing; says what installs it.
    """
    for tracker in config.tracking.trackers:
        packages = tracker.packages()
        missing = [module for module in packages if importlib.util.find_spec(module) is None]
        if missing:
            raise UsageError(
                f"tracking.trackers: {tracker.name} needs {' and '.join(missing)}, not installed here",
                hint=f"pip install '{packages[missing[0]]}', or take {tracker.name} out of tracking.trackers",
            )


def run_info(config: StackWiseConfig, directory: Path) -> RunInfo:
    """What trackers are told of a run."""
    tracking = config.tracking
    return RunInfo(
        name=printable(tracking.name or directory.name),
        project=printable(tracking.project),
        group=None if tracking.group is None else printable(tracking.group),
        directory=str(directory),
        parameters={key: printable(v) if isinstance(v, str) else v for key, v in flat(config).items()},
    )
