"""Preferences on a task whose reward can be checked: answers of a given length, on real text.

    python -m benchmarks.preferences [--seeds 0 1 2] [--target 24] [--bound 25] [--pairs 512]

A small rack is fine-tuned on lines of the Python standard library: their first characters are the prompt, the rest is
the answer. It then answers prompts twice; which answer is nearer in length to the target decides what is chosen. On
these pairs DPO and IPO train from it, and a reward model. On held-out prompts are measured: the reward, which is the
distance of an answer's length from the target with a minus sign; and the divergence from the reference (KL), as the
mean log-ratio of what is drawn, in nats an answer. All training is ordinary runs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.common import Result, parser, positive, refuse, run_command, say, table
from benchmarks.document import Section

if TYPE_CHECKING:
    import torch

    from stackwise.inference import LoadedModel

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
PROMPT, SHORTEST, LONGEST = 10, 16, 72
"""Characters of a prompt; of a line, with its prompt."""
ANSWER = 64  # most tokens that are drawn for an answer
HELD_OUT = 256  # prompts that nothing trains on
METHODS: dict[str, dict[str, Any]] = {
    "DPO, beta 0.1": {"name": "dpo", "beta": 0.1},
    "DPO, beta 0.1, smoothing 0.1": {"name": "dpo", "beta": 0.1, "label_smoothing": 0.1},
    "DPO, beta 0.5": {"name": "dpo", "beta": 0.5},
    "IPO, tau 0.5": {"name": "dpo", "loss": "ipo", "beta": 0.5},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("preferences", arguments, lambda given: _section(measure(_parser().parse_args(given))), PAGE)


def _parser() -> argparse.ArgumentParser:
    return make_parser("preferences", __doc__)


def make_parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """The options of a course."""
    made = parser(module, about)
    add = made.add_argument
    add(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="seeds, each a whole course; default 0 1 2"
    )
    add("--target", type=positive, default=24, metavar="N", help="characters that an answer is to have; default 24")
    add("--bound", type=float, default=25.0, help="nats an answer that the KL must stay below; default 25")
    add("--pairs", type=positive, default=512, metavar="N", help="prompts that pairs are made of; default 512")
    add("--steps", type=positive, default=400, metavar="N", help="steps of fine-tuning; default 400")
    add("--preference-steps", type=positive, default=60, metavar="N", help="steps over pairs; default 60")
    add("--width", type=positive, default=128, metavar="N", help="d_model; default 128")
    add("--dir", metavar="DIR", help="where runs go; default: the system's temporary directory")
    return made


def measure(options: argparse.Namespace, course: type[Course] | None = None) -> Result:
    """Measure it, seed by seed.

    Args:
        course: What one seed goes through; None: `Course`.
    """
    lines, by_seed = prompt_lines(options.pairs), []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=options.dir) as name:
            by_seed.append((course or Course)(options, Path(name), seed, lines).run())
    return {"seeds": options.seeds, "target": options.target, "bound": options.bound, "runs": by_seed}


def prompt_lines(pairs: int) -> list[str]:
    """Different lines of the standard library, of a middle length, enough for so many prompts."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for line in path.read_text(errors="replace").splitlines():
            text = line.strip()
            if SHORTEST <= len(text) <= LONGEST and text.isascii():
                found[text] = None
    if len(found) < pairs + HELD_OUT + 100:
        raise refuse(f"--pairs {pairs}: there are {len(found)} lines", "give a smaller number")
    return list(found)


class Course:
    """One seed: fine-tuning, pairs, and what each method makes of them."""

    def __init__(self, options: argparse.Namespace, root: Path, seed: int, lines: list[str]) -> None:
        self.options, self.root, self.seed = options, root, seed
        lines = random.Random(seed).sample(lines, min(len(lines), 12000))
        prompts = list(dict.fromkeys(line[:PROMPT] for line in lines))
        self.held_out, self.prompts = prompts[:HELD_OUT], prompts[HELD_OUT : HELD_OUT + options.pairs]
        kept = {*self.held_out}
        self.lines = [line for line in lines if line[:PROMPT] not in kept]

    def run(self) -> Result:
        """Everything."""
        self.fine_tune()
        reference = model(self.root / "model")
        before = self.judged(reference, reference)
        say(f"seed {self.seed}: fine-tuned: {before}")
        accuracies, methods = self.make_pairs(reference), {}
        for number, (name, objective) in enumerate(METHODS.items()):
            run = self.tuned(f"method{number}", objective, 3e-4)
            methods[name] = self.judged(model(run), reference) | {"accuracy": ranked(run)}
            say(f"seed {self.seed}: {name}: {methods[name]}")
        right = ranked(self.tuned("reward", {"name": "reward"}, 1e-3))
        return {"seed": self.seed, "before": before, "pairs": accuracies, "methods": methods, "reward": right}

    def fine_tune(self) -> None:
        """A rack that answers: it is exported to `model`."""
        rows = [{"prompt": line[:PROMPT], "completion": line[PROMPT:]} for line in self.lines]
        self.write("lines", rows)
        settings = {
            "model.d_model": self.options.width,
            "model.n_heads": self.options.width // 32,
            "model.architecture": {"n_stacks": 4, "blocks_per_stack": 1},
            "data.tokenizer": "bytes",
            "training.objective": "sft",
            "training.seq_len": 128,
            "training.steps": self.options.steps,
            "training.batch_size": 16,
            "training.learning_rate": 2e-3,
        }
        run = self.trained("tuned", "lines", settings)
        import torch

        from stackwise.pipeline.committed.load import load_rack
        from stackwise.pipeline.committed.use import export_rack
        from stackwise.pipeline.run import RunDirectory
        from stackwise.pretrained.writing import ExportOptions

        export_rack(
            load_rack(RunDirectory(run), torch.device("cpu")), self.root / "model", ExportOptions(overwrite=True)
        )

    def make_pairs(self, reference: LoadedModel) -> int:
        """Answers to the prompts, twice; how many pairs they made."""
        drawn = [self._answers(reference, self.prompts, 1000 * self.seed + 1 + turn) for turn in range(2)]
        rows = []
        for prompt, one, other in zip(self.prompts, *drawn, strict=True):
            better, worse = sorted((one, other), key=self._distance)
            if self._distance(better) < self._distance(worse) and better and worse:
                rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
        self.write("pairs", rows)
        return len(rows)

    def tuned(self, name: str, objective: dict[str, Any], rate: float) -> Path:
        """A run over the pairs, from there."""
        settings = {
            "init.weights": str(self.root / "model"),
            "data.held_out": 0.15,
            "training.objective": objective,
            "training.seq_len": 2 * (PROMPT + ANSWER + 2),
            "training.steps": self.options.preference_steps,
            "training.batch_size": 32,
            "training.learning_rate": rate,
            "training.eval_every": self.options.preference_steps,
            "evaluation.samples": 512,
        }
        return self.trained(name, "pairs", settings)

    def trained(self, name: str, data: str, settings: dict[str, Any]) -> Path:
        """A run, finished; its directory."""
        from stackwise.config import StackWiseConfig
        from stackwise.config.loading import build
        from stackwise.pipeline.run import RunDirectory
        from stackwise.pipeline.runner.runner import Runner

        common = {
            "seed": self.seed,
            "device": "cpu",
            "data.paths": [str(self.root / f"{data}.jsonl")],
            "data.cache_dir": str(self.root / "cache"),
            "store.path": str(self.root / "store"),
            "training.mode": "end_to_end",
        }
        config = build(StackWiseConfig, {}, common | settings)
        Runner(config, RunDirectory(self.root / name), lambda event: None).run()
        return self.root / name

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        """A file of rows."""
        (self.root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _distance(self, answer: str) -> int:
        return abs(len(answer) - int(self.options.target))

    def _answers(self, model: LoadedModel, prompts: list[str], seed: int) -> list[str]:
        return [_text(ids) for ids in _drawn(model, prompts, seed)]

    def judged(self, model: LoadedModel, reference: LoadedModel) -> dict[str, float]:
        """The reward on held-out prompts, and the divergence from the reference."""
        import torch

        ids = _drawn(model, self.held_out, 1000 * self.seed)
        apart = _said(model, ids) - _said(reference, ids)
        answers = [_text(row) for row in ids]
        return {
            "reward": -fmean(map(self._distance, answers)),
            "length": fmean(map(len, answers)),
            "kl": float(torch.clamp(apart.mean(), min=0.0)),
        }


SEPARATOR = 256


def model(weights: Path) -> LoadedModel:
    """A model as generation holds it."""
    import torch

    from stackwise.inference import LoadedModel
    from stackwise.pipeline.committed.load import load_model

    rack = load_model(str(weights), torch.device("cpu"), say)
    stages = list(rack.whole()) if weights.name == "model" else list(rack.modules())
    return LoadedModel(rack.front(), stages, True, rack.autocast, rack.config.model.keeps_cache)


def _drawn(model: LoadedModel, prompts: list[str], seed: int) -> torch.Tensor:
    """Prompts with answers drawn at temperature 1, by generation with its cache."""
    import torch

    from stackwise.inference import Continuing, sample_causal

    given = torch.tensor([list(prompt.encode()) for prompt in prompts])
    how = Continuing(temperature=1.0, seed=seed, forbidden={SEPARATOR + 1}, stop_token_id=SEPARATOR)
    with torch.no_grad():
        return sample_causal(model, given, ANSWER, how)


def _text(ids: torch.Tensor) -> str:
    """An answer, up to its end."""
    tokens = ids[PROMPT:].tolist()
    end = tokens.index(SEPARATOR) if SEPARATOR in tokens else len(tokens)
    return bytes(tokens[:end]).decode(errors="replace")


def _said(model: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """The log-probability of each answer, its end among it, in nats."""
    import torch

    rows, length = ids.shape
    with torch.no_grad():
        logits = model.logits_at(ids, torch.arange(rows * length), time=torch.zeros(rows))
    logits[:, SEPARATOR + 1] = -torch.inf  # never drawn
    said = logits.log_softmax(-1).view(rows, length, -1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    ended = (ids[:, :-1] == SEPARATOR).cumsum(1) > 0
    said = said.masked_fill(ended, 0.0)
    return said[:, PROMPT - 1 :].sum(1)


def ranked(run: Path) -> float:
    """Share of held-out pairs that a run ranks right at its end."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return float([event for event in events if event["event"] == "held_out"][-1]["terms"]["accuracy"])


def _section(result: Result) -> Section:
    runs = result["runs"]

    def spread(values: list[float], form: str) -> str:
        low, high = min(values), max(values)
        return f"{fmean(values):{form}} ({low:{form}} to {high:{form}})"

    def row(name: str, found: list[dict[str, float]], accuracy: list[float] | None) -> list[str]:
        figures = [spread([one[key] for one in found], ".1f") for key in ("reward", "length", "kl")]
        return [name, *figures, "" if accuracy is None else spread([100 * a for a in accuracy], ".0f")]

    rows = [row("fine-tuned (the reference)", [run["before"] for run in runs], None)]
    for name in METHODS:
        found = [run["methods"][name] for run in runs]
        rows.append(row(name, found, [one["accuracy"] for one in found]))
    rows.append(["reward model", "", "", "", spread([100 * run["reward"] for run in runs], ".0f")])
    body = table(("method", "reward", "characters", "KL, nats an answer", "held-out pairs ranked right, %"), rows)
    rose = sum(m["reward"] > run["before"]["reward"] for run in runs for m in run["methods"].values())
    within = sum(m["kl"] < result["bound"] for run in runs for m in run["methods"].values())
    every = len(METHODS) * len(runs)
    pairs = fmean(run["pairs"] for run in runs)
    text = (
        f"Answers are to have {result['target']} characters; the reward is the distance from that, with a minus sign, "
        f"over {HELD_OUT} held-out prompts. About {pairs:.0f} pairs a seed, of the reference's own answers; "
        f"{len(runs)} seeds: mean (smallest to largest). The reward rose in {rose} of {every} runs; the KL stayed "
        f"below {result['bound']:g} nats an answer in {within} of {every}."
    )
    return Section("preferences", "Answers of a given length", text, body, "CPU", result)


if __name__ == "__main__":
    sys.exit(main())
