"""Suites of tasks: likelihoods are those of transformers, GLUE is learned and scored, local tasks are answered."""

import dataclasses
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from stackwise.data.tokenizer import bytes_tokenizer
from stackwise.errors import UsageError
from stackwise.pipeline.committed.load import load_model, load_rack
from stackwise.pipeline.suites import SuiteOptions, run_suites
from stackwise.pipeline.suites import glue as glue_suite
from stackwise.pipeline.suites.scoring import Continuation, Scorer
from tests.pretrained.models import make

CPU = torch.device("cpu")
BYTES = {"vocab_size": bytes_tokenizer().vocab_size}


def model(name: str, folder: Path):
    """A model of transformers over bytes, and ours of the same weights."""
    theirs = make(name, folder, **BYTES)
    bytes_tokenizer().save(folder / "tokenizer.json")
    return theirs, Scorer(load_model(str(folder), CPU, lambda _: None))


def ids(text: str) -> np.ndarray:
    return bytes_tokenizer().encode_batch([text])[0].astype(np.int64)


@torch.no_grad()
def test_a_causal_rack_says_what_transformers_says(tmp_path):
    theirs, scorer = model("gpt2", tmp_path)
    asked = [
        Continuation(ids("to be or "), ids("not to be")),
        Continuation(ids("x" * 100), ids("yy")),  # the context is longer than a row
        Continuation(ids(""), ids("a")),
    ]
    for question, answer in zip(asked, scorer.answers(asked), strict=True):
        context = question.context if len(question.context) else np.array([scorer.rack.data.tokenizer.separator_id])
        row = torch.from_numpy(np.concatenate((context, question.ids)))[None, -65:]
        log_probs = theirs(row[:, :-1]).logits.log_softmax(-1)[0, -len(question.ids) :]
        targets = torch.from_numpy(question.ids)
        assert answer.nats == pytest.approx(-log_probs.gather(1, targets[:, None]).sum().item(), rel=1e-4)
        assert answer.greedy == bool((log_probs.argmax(-1) == targets).all())


@torch.no_grad()
def test_a_masked_rack_is_asked_one_token_at_a_time(tmp_path):
    theirs, scorer = model("bert", tmp_path)
    assert scorer.likelihood == "pseudo"
    context, text, mask = ids("to be"), ids(" or"), scorer.rack.mask_token
    nats = 0.0
    for place in range(len(text)):
        row = torch.from_numpy(np.concatenate((context, text)))[None]
        row[0, len(context) + place] = mask
        nats -= theirs(row).logits.log_softmax(-1)[0, len(context) + place, text[place]].item()
    assert scorer.answers([Continuation(context, text)])[0].nats == pytest.approx(nats, rel=1e-4)


@torch.no_grad()
def test_a_bound_is_the_mean_over_all_masks(tmp_path):
    _, scorer = model("bert", tmp_path)
    scorer.likelihood = "bound"
    context, text, mask = ids("to be"), ids("o"), scorer.rack.mask_token
    alone = scorer.answers([Continuation(context, text)])[0].nats  # of one token there is one mask
    row = torch.from_numpy(np.append(context, mask))[None]
    assert alone == pytest.approx(
        -scorer.model.logits_at(row, torch.tensor([5])).log_softmax(-1)[0, text[0]].item(), rel=1e-4
    )
    two = Continuation(context, ids("or"))
    # two tokens: half of the draws mask one of them, weighted 2, half both, weighted 1
    both = torch.from_numpy(np.concatenate((context, [mask, mask])))[None]
    logits = scorer.model.logits_at(both, torch.tensor([5, 6])).log_softmax(-1)
    of_both = -(logits[0, two.ids[0]] + logits[1, two.ids[1]]).item()
    singles = []
    for place in (5, 6):
        row = torch.from_numpy(np.concatenate((context, two.ids)))[None]
        row[0, place] = mask
        singles.append(
            -scorer.model.logits_at(row, torch.tensor([place])).log_softmax(-1)[0, two.ids[place - 5]].item()
        )
    low, high = 0.5 * of_both + min(singles), 0.5 * of_both + max(singles)
    assert low - 1e-4 <= scorer.answers([two])[0].nats <= high + 1e-4


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A causal model over bytes."""
    folder = tmp_path_factory.mktemp("suites") / "gpt2"
    make("gpt2", folder, **BYTES)
    bytes_tokenizer().save(folder / "tokenizer.json")
    return folder


def test_language_modelling_scores_every_token_once(weights, tmp_path):
    text = "It was the best of times, it was the worst of times. " * 4
    (tmp_path / "a.txt").write_text(text)
    options = SuiteOptions(("lm",), data=[str(tmp_path / "a.txt")], stride=16, device="cpu")
    result = run_suites(None, str(weights), options, lambda _: None)["lm"]
    assert result["tokens"] == result["bytes"] == len(text)
    scorer = Scorer(load_model(str(weights), CPU, lambda _: None))
    whole, asked = ids(text), [Continuation(ids(""), ids(text)[:64])]
    for start in range(64, len(whole), 16):
        stop = min(start + 16, len(whole))
        asked.append(Continuation(whole[:start], whole[start:stop]))
    nats = sum(answer.nats for answer in scorer.answers(asked))
    assert result["perplexity"] == pytest.approx(math.exp(nats / len(whole)), rel=0.05)  # windows lose some context
    assert result["bits_per_byte"] == pytest.approx(math.log2(result["perplexity"]), rel=1e-6)


def test_tasks_of_the_harness_are_read_from_local_files(weights, tmp_path, capsys):
    rows = [
        {"context": "ab", "choices": ["c", "dd"], "label": 0},
        {"context": "ba", "choices": ["x", "yy"], "label": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "rows.jsonl")}},
        "validation_split": "validation",
        "doc_to_text": "{{context}}",
    }
    choice = {
        "task": "pick",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
    }
    made = {
        "task": "make",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    rolling = {
        "task": "roll",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    for more in (choice, made, rolling):
        (tmp_path / f"{more['task']}.yaml").write_text(json.dumps(task | more))  # JSON is YAML
    options = SuiteOptions(("reasoning",), tasks=("pick", "make", "roll"), task_path=tmp_path, device="cpu")
    result = run_suites(None, str(weights), options, lambda _: None)["reasoning"]
    assert capsys.readouterr().out == ""  # JSON of the figures, and nothing else, goes there
    scorer = Scorer(load_model(str(weights), CPU, lambda _: None))
    picked = []
    for row in rows:
        answers = scorer.answers([Continuation(ids(row["context"]), ids(text)) for text in row["choices"]])
        picked.append(int(answers[1].nats < answers[0].nats) == row["label"])
    assert result["pick"]["acc"] == np.mean(picked)
    assert result["pick"]["samples"] == 2
    nats = [scorer.answers([Continuation(ids(""), ids(row["context"]))])[0].nats for row in rows]
    assert result["roll"]["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / 4, rel=1e-4)
    assert 0 <= result["make"]["exact_match"] <= 1
    (tmp_path / "lack.yaml").write_text(json.dumps(task | choice | {"task": "lack", "doc_to_choice": "{{[a, b]}}"}))
    with pytest.raises(UsageError, match="column"):
        run_suites(None, str(weights), dataclasses.replace(options, tasks=("lack",)), lambda _: None)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UsageError):
        run_suites(None, str(weights), dataclasses.replace(options, tasks=("pick",)), lambda _: None)


def table(path: Path, rows: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences of letters, and whether they are of the first half of the alphabet."""
    draw = random.Random(seed)
    labels = [str(draw.randrange(2)) for _ in range(count)]
    return [("".join(draw.choices("abcdefgh" if label == "1" else "stuvwxyz", k=8)), label) for label in labels]


@pytest.mark.parametrize(("name", "rate", "epochs"), [("gpt2", 3e-3, 4), ("bert", 1e-3, 8)])
def test_glue_is_learned_scored_and_not_run_twice(tmp_path, name, rate, epochs):
    make(name, tmp_path / "model", **BYTES)
    bytes_tokenizer().save(tmp_path / "model" / "tokenizer.json")
    data = tmp_path / "glue"
    for part, count in (("train", 200), ("dev", 60)):
        table(data / "SST-2" / f"{part}.tsv", [("sentence", "label"), *sentences(count, count)])
    table(data / "SST-2" / "test.tsv", [("index", "sentence"), ("0", "abc"), ("1", "xyz")])
    settings = {"training.learning_rate": rate, "training.epochs_per_layer": epochs, "training.batch_size": 1}
    options = SuiteOptions(("glue",), task_path=data, settings=settings, out=tmp_path / "out", device="cpu")
    result = run_suites(None, str(tmp_path / "model"), options, lambda _: None)["glue"]
    assert result["tasks"]["SST-2"]["metrics"]["accuracy"]["mean"] > 0.9
    assert (tmp_path / "out" / "submission" / "SST-2.tsv").read_text() == "index\tprediction\n0\t1\n1\t0\n"
    rack = load_rack(glue_suite.RunDirectory(tmp_path / "out" / "SST-2" / "seed-0"), CPU)
    assert rack.objective.causal is (name == "gpt2")
    steps = (tmp_path / "out" / "SST-2" / "seed-0" / "events.jsonl").read_text().count('"step"')
    again = run_suites(None, str(tmp_path / "model"), options, lambda _: None)["glue"]
    assert again == result
    assert (tmp_path / "out" / "SST-2" / "seed-0" / "events.jsonl").read_text().count('"step"') == steps


ROWS: dict[str, list[dict[str, object]]] = {
    "CoLA": [{"sentence": "a", "label": 1}],
    "SST-2": [{"sentence": "a", "label": 1}],
    "MRPC": [{"sentence1": "a", "sentence2": "b", "label": 1}],
    "STS-B": [{"sentence1": "a", "sentence2": "b", "label": 2.6}],
    "QQP": [{"question1": "a", "question2": "b", "label": 1}],
    "MNLI": [{"premise": "a", "hypothesis": "b", "label": 1}],
    "QNLI": [{"question": "a", "sentence": "b", "label": 1}],
    "RTE": [{"sentence1": "a", "sentence2": "b", "label": 1}],
    "WNLI": [{"sentence1": "a", "sentence2": "b", "label": 1}],
}
HEADS: dict[str, list[tuple[str, ...]]] = {
    "CoLA": [("gj04", "1", "", "a")],
    "SST-2": [("sentence", "label"), ("a", "1")],
    "MRPC": [("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), ("1", "7", "8", "a", "b")],
    "STS-B": [("index", "sentence1", "sentence2", "score"), ("0", "a", "b", "2.6")],
    "QQP": [("id", "question1", "question2", "is_duplicate"), ("0", "a", "b", "1")],
    "MNLI": [("index", "sentence1", "sentence2", "gold_label"), ("0", "a", "b", "neutral")],
    "QNLI": [("index", "question", "sentence", "label"), ("0", "a", "b", "not_entailment")],
    "RTE": [("index", "sentence1", "sentence2", "label"), ("0", "a", "b", "not_entailment")],
    "WNLI": [("index", "sentence1", "sentence2", "label"), ("0", "a", "b", "1")],
}


@pytest.mark.parametrize("name", glue_suite.TASKS)
def test_both_layouts_of_each_task_are_read(tmp_path, name):
    import pyarrow
    import pyarrow.parquet

    task = glue_suite.TASKS[name]
    table(tmp_path / "tsv" / name / "train.tsv", HEADS[name])
    (tmp_path / "parquet" / name.lower()).mkdir(parents=True)
    path = tmp_path / "parquet" / name.lower() / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[name]), path)
    read = [glue_suite.read_examples(tmp_path / layout, task, "train") for layout in ("tsv", "parquet")]
    assert read[0] == read[1]
    assert read[0] == [glue_suite.Example(tuple("ab"[: len(task.texts[0])]), 2.6 if name == "STS-B" else 1.0)]


@pytest.mark.parametrize(
    ("rows", "tasks"),
    [
        ([("text", "label"), ("a", "1")], ()),  # a column is missing
        ([("sentence", "label"), ("a", "2")], ()),  # a label outside the set
        ([("sentence", "label"), ("a", "1")], ("SST",)),  # no such task
        ([("sentence", "label"), ("a", "1")], ()),  # no development file
    ],
)
def test_a_faulty_task_is_refused_before_anything_is_written(weights, tmp_path, rows, tasks):
    table(tmp_path / "glue" / "SST-2" / "train.tsv", rows)
    options = SuiteOptions(("glue",), task_path=tmp_path / "glue", tasks=tasks, out=tmp_path / "out", device="cpu")
    with pytest.raises(UsageError):
        run_suites(None, str(weights), options, lambda _: None)
    assert not (tmp_path / "out").exists()
