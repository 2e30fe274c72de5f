"""Reinforcement learning on a task whose reward can be checked: answers of a given length, on real text.

    python -m benchmarks.ppo [--seeds 0 1 2] [--target 24] [--bound 25] [--phases 16]

As `benchmarks.preferences` begins: a small rack is fine-tuned on lines of the Python standard library, and what is
measured on held-out prompts is the same. From it PPO trains: scored by the length itself, with a penalty on the
divergence from the reference that is fixed, or follows a target; and scored by a reward model, which a run has trained
on pairs of the rack's own answers. All training is ordinary runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import Result, positive, run_command, say, table
from benchmarks.document import Section
from benchmarks.preferences import ANSWER, HELD_OUT, PAGE, PROMPT, Course, make_parser, measure, model

BY_MODEL = "reward model, KL to 8 nats"
METHODS: dict[str, dict[str, Any]] = {
    "length, KL to 8 nats": {"kl": {"coefficient": 0.05, "target": 8.0, "horizon": 512}},
    "length, KL fixed": {"kl": {"coefficient": 0.05}},
    BY_MODEL: {"kl": {"coefficient": 0.05, "target": 8.0, "horizon": 512}},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("ppo", arguments, lambda given: _section(measure(_parser().parse_args(given), _Course)), PAGE)


def _parser() -> argparse.ArgumentParser:
    made = make_parser("ppo", __doc__)
    made.add_argument("--phases", type=positive, default=16, metavar="N", help="phases of PPO; default 16")
    made.add_argument("--answers", type=positive, default=128, metavar="N", help="answers a phase; default 128")
    made.add_argument("--rate", type=float, default=5e-4, help="learning rate of PPO; default 5e-4")
    return made


class _Course(Course):
    """One seed: fine-tuning, then PPO in each way."""

    def run(self) -> Result:
        """Everything."""
        self.fine_tune()
        reference = model(self.root / "model")
        before, methods = self.judged(reference, reference), {}
        say(f"seed {self.seed}: fine-tuned: {before}")
        self.make_pairs(reference)
        reward = self.tuned("reward", {"name": "reward"}, 1e-3)
        self.write("prompts", [{"prompt": prompt} for prompt in self.prompts])
        for number, (name, settings) in enumerate(METHODS.items()):
            length = {"name": "length", "target": self.options.target}
            score = {"name": "model", "path": str(reward)} if name == BY_MODEL else length
            run = self._phases(f"method{number}", settings | {"score": score})
            methods[name] = self.judged(model(run), reference) | {"phases": _phases(run)}
            say(f"seed {self.seed}: {name}: {methods[name]}")
        return {"seed": self.seed, "before": before, "methods": methods}

    def _phases(self, name: str, settings: dict[str, Any]) -> Path:
        objective = {"name": "ppo", "new_tokens": ANSWER, "passes": 4, "value_weight": 0.5, "clip_value": 1.0}
        return self.trained(
            name,
            "prompts",
            {
                "init.weights": str(self.root / "model"),
                "data.held_out": 0.1,
                "training.objective": objective | settings,
                "training.windows": self.options.phases,
                "training.seq_len": PROMPT + ANSWER + 2,
                "training.rows": self.options.answers,
                "training.steps": max(1, self.options.answers // 8) * self.options.phases,
                "training.batch_size": 32,
                "training.learning_rate": self.options.rate,
                "training.lr_schedule": "constant",
            },
        )


def _phases(run: Path) -> list[dict[str, float]]:
    """What each phase's answers came to, as the run says."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    keys = ("score", "kl", "length", "coefficient")
    return [{key: event[key] for key in keys} for event in events if event["event"] == "rolled_out"]


def _section(result: Result) -> Section:
    runs = result["runs"]

    def spread(values: list[float], form: str = ".1f") -> str:
        return f"{fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    def row(name: str, figures: list[dict[str, Any]]) -> list[str]:
        own = [one["phases"] for one in figures if "phases" in one]
        most = spread([max(phase["kl"] for phase in phases) for phases in own]) if own else ""
        dear = spread([phases[-1]["coefficient"] for phases in own], ".3f") if own else ""
        return [name, *(spread([one[key] for one in figures]) for key in ("reward", "length", "kl")), most, dear]

    rows = [row("fine-tuned (the reference)", [run["before"] for run in runs])]
    rows += [row(f"PPO: {name}", [run["methods"][name] for run in runs]) for name in METHODS]
    head = ("scored by", "reward", "characters", "KL, nats an answer", "largest KL of a phase", "last KL coefficient")
    rose = sum(m["reward"] > run["before"]["reward"] for run in runs for m in run["methods"].values())
    within = sum(m["kl"] < result["bound"] for run in runs for m in run["methods"].values())
    every = len(METHODS) * len(runs)
    text = (
        f"Answers are to have {result['target']} characters; the reward is the distance from that, with a minus sign, "
        f"over {HELD_OUT} held-out prompts. {len(runs)} seeds: mean (smallest to largest). The reward rose in {rose} "
        f"of {every} runs; the KL stayed below {result['bound']:g} nats an answer in {within} of {every}."
    )
    return Section("ppo", "PPO: answers of a given length", text, table(head, rows), "CPU", result)


if __name__ == "__main__":
    sys.exit(main())
