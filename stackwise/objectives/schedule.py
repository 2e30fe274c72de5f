"""How much is masked: the fraction over time or depth. No torch here."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from stackwise.errors import UsageError

Floats = NDArray[np.float64]
ScheduleType = Literal["linear", "exponential", "cosine"]


class MaskScheduler:
    """The masked fraction over time or depth.

    `linear`: in equal steps. `exponential`: in equal ratios (geometric). `cosine`: half a cosine, slow at both ends.

    Args:
        min_fraction: At time 0.
        max_fraction: At time 1.
        schedule_type: The shape between.

    Raises:
        UsageError: Fractions outside (0, 1], the smaller above the larger, or a shape that does not exist.
    """

    def __init__(
        self, min_fraction: float = 0.15, max_fraction: float = 0.90, schedule_type: ScheduleType = "linear"
    ) -> None:
        for name, value in (("min_fraction", min_fraction), ("max_fraction", max_fraction)):
            if not 0.0 < value <= 1.0:
                raise UsageError(f"{name} {value} is outside (0, 1]")
        if min_fraction > max_fraction:
            raise UsageError(f"min_fraction {min_fraction} is above max_fraction {max_fraction}")
        if schedule_type not in ("linear", "exponential", "cosine"):
            raise UsageError(f"mask schedule {schedule_type!r} is none of linear, exponential, cosine")
        self.min_fraction, self.max_fraction = float(min_fraction), float(max_fraction)
        self.schedule_type: ScheduleType = schedule_type

    @overload
    def fraction(self, t: float) -> float: ...
    @overload
    def fraction(self, t: Floats) -> Floats: ...
    def fraction(self, t: float | Floats) -> float | Floats:
        """The fraction at time t in [0, 1]; a number for a number, an array for an array.

        Raises:
            UsageError: A time outside [0, 1].
        """
        time = np.asarray(t, dtype=np.float64)
        if not np.all((time >= 0.0) & (time <= 1.0)):
            raise UsageError("time runs from 0 to 1")
        low, high = self.min_fraction, self.max_fraction
        if self.schedule_type == "linear":
            value = low + (high - low) * time
        elif self.schedule_type == "exponential":
            value = low * (high / low) ** time
        else:
            value = low + (high - low) * (1.0 - np.cos(np.pi * time)) / 2.0
        return value if isinstance(t, np.ndarray) else float(value)

    def for_depth(self, k: int, n: int) -> float:
        """The fraction of stage k of n: the smallest at the first, the largest at the last; of one, that of time 1/2.

        Raises:
            UsageError: There is no such stage.
        """
        self._check_stage(k, n)
        return self.fraction(k / (n - 1) if n > 1 else 0.5)

    def window(self, k: int, n: int) -> tuple[float, float]:
        """The fractions from … to that belong to stage k of n, where time is depth. They meet, and cover all.

        Raises:
            UsageError: There is no such stage.
        """
        self._check_stage(k, n)
        return self.fraction(k / n), self.fraction((k + 1) / n)

    @staticmethod
    def _check_stage(k: int, n: int) -> None:
        if not 0 <= k < n:
            raise UsageError(f"there is no stage {k} of {n}")

    def specification(self) -> dict[str, Any]:
        """Everything that determines its fractions."""
        return {"type": self.schedule_type, "min": self.min_fraction, "max": self.max_fraction}
