"""Few-shot adaptation: MAML, first-order MAML and Reptile against fine-tuning from plain pre-training, on real text.

    python -m benchmarks.meta --out DIR [--seeds 0 1 2] [--steps N] [--wiki WIKI]

A task is source text of the Python standard library whose tokens stand for each other; with `--wiki` (see
`benchmarks.continual`) it is text of a domain or a language: five are trained on, the rate is chosen on the topics of
Python's help, and Spanish counts. Every method takes the same
number of updates over rows of the same kind; its weights then adapt to tasks that no method has seen, by plain gradient
descent on a few support rows, and the loss on other rows of the task counts. The rate of these steps is chosen for each
method and number of steps on further tasks. All training is ordinary runs; where it was interrupted it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.common import Result, parser, positive, run_command, say, table
from benchmarks.continual import texts
from benchmarks.document import Section

if TYPE_CHECKING:
    from stackwise.batch import Batch
    from stackwise.pipeline.committed.load import CommittedRack
    from stackwise.training.stage import StageModel

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
METHODS = {
    "MAML": {"method": "maml"},
    "first-order MAML": {"method": "fomaml"},
    "Reptile": {"method": "reptile"},
    "plain, on the same tasks": {"method": "joint"},
    "plain, on text as it is": None,
}
TASKS = {"permutations": 256, "held_out": 6, "support": 4, "inner_rate": 0.3, "inner_steps": 2}
RATES = (0.1, 0.3, 1.0)  # of the steps that adapt: each method's best one counts
SHOTS = (0, 1, 3, 5)  # steps whose loss is reported
EPISODES = 2  # times that a task is adapted to
BY_DOMAIN = {**{key: value for key, value in TASKS.items() if key != "permutations"}, "held_out": 2}
DOMAIN_EPISODES = 12  # of one task


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("meta", arguments, lambda given: _section(measure(_parser().parse_args(given))), PAGE)


def _parser() -> argparse.ArgumentParser:
    made = parser("meta", __doc__)
    made.add_argument("--out", type=Path, required=True, help="where runs go, and stay")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="seeds; default 0 1 2")
    made.add_argument("--steps", type=positive, default=150, metavar="N", help="updates of each method; default 150")
    made.add_argument("--wiki", type=Path, metavar="DIR", help="tasks are text by domain; see benchmarks.continual")
    return made


def _domains(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Text by domain and language, each a task: the last two are not trained on."""
    wiki = {task["name"]: task for task in texts(options.wiki, options.out)}
    library, headers = Path(sysconfig.get_path("stdlib")), sysconfig.get_path("include")
    python = {"name": "python", "paths": [str(library / part) for part in ("asyncio", "email", "json")]}
    tables = {"name": "tables", "paths": [str(library / "encodings")]}
    topics = {"name": "topics", "paths": [str(library / "pydoc_data" / "topics.py")]}
    tables_and_code = [python, {"name": "c", "paths": [headers]}, tables]
    return [wiki["english"], wiki["french"], *tables_and_code, topics, wiki["spanish"]]


def measure(options: argparse.Namespace) -> Result:
    """Every method under every seed."""
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, list[list[float]]] = {name: [] for name, meta in METHODS.items() if meta or not options.wiki}
    for seed in options.seeds:
        for name in result:
            meta = METHODS[name]
            run = options.out / f"{seed}-{name.replace(' ', '-').replace(',', '')}"
            _train(run, options, seed, meta)
            result[name].append(_adapted(run, options.wiki is not None))
            say(f"seed {seed}: {name}: {', '.join(f'{nats:.3f}' for nats in result[name][-1])}")
    return {"seeds": options.seeds, "steps": options.steps, "methods": result, "domains": options.wiki is not None}


def _train(run: Path, options: argparse.Namespace, seed: int, meta: dict[str, Any] | None) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    paths = [str(library / part) for part in ("asyncio", "email", "json", "unittest", "xml")]
    tasks = _domains(options) if options.wiki else []
    values = {
        "data.paths": json.dumps([] if tasks else paths),
        "data.tasks": json.dumps(tasks),
        "data.max_bytes": 2_000_000,
        "store.path": str(options.out / "store"),
        "seed": seed,
        "model.d_model": 32,
        "training.objective": "clm",
        "training.mode": "end_to_end",
        "training.steps": options.steps,
        "training.batch_size": 8,
        "training.accumulation": 4,
        "training.seq_len": 32,
        "training.meta": json.dumps(None if meta is None else (BY_DOMAIN if tasks else TASKS) | meta),
        "evaluation.samples": 256,
    }
    command = [sys.executable, "-m", "stackwise", "run", "--preset", "micro", "--run", str(run)]
    pairs = (part for key, value in values.items() for part in ("-o", f"{key}={value}"))
    subprocess.run([*command, *pairs], check=True, stdout=subprocess.DEVNULL)


def _adapted(run: Path, domains: bool) -> list[float]:
    """The loss on tasks held out after each of `SHOTS`, each at the rate that is best on other tasks."""
    import torch

    from stackwise.config.continual import Meta
    from stackwise.pipeline.committed.load import load_rack
    from stackwise.pipeline.run import RunDirectory
    from stackwise.training.tasks import ADAPTATION, Adaptation

    device = torch.device("cpu")
    rack = load_rack(RunDirectory(run), device)
    model = _model(rack)
    parameters = dict(model.requires_grad_().named_parameters())
    curves: dict[bool, list[Sequence[float]]] = {False: [], True: []}  # by rate, of other tasks and of those that count
    for counts, kept in curves.items():
        for rate in RATES:
            meta = Meta.model_validate({**TASKS, "inner_rate": rate, "inner_steps": max(SHOTS)})
            adaptation = Adaptation(model, meta, parameters, device)
            curve = [adaptation.judged(task)[ADAPTATION] for task in (_of_domain if domains else _tasks)(rack, counts)]
            total = torch.stack([term.sum for term in curve]).sum(0)
            kept.append((total / sum(term.count for term in curve)).tolist())
    best = [min(range(len(RATES)), key=lambda i: _number(curves[False][i][shot])) for shot in SHOTS]
    return [curves[True][i][shot] for i, shot in zip(best, SHOTS, strict=True)]


def _number(nats: float) -> float:
    return nats if math.isfinite(nats) else math.inf


def _model(rack: CommittedRack) -> StageModel:
    from stackwise.training.stage import StageModel

    (modules,) = rack.exits()
    front, head = modules.front, modules.head
    assert front is not None, "a rack in one stage begins with tokens"
    assert head is not None, "it ends with logits"
    if head.tied:
        head.fixed = None
        head.share(front.get_parameter("embedding.weight"))
    return StageModel(front, modules.blocks, head, rack.objective, "fp32").eval()


def _tasks(rack: CommittedRack, counts: bool) -> Iterator[Batch]:
    """Held-out rows of tasks that no method was trained on: those that count, or as many others."""
    import numpy as np
    import torch

    from stackwise.batch import MASKS, TOKENS, Batch
    from stackwise.config.continual import Meta
    from stackwise.identity import generator
    from stackwise.training.tasks import PermutedTasks

    meta, rows, length = Meta.model_validate(TASKS), 8, rack.config.training.seq_len
    used_U = np.setdiff1d(np.flatnonzero(rack.data.train.counts), [rack.data.separator_id])
    tasks = PermutedTasks(meta, rack.config.seed, rows, used_U, rack.vocab_size)
    first = tasks.training + (0 if counts else tasks.held)
    for task in range(first, first + tasks.held):
        chosen = generator(rack.config.seed, "rows", task).permutation(rack.data.held_out.n_samples(length))
        for episode in range(EPISODES):
            which = chosen[episode * rows : (episode + 1) * rows]
            tokens = torch.from_numpy(rack.data.held_out.samples(which, length))
            masks = torch.zeros(tokens.shape, dtype=torch.bool)
            yield tasks.show(Batch(which, None, {TOKENS: tokens, MASKS: masks}), task)


def _of_domain(rack: CommittedRack, counts: bool) -> Iterator[Batch]:
    """Held-out rows of the last task, which counts, or of the one before it."""
    import numpy as np
    import torch

    from stackwise.batch import MASKS, TOKENS, Batch
    from stackwise.identity import generator

    split, rows, length = rack.data.held_out, 8, rack.config.training.seq_len
    task = len(split.tasks) - (1 if counts else 2)
    chosen = generator(rack.config.seed, "rows", task).permutation(np.flatnonzero(split.sample_tasks(length) == task))
    for episode in range(DOMAIN_EPISODES):
        which = chosen[episode * rows : (episode + 1) * rows]
        tokens = torch.from_numpy(split.samples(which, length))
        yield Batch(which, None, {TOKENS: tokens, MASKS: torch.zeros(tokens.shape, dtype=torch.bool)})


def _section(result: Result) -> Section:
    header = ["trained by", *(f"after {shot}" if shot else "before" for shot in SHOTS)]
    lines = [
        [name, *(f"{fmean(seed[i] for seed in by_seed):.3f} ({min(s[i] for s in by_seed):.3f} to "
                 f"{max(s[i] for s in by_seed):.3f})" for i in range(len(SHOTS)))]
        for name, by_seed in result["methods"].items()
    ]  # fmt: skip
    seeds = f"mean of seeds {', '.join(map(str, result['seeds']))}, smallest to largest in brackets"
    steps = f"{result['steps']} updates of four tasks of 8 rows of 32 tokens"
    shots = "before and after steps on 4 support rows"
    permuted = (
        f"Two blocks of width 32 learn bytes of the standard library in {steps}; in a task all bytes are permuted. "
        f"Nats a token on 4 query rows of {TASKS['held_out']} tasks held out, twice each, {shots}; {seeds}."
    )
    by_domain = (
        f"Two blocks of width 32 learn bytes of five domains in {steps}. Nats a token on 4 query rows of Spanish text, "
        f"which is not among them, {DOMAIN_EPISODES} times, {shots}; {seeds}."
    )
    text = by_domain if result["domains"] else permuted
    return Section("meta", "Few-shot adaptation", text, table(header, lines), "cpu", result)


if __name__ == "__main__":
    sys.exit(main())
