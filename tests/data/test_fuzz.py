"""Files changed at random: what was read, or one line; no crash, no traceback, and never other data under one key."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stackwise.config import DataConfig
from stackwise.data import prepare
from stackwise.errors import StackWiseError

SPLICES = (b"-1", b"1e999", b"null", b"[[", b"{}", b"true", b"9" * 20, b"\xff", b"\0", b",", b"4294967295")
VALUES = (None, -1, 1.5, True, [], {}, "x", 10**30, [1], 1 << 32, 1 << 63, float("inf"), "\ud800", "a" * 1000)
TEXTS = [{"text": f"some text number {i} " * 8, "id": i} for i in range(60)]
TOKENS = [
    {"input_ids": [i, 3, 5, 7 * i % 200], "attention_mask": [1, 1, 1, 0], "weights": [0.5, i / 7, 1.0, 0.0]}
    for i in range(60)
]


def changed(data: bytes, dice: random.Random) -> bytes:
    content = bytearray(data)
    for _ in range(dice.choice([1, 1, 3, 20])):
        at = dice.randrange(len(content) + 1)
        match dice.randrange(4):
            case 0:
                content[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                del content[at : at + dice.randrange(1, 200)]
            case 2:
                content[at:at] = dice.choice(SPLICES)
            case _:
                content[at : at + 4] = content[: dice.randrange(9)]
    return bytes(content[: dice.randrange(len(content) + 1)] if dice.random() < 0.1 else content)


def changed_json(data: bytes, dice: random.Random) -> bytes:
    """Another value somewhere within a JSON document; other bytes of one that was damaged before."""
    try:
        value = at = json.loads(data)
    except ValueError:
        return changed(data, dice)
    while True:
        key = dice.choice(list(at) if isinstance(at, dict) else list(range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or dice.random() < 0.3:
            break
        at = at[key]
    at[key] = dice.choice(VALUES)
    return json.dumps(value).encode()


def replaced(file: Path, dice: random.Random) -> None:
    """Something else in a file's place."""
    content = file.read_bytes()
    match dice.randrange(5):
        case 0:
            file.write_bytes(changed(content, dice))
        case 1:
            file.write_bytes(
                (changed_json if file.suffix == ".json" and content[:1] == b"{" else changed)(content, dice)
            )
        case 2:
            file.unlink()
            os.mkfifo(file)
        case 3:
            file.unlink()
            file.symlink_to(dice.choice(["/dev/zero", "/etc/passwd", "nowhere"]))
        case _:
            file.unlink()


@pytest.fixture
def contents(tmp_path: Path) -> dict[str, bytes]:
    scratch = tmp_path / "scratch"
    made: dict[str, bytes] = {}
    for name, rows in (("texts", TEXTS), ("tokens", TOKENS)):
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, scratch, compression="none")
        made[f"{name}.parquet"] = scratch.read_bytes()
        with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        made[f"{name}.arrow"] = scratch.read_bytes()
        made[f"{name}.json"] = json.dumps(rows).encode()
        made[f"{name}.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
        made[f"{name}.jsonl.gz"] = gzip.compress(made[f"{name}.jsonl"])
        made[f"{name}.jsonl.zst"] = bytes(pa.Codec("zstd").compress(made[f"{name}.jsonl"], asbytes=True))
    made["texts.html"] = "".join(f"<p class='a'>{row['text']}&amp; <b>more</b><!-- x -->\n" for row in TEXTS).encode()
    made["texts.ipynb"] = json.dumps({"cells": [{"source": [row["text"]]} for row in TEXTS], "nbformat": 4}).encode()
    return made


@pytest.mark.parametrize("trials", [80, pytest.param(4000, marks=pytest.mark.stress)])
def test_files_changed_at_random(tmp_path: Path, contents: dict[str, bytes], trials: int) -> None:
    dice = random.Random(trials)
    (tmp_path / "good.jsonl").write_bytes(contents["texts.jsonl"])
    os.utime(tmp_path / "good.jsonl", (1, 1))

    def config(path: Path, **more: Any) -> DataConfig:
        return DataConfig(paths=[str(path)], cache_dir=str(tmp_path / "cache"), **{"tokenizer": "bytes", **more})

    def file() -> None:
        name = dice.choice(sorted(contents))
        data = (changed_json if name.endswith((".json", ".ipynb")) and dice.random() < 0.5 else changed)(
            contents[name], dice
        )
        (tmp_path / name).write_bytes(data)
        prepare(config(tmp_path / name, columns=["weights"] if name.startswith("tokens") else []))

    def prepared_set() -> None:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(whole.directory, tmp_path / "copy")
        replaced(dice.choice([path for path in (tmp_path / "copy").rglob("*") if path.is_file()]), dice)
        data, _ = prepare(config(tmp_path / "copy"))
        assert data.id == whole.id
        assert (data.train.samples(range(9), 16) == whole.train.samples(range(9), 16)).all()
        assert (data.train.sample_ids(16) == whole.train.sample_ids(16)).all()

    def tokenizer() -> None:
        own = tmp_path / "tokenizer.json"
        own.write_bytes((changed_json if dice.random() < 0.7 else changed)(whole.tokenizer.json.encode(), dice))
        data, _ = prepare(config(tmp_path / "good.jsonl", tokenizer=str(own)))
        data.tokenizer.decode(data.train.tokens[:50])
        data.train.sample_bytes([0], 16)

    def cache() -> None:
        files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.parent.name != "locks"]
        replaced(dice.choice(files), dice)
        for _ in range(2):
            data, _ = prepare(config(tmp_path / "good.jsonl", vocab_size=300, tokenizer="bpe"))
            assert data.id == whole.id

    whole, _ = prepare(config(tmp_path / "good.jsonl", vocab_size=300, tokenizer="bpe"), out=tmp_path / "whole")
    whole.train.sample_ids(16)
    kinds: list[Callable[[], None]] = [file, file, prepared_set, tokenizer, cache]
    refused: list[tuple[Callable[[], None], StackWiseError]] = []
    for number in range(trials):
        kind = kinds[number % len(kinds)]
        try:
            kind()
        except StackWiseError as error:
            refused.append((kind, error))
    assert cache not in [kind for kind, _ in refused]  # what is kept is made anew
    assert {error.exit_code for _, error in refused} <= {2, 3}
    assert not [error for _, error in refused if "\n" in error.message or len(error.message) > 2000]
