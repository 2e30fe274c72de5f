"""What a pretrained model is worth as a beginning: distillation, integers, blocks in turn, each beside its baselines.

    python -m benchmarks.pretrained_quality [--steps 150] [--seeds 3] [--rates 1e-3] [--write]

A teacher is trained first: a rack of 6 blocks that continues Python's standard library, byte by byte. The rows of each
table begin from it, or from nothing, get as many updates of each block as the table says, and are scored by their exact
likelihood of held-out files. A row's learning rate is the best of the grid on the first seed; the other seeds train at
that one. The teacher and the results are kept, run by run: what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Result, Spread, parser, positive, run_command, say, table
from benchmarks.document import Section
from benchmarks.quality.plain import apart, resting
from benchmarks.quality.results import started_by_themselves
from stackwise import words
from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.identity import content_id
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.committed.use import export_rack
from stackwise.pipeline.initial import with_checkpoint
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.runner import Runner

DOCS = Path(__file__).parent.parent / "docs"

BLOCKS = 6
RACK: dict[str, Any] = {
    "model.d_model": 96,
    "model.n_heads": 4,
    "model.init_std": 0.1,
    "model.architecture.n_stacks": BLOCKS,
    "model.architecture.blocks_per_stack": 1,
}
"""The teacher's shape, and that of what is trained from scratch beside it."""
BASE: dict[str, Any] = {
    "data.tokenizer": "bytes",
    "data.max_bytes": 4_000_000,
    "evaluation.samples": 128,
    "training.seq_len": 128,
    "training.log_every": 100,
    "training.objective": "clm",
    "training.mode": "end_to_end",
    "training.batch_size": 4,
    "training.checkpoint_minutes": 60.0,
    "device": "cpu",
}
"""Samples of 128 bytes of Python's standard library, under a causal loss."""

STILL = {"training.steps": 1, "training.learning_rate": 1e-9, "training.weight_decay": 0.0}
"""A run that leaves weights where they were, for the sake of its evaluation."""


@dataclass(frozen=True)
class Row:
    """A way to train, or a beginning.

    Args:
        name: What the table calls it.
        settings: What makes it, as dotted keys; "TEACHER" stands for the teacher's directory.
        share: Steps of a stage, as a share of the benchmark's; None: nothing trains, it is scored as it stands.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    share: float | None = 1.0

    @property
    def key(self) -> str:
        """Names it in the file of results: the same settings for as many steps are one result."""
        return content_id("row", [self.name, self.settings, self.share])[:8] + f" {self.name}"


FROM: dict[str, Any] = {"init.weights": "TEACHER"}
HALF = FROM | {"init.blocks": 2}
FRESH_HALF = RACK | {"model.architecture.n_stacks": BLOCKS // 2}
TAUGHT: dict[str, Any] = {"distillation.teacher": "TEACHER", "distillation.top_k": 16}
STAGED: dict[str, Any] = {"training.mode": "layerwise", "training.fusion.strategy": "trainable"}

DISTILLATION = (
    Row("the teacher, 6 blocks", FROM, None),
    Row("every second block of it, as they stand", HALF, None),
    Row("these, trained on without the teacher", HALF, 2.0),
    Row("these, drawn to the teacher's tokens", HALF | TAUGHT, 2.0),
    Row("these, block by block to its states, then to its tokens", HALF | TAUGHT | STAGED, 1.0),
    Row("from scratch", FRESH_HALF, 2.0),
    Row("from scratch, drawn to the teacher's tokens", FRESH_HALF | TAUGHT, 2.0),
)


def _integers(bits: int, **more: Any) -> dict[str, Any]:
    return {"training.quantization": {"bits": bits, "group": 32, "symmetric": False} | more}


SCALES = {f"stages.{BLOCKS}.training.quantization": _integers(2, trains="scales")["training.quantization"]}
INTEGERS = (
    Row("float, as it stands", FROM, None),
    Row("float, trained on", FROM, 1.0),
    *(
        row
        for bits in (4, 3, 2)
        for row in (
            Row(f"{bits} bits: rounded to nearest", FROM | _integers(bits), None),
            Row(f"{bits} bits: the whole trained", FROM | _integers(bits), 1.0),
        )
    ),
    Row("2 bits: block by block to the float states, then scales", FROM | _integers(2) | TAUGHT | STAGED | SCALES, 0.5),
    Row("4 bits: from scratch", RACK | _integers(4), 1.0),
)

PROSE: dict[str, Any] = {"data.paths": ["HEADERS"]}


def _turns(rounds: int) -> dict[str, Any]:
    return {"training.mode": {"name": "in_turn", "block_size": 2}, "training.windows": rounds}


SECTIONS, ROUNDS = BLOCKS // 2, 2
IN_TURN = (
    Row("as it stands", FROM | PROSE, None),
    Row("all parameters", FROM | PROSE, 1.0),
    Row("2 blocks in turn, as many steps", FROM | PROSE | _turns(ROUNDS), 1.0 / SECTIONS / ROUNDS),
    Row("2 blocks in turn, as many updates of each block", FROM | PROSE | _turns(ROUNDS), 1.0 / ROUNDS),
    Row("from scratch", RACK | PROSE, 1.0),
)
TABLES: dict[str, tuple[str, tuple[Row, ...]]] = {
    "distillation": ("A student of 3 blocks (updates of each block: twice the steps)", DISTILLATION),
    "integers": ("Blocks in integers, groups of 32 with a zero point (updates of each block: the steps)", INTEGERS),
    "in turn": ("Other text: the headers of torch, C++ (steps: as each row says)", IN_TURN),
}

LARGE: dict[str, Any] = {"model.d_model": 768, "model.n_heads": 12, "model.architecture.n_stacks": 12}
LARGE |= {"training.seq_len": 128, "training.batch_size": 1, "training.steps": 2, "evaluation.samples": 2}
MEMORY: dict[str, dict[str, Any]] = {
    "all parameters": {},
    "4 blocks in turn": {"training.mode": {"name": "in_turn", "block_size": 4}},
}
"""Runs of a rack of 12 blocks of width 768, whose memory is weights, gradients and moments for the most part."""


class Kept:
    """Results by name, in a file that grows.

    Args:
        path: The file.
        setting: What all of them share; a file of another setting is refused.
    """

    def __init__(self, path: Path, setting: Result) -> None:
        self._path, self._setting = path, setting
        self.results: dict[str, Any] = {}
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["setting"] != setting:
                raise SystemExit(f"{path} holds results of another setting: name another file with --results")
            self.results = known["results"]

    def add(self, key: str, result: Any) -> None:
        """Keep one more."""
        self.results[key] = result
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps({"setting": self._setting, "results": self.results}, indent=1) + "\n")
        temporary.replace(self._path)


@dataclass
class Bench:
    """Runs rows.

    Args:
        teacher: Its directory.
        kept: What was measured before.
        options: The command's.
    """

    teacher: Path
    kept: Kept
    options: argparse.Namespace

    def score(self, row: Row, rate: float, seed: int) -> float | None:
        """Bits a byte of held-out text; None with `--report`, where it is not known."""
        key = self._key(row, rate, seed)
        if key not in self.kept.results and not self.options.report:
            say(key)
            steps: dict[str, Any] = {"training.steps": max(1, round(self.options.steps * (row.share or 0)))}
            steps["training.rows"] = (
                4 * self.options.steps * (1 if row.share is None else 2)
            )  # as many as 2 x steps see
            settings = BASE | row.settings | {"seed": seed, "training.learning_rate": rate} | steps
            self.kept.add(key, self._run(settings | (STILL if row.share is None else {})))
        return self.kept.results.get(key)

    def known(self, row: Row, rate: float) -> list[float]:
        """The scores of all seeds, as far as they are known."""
        keys = dict.fromkeys(self._key(row, rate, seed) for seed in range(self.options.seeds))
        return [self.kept.results[key] for key in keys if key in self.kept.results]

    def _key(self, row: Row, rate: float, seed: int) -> str:
        # Nothing of a row that is scored as it stands is drawn.
        return row.key if row.share is None else f"{row.key} | {rate:g} | {seed}"

    def _run(self, settings: dict[str, Any]) -> float:
        headers = Path(torch.__file__).parent / "include" / "ATen"
        named = {"TEACHER": str(self.teacher)}
        values = {key: named.get(value, value) if isinstance(value, str) else value for key, value in settings.items()}
        if "data.paths" in values:
            values |= {"data.paths": [str(headers)]}
        with tempfile.TemporaryDirectory(prefix="stackwise-quality-", dir=self.options.dir) as temporary:
            config = with_checkpoint(build(StackWiseConfig, {}, values))
            return float(
                Runner(config, RunDirectory(Path(temporary) / "run"), lambda event: None).run()["bits_per_byte"]
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    page = DOCS / "quality.md"
    return run_command("pretrained_quality", arguments, lambda given: _section(_parser().parse_args(given)), page)


def _parser() -> argparse.ArgumentParser:
    made = parser("pretrained_quality", __doc__)
    add = made.add_argument
    add("--steps", type=positive, default=150, metavar="N", help="updates of each block, but as a table says")
    add("--teacher-steps", type=positive, default=1000, metavar="N", help="updates of the teacher; default 1000")
    add("--seeds", type=positive, default=3, metavar="N", help="seeds; default 3")
    add("--rates", default="1e-3", metavar="X,X", help="the grid of learning rates")
    add("--results", type=Path, default=DOCS / "pretrained-quality.json", metavar="FILE", help="where results are kept")
    add("--dir", metavar="DIR", default="runs/pretrained-quality", help="where the teacher stays, and runs for a while")
    add("--report", action="store_true", help="run nothing: tables of what is there")
    return made


def _teacher(options: argparse.Namespace) -> Path:
    """The teacher's directory; it is trained, or trained on, where it is not there."""
    root = Path(options.dir)
    out = root / "teacher"
    if not out.exists() and not options.report:
        say("the teacher")
        more = {
            "training.steps": options.teacher_steps,
            "training.learning_rate": 2e-3,
            "training.batch_size": 8,
            "training.rows": 12_000,
        }
        config = build(StackWiseConfig, {}, RACK | BASE | more)
        run = RunDirectory(root / "teacher-run")
        Runner(config, run, lambda event: None).run()
        export_rack(load_rack(run, torch.device("cpu")), out)
    return out


def _section(options: argparse.Namespace) -> Section:
    rates = [float(rate) for rate in options.rates.split(",")]
    shared = {"steps": options.steps, "teacher_steps": options.teacher_steps, "rates": rates, "base": RACK | BASE}
    bench = Bench(_teacher(options), Kept(options.results, shared), options)
    rows = [row for _, members in TABLES.values() for row in members]
    best: dict[str, float] = {}
    for seed in range(options.seeds):  # every row from the first seed, then every row from the next
        for row in rows:
            if row.key not in best:
                first = {rate: bench.score(row, rate, 0) for rate in (rates[:1] if row.share is None else rates)}
                best[row.key] = min(first, key=lambda rate, first=first: first[rate] or 99.0)  # type: ignore[misc]
            bench.score(row, best[row.key], seed)
    body, result = [], {}
    for name, (title, members) in TABLES.items():
        known = {row.name: bench.known(row, best[row.key]) for row in members}
        result[name] = known
        body.append(f"### {title}\n\n{table(['row', 'bits per byte', 'rate', 'seeds'], _lines(members, known, best))}")
    memory = _memory(bench)
    header = ["12 blocks of width 768, batch of 1", "peak memory of a worker beyond a resting one"]
    body.append("### Memory\n\n" + table(header, ([name, words.size(size)] for name, size in memory.items())))
    text = (
        f"Racks of width 96 by bytes, samples of 128, batches of 4, {options.steps} steps; the teacher got "
        f"{options.teacher_steps:,} of batches of 8. Bits per byte of held-out files by exact likelihood; medians over "
        "the seeds of a row, smallest to largest in brackets. Rates: the best of a grid by the first seed."
    )
    title = "A pretrained model as a beginning"
    return Section("pretrained-quality", title, text, "\n\n".join(body), "CPU", result | {"memory": memory})


def _lines(rows: Sequence[Row], scores: dict[str, list[float]], best: dict[str, float]) -> Iterator[list[str]]:
    for row in rows:
        if not (known := scores[row.name]):
            continue
        spread = Spread.of(known)
        shown = f"{spread.median:.3f}" + (f" ({spread.min:.3f} to {spread.max:.3f})" if len(known) > 1 else "")
        drawn = row.share is not None  # what is scored as it stands has neither rate nor seed
        yield [row.name, shown, words.rate(best[row.key]) if drawn else "", str(len(known)) if drawn else ""]


def _memory(bench: Bench) -> dict[str, int]:
    """Most bytes that a worker holds beyond one that has nothing to do."""
    sizes: dict[str, int] = {}
    for name, settings in MEMORY.items():
        key = f"memory: {name}"
        if key not in bench.kept.results and not bench.options.report:
            say(key)
            with tempfile.TemporaryDirectory(prefix="stackwise-quality-", dir=bench.options.dir) as temporary:
                config = build(StackWiseConfig, {}, RACK | BASE | LARGE | settings)
                run = RunDirectory(Path(temporary) / "run")
                with started_by_themselves():
                    Runner(config, run, lambda event: None).run()
                bench.kept.add(key, max(s["peak_memory_bytes"] for s in status(run)["stages"]) - apart(resting))
        if key in bench.kept.results:
            sizes[name] = bench.kept.results[key]
    return sizes


if __name__ == "__main__":
    sys.exit(main())
