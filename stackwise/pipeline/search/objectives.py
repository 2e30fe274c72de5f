"""What a search makes small: figures of a finished run, or a function of one's own."""

from __future__ import annotations

import importlib
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from stackwise.config.tune import Measure
from stackwise.errors import StackWiseError, UsageError
from stackwise.pipeline.run import RunDirectory
from stackwise.store import ActivationStore
from stackwise.text import printable

Measured = Callable[[RunDirectory], float]

MEASURES: tuple[Measure, ...] = get_args(Measure)
QUALITY = ("bits_per_byte", "loss")
"""Figures that follow from what the stages commit alone."""


def objective(name: str) -> Measured:
    """The figure of a name; `module:function` is called with the run's directory as a path.

    Raises:
        UsageError: There is no such figure, module or function.
    """
    if name in MEASURES:
        return lambda run: _figure(name, run)
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise UsageError(
            f"--objective {name}: there is no such figure", hint=f"{', '.join(MEASURES)}, or module:function"
        )
    sys.path.insert(0, str(Path.cwd()))  # the user's own file lies where they are
    try:
        call: Any = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        line = (str(error).splitlines() or [""])[0]
        raise UsageError(f"--objective {name} cannot be imported: {type(error).__name__}: {line}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(call):
        raise UsageError(f"--objective {name} is no function")

    def measured(run: RunDirectory) -> float:
        try:
            value = call(run.path)
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise StackWiseError(f"objective {name}: {type(error).__name__}: {line}") from error
        try:
            number = float(value)
        except Exception:
            number = math.nan
        if not math.isfinite(number):
            shown = printable(f"{value!r:.60}") if isinstance(value, str | int | float | None) else ""
            raise StackWiseError(
                f"objective {name} returned {f'{type(value).__name__} {shown}'.strip()}, which is no finite number",
                hint="let it return a number: the lower, the better",
            )
        return number

    return measured


def measure(name: str, of: Measured, run: RunDirectory) -> float:
    """An objective's value of a finished run.

    Raises:
        StackWiseError: It has none, or it is no finite number.
    """
    value = of(run)
    if not math.isfinite(value):
        raise StackWiseError(f"objective {name} is {value}, no finite number")
    return value


def _figure(name: str, run: RunDirectory) -> float:
    manifest = run.manifest()
    if name == "memory":
        return float(max(stage["peak_memory_bytes"] or 0 for stage in manifest["stages"]))
    if name == "seconds":  # as committed: what another trial trained took as long for this one
        with ActivationStore(run.store_path(run.config()), create=False) as store:
            known = [store.stage(stage["recipe"], check=False) for stage in manifest["stages"]]
        return float(sum(stage.record.get("seconds", 0.0) for stage in known if stage is not None))
    result = (manifest.get("evaluation") or {}).get("result") or {}
    losses = [loss for loss in (result.get("loss") or {}).values() if loss is not None]
    value = result.get("bits_per_byte") if name == "bits_per_byte" else statistics.fmean(losses) if losses else None
    if value is None:
        raise StackWiseError(f"the run has no held-out {name}", hint="judge by another figure with --objective")
    return float(value)
