"""Conversations and pairs become rows of tokens: as transformers makes them, packed whole, and refused in one line."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackwise.config import DataConfig
from stackwise.data import PreparedData, prepare
from stackwise.data.chat import TEMPLATES
from stackwise.data.prepared import PackedSplit, PairSplit
from stackwise.errors import UsageError

SFT, PAIRS = ("completion_mask",), ("pair_mask", "margin")


def _prepared(tmp_path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...], **settings: Any) -> PreparedData:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(paths=[str(path)], **{"tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")} | settings)
    return prepare(config, columns=columns)[0]


def _talk(number: int, turns: int = 1) -> dict[str, Any]:
    said = []
    for turn in range(turns):
        said.append({"role": "user", "content": f"question {number} {turn}"})
        said.append({"role": "assistant", "content": f"answer {number * turn}, naïve 東京"})
    return {"messages": said}


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with special tokens and a chat template, as transformers writes one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|mask|>", "<|im_start|>", "<|im_end|>", "<s>"],
    )
    backend.train_from_iterator([message["content"] for n in range(40) for message in _talk(n)["messages"]], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<s>")
    fast.chat_template = "{{ bos_token }}" + TEMPLATES["chatml"]
    directory = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(directory)
    return directory


def test_tokens_are_those_of_transformers_and_answers_alone_are_scored(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    from transformers import AutoTokenizer

    rows = [_talk(number, 1 + number % 3) for number in range(24)]
    data = _prepared(tmp_path, rows, SFT, tokenizer=str(tokenizer_directory))
    oracle = AutoTokenizer.from_pretrained(tokenizer_directory)
    expected: Counter[tuple[int, ...]] = Counter()
    scored: Counter[str] = Counter()
    for row in rows:
        messages = row["messages"]
        expected[tuple(oracle.apply_chat_template(messages, tokenize=True, return_dict=False))] += 1
        scored["".join(f"{m['content']}<|im_end|>\n" for m in messages if m["role"] == "assistant")] += 1
    found: Counter[tuple[int, ...]] = Counter()
    found_scored: Counter[str] = Counter()
    for split in (data.train, data.held_out):
        edges = [*split.documents.tolist(), split.n_tokens]
        marks = split._columns["completion_mask"]
        for start, stop in itertools.pairwise(edges):
            tokens = split.tokens[start : stop - 1].tolist()  # a separator ends it
            found[tuple(tokens)] += 1
            found_scored[oracle.decode([t for t, m in zip(tokens, marks[start:stop], strict=False) if m])] += 1
    assert found == expected
    assert found_scored == scored


@pytest.mark.parametrize("seq_len", [64, 150, 1024])
def test_packing_keeps_documents_whole_and_apart(tmp_path: Path, seq_len: int) -> None:
    rows = [{"prompt": f"{n}? ", "completion": "word " * (1 + 7 * n % 23)} for n in range(60)]
    split = _prepared(tmp_path, rows, SFT).train
    assert isinstance(split, PackedSplit)
    edges = np.append(split.documents, split.n_tokens)
    lengths = np.minimum(np.diff(edges), seq_len)
    n = split.n_samples(seq_len)
    tokens, segments = split.samples(range(n), seq_len), split.segments(range(n), seq_len)
    marks = split.column("completion_mask", range(n), seq_len)
    runs = sorted(tuple(tokens[i][segments[i] == s]) for i in range(n) for s in range(segments[i].max() + 1))
    whole = sorted(tuple(split.tokens[a : a + k].tolist()) for a, k in zip(edges[:-1], lengths, strict=True))
    kept = [run for run in runs if len(set(run)) > 1]  # all else is padding
    assert kept == whole
    assert marks.sum() == sum(
        split._columns["completion_mask"][a : a + k].sum() for a, k in zip(edges[:-1], lengths, strict=True)
    )
    assert n <= 1.25 * lengths.sum() / seq_len + 1
    assert len(split.sample_ids(seq_len)) == n
    cut = int((np.diff(edges) > seq_len).sum())
    assert split.remarks(seq_len) == ([f"{cut} of {split.n_documents} rows are cut at {seq_len} tokens"] if cut else [])


def test_pairs_stand_in_halves_with_their_marks(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} is ", "chosen": "good", "rejected": "bad indeed", "margin": n / 4} for n in range(20)]
    implicit = [{"chosen": _talk(n)["messages"], "rejected": _other(n)} for n in range(100, 110)]
    data = _prepared(tmp_path, [*rows, *implicit], PAIRS, chat_template="plain")
    split = data.train
    assert isinstance(split, PairSplit)
    n, length = split.n_samples(256), 256
    tokens, marks = split.samples(range(n), length), split.column("pair_mask", range(n), length)
    margins = split.column("margin", range(n), length)
    said = set()
    for row in range(n):
        sides = [bytes(tokens[row][marks[row] == m].astype(np.uint8)[: (marks[row] == m).sum()]) for m in (1, 3)]
        said.add(tuple(side[:4] for side in sides))
        assert not (marks[row, : length // 2] >= 2).any()
        assert not (marks[row, length // 2 :] == 1).any()
        number = bytes(tokens[row, :8].astype(np.uint8)).split(b" ")[0]
        assert margins[row, 0] == (float(number) / 4 if number.isdigit() else 0)
    assert said == {(b"good", b"bad "), (b"answ", b"no, ")}
    assert not split.remarks(256)
    assert len(split.remarks(16)) == 2
    assert split.n_samples(16) < n  # where no answer is left of a side, there is nothing to compare


def _other(number: int) -> list[dict[str, str]]:
    messages = _talk(number)["messages"]
    return [messages[0], {"role": "assistant", "content": "no, nothing"}]


GOOD: dict[str, Any] = {"prompt": "a ", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("row", "columns", "what"),
    [
        ({"chosen": "I do", "rejected": "You do"}, PAIRS, "differ"),
        ({"chosen": _talk(1)["messages"], "rejected": _talk(2)["messages"]}, PAIRS, "differ"),
        ({"prompt": "a", "chosen": "b"}, PAIRS, "loser"),
        (GOOD | {"rejected": None}, PAIRS, "loser"),
        (GOOD | {"chosen": ""}, PAIRS, "winner"),
        (GOOD | {"margin": "high"}, PAIRS, "number"),
        (GOOD | {"margin": float("nan")}, PAIRS, "number"),
        (GOOD | {"margin": True}, PAIRS, "number"),
        (GOOD | {"rejected": [{"role": "assistant", "content": "c"}]}, PAIRS, "alike"),
        ({"prompt": "a"}, SFT, "completion"),
        ({"text": "a"}, SFT, "messages"),
        ({"messages": []}, SFT, "messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, SFT, "assistant"),
        ({"messages": [{"content": "a"}]}, SFT, "role"),
        ({"prompt": "a", "completion": ""}, SFT, "empty"),
    ],
)
def test_bad_rows_are_told_in_a_line(tmp_path: Path, row: dict[str, Any], columns: tuple[str, ...], what: str) -> None:
    good = GOOD if columns == PAIRS else {"prompt": "a", "completion": "b"}
    with pytest.raises(UsageError, match=what) as caught:
        _prepared(tmp_path, [good, row], columns, chat_template="chatml")
    assert "line 2" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, "chat template"),
        ({"chat_template": "{"}, "does not exist"),
        ({"tokenizer": "bpe", "chat_template": "chatml"}, "tokenizer"),
    ],
)
def test_bad_settings_of_conversations(tmp_path: Path, settings: dict[str, str], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        _prepared(tmp_path, [_talk(1), _talk(2)], SFT, **settings)


def test_a_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    path = tmp_path / "evil.jinja"
    path.write_text("{{ messages.__class__.__mro__ }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UsageError, match="template"):
        _prepared(tmp_path, [_talk(1), _talk(2)], SFT, chat_template=str(path))
