"""The kinds of tracker: their settings and facts. Each one's package is imported when it is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from stackwise.config.fields import Text
from stackwise.config.kinds import Tracker

if TYPE_CHECKING:
    from stackwise.pipeline.tracking import following

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


class TensorBoard(Tracker):
    """TensorBoard event files in the run directory."""

    inside: ClassVar[bool] = True
    named: ClassVar[bool] = False

    def build(self) -> following.Tracker:
        """See `Tracker.build`."""
        from stackwise.pipeline.tracking import trackers

        return trackers.TensorBoard()


class WeightsAndBiases(Tracker):
    """Weights & Biases."""

    mode: Literal["offline", "online"] = Field(
        "offline", description="online, or offline: kept in the run directory, to sync later"
    )

    def packages(self) -> dict[str, str]:
        """See `Tracker.packages`."""
        return {"wandb": "stackwise[wandb]"}

    def build(self) -> following.Tracker:
        """See `Tracker.build`."""
        from stackwise.pipeline.tracking import trackers

        return trackers.WeightsAndBiases(self.mode)


class MLflow(Tracker):
    """MLflow."""

    uri: Text = Field(description="a server, a database, or a directory")

    def packages(self) -> dict[str, str]:
        """See `Tracker.packages`."""
        database = self.uri.split(":")[0].split("+")[0] in DATABASES
        return {"mlflow": "stackwise[mlflow]"} | (
            dict.fromkeys(("sqlalchemy", "alembic"), "mlflow") if database else {}
        )

    def placed(self, absolute: Callable[[str], str]) -> Self:
        """See `Tracker.placed`."""
        scheme, colon, rest = self.uri.partition("://")
        if not colon and scheme != "databricks":
            return self.model_copy(update={"uri": absolute(scheme)})
        if scheme == "sqlite" and rest.startswith("/") and not rest.startswith("//"):
            return self.model_copy(update={"uri": f"sqlite:///{absolute(rest[1:])}"})
        return self

    def build(self) -> following.Tracker:
        """See `Tracker.build`."""
        from stackwise.pipeline.tracking import trackers

        return trackers.MLflow(self.uri)
