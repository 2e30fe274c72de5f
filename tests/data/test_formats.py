"""What files hold that are not plain text, and what is not to be trained on: rows, packed files, padding, folders."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stackwise.config import DataConfig
from stackwise.data import PreparedData, prepare, readers
from stackwise.errors import NotFound, UsageError
from tests.conftest import raises_naming

from .test_sources import TEXTS, read_back, write_dataset, write_jsonl

Settings = Callable[..., DataConfig]
SOME = TEXTS[:60]
ROWS = [{"text": text} for text in SOME]


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=2).encode("utf-8-sig")),
        ("a.json", "\n".join(map(json.dumps, ROWS)).encode()),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()),
        ("a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
        ("a.json.zst", zstd(json.dumps(ROWS).encode())),
        ("a.ndjson.bz2", bz2.compress("\n".join(map(json.dumps, ROWS)).encode())),
        ("a.jsonl.bak", "\n".join(map(json.dumps, ROWS)).encode()),
    ],
)
def test_rows_in_every_wrapping(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)  # rows that come in parts
    (tmp_path / name).write_bytes(content)
    assert sorted(read_back(settings(tmp_path / name, tokenizer="bytes"))) == sorted(SOME)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, zstd])
def test_packed_text_is_the_text(tmp_path: Path, settings: Settings, pack: Callable[[bytes], bytes]) -> None:
    text = "".join(TEXTS) * 40  # some megabytes, in two members
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    raw = text.encode()
    suffix = {gzip.compress: ".gz", bz2.compress: ".bz2"}.get(pack, ".zst")
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(raw[:700_001]) + pack(raw[700_001:]))
    for most in (None, 1_500_000, len(raw)):
        plain, _ = prepare(settings(tmp_path / "a.txt", tokenizer="bytes", max_bytes=most))
        packed, reused = prepare(settings(tmp_path / f"b.txt{suffix}", tokenizer="bytes", max_bytes=most))
        assert reused
        assert packed.id == plain.id


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt.gz", gzip.compress(os.urandom(5000).hex().encode())[:-900], "damaged or cut off"),
        ("a.txt.gz", b"no gzip", "damaged or cut off"),
        ("a.jsonl.zst", zstd(os.urandom(5000).hex().encode())[:-900], "damaged or cut off"),
        ("a.txt.zst", b"nor zstd", "damaged or cut off"),
        ("a.txt.gz", gzip.compress(b" " * (80 << 20)), "more than 200 times its size"),
        ("a.jsonl.zst", zstd(b'{"text": "' + b"a" * (80 << 20)), "more than 200 times its size"),
        ("a.zip", b"PK", "unpack it first"),
        ("a.tar.gz", gzip.compress(b"a", mtime=0), "unpack it first"),
        ("a.parquet.gz", gzip.compress(b"a", mtime=0), "unpack it first"),
        ("a.csv", b"text,label\none,2\n", "save it as jsonl or parquet"),
        ("a.json", b'{"name": "a package"}', "no column 'text'; its columns are: name"),
        ("a.json", b"[1, 2]", "row 1: a number, not an object"),
        ("a.json", json.dumps(ROWS).encode()[:-9], "row 60: not JSON"),
        ("a.json", json.dumps(ROWS).encode()[:-1], "ends within its array"),
        ("a.json", json.dumps(ROWS).encode() + b"{}", "something follows the array"),
        ("a.json", b'[{"text": ' + b"[" * 100_000, "nested too deeply"),
        ("a.json", b'[{"text": ' + b"9" * 10_000 + b"}]", "row 1: not JSON"),
        ("a.json", b'[{"text": "\xff"}]', "not UTF-8"),
        ("a.txt", b'{"text": "one"}\n{"text": "two"}\n', "JSON lines: give it a name"),
        ("part-0001", b'{"input_ids": [1]}\n', "JSON lines: give it a name"),
        ("a.txt", "text".encode("utf-16"), "UTF-16"),
    ],
)
def test_refused_with_what_to_do(tmp_path: Path, settings: Settings, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        prepare(settings(tmp_path / name, tokenizer="bytes"))
    assert caught.value.exit_code == 2
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_a_line_that_is_too_long(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ROW_BYTES", 1000)
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text('{"text": "' + "a" * 3_000_000)
        with raises_naming(UsageError, tmp_path / name):
            prepare(settings(tmp_path / name, tokenizer="bytes"))


def test_what_lies_in_a_folder_and_is_no_text_of_it(tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "set"
    for name in (
        *("README.md", "LICENSE", "data/CITATION.cff", "dataset_infos.json", "state.json", "package.json"),
        *("rows.jsonl~", "rows.jsonl.bak", "rows.jsonl.orig", ".rows.jsonl.swp", "#rows#", "big.jsonl.part"),
        *("node_modules/a.js", "__pycache__/a.txt", ".git/HEAD", "table.csv", "table.tsv.gz"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"some": "thing"}\n')
    write_jsonl(folder / "data" / "rows.jsonl", ROWS)
    (folder / "notes.txt").write_text("a text beside them")
    data, _ = prepare(settings(folder, tokenizer="bytes"))
    assert sorted(read_back(settings(folder, tokenizer="bytes"))) == sorted([*SOME, "a text beside them"])
    assert data.skipped["reasons"] == {
        "JSON that holds no rows": 3,
        "a backup, or not finished": 5,
        "a folder of tools": 2,
        "a table: save it as jsonl or parquet, a row a document": 2,
        "about the data set": 3,
        "hidden": 2,
    }
    (folder / "data" / "rows.jsonl").unlink()  # beside texts alone, a README is a text
    assert '{"some": "thing"}\n' in read_back(settings(folder, tokenizer="bytes"))


def test_links_out_of_a_folder_are_followed_only_if_asked(tmp_path: Path, settings: Settings) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out"
    for at in (folder, outside / "deep"):
        at.mkdir(parents=True)
        (at / "a.txt").write_text(f"the text of {at.name}\n")
    (outside / "b.txt").write_text("another text\n")
    (folder / "file.txt").symlink_to(outside / "b.txt")
    (folder / "folder").symlink_to(outside / "deep")
    (folder / "twice.txt").symlink_to(folder / "a.txt")
    (folder / "more.txt").write_text("more text\n")
    mine = ["more text\n", "the text of in\n"]
    assert sorted(read_back(settings(folder, tokenizer="bytes"))) == mine
    data, _ = prepare(settings(folder, tokenizer="bytes"))
    assert data.skipped["reasons"] == {
        "a link out of its folder (see data.follow_links)": 2,
        "named twice": 1,
    }
    followed = read_back(settings(folder, tokenizer="bytes", follow_links=True))
    assert sorted(followed) == sorted([*mine, "another text\n", "the text of deep\n"])
    (tmp_path / "link").symlink_to(folder)  # what is named is meant
    assert sorted(read_back(settings(tmp_path / "link", tokenizer="bytes"))) == mine
    assert sorted(read_back(settings(tmp_path / "in" / "*.txt", tokenizer="bytes"))) == mine


def test_a_data_set_whose_shard_is_a_link_out(tmp_path: Path, settings: Settings) -> None:
    folder = write_dataset(tmp_path / "set", TEXTS[:50], TEXTS[50:80])
    (folder / "data-00001-of-00002.arrow").rename(tmp_path / "elsewhere.arrow")
    (folder / "data-00001-of-00002.arrow").symlink_to(tmp_path / "elsewhere.arrow")
    data, _ = prepare(settings(folder, tokenizer="bytes"))
    assert data.summary()["documents"] == 50
    assert prepare(settings(folder, tokenizer="bytes", follow_links=True))[0].summary()["documents"] == 80


def test_patterns(tmp_path: Path, settings: Settings) -> None:
    for name in ("a/one.txt", "a/two.txt", "b/c/three.txt", "b/four.md", "[odd].txt"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(f"the text of {name}\n")

    def names(*patterns: str) -> list[str]:
        texts = read_back(settings(*(tmp_path / "texts" / each for each in patterns), tokenizer="bytes"))
        return sorted(text.split()[-1] for text in texts)

    assert names("a/*.txt") == ["a/one.txt", "a/two.txt"]
    assert names("**/*.txt") == ["[odd].txt", "a/one.txt", "a/two.txt", "b/c/three.txt"]
    assert names("[ab]") == ["a/one.txt", "a/two.txt", "b/c/three.txt", "b/four.md"]
    assert names("[odd].txt", "a/o*") == ["[odd].txt", "a/one.txt"]
    with raises_naming(NotFound, tmp_path / "texts" / "*.rst"):
        prepare(settings(tmp_path / "texts" / "*.rst", tokenizer="bytes"))


def test_columns_within_objects(tmp_path: Path, settings: Settings) -> None:
    rows = [{"doc": {"text": text, "id": i}, "text": "not this"} for i, text in enumerate(SOME)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        config = settings(tmp_path / name, tokenizer="bytes", text_column="doc.text")
        assert sorted(read_back(config)) == sorted(SOME)
    write_jsonl(tmp_path / "b.jsonl", [{"doc.text": text} for text in SOME])
    assert sorted(read_back(settings(tmp_path / "b.jsonl", tokenizer="bytes", text_column="doc.text"))) == sorted(SOME)


def test_a_readme_beside_json_rows(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.json").write_text(json.dumps(ROWS))
    (tmp_path / "set" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert sorted(read_back(settings(tmp_path / "set", tokenizer="bytes"))) == sorted(SOME)


# Rows of tokens.


def streams(data: PreparedData, *names: str) -> list[tuple[Any, ...]]:
    """Both sides' tokens, each with its values in the named columns."""
    rows: list[tuple[Any, ...]] = []
    for split in (data.train, data.held_out):
        every = range(split.n_tokens)
        columns = [split.column(name, every, 1).ravel().tolist() for name in names]
        rows += zip(split.samples(every, 1).ravel().tolist(), *columns, strict=True)
    return rows


def written(folder: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    if kind == "jsonl":
        return write_jsonl(folder / "rows.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_padding_is_left_out(tmp_path: Path, settings: Settings, kind: str) -> None:
    rows = [
        {"input_ids": [97 + i % 20, 98, 99, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "targets": [1, 2, i, 0, 0]}
        for i in range(50)
    ]
    data, _ = prepare(settings(written(tmp_path, rows, kind), tokenizer="bytes"))
    pairs = streams(data, "targets")
    assert sorted(pairs) == sorted(
        [pair for i in range(50) for pair in ((97 + i % 20, 1), (98, 2), (99, i), (256, -100))]
    )
    assert any("attention_mask" in note and "(100)" in note for note in data.notes)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_labels_are_understood_or_refused(tmp_path: Path, settings: Settings, kind: str) -> None:
    def rows(**more: list[int]) -> Path:
        return written(tmp_path, [{"input_ids": [97, 98, i, 7, 7], **more} for i in range(40)], kind)

    def labelled(change: Callable[[list[int]], list[int]], **more: list[int]) -> Path:
        made = [{"input_ids": [97, 98, i, 7, 7], "labels": change([97, 98, i, 7, 7]), **more} for i in range(40)]
        return written(tmp_path, made, kind)

    tokens = sorted((t,) for i in range(40) for t in (97, 98, i, 7, 7, 256))
    assert sorted(streams(prepare(settings(labelled(list), tokenizer="bytes"))[0])) == tokens
    data, _ = prepare(settings(labelled(lambda row: [*row[:3], -100, -100]), tokenizer="bytes"))
    assert sorted(streams(data)) == sorted((t,) for i in range(40) for t in (97, 98, i, 256))
    assert any("(80)" in note for note in data.notes)
    for change in (lambda row: [-100, *row[1:]], lambda row: [0] * 5):  # a prompt that is not scored; other targets
        with pytest.raises(UsageError, match="labels say something else") as caught:
            prepare(settings(labelled(change), tokenizer="bytes"))
        assert "targets" in (caught.value.hint or "")
    kept, _ = prepare(settings(labelled(lambda row: [-100, *row[1:]]), tokenizer="bytes", columns=["labels"]))
    assert (97, -100) in streams(kept, "labels")
    ignored, _ = prepare(settings(rows(token_type_ids=[0] * 5), tokenizer="bytes"))
    assert any("token_type_ids" in note and "(40)" in note for note in ignored.notes)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_named_columns(tmp_path: Path, settings: Settings, kind: str) -> None:
    rows = [
        {"input_ids": [i, 3], "targets": [-100, i], "weights": [i / 4, 1.0], "groups": [i << 40, -5]} for i in range(40)
    ]
    path = written(tmp_path, rows, kind)
    plain, _ = prepare(settings(path, tokenizer="bytes"))
    assert plain.train.columns == ("targets",)
    data, reused = prepare(settings(path, tokenizer="bytes", columns=["weights"]), columns=("groups",))
    assert not reused
    assert data.id != plain.id
    assert sorted(data.train.columns) == ["groups", "targets", "weights"]
    expected = [pair for i in range(40) for pair in ((i, i << 40, -100, i / 4), (3, -5, i, 1.0), (256, 0, -100, 0.0))]
    assert sorted(streams(data, "groups", "targets", "weights")) == sorted(expected)
    assert data.train.column("weights", [0], 6).dtype == np.float32
    assert data.train.column("groups", [0], 6).dtype == np.int64
    assert data.train.column_digest("weights") != data.train.column_digest("groups")
    opened = PreparedData.open(data.directory)
    assert streams(opened, "weights") == streams(data, "weights")
    assert prepare(settings(data.directory), columns=("weights",))[1]
    with raises_naming(UsageError, "'rewards'"):
        prepare(settings(data.directory), columns=("rewards",))
    with raises_naming(UsageError, "'rewards'"):
        prepare(settings(path, tokenizer="bytes", columns=["rewards"]))
    rows[7]["weights"] = [i + 0.5 for i in range(2)]  # one value, another set
    assert prepare(settings(written(tmp_path, rows, kind), columns=["weights"], tokenizer="bytes"))[0].id != data.id


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, True]}, "not a list of integers"),
        ({"input_ids": [1, 2.0]}, "not a list of integers"),
        ({"input_ids": [1, None]}, "not a list of integers"),
        ({"input_ids": ["1"]}, "not a list of integers"),
        ({"input_ids": {"a": 1}}, "an object, not a list"),
        ({"input_ids": [1 << 31]}, "beyond 32 bits"),
        ({"input_ids": [1 << 70]}, "beyond 32 bits"),
        ({"input_ids": [-1]}, "negative id"),
        ({"input_ids": [1 << 25]}, "without a tokenizer ids are below"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "2 input_ids but 1 attention_mask"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "something else than 0 and 1"),
        ({"input_ids": [1, 2], "attention_mask": [[1], [1]]}, "not a list of integers"),
        ({"input_ids": [1], "weights": [float("nan")]}, "not finite"),
        ({"input_ids": [1], "weights": [float("inf")]}, "not finite"),
        ({"input_ids": [1], "weights": [1e300]}, "beyond 32-bit"),
        ({"input_ids": [1], "weights": [1 << 64]}, "beyond 64 bits"),
        ({"input_ids": [1], "weights": 1.0}, "not a list of numbers"),
        ({"input_ids": [1, 2], "weights": [1.0]}, "2 input_ids but 1 weights"),
        ({"text": "a", "weights": [1.0]}, "no row brings 'weights'"),
    ],
)
def test_rows_that_cannot_be(tmp_path: Path, settings: Settings, row: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UsageError, match=message):
        prepare(settings(path, columns=["weights"] if "weights" in row else []))


@pytest.mark.parametrize("name", ["input_ids", "tokens", "bytes", "../x", "", "a b", "x" * 65])
def test_names_that_no_column_has(tmp_path: Path, settings: Settings, name: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1]}])
    with pytest.raises(UsageError, match=r"data\.columns"):
        prepare(settings(path, columns=[name]))


def test_text_beside_tokens_is_said(tmp_path: Path, settings: Settings) -> None:
    rows = [{"text": text, "input_ids": [1, 2]} for text in SOME]
    for kind in ("jsonl", "parquet"):
        data, _ = prepare(settings(written(tmp_path, rows, kind), tokenizer="bytes"))
        assert any("input_ids" in note and "(60)" in note for note in data.notes)


def test_parquet_that_is_faulty(tmp_path: Path, settings: Settings) -> None:
    file = tmp_path / "a.parquet"
    invalid = pa.array([b"one", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    for table, message in (
        (pa.table({"text": invalid}), "UTF8"),
        (pa.table({"text": [1, 2]}), "holds a number, not text"),
        (pa.table({"text": [["a"], ["b"]]}), "holds a list, not text"),
        (pa.table({"text": [b"a", b"b"]}), "holds binary data, not text"),
        (pa.table({"input_ids": [[0.5]]}), "not a list of integers"),
        (pa.table({"input_ids": ["a"]}), "not a list of integers"),
        (pa.table({"input_ids": pa.array([[2**63]], pa.list_(pa.uint64()))}), "beyond 32 bits"),
    ):
        pq.write_table(table, file)
        with pytest.raises(UsageError, match=message):
            prepare(settings(file, tokenizer="bytes"))
    pq.write_table(pa.table({"text": TEXTS}), file, compression="none", row_group_size=100)
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[: len(whole) // 2] + whole[-2000:], whole[:4], b""):
        file.write_bytes(damaged)
        with pytest.raises(UsageError):
            prepare(settings(file, tokenizer="bytes"))
