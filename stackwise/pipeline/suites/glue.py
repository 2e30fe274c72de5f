"""GLUE (arXiv 1804.07461): a rack fine-tuned on each task, and scored by the task's own metrics.

A task is said in the rack's own words: an example becomes tokens, and a label one token, which the head says at the
separator that begins the example (or, of a causal rack, ends it). So fine-tuning is an ordinary run from the rack's
weights with `training.objective: custom`, resumed and reused like any other, and no head is added. Examples are packed
into samples, and attention stays within each. STS-B's scores are 26 labels, a fifth apart, as T5 has them (arXiv
1910.10683); what is scored is their mean under the rack's probabilities.
"""

from __future__ import annotations

import csv
import json
import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.data.tokenizer import Tokenizer
from stackwise.durable import write_bytes
from stackwise.errors import NotFound, UsageError
from stackwise.identity import digest
from stackwise.pipeline.committed.load import CommittedRack, load_rack
from stackwise.pipeline.device import resolve_device
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.suites.scoring import Ids, RackReader, Row

Floats = NDArray[np.float64]
Say = Callable[[str], None]
SCORES = 26
"""Labels that STS-B's scores from 0 to 5 are rounded to."""
DIGESTS = 16
"""Hex digits of an example file's name."""


@dataclass(frozen=True)
class Task:
    """One task, as its files have it.

    Args:
        name: As GLUE's folders have it.
        texts: Its columns of text, one or two: in TSV files, then in parquet ones.
        label: Its label's columns, in both.
        labels: The names of its labels, in the order of their numbers; empty: it is a score from 0 to 5.
        metrics: What it is scored by; the first is its main one, unless there are two of equal weight.
        dev, test: Names of its files, without an ending.
        columns: The columns of files without a header; None: they have one.
        submission: The names of its files for GLUE's server, one for each of `test`.
    """

    name: str
    texts: tuple[tuple[str, ...], tuple[str, ...]]
    label: tuple[str, str]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    dev: tuple[str, ...] = ("dev",)
    test: tuple[str, ...] = ("test",)
    columns: tuple[str, ...] | None = None
    submission: tuple[str, ...] = ()

    @property
    def is_score(self) -> bool:
        """Whether it asks for a number, not for a label."""
        return not self.labels

    @property
    def count(self) -> int:
        """Labels that the rack tells apart."""
        return len(self.labels) or SCORES


_ENTAILS = ("entailment", "not_entailment")
_BINARY = ("0", "1")
_PAIR = ("sentence1", "sentence2")
TASKS = {
    task.name: task
    for task in (
        Task(
            "CoLA",
            (("sentence",), ("sentence",)),
            ("label", "label"),
            _BINARY,
            ("matthews",),
            columns=("source", "label", "star", "sentence"),
        ),
        Task("SST-2", (("sentence",), ("sentence",)), ("label", "label"), _BINARY, ("accuracy",)),
        Task("MRPC", (("#1 String", "#2 String"), _PAIR), ("Quality", "label"), _BINARY, ("accuracy", "f1")),
        Task("STS-B", (_PAIR, _PAIR), ("score", "label"), (), ("pearson", "spearman")),
        Task("QQP", (("question1", "question2"),) * 2, ("is_duplicate", "label"), _BINARY, ("accuracy", "f1")),
        Task(
            "MNLI",
            (_PAIR, ("premise", "hypothesis")),
            ("gold_label", "label"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            ("dev_matched", "dev_mismatched"),
            ("test_matched", "test_mismatched"),
            submission=("MNLI-m", "MNLI-mm"),
        ),
        Task("QNLI", (("question", "sentence"),) * 2, ("label", "label"), _ENTAILS, ("accuracy",)),
        Task("RTE", (_PAIR, _PAIR), ("label", "label"), _ENTAILS, ("accuracy",)),
        Task("WNLI", (_PAIR, _PAIR), ("label", "label"), _BINARY, ("accuracy",)),
    )
}


@dataclass(frozen=True)
class Example:
    """Texts and their label: its number, or a score; None: it is not known."""

    texts: tuple[str, ...]
    label: float | None


# Reading.


def read_examples(folder: Path, task: Task, part: str) -> list[Example] | None:
    """One file of a task, TSV as distributed or parquet; None: there is none.

    Args:
        folder: Where GLUE's folders are; a task's is named as `Task.name`, or in small letters without dashes.
        part: Such as `train` or `dev_matched`.

    Raises:
        UsageError: A column is missing, or a label is none of the task's.
    """
    for directory in (folder / task.name, folder / task.name.lower(), folder / task.name.lower().replace("-", "")):
        tsv = directory / f"{part}.tsv"
        if tsv.is_file():
            return [*_examples(tsv, task, _tsv_rows(tsv, task, part), 0)]
        for name in (part, part.replace("dev", "validation")):
            files = sorted(directory.glob(f"{name}-*.parquet")) or [*directory.glob(f"{name}.parquet")]
            if files:
                return [example for file in files for example in _examples(file, task, _parquet_rows(file), 1)]
    return None


def _tsv_rows(path: Path, task: Task, part: str) -> Iterator[Mapping[str, Any]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            # quotes are letters like others in these files
            columns = task.columns if task.columns is not None and not part.startswith("test") else None
            reader = csv.DictReader(file, columns, delimiter="\t", quoting=csv.QUOTE_NONE)
            yield from reader
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read as TSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    from stackwise.data.readers import require_pyarrow

    require_pyarrow(path)
    import pyarrow
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _examples(path: Path, task: Task, rows: Iterator[Mapping[str, Any]], layout: int) -> Iterator[Example]:
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        texts = []
        for column in task.texts[layout]:
            if column not in row:
                columns = ", ".join(str(name) for name in row)
                raise UsageError(f"{where}: no column {column!r}; its columns are: {columns[:300]}")
            if not isinstance(row[column], str):  # a line that is cut short
                raise UsageError(f"{where}: column {column!r} holds no text")
            texts.append(row[column])
        yield Example(tuple(texts), _label(where, task, row, task.label[layout]))


def _label(where: str, task: Task, row: Mapping[str, Any], column: str) -> float | None:
    value = row.get(column)
    if value is None or value == -1:  # the tests' labels are not given away
        return None
    if task.is_score:
        try:
            score = float(value)
        except ValueError:
            score = math.nan
        if not 0 <= score <= 5:
            raise UsageError(f"{where}: {column} {value!r} is no score from 0 to 5")
        return score
    if isinstance(value, int) and 0 <= value < task.count:
        return float(value)
    if value not in task.labels:
        raise UsageError(f"{where}: {column} {value!r} is none of {', '.join(task.labels)}")
    return float(task.labels.index(value))


# Examples as tokens.


@dataclass(frozen=True)
class Wording:
    """How examples and labels are said to a rack.

    Args:
        longest: Tokens of an example, at most; of its texts the longest is cut first.
        causal: The label is said behind the example, not in front.
        labels: The token of each label.
    """

    tokenizer: Tokenizer
    longest: int
    causal: bool
    labels: tuple[int, ...]

    def ids(self, example: Example) -> Ids:
        """An example's tokens: separator, text, separator, and so on."""
        texts = [ids.astype(np.int64) for ids in self.tokenizer.encode_batch(list(example.texts))]
        room = self.longest - len(texts) - 1
        while (total := sum(map(len, texts))) > room:
            longest = max(range(len(texts)), key=lambda place: len(texts[place]))
            texts[longest] = texts[longest][: len(texts[longest]) - max(1, (total - room) // 2)]
        separator = np.array([self.tokenizer.separator_id])
        return np.concatenate([separator, *(part for ids in texts for part in (ids, separator))])

    def place(self, ids: Ids) -> int:
        """Where the label is said."""
        return len(ids) - 1 if self.causal else 0

    def target(self, task: Task, label: float) -> int:
        """The token of a label or score."""
        return self.labels[round(label * (SCORES - 1) / 5) if task.is_score else int(label)]


def wording(rack: CommittedRack, task: Task) -> Wording:
    """How a task is said to a rack: letters stand for labels."""
    tokenizer = rack.data.tokenizer
    letters = [tokenizer.encode_batch([letter])[0].tolist() for letter in string.ascii_uppercase[: task.count]]
    ids = [letter[-1] for letter in letters if letter]
    if len(set(ids)) < task.count:  # letters that this tokenizer does not tell apart
        ids = [number for number in range(tokenizer.vocab_size) if number != tokenizer.separator_id][: task.count]
    if len(ids) < task.count:
        raise UsageError(f"{task.name}: {task.count} labels are more than this rack has tokens")
    longest = rack.config.model.max_seq_len or rack.config.training.seq_len
    return Wording(tokenizer, longest, rack.objective.causal is True, tuple(ids[: task.count]))


# Fine-tuning and scoring.


@dataclass(frozen=True)
class GlueOptions:
    """What of GLUE is run.

    Args:
        data: The folder with GLUE's folders.
        out: Where its runs and files go.
        tasks: Names of tasks; empty: those that `data` has.
        seeds: One run for each.
        settings: Settings of the fine-tuning runs, by dotted key, over those here.
        device: Where it runs.
    """

    data: Path
    out: Path
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, Any] | None = None
    device: str = "auto"


def glue(rack: CommittedRack, weights: str, options: GlueOptions, say: Say) -> dict[str, Any]:
    """Fine-tune and score a rack on GLUE.

    Args:
        rack: Its tokenizer and direction; its weights are read by each run.
        weights: What `init.weights` names it by: a directory of Hugging Face's layout, an export, or a finished run.
        say: Called with a line for each thing done.

    Returns:
        By task: each metric (for MNLI by file) with its `mean`, `std` over seeds and `values`; `examples`;
        `submission`, files for GLUE's server, of the first seed. `score`: the mean over tasks of the means of their
        metrics, as GLUE's board has it.

    Raises:
        NotFound: No folder, or no task in it.
        UsageError: A file is faulty, or a task has no training or development file.
    """
    if not options.data.is_dir():
        raise NotFound(f"--task-path {options.data}: there is no such folder", hint="name the folder of GLUE's folders")
    tasks = _chosen(options)
    results: dict[str, Any] = {}
    for task in tasks:
        results[task.name] = _task(rack, weights, task, options, say)
    means = [np.mean([m["mean"] for m in of_task["metrics"].values()]) for of_task in results.values()]
    return {"tasks": results, "score": float(np.mean(means))}


def _chosen(options: GlueOptions) -> list[Task]:
    by_name = {name.lower(): task for name, task in TASKS.items()}
    for name in options.tasks:
        if name.lower() not in by_name:
            raise NotFound(f"--tasks {name}: there is no such task of GLUE", hint=f"they are {', '.join(TASKS)}")
    if options.tasks:
        return [by_name[name.lower()] for name in options.tasks]
    there = [task for task in TASKS.values() if read_examples(options.data, task, "train")]
    if not there:
        folders = f"{', '.join(TASKS)}, each with train.tsv and dev.tsv, or parquet"
        raise NotFound(f"--task-path {options.data}: none of GLUE's tasks is here", hint=f"its folders are {folders}")
    return there


def _task(rack: CommittedRack, weights: str, task: Task, options: GlueOptions, say: Say) -> dict[str, Any]:
    train = [example for example in read_examples(options.data, task, "train") or () if example.label is not None]
    devs = {part: read_examples(options.data, task, part) for part in task.dev}
    missing = [part for part, examples in {"train": train, **devs}.items() if not examples]
    if missing:
        raise UsageError(f"{options.data / task.name}: no {missing[0]} file, or none with labels")
    words = wording(rack, task)
    path = _write_rows(options.out / task.name, task, words, train)
    values: dict[str, list[float]] = {}
    submission: list[str] = []
    for seed in options.seeds:
        run = RunDirectory(options.out / task.name / f"seed-{seed}")
        config = _configuration(weights, path, task, words, train, seed, options)
        config.name = f"glue-{task.name}-{seed}"
        say(f"{task.name}, seed {seed}: {len(train):,} examples, run {run.path}")
        Runner(config, run, lambda _: None, resume_command="the same command").run()
        reader = RackReader(load_rack(run, resolve_device(options.device)))
        for part, examples in devs.items():
            assert examples is not None
            answers = _answers(reader, words, task, examples)
            truth = np.array([example.label for example in examples], dtype=np.float64)
            if np.isnan(truth).any():
                raise UsageError(f"{options.data / task.name}: {part} has rows without a label")
            for metric, value in _metrics(task, truth, answers).items():
                key = f"{metric}_{part.removeprefix('dev_')}" if len(devs) > 1 else metric
                values.setdefault(key, []).append(value)
        if not submission:
            submission = _submit(reader, words, task, options)
        figures = ", ".join(f"{key} {of_key[-1]:.3f}" for key, of_key in values.items())
        say(f"{task.name}, seed {seed}: {figures}")
    metrics = {key: {"mean": float(np.mean(v)), "std": float(np.std(v)), "values": v} for key, v in values.items()}
    counts = {"train": len(train)} | {part: len(examples or ()) for part, examples in devs.items()}
    return {"metrics": metrics, "examples": counts, "submission": submission}


def _write_rows(folder: Path, task: Task, words: Wording, train: Sequence[Example]) -> Path:
    """The training examples as rows of tokens and targets; the file is named by its content."""
    lines = []
    for example in train:
        assert example.label is not None
        ids = words.ids(example)
        targets = np.full(len(ids), -100)
        targets[words.place(ids)] = words.target(task, example.label)
        lines.append(json.dumps({"input_ids": ids.tolist(), "targets": targets.tolist()}))
    data = ("\n".join(lines) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"train-{digest(data)[:DIGESTS]}.jsonl"
    if not path.is_file():
        write_bytes(path, data)
    return path


def _configuration(
    weights: str,
    rows: Path,
    task: Task,
    words: Wording,
    train: Sequence[Example],
    seed: int,
    options: GlueOptions,
) -> StackWiseConfig:
    from stackwise.pipeline.initial import with_checkpoint

    mean = np.mean([len(words.ids(example)) for example in train[:200]])
    values: dict[str, Any] = {
        "init.weights": weights,
        "seed": seed,
        "device": options.device,
        "data.paths": [str(rows)],
        "data.within_documents": True,
        "store.path": str(options.out / "store"),
        "tracking.trackers": [],
        "training.mode": "end_to_end",
        "training.objective": {"name": "custom", "attention": "causal" if words.causal else "both"},
        # of custom targets the masks say which are scored: all
        "training.min_mask_fraction": 1.0,
        "training.max_mask_fraction": 1.0,
        "training.seq_len": words.longest,
        "training.epochs_per_layer": 3,
        "training.batch_size": max(1, round(32 * float(mean) / words.longest)),
        "training.learning_rate": 5e-5,
        "training.lr_schedule": "linear",
        "training.min_learning_rate": 0.0,
        "training.warmup": 0.1,
        "training.weight_decay": 0.01,
        "evaluation.samples": 8,
    }
    return with_checkpoint(
        build(StackWiseConfig, {}, values | dict(options.settings or {}), source=f"GLUE, {task.name}")
    )


@torch.no_grad()
def _answers(reader: RackReader, words: Wording, task: Task, examples: Sequence[Example]) -> Floats:
    """The number of each example's likeliest label, or the mean of its score: float64 [n]."""
    rows = []
    for example in examples:
        ids = words.ids(example)
        rows.append(Row(ids, np.array([words.place(ids)])))
    places = {id(row): place for place, row in enumerate(rows)}
    answers = np.zeros(len(rows))
    for batch in reader.batches(rows):
        logits_BL = reader.logits(batch)[:, list(words.labels)]
        if task.is_score:
            scores_L = torch.linspace(0, 5, SCORES, device=logits_BL.device)
            values = logits_BL.softmax(-1) @ scores_L
        else:
            values = logits_BL.argmax(-1)
        for row, value in zip(batch, values.cpu().tolist(), strict=True):
            answers[places[id(row)]] = value
    return answers


def _metrics(task: Task, truth: Floats, answers: Floats) -> dict[str, float]:
    from scipy import stats
    from sklearn import metrics

    def correlation(function: Any) -> float:
        # of answers that are all alike there is none
        return float(function(truth, answers).statistic) if np.ptp(answers) > 0 and np.ptp(truth) > 0 else 0.0

    functions: dict[str, Callable[[], float]] = {
        "accuracy": lambda: metrics.accuracy_score(truth, answers),
        "f1": lambda: metrics.f1_score(truth, answers, zero_division=0.0),
        "matthews": lambda: metrics.matthews_corrcoef(truth, answers),
        "pearson": lambda: correlation(stats.pearsonr),
        "spearman": lambda: correlation(stats.spearmanr),
    }
    return {name: float(functions[name]()) for name in task.metrics}


def _submit(reader: RackReader, words: Wording, task: Task, options: GlueOptions) -> list[str]:
    """Write the tests' answers as GLUE's server takes them; the paths."""
    written = []
    for part, name in zip(task.test, task.submission or (task.name,), strict=True):
        examples = read_examples(options.data, task, part)
        if not examples:
            continue
        answers = _answers(reader, words, task, examples)
        predictions = [f"{a:.3f}" if task.is_score else task.labels[int(a)] for a in answers.tolist()]
        lines = ["index\tprediction", *(f"{number}\t{answer}" for number, answer in enumerate(predictions))]
        path = options.out / "submission" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, ("\n".join(lines) + "\n").encode())
        written.append(str(path))
    return written
