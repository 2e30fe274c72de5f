"""Formats and folders: what is read, in which order, and what is left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stackwise.config import DataConfig
from stackwise.data import prepare, readers
from stackwise.errors import NotFound, UsageError
from tests.conftest import raises_naming

from .conftest import FOREIGN, documents_of

Settings = Callable[..., DataConfig]
TEXTS = [f"document {i}: {FOREIGN}" for i in range(600)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_stream(path: Path, texts: list[str], type_: pa.DataType | None = None, column: str = "text") -> None:
    """An Arrow file as `Dataset.save_to_disk` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({column: pa.array(texts, type_ or pa.string()), "label": list(range(len(texts)))})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


def write_dataset(folder: Path, *shards: list[str], **more: Any) -> Path:
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        write_stream(folder / name, texts, **more)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def read_back(config: DataConfig) -> list[str]:
    data, _ = prepare(config)
    return documents_of(data.train, data.tokenizer.decode) + documents_of(data.held_out, data.tokenizer.decode)


def test_every_format_gives_the_same_set(tmp_path: Path, settings: Settings) -> None:
    table = pa.table({"text": TEXTS, "label": list(range(len(TEXTS)))})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=50)
    pq.write_table(table.slice(0, 250), tmp_path / "first.parquet", compression="zstd")
    write_jsonl(tmp_path / "second.jsonl", [{"text": text} for text in TEXTS[250:]])
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=77)
    for number, text in enumerate(TEXTS):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{number:04}.txt").write_text(text, encoding="utf-8")
    sources: list[list[Path]] = [
        [write_jsonl(tmp_path / "rows.jsonl", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])],
        [tmp_path / "rows.parquet"],
        [tmp_path / "rows.arrow"],
        [tmp_path / "first.parquet", tmp_path / "second.jsonl"],
        [write_dataset(tmp_path / "set", TEXTS[:200], TEXTS[200:], type_=pa.large_string())],
        [tmp_path / "files"],
    ]
    sets = [prepare(settings(*paths, tokenizer="bytes")) for paths in sources]
    assert [reused for _, reused in sets] == [False, True, True, True, True, True]
    assert len({data.id for data, _ in sets}) == 1
    data = sets[0][0]
    assert sorted(read_back(settings(*sources[0], tokenizer="bytes"))) == sorted(TEXTS)
    assert data.summary()["bytes"] == sum(len(text.encode()) for text in TEXTS)


def test_data_set_dictionary_trains_on_train(tmp_path: Path, settings: Settings) -> None:
    write_dataset(tmp_path / "dict" / "train", TEXTS[:400])
    write_dataset(tmp_path / "dict" / "test", TEXTS[400:])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    data, _ = prepare(settings(tmp_path / "dict", tokenizer="bytes"))
    assert data.summary()["documents"] == 400
    assert data.summary()["skipped"]["files"] == [
        {"path": str(tmp_path / "dict" / "test"), "why": "not the train split of its data set"}
    ]
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["validation", "test"]}')
    (tmp_path / "dict" / "train").rename(tmp_path / "dict" / "validation")
    assert prepare(settings(tmp_path / "dict", tokenizer="bytes"))[0].summary()["documents"] == 600


def test_other_column_and_empty_rows(tmp_path: Path, settings: Settings) -> None:
    rows = write_jsonl(
        tmp_path / "a.jsonl", [{"body": text, "text": "no"} for text in TEXTS] + [{"body": None}, {"body": ""}]
    )
    assert sorted(read_back(settings(rows, tokenizer="bytes", text_column="body"))) == sorted(TEXTS)
    pq.write_table(pa.table({"text": ["one", None, "", "two"]}), tmp_path / "b.parquet")
    assert sorted(read_back(settings(tmp_path / "b.parquet", tokenizer="bytes"))) == ["one", "two"]


def test_jsonl_as_it_is_found(tmp_path: Path, settings: Settings) -> None:
    file = tmp_path / "odd.jsonl"
    lone = '{"text": "half \\ud83d of a pair"}'
    pair = '{"text": "whole \\ud83d\\ude42 pair"}'
    file.write_bytes(b"\xef\xbb\xbf" + f'{lone}\r\n\n  \n{pair}\n{{"text": "no line end"}}'.encode())
    assert sorted(read_back(settings(file, tokenizer="bytes"))) == ["half � of a pair", "no line end", "whole 🙂 pair"]


def test_what_is_not_text_is_skipped_and_said(tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "mixed"
    for name, content in {
        "good.txt": TEXTS[0].encode(),
        "bom.txt": b"\xef\xbb\xbfwith a mark\n",
        "sub/also.md": TEXTS[1].encode(),
        "image.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "latin.txt": "Straße".encode("latin-1"),
        "late.txt": b"a" * (3 << 20) + b"\xff",
        "utf16.txt": "text".encode("utf-16"),
        "empty.txt": b"",
        ".hidden": b"hidden\n",
        ".git/config": b"hidden\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    out = tmp_path / "mixed" / "set"
    prepare(settings(folder / "good.txt", tokenizer="bytes"), out=out)
    (folder / "loop").symlink_to(folder)
    (folder / "broken").symlink_to(folder / "nowhere")
    (folder / "itself").symlink_to(folder / "itself")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.bin")).write_bytes(b"\0")
    os.mkfifo(folder / "pipe")
    data, _ = prepare(settings(folder, tokenizer="bytes"))
    skipped = data.summary()["skipped"]
    assert skipped["reasons"] == {
        "UTF-16 text: convert it to UTF-8": 1,
        "a broken link": 2,
        "a prepared data set": 1,
        "binary": 2,
        "empty": 1,
        "hidden": 2,
        "named twice": 1,
        "not UTF-8 text": 2,
        "not a file": 1,
    }
    assert {"path": str(folder / "latin.txt"), "why": "not UTF-8 text"} in skipped["files"]
    assert skipped["count"] == 13
    assert sorted(read_back(settings(folder, tokenizer="bytes"))) == sorted([TEXTS[0], TEXTS[1], "with a mark\n"])


def test_unreadable_files_in_a_folder_are_named(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text(f"the text of {name}\n")
    real = readers.open_file

    def refuse(path: Path) -> IO[bytes]:
        if path == folder / "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(readers, "open_file", refuse)  # a test may run as root, who may read everything
    data, _ = prepare(settings(folder, tokenizer="bytes"))
    assert data.summary()["skipped"]["files"] == [{"path": str(folder / "b"), "why": "unreadable"}]
    with raises_naming(UsageError, folder / "b"):
        prepare(settings(folder / "a", folder / "b", tokenizer="bytes"))


def test_a_long_document_is_cut_only_in_memory(tmp_path: Path, settings: Settings, library_texts: list[str]) -> None:
    long = ("".join(library_texts) + FOREIGN)[:700_000]
    (tmp_path / "long.txt").write_text(long, encoding="utf-8")
    (tmp_path / "line.txt").write_text("é" * 300_000, encoding="utf-8")
    paths = (tmp_path / "long.txt", tmp_path / "line.txt")
    data, _ = prepare(settings(*paths, vocab_size=600, held_out=0.4))
    both = documents_of(data.train, data.tokenizer.decode) + documents_of(data.held_out, data.tokenizer.decode)
    assert sorted(both) == sorted([long, "é" * 300_000])
    # cut where the pre-tokenizer begins a new word anyway: the tokens are those of the whole text
    split = data.train if documents_of(data.train, data.tokenizer.decode) == [long] else data.held_out
    assert np.array_equal(split.tokens[:-1], data.tokenizer.encode_batch([long])[0])


def test_rows_of_tokens(tmp_path: Path, settings: Settings) -> None:
    rows = [{"input_ids": [i % 7, 3, 9, i % 5], "targets": [-100, 3, i % 10, 1]} for i in range(200)]
    data, _ = prepare(settings(write_jsonl(tmp_path / "rows.jsonl", rows), held_out=0.2))
    assert (data.vocab_size, data.separator_id, data.mask_id) == (12, 10, 11)
    n = data.train.n_samples(5)
    targets = data.train.targets(range(n), 5)
    assert targets is not None
    found = {
        (*tokens, *row) for tokens, row in zip(data.train.samples(range(n), 5).tolist(), targets.tolist(), strict=True)
    }
    assert data.train.columns == ("targets",)
    assert np.array_equal(data.train.column("targets", range(n), 5), targets)
    with raises_naming(UsageError, "'weights'"):
        data.train.column("weights", [0], 5)
    assert found <= {(*row["input_ids"], 10, *row["targets"], -100) for row in rows}
    assert data.tokenizer.decode([3, 9, 11]) == "3 9 <|mask|>"
    assert data.summary()["bytes"] == 0
    assert data.train.sample_bytes([0], 5).tolist() == [0]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert prepare(settings(tmp_path / "rows.parquet", held_out=0.2))[1]


def test_rows_of_tokens_of_ones_own_tokenizer(tmp_path: Path, settings: Settings) -> None:
    texts = [f"text number {i}\n" for i in range(40)]
    rows = write_jsonl(tmp_path / "r.jsonl", [{"input_ids": [*text.encode(), 256]} for text in texts])
    data, _ = prepare(settings(rows, tokenizer="bytes"))
    assert data.train.targets([0], 4) is None
    # a separator that a row brought is not doubled
    assert sorted(
        documents_of(data.train, data.tokenizer.decode) + documents_of(data.held_out, data.tokenizer.decode)
    ) == sorted(texts)
    assert data.summary()["bytes"] == sum(map(len, texts))


def test_one_row_of_tokens_is_divided(tmp_path: Path, settings: Settings) -> None:
    row = {"input_ids": list(range(100)), "targets": list(range(100, 0, -1))}
    data, _ = prepare(settings(write_jsonl(tmp_path / "one.jsonl", [row]), held_out=0.1))
    assert data.train.tokens[:-1].tolist() == list(range(90))
    assert data.held_out.tokens[:-1].tolist() == list(range(90, 100))
    targets = data.held_out.targets(range(11), 1)
    assert targets is not None
    assert targets.ravel().tolist() == [*range(10, 0, -1), -100]


def test_a_file_named_twice_is_read_once(tmp_path: Path, settings: Settings) -> None:
    for name in "ab":
        (tmp_path / "texts" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text(f"the text of {name}\n")
    data, _ = prepare(settings(tmp_path / "texts" / "b", tmp_path / "texts", tokenizer="bytes"))
    assert data.summary()["documents"] == 2
    assert data.summary()["skipped"]["reasons"] == {"named twice": 1}


def test_pyarrow_is_asked_for_only_when_needed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.txt").write_text("two\n")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "c.parquet")
    script = f"""
import sys
sys.modules["pyarrow"] = None  # as where it is not installed
from stackwise.config import DataConfig
from stackwise.data import prepare, readers
from stackwise.errors import UsageError
DIR = "{tmp_path}/"
def go(*names):
    return prepare(DataConfig(paths=[DIR + n for n in names], tokenizer="bytes", cache_dir=DIR + "cache"))
assert go("a.txt", "b.txt")[0].train.n_documents == 1
assert "torch" not in sys.modules
try:
    go("c.parquet")
except UsageError as error:
    assert "pip install 'stackwise[arrow]'" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_a_path_that_does_not_exist(tmp_path: Path, settings: Settings) -> None:
    with raises_naming(NotFound, "data.paths", tmp_path / "nowhere"):
        prepare(settings(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []
