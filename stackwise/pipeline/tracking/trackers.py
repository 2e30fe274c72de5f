"""The trackers: TensorBoard event files, Weights & Biases, MLflow. Each package is imported when it is used."""

from __future__ import annotations

import importlib.util
import itertools
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.loading import flat
from stackwise.errors import UsageError
from stackwise.pipeline.tracking.event_files import EventFile
from stackwise.pipeline.tracking.figures import Point
from stackwise.pipeline.tracking.following import About

OPEN_WRITERS = 8
"""Event files of TensorBoard kept open at once."""
_STATES = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class TensorBoard:
    """One folder of event files a stage (`stage-000`, …), and `depth` for held-out figures by depth."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._directory = Path()
        self._writers: dict[int | None, EventFile] = {}
        self._numbers = itertools.count()

    def open(self, about: About, number: int, known: str | None) -> str:
        """Use `RUN/tensorboard`; a changed configuration gets a folder of its own in it."""
        self._directory = Path(about.directory) / "tensorboard"
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
            directory.mkdir(parents=True, exist_ok=True)
            self._writers[stage] = EventFile(directory, f".{os.getpid()}-{next(self._numbers)}")
        return self._writers[stage]


class WeightsAndBiases:
    """A run of Weights & Biases: a series a stage and figure, each over the stage's own steps.

    Args:
        mode: `online`, or `offline`: files under `RUN/wandb`, which `wandb sync` uploads.
    """

    name = "wandb"

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._run: Any = None
        self._defined: set[str] = set()

    def open(self, about: About, number: int, known: str | None) -> str:
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
                dir=about.directory,
                project=about.project,
                group=about.group,
                name=about.name if number == 1 else f"{about.name} ({number})",
                config=_nested(about.parameters),
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


class MLflow:
    """A run of an MLflow experiment.

    Args:
        uri: A server (`http://…`), a database (`sqlite:////…`), or a directory.
    """

    name = "mlflow"

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._client: Any = None
        self._id = ""

    def open(self, about: About, number: int, known: str | None) -> str:
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
            self._id = self._create(about, number)
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

    def _create(self, about: About, number: int) -> str:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(about.project)
        if experiment is not None:
            key = experiment.experiment_id
        else:
            try:
                key = self._client.create_experiment(about.project)
            except MlflowException:  # another run made it just now
                key = self._client.get_experiment_by_name(about.project).experiment_id
        tags = {"mlflow.source.name": "stackwise", "stackwise.directory": about.directory}
        if about.group is not None:
            tags["group"] = about.group
        name = about.name if number == 1 else f"{about.name} ({number})"
        run = str(self._client.create_run(key, run_name=name, tags=tags).info.run_id)
        params = [Param(key, str(value)[:500]) for key, value in about.parameters.items()]
        for batch in _batches(params, 100):
            self._client.log_batch(run, params=batch)
        return run


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


def wanted(config: StackWiseConfig) -> dict[str, dict[str, Any]]:
    """The trackers that a configuration asks for, by name, with their settings."""
    return {tracker.name: tracker.plain() for tracker in config.tracking.trackers}


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


def about(config: StackWiseConfig, directory: Path) -> About:
    """What trackers are told of a run."""
    tracking = config.tracking
    return About(
        name=tracking.name or directory.name,
        project=tracking.project,
        group=tracking.group,
        directory=str(directory),
        parameters=flat(config),
    )
