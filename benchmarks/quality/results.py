"""What has been measured: one entry a run, in a file that grows, so that a table can be finished another day."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Result, say
from benchmarks.quality.plain import apart, resting, train_plainly
from benchmarks.quality.rows import PLAIN, Budget, Row, configuration, flops, updates
from stackwise.config import StackWiseConfig
from stackwise.data import prepare
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.schedule import schedule

SHORT = 16
"""Updates of each block in a run whose memory is measured."""


@dataclass(frozen=True)
class Trial:
    """One run: a row under a budget, at a rate, from a seed."""

    row: Row
    budget: Budget
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """Names it in the file."""
        return f"{self.row.name} | {self.budget} | {self.rate:g} | {self.seed}"


class Results:
    """The file.

    Args:
        path: Where it is.
        setting: What all runs share; results of another setting are refused.
        directory: Where the temporary runs go; None: the system's temporary directory.
        store: One for all runs, which then share what they have in common; None: each has its own.
    """

    def __init__(self, path: Path, setting: Result, directory: str | None = None, store: str | None = None) -> None:
        self.path, self.setting, self.directory, self.store = path, setting, directory, store
        self.runs: dict[str, Result] = {}
        self.memory: dict[str, list[int]] = {}
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["setting"] != setting:
                raise SystemExit(f"{path} holds results of another setting: name another file with --results")
            self.runs, self.memory = known["runs"], known.get("memory", {})

    def of(self, trial: Trial) -> Result:
        """A trial's result; it is run where it is not there yet."""
        if trial.key not in self.runs:
            say(trial.key)
            self.runs[trial.key] = _run(trial, self.setting, self.directory, self.store)
            self._save()
        return self.runs[trial.key]

    def memory_of(self, row: Row) -> list[int] | None:
        """By phase the most bytes that a process holds beyond what it held before its job; a short run where not known.

        Phases are depths of the schedule; where each takes as much, or only the largest is known, there is one figure.
        None: a resting process was larger than one at work, as on a machine short of memory, and nothing follows.

        Short, as what a process holds is there after some steps; what grows are the mapped pages of a boundary that it
        has read, which the system takes back at will. Workers are started by themselves, as the plain loop's process
        is: a forked one begins with what it shares.
        """
        if row.name not in self.memory:
            say(f"{row.name} | memory")
            measured = _memory(row, self.setting, self.directory)
            if min(measured) <= 0:
                return None
            self.memory[row.name] = measured
            self._save()
        return self.memory[row.name]

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        text = json.dumps({"setting": self.setting, "memory": self.memory, "runs": self.runs}, indent=1)
        temporary.write_text(text + "\n")
        temporary.replace(self.path)


def setting_of(base: dict[str, Any], steps: int) -> Result:
    """What the runs of a file share: rack, data and batch as dotted keys, updates of each block, the vocabulary."""
    config = StackWiseConfig.from_preset("stages", base)
    vocab_size = config.model.vocab_size or prepare(config.data)[0].tokenizer.vocab_size
    return {"base": base, "steps": steps, "vocab_size": vocab_size}


def mean_loss(result: Result) -> float:
    """Nats a masked token on held-out text, averaged over the fractions."""
    losses: list[float] = list(result["loss"].values())
    return sum(losses) / len(losses)


def _run(trial: Trial, setting: Result, directory: str | None, store: str | None) -> Result:
    config = configuration(
        setting["base"], trial.row, trial.budget, steps=setting["steps"], rate=trial.rate, seed=trial.seed
    )
    stages = schedule(config)
    shared = {
        "updates": updates(config),
        "stages": len(stages),
    }
    if trial.row.name == PLAIN:
        plain = apart(train_plainly, config)
        figures = plain["evaluation"]
        own = {key: plain[key] for key in ("seconds", "rows")} | {"written": 0, "read": 0}
        return shared | own | _figures(figures) | {"flops": flops(config, setting["vocab_size"])}
    with tempfile.TemporaryDirectory(prefix="stackwise-quality-", dir=directory) as temporary:
        config.store.path = store
        run = RunDirectory(Path(temporary) / "run")
        events: list[dict[str, Any]] = []
        figures = Runner(config, run, events.append).run()
        manifest = run.manifest()
        written = sum(event["bytes"] for event in events if event["event"] == "written")
        own = {
            "seconds": events[-1]["seconds"],
            "rows": sum(rows for _, rows, *_ in manifest["rowsets"].values()),
            "written": written,
            "read": _read(config, manifest["rowsets"]),
        }
    return shared | own | _figures(figures) | {"flops": flops(config, setting["vocab_size"])}


def _memory(row: Row, setting: Result, directory: str | None) -> list[int]:
    config = configuration(setting["base"], row, "rows", steps=SHORT, rate=1e-3, seed=0)
    if row.name == PLAIN:
        return [int(apart(train_plainly, config)["peak_memory_bytes"])]
    with tempfile.TemporaryDirectory(prefix="stackwise-quality-", dir=directory) as temporary:
        run = RunDirectory(Path(temporary) / "run")
        with started_by_themselves():
            Runner(config, run, lambda event: None).run()
        rested, peaks = apart(resting), dict[int, int]()
        for stage in status(run)["stages"]:
            peaks[stage["depth"]] = max(peaks.get(stage["depth"], 0), stage["peak_memory_bytes"] - rested)
        return list(peaks.values()) if config.training.growth else [max(peaks.values())]


@contextlib.contextmanager
def started_by_themselves() -> Iterator[None]:
    """Workers are fresh processes in here, not forked ones."""
    before = os.environ.get("STACKWISE_FORK")
    os.environ["STACKWISE_FORK"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["STACKWISE_FORK"]
        else:
            os.environ["STACKWISE_FORK"] = before


def _read(config: StackWiseConfig, rowsets: dict[str, Any]) -> int:
    """Bytes of boundaries read: by training, and by the forward passes that write the next ones."""
    from stackwise.pipeline.recipe import boundary_bytes

    batch = config.training.batch_size * config.training.accumulation
    stages = schedule(config)
    rows = max(rows for _, rows, *_ in rowsets.values())
    reading = [stage for stage in stages if stage.reads_boundary]
    trained = sum((config.stage_training(stage.depth).steps or 0) * batch for stage in reading)
    passes = sum(max(0, len(reading) - 1 - n) for n in range(len(reading))) if config.fresh_masks else len(reading) - 1
    return boundary_bytes(config, trained + max(0, passes) * rows)


def _figures(evaluation: Result) -> Result:
    return {
        "loss": evaluation["loss"],
        "bits_per_byte": evaluation["bits_per_byte"],
        "by_depth": [stage["loss"] for stage in evaluation["stages"]],
    }
