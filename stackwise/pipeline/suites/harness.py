"""Language modelling in windows that overlap; reasoning and other tasks by lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from stackwise.data import Split
from stackwise.errors import NotFound, StackWiseError, UsageError
from stackwise.pipeline.suites.scoring import Continuation, Ids, Scorer

TOKENS_AT_ONCE = 1 << 20
"""Tokens of documents that are asked about together."""


def language_modelling(
    scorer: Scorer,
    split: Split,
    *,
    stride: int | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """How well a rack says documents. Each token is scored once, from what its window has before (and, where the rack
    is not causal, behind) it; windows begin every `stride` tokens.

    Args:
        split: Prepared text.
        stride: Tokens that a window is further than the one before; None: half of what a row takes.
        limit: Documents, at most.
        progress: Called with (documents done, documents).

    Returns:
        `likelihood` (exact, pseudo, bound), `perplexity` (a token's; None under pseudo-likelihood has its own name:
        `pseudo_perplexity`), `bits_per_byte`, `documents`, `tokens`, `bytes`, `stride`; `by_document`: the quartiles of
        a document's bits per byte.

    Raises:
        UsageError: A stride longer than a row, or no documents.
    """
    longest = scorer.longest
    stride = stride or max(1, longest // 2)
    if stride > longest:
        raise UsageError(f"--stride {stride}: windows of {longest} tokens would leave tokens out", hint="a smaller one")
    documents = [ids for ids in _documents(split, scorer.rack.data.tokenizer.separator_id) if len(ids)][:limit]
    if not documents:
        raise UsageError("the text has no documents", hint="name other text: --data PATH")
    nats, sizes, tokens, done = [], [], 0, 0
    for group in _groups(documents):
        questions = [(place, window) for place, ids in enumerate(group) for window in windows(ids, longest, stride)]
        answers = scorer.answers([window for _, window in questions])
        of_group = np.zeros(len(group))
        for (place, _), answer in zip(questions, answers, strict=True):
            of_group[place] += answer.nats
        nats += of_group.tolist()
        sizes += [len(scorer.decode(ids).encode()) for ids in group]
        tokens += sum(len(ids) for ids in group)
        done += len(group)
        if progress is not None:
            progress(done, len(documents))
    total, nbytes = sum(nats), sum(sizes)
    by_document = [n / math.log(2) / size for n, size in zip(nats, sizes, strict=True) if size]
    name = "pseudo_perplexity" if scorer.likelihood == "pseudo" else "perplexity"
    return {
        "likelihood": scorer.likelihood,
        name: math.exp(min(total / tokens, 700.0)),
        "bits_per_byte": total / math.log(2) / nbytes if nbytes else None,
        "by_document": np.percentile(by_document, [25, 50, 75]).tolist() if by_document else [],
        "documents": len(documents),
        "tokens": tokens,
        "bytes": nbytes,
        "stride": stride,
    }


def _documents(split: Split, separator: int) -> Iterator[Ids]:
    """The tokens of each document, without the separator behind it."""
    starts = [*np.asarray(split.documents).tolist(), len(split.tokens)]
    for start, stop in itertools.pairwise(starts):
        ids = np.asarray(split.tokens[start:stop], dtype=np.int64)
        yield ids[:-1] if len(ids) and ids[-1] == separator else ids


def _groups(documents: list[Ids]) -> Iterator[list[Ids]]:
    group: list[Ids] = []
    for ids in documents:
        group.append(ids)
        if sum(map(len, group)) > TOKENS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def windows(ids: Ids, longest: int, stride: int) -> Iterator[Continuation]:
    """The first `longest` tokens; then the next `stride`, behind as many as a row takes beside them."""
    yield Continuation(ids[:0], ids[:longest])
    for start in range(longest, len(ids), stride):
        stop = min(start + stride, len(ids))
        yield Continuation(ids[max(0, stop - longest) : start], ids[start:stop])


REASONING = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "lambada_openai", "boolq", "gsm8k")
"""The tasks of the suite; their data is asked of a hub, unless a folder of tasks says where it lies."""
_NAMES = re.compile(rb"""^["']?(?:task|group|tag)["']?:[ ]*["']?([\w.+-]+)""", re.MULTILINE)
DEFAULT_LENGTH = 256
"""Tokens that a task gets where it does not say how many."""


class RackModel(LM):
    """A rack as lm-evaluation-harness asks it: log-likelihoods in nats, text until a string."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self._scorer = scorer

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """See `LM.loglikelihood`; of a rack that is not causal its bound, or its pseudo-likelihood."""
        questions = [self._continuation(*request.args) for request in requests]
        return [(-answer.nats, answer.greedy) for answer in self._scorer.answers(questions)]

    def _continuation(self, context: str, continuation: str) -> Continuation:
        """Blanks at the context's end belong to the continuation, as tokens have them in front."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before, whole = self._scorer.encode(stripped), self._scorer.encode(stripped + continuation)
        if len(whole) <= len(before):  # the tokens of both together are others than those of each
            whole_ids = self._scorer.encode(continuation)
            return Continuation(before, whole_ids[-self._scorer.longest :])
        return Continuation(whole[: len(before)], whole[len(before) :][-self._scorer.longest :])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """See `LM.loglikelihood_rolling`."""
        longest = self._scorer.longest
        pieces = [list(windows(self._scorer.encode(request.args[0]), longest, longest)) for request in requests]
        answers = iter(self._scorer.answers([piece for of_request in pieces for piece in of_request]))
        return [-sum(next(answers).nats for _ in of_request) for of_request in pieces]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """See `LM.generate_until`: the likeliest tokens, whatever a task says of sampling."""
        texts = []
        for request in requests:
            context, settings = request.args
            until = settings.get("until", [])
            length = int(settings.get("max_gen_toks", DEFAULT_LENGTH))
            texts.append(self._scorer.continue_text(context, length, [until] if isinstance(until, str) else until))
        return texts


def run_tasks(
    scorer: Scorer,
    tasks: Sequence[str] = REASONING,
    *,
    folder: Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
) -> dict[str, Any]:
    """Figures of a rack on tasks of lm-evaluation-harness.

    Args:
        tasks: Their names.
        folder: YAML files of tasks beside the harness's own (`dataset_path: json` reads local files).
        limit: Rows of each task, at most.
        few_shot: Examples in front of each row; None: as the task says.

    Returns:
        By task, its metrics by name as the harness has them (`acc`, `acc_norm`, their standard errors), and `samples`.

    Raises:
        NotFound: A task that is not known, or a folder that is not there.
        UsageError: Its data cannot be had: no hub is reached, a file or a column is missing.
    """
    if folder is not None and not folder.is_dir():
        raise NotFound(f"--task-path {folder}: there is no such folder")
    with _quiet():
        manager = _manager(tasks, folder)
        results: dict[str, Any] = {}
        for task in tasks:
            try:
                answer = simple_evaluate(
                    RackModel(scorer),
                    tasks=[task],
                    task_manager=manager,
                    limit=limit,
                    num_fewshot=few_shot,
                    bootstrap_iters=1000,
                    log_samples=False,
                )
            except StackWiseError:
                raise
            except Exception as error:  # of a task's files or its hub: whatever the libraries below make of it
                raise UsageError(f"{task}: {_reason(error)}", hint=_data_hint(error)) from error
            assert answer is not None
            for name, metrics in answer["results"].items():
                figures = {key.removesuffix(",none"): value for key, value in metrics.items() if key != "alias"}
                count = answer.get("n-samples", {}).get(name, {}).get("effective")
                results[name] = {
                    key: value
                    for key, value in figures.items()
                    if isinstance(value, int | float) and key != "sample_len"
                }
                results[name] |= {} if count is None else {"samples": count}
    return results


def _manager(tasks: Sequence[str], folder: Path | None) -> TaskManager:
    """What finds the tasks; the harness's own, which are thousands, are indexed where they are asked for alone."""
    if folder is not None:
        alone = TaskManager(include_path=str(folder), include_defaults=False)
        if set(tasks) <= set(alone.all_tasks):
            return alone
    for task in set(tasks) - set(() if folder is None else alone.all_tasks):
        _check_named(task)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known:
            raise NotFound(f"--tasks {task}: there is no such task", hint=_near(task, known))
    return manager


def _check_named(task: str) -> None:
    """Refuse a name that is nowhere in the text of the harness's tasks: its own index reads all of them as YAML first.

    Raises:
        NotFound: There is no such task.
    """
    names: set[bytes] = set()
    for path in Path(lm_eval.tasks.__file__).parent.rglob("*yaml"):  # what they include has no suffix
        text = path.read_bytes()
        if task.encode() in text:
            return
        names.update(_NAMES.findall(text))
    raise NotFound(f"--tasks {task}: there is no such task", hint=_near(task, {name.decode() for name in names}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what the harness, its loggers and its commands print: standard output is the figures' alone."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)  # git, and handlers that hold the stream, write there past sys.stderr
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _near(task: str, known: set[str]) -> str:
    near = difflib.get_close_matches(task, sorted(known), n=3)
    return f"did you mean {' or '.join(near)}?" if near else "tasks of your own: --task-path FOLDER"


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if (
        isinstance(error, ValueError) and lines and lines[0].startswith("malformed node")
    ):  # of a column that is not there
        return "its doc_to_choice gives no list of choices: a column that it names is missing"
    return lines[0][:300] if lines else type(error).__name__


def _data_hint(error: Exception) -> str:
    away = type(error).__name__ in (
        "ConnectionError",
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "MaxRetryError",
    )
    away = away or "offline" in str(error).lower() or "hub" in str(error).lower()
    if away:
        return "no hub is reached: --task-path FOLDER with a task of `dataset_path: json` reads local files"
    return "look at the task's file: its data_files, and the columns that its templates name"
