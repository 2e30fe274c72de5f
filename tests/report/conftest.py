from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.yaml_files import dump
from stackwise.pipeline.run import RunDirectory

RECIPES = [f"{depth:032x}" for depth in range(200)]


class HandMade:
    """A run directory written by hand, event by event."""

    def __init__(self, path: Path, **overrides: Any) -> None:
        self.run = RunDirectory(path)
        self.run.create()
        self.config = StackWiseConfig.from_preset("smoke", {k.replace("__", "."): v for k, v in overrides.items()})
        self.run.config_file.write_text(dump(self.config))
        self.time = 1_700_000_000.0
        self.stages: list[dict[str, Any]] = []
        self.evaluation: dict[str, Any] | None = None

    def event(self, name: str, after: float = 1.0, /, **values: Any) -> None:
        self.time += after
        with self.run.events_file.open("a") as file:
            file.write(json.dumps({"time": self.time, "event": name, **values}) + "\n")

    def device(self) -> None:
        self.event("device", device="cpu", name="2 CPU cores", memory=8 * 10**9, precision="fp32")

    def stage(self, depth: int, state: str = "done", step: int = 60, reason: str = "not trained yet") -> None:
        """A stage as the manifest has it, and its training in the log."""
        self.event("training", stage=depth, recipe=RECIPES[depth], reason=reason, steps=60, trunk=None)
        for last in range(10, step + 1, 10):
            losses = [3.0 + 4 * math.exp(-(last - 9 + i) / 8) for i in range(10)]
            figures = {"learning_rate": 1e-3, "tokens_per_second": 5e3, "wait_fraction": 0.01, "memory": 4e8}
            self.event("step", stage=depth, step=last, steps=60, losses=losses, loss=losses[-1], **figures)
        if state == "done":
            self.event("committed", stage=depth, recipe=RECIPES[depth], parts={})
        self.stages.append(
            {
                "depth": depth,
                "window": 0,
                "blocks": [depth, depth],
                "state": state,
                "step": step,
                "steps": 60,
                "loss": 3.25 if step else None,
                "trunk": None,
                "weights": "ab" * 16 if state == "done" else None,
                "recipe": RECIPES[depth],
                "reason": reason,
                "wait_fraction": 0.01 if step else None,
                "peak_memory_bytes": 400_000_000 if step else None,
            }
        )

    def evaluate(self, stages: int) -> None:
        def figures(depth: int) -> dict[str, Any]:
            loss = {"0.15": 2.5 - 0.1 * depth, "0.5": 2.8 - 0.1 * depth, "0.9": 3.1 - 0.1 * depth}
            return {"bits_per_byte": 3.0 - 0.1 * depth, "loss": loss, "accuracy": dict.fromkeys(loss, 0.4)}

        self.evaluation = {
            **figures(stages - 1),
            "tokens": 4096,
            "bytes": 4000,
            "stages": [{"depth": depth, **figures(depth)} for depth in range(stages)],
            "baselines": {"unigram": {**figures(-14)}, "first_stage": figures(0)},
        }

    def save(self) -> RunDirectory:
        evaluation = None if self.evaluation is None else {"key": "k", "result": self.evaluation}
        self.run.write_manifest(
            {
                "name": self.config.name,
                "data": {"id": "0" * 32, "directory": "/d"},
                "vocabulary": {"size": 258, "mask": 257},
                "stages": self.stages,
                "boundaries": [],
                "evaluation": evaluation,
            }
        )
        return self.run


@pytest.fixture
def made(tmp_path: Path) -> HandMade:
    return HandMade(tmp_path / "run")
