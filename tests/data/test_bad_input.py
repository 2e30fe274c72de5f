"""What users hand in by mistake: one clear line, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from stackwise.config import DataConfig
from stackwise.data import PreparedData, prepare, require_samples
from stackwise.errors import DamageError, NoSpaceError, NotFound, StackWiseError, UsageError
from tests.conftest import raises_naming

from .conftest import all_text
from .test_sources import write_dataset

Settings = Callable[..., DataConfig]
GOOD = b'{"text": "one"}\n{"text": "two"}\n'

# What is named of each: where, and what is there.
FAULTS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("empty.txt", b"", ("data.paths", "1 empty")),
    "binary": ("x.bin", b"\x7fELF\0\0", ("data.paths", "1 binary")),
    "not utf-8": ("x.txt", b"Stra\xdfe", ("data.paths", "UTF-8")),
    "no json": ("x.jsonl", GOOD + b'{"text": \n', ("x.jsonl", "line 3", "JSON")),
    "json not utf-8": ("x.jsonl", GOOD + b'{"text": "\xff"}\n', ("x.jsonl", "line 3", "UTF-8")),
    "nested": ("x.jsonl", b"[" * 100_000, ("x.jsonl", "line 1", "JSON")),
    "array": ("x.jsonl", GOOD + b"[1, 2]\n", ("x.jsonl", "line 3", "list")),
    "no column": ("x.jsonl", GOOD + b'{"b": 1, "a": 2}\n', ("line 3", "'text'", "a, b", "data.text_column")),
    "number": ("x.jsonl", GOOD + b'{"text": 7}\n', ("line 3", "'text'", "number")),
    "float ids": (
        "x.jsonl",
        b'{"input_ids": [0.5]}\n',
        ("line 1", "'input_ids'", "list"),
    ),
    "ragged ids": ("x.jsonl", b'{"input_ids": [[1], [2, 3]]}\n', ("line 1", "'input_ids'", "list")),
    "negative": ("x.jsonl", b'{"input_ids": [1, -1]}\n', ("line 1", "'input_ids'", "-1")),
    "wide": ("x.jsonl", b'{"input_ids": [4294967296]}\n', ("line 1", "'input_ids'", "4294967296")),
    "targets": ("x.jsonl", b'{"input_ids": [1, 2], "targets": [1]}\n', ("line 1", "2 input_ids", "1 targets")),
    "negative target": ("x.jsonl", b'{"input_ids": [1], "targets": [-1]}\n', ("line 1", "'targets'", "-100")),
    "mixed": ("x.jsonl", GOOD + b'{"input_ids": [1]}\n', ("data.paths", "text", "input_ids")),
    "some targets": (
        "x.jsonl",
        b'{"input_ids": [1], "targets": [1]}\n{"input_ids": [1]}\n',
        ("data.paths", "targets"),
    ),
    "parquet": ("x.parquet", b"PAR1 but nothing more", ("x.parquet",)),
    "arrow": ("x.arrow", b"nothing of the kind", ("x.arrow",)),
    "one byte": ("x.txt", b"a", ("data.paths",)),
    "all the same": ("x.jsonl", b'{"text": "one"}\n' * 9, ("data.paths", "9 documents")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_files(tmp_path: Path, settings: Settings, name: str) -> None:
    file, content, facts = FAULTS[name]
    (tmp_path / file).write_bytes(content)
    for out in (None, tmp_path / "out"):
        with raises_naming(UsageError, *facts) as caught:
            prepare(settings(tmp_path / file, tokenizer="bytes"), out=out)
        assert caught.value.exit_code == 2
        assert "\n" not in caught.value.message
    left = [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts]
    assert left == [tmp_path / file]
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_an_empty_folder(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "nothing").mkdir()
    with raises_naming(UsageError, "data.paths", tmp_path / "nothing"):
        prepare(settings(tmp_path / "nothing"))
    assert not (tmp_path / "cache").exists()


def test_a_device_is_no_file(settings: Settings) -> None:
    with raises_naming(UsageError, "data.paths", "/dev/null"):
        prepare(settings("/dev/null"))


@pytest.mark.parametrize("path", ["~nobody-of-this-name/text", "x" * 300])
def test_paths_that_cannot_be(settings: Settings, path: str) -> None:
    with raises_naming(UsageError, "data.paths", path):
        prepare(settings(path))
    with pytest.raises(UsageError, match="tokenizer"):
        prepare(settings("/dev/null", tokenizer=path))


def test_neither_is_a_pipe_nor_a_socket(tmp_path: Path, settings: Settings) -> None:
    os.mkfifo(tmp_path / "pipe")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name in ("pipe", "socket"):
            with raises_naming(UsageError, "data.paths", tmp_path / name):
                prepare(settings(tmp_path / name))
            with pytest.raises(UsageError):
                prepare(settings(tmp_path / "missing", tokenizer=str(tmp_path / name)))


def test_parquet_without_the_column(tmp_path: Path, settings: Settings) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "x.parquet")
    with raises_naming(UsageError, tmp_path / "x.parquet", "'text'", "body, id", "data.text_column"):
        prepare(settings(tmp_path / "x.parquet"))


def test_damaged_data_set_folders(tmp_path: Path, settings: Settings) -> None:
    folder = write_dataset(tmp_path / "set", ["one"] * 5, ["two"] * 5)
    (folder / "data-00001-of-00002.arrow").unlink()
    with raises_naming(NotFound, folder / "data-00001-of-00002.arrow", "state.json"):
        prepare(settings(folder))
    state = json.loads((folder / "state.json").read_text())
    for bad in ("../../secret.arrow", "/etc/passwd", "..", 7):
        (folder / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": bad}]}))
        with raises_naming(UsageError, folder / "state.json"):
            prepare(settings(folder))
    (folder / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "i.arrow"}]}))
    with raises_naming(UsageError, folder, "flatten_indices()"):
        prepare(settings(folder))
    (folder / "state.json").write_text("{")
    with raises_naming(UsageError, folder / "state.json", "JSON"):
        prepare(settings(folder))


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"version": "1.0", "model": {"type": "Nothing"}}', "[]"])
def test_a_broken_tokenizer(corpus: Path, settings: Settings, tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with raises_naming(UsageError, tmp_path / "tokenizer.json"):
        prepare(settings(corpus, tokenizer=str(tmp_path / "tokenizer.json")))
    with raises_naming(NotFound, tmp_path / "missing.json", "data.tokenizer"):
        prepare(settings(corpus, tokenizer=str(tmp_path / "missing.json")))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("highest", [1 << 23, (1 << 32) - 1, 1 << 32, -1, 1.5, "x"])
def test_a_tokenizer_with_absurd_ids(corpus: Path, settings: Settings, tmp_path: Path, highest: object) -> None:
    made = json.loads(tokenizer_of("words", "a b c").to_str())
    made["model"]["vocab"]["b"] = highest
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        prepare(settings(corpus, tokenizer=str(tmp_path / "tokenizer.json")))


def test_a_tokenizer_that_cannot_encode(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"))  # which it lacks
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        prepare(settings(corpus, tokenizer=str(tmp_path / "tokenizer.json")))
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_vocabularies_that_do_not_fit(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    with raises_naming(UsageError, "data.vocab_size: 100", 258):
        prepare(settings(corpus, vocab_size=100))
    with raises_naming(UsageError, "model.vocab_size", 10**30, 1 << 22):
        prepare(settings(corpus), model_vocab=10**30)
    with raises_naming(UsageError, "model.vocab_size: 257", 258):
        prepare(settings(corpus), model_vocab=257)
    with raises_naming(UsageError, "model.vocab_size: 500", "data.vocab_size", 600):
        prepare(settings(corpus, vocab_size=600), model_vocab=500)
    with raises_naming(UsageError, "model.vocab_size: 256", 258):
        prepare(settings(corpus, tokenizer="bytes"), model_vocab=256)
    assert not (tmp_path / "cache").exists()
    data, _ = prepare(settings(corpus, tokenizer="bytes"), model_vocab=258)
    with raises_naming(UsageError, "model.vocab_size: 200", data.directory, 258):
        prepare(settings(data.directory), model_vocab=200)


def test_ids_beyond_the_tokenizer_and_masks_in_the_data(tmp_path: Path, settings: Settings) -> None:
    rows = tmp_path / "x.jsonl"
    rows.write_text("".join(f'{{"input_ids": [{i}]}}\n' for i in range(300)))
    with raises_naming(UsageError, "data.paths", 299, 258, "data.tokenizer"):
        prepare(settings(rows, tokenizer="bytes"))
    rows.write_text("".join(f'{{"input_ids": [{i}, 257]}}\n' for i in range(30)))
    with raises_naming(UsageError, "id 257"):
        prepare(settings(rows, tokenizer="bytes"))
    assert not list((tmp_path / "cache" / "prepared").iterdir())
    # with targets of their own, rows may show masks
    rows.write_text("".join(f'{{"input_ids": [{i}, 257], "targets": [-100, 5]}}\n' for i in range(30)))
    prepare(settings(rows, tokenizer="bytes"))


def test_prepared_sets_that_are_damaged_or_newer(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    data, _ = prepare(settings(corpus, tokenizer="bytes"), out=tmp_path / "set")
    kept = all_text(data.directory)

    def faulty(file: str, content: bytes | None, *facts: object, kind: type[StackWiseError] = DamageError) -> None:
        path = data.directory / file
        path.write_bytes(content) if content is not None else path.unlink()
        with raises_naming(kind, data.directory, *facts):
            PreparedData.open(data.directory)
        with pytest.raises((DamageError, UsageError)) as error:
            prepare(settings(data.directory))
        assert error.value.exit_code == (3 if kind is DamageError else 2) or file == "meta.json"
        path.write_bytes(kept[file])

    meta = json.loads(kept["meta.json"])
    size = len(kept["train/tokens.bin"])
    faulty("train/tokens.bin", kept["train/tokens.bin"][:-2], "train/tokens.bin", size - 2, size)
    faulty("train/tokens.bin", b"\1" + kept["train/tokens.bin"][1:], "train/tokens.bin")
    faulty("held_out/counts.bin", None, "held_out/counts.bin")
    faulty("tokenizer.json", b"{}", "tokenizer.json")
    faulty("tokenizer.json", None)
    faulty("meta.json", kept["meta.json"][:100], "meta.json")
    faulty("meta.json", None, "meta.json", kind=NotFound)
    faulty("meta.json", json.dumps(meta | {"version": 2}).encode(), 2, 1, kind=UsageError)
    faulty("meta.json", json.dumps(meta | {"id": "../.."}).encode(), "meta.json", "id")
    altered = json.loads(kept["meta.json"])
    altered["tokenizer"]["mask_id"] = 5
    faulty("meta.json", json.dumps(altered).encode(), "meta.json")
    del altered["splits"]["train"]
    faulty("meta.json", json.dumps(altered).encode())
    PreparedData.open(data.directory).verify()
    for file in ("train/tokens.bin", "meta.json", "tokenizer.json"):  # nothing waits, and no link is followed
        path = data.directory / file
        path.rename(tmp_path / "aside")
        for make in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "aside"), Path.mkdir):
            make(path)  # type: ignore[operator]
            with pytest.raises(DamageError):
                PreparedData.open(data.directory)
            with pytest.raises((DamageError, UsageError)):
                prepare(settings(data.directory))
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        (tmp_path / "aside").rename(path)
    for altered in ([], {"train": []}, {"train": {"columns": [], "bytes": 0}}, None, 7):
        (data.directory / "meta.json").write_text(json.dumps(meta | {"splits": altered}))
        with raises_naming(DamageError, data.directory):
            PreparedData.open(data.directory)
    (data.directory / "meta.json").write_text("[" * 100_000)
    with raises_naming(DamageError, data.directory):
        PreparedData.open(data.directory)


def test_of_a_large_set_blocks_are_checked(
    corpus: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = prepare(settings(corpus, tokenizer="bytes"), out=tmp_path / "set")
    monkeypatch.setattr("stackwise.data.prepared.VERIFIED_BYTES", 0)
    tokens = data.directory / "train" / "tokens.bin"
    kept, middle = tokens.read_bytes(), tokens.stat().st_size // 2
    assert len(kept) > 1 << 20, "several blocks"
    for place in (0, middle, len(kept) - 1):
        tokens.write_bytes(kept[:place] + bytes([kept[place] ^ 1]) + kept[place + 1 :])
        with raises_naming(DamageError, "train/tokens.bin"):
            PreparedData.open(data.directory)
    tokens.write_bytes(kept)
    PreparedData.open(data.directory)
    (data.directory / "train" / "block-sums.bin").unlink()  # as in sets that were made before
    PreparedData.open(data.directory)


def test_somebody_elses_meta_json_is_no_set(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "meta.json").write_text('{"author": "me"}')
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"the text of {name}\n")
    assert prepare(settings(tmp_path / "texts", tokenizer="bytes"))[0].summary()["documents"] == 2
    with raises_naming(NotFound, tmp_path / "texts", "meta.json"):
        PreparedData.open(tmp_path / "texts")


def test_too_short_for_a_sample(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "a.txt").write_text("short\n" * 10)
    data, _ = prepare(settings(tmp_path / "a.txt", tokenizer="bytes", held_out=0.2))
    assert require_samples(data.train, 16, "training text") == data.train.n_tokens // 16
    with raises_naming(UsageError, "held-out text", 13, 16, "training.seq_len", "data.held_out"):
        require_samples(data.held_out, 16, "held-out text")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, settings: Settings) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD * 3)

    def change(phase: str, done: int, total: int | None) -> None:
        if phase == "reading" and done == total:
            file.write_bytes(GOOD)

    with raises_naming(UsageError, file):
        prepare(settings(file, tokenizer="bytes"), progress=change)
    assert not list((tmp_path / "cache" / "prepared").iterdir())


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_leaves_nothing(corpus: Path, settings: Settings, tmp_path: Path, late: bool) -> None:
    def interrupt(phase: str, done: int, total: int | None) -> None:
        if phase == "tokenizing" and bool(done) == late:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings(corpus, tokenizer="bytes"), progress=interrupt)
    assert not list((tmp_path / "cache" / "prepared").iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(corpus: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(self: Path, mode: str = "r", *args: object, **more: object) -> object:
        target = Path("/dev/full") if self.name == "tokens.bin" and "w" in mode else self
        return real(target, mode, *args, **more)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(NoSpaceError) as caught:
            prepare(settings(corpus, tokenizer="bytes"))
    assert caught.value.exit_code == 5
    assert not list((tmp_path / "cache" / "prepared").iterdir())
    assert not prepare(settings(corpus, tokenizer="bytes"))[1]


def test_a_cache_that_cannot_be_written(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with raises_naming(UsageError, tmp_path / "cache", "data.cache_dir"):
        prepare(settings(corpus, tokenizer="bytes"))
    # with a place of its own a set needs no cache
    assert prepare(settings(corpus, vocab_size=300), out=tmp_path / "set")[0].vocab_size == 300
    assert prepare(settings(corpus, vocab_size=300), out=tmp_path / "set")[1]
    with raises_naming(UsageError, tmp_path / "cache" / "set"):
        prepare(settings(corpus, tokenizer="bytes"), out=tmp_path / "cache" / "set")


def tokenizer_of(kind: str, text: str) -> tokenizers.Tokenizer:
    """A tokenizer that knows the words of a text, or its letters."""
    unknown = "[UNK]"
    if kind == "unigram":
        return tokenizers.Tokenizer(models.Unigram([(unknown, 0.0), *((c, -1.0) for c in sorted({*text}))], unk_id=0))
    known = {word: i for i, word in enumerate([unknown, *sorted({*text.split()})])}
    made = tokenizers.Tokenizer(
        models.WordLevel(known, unknown) if kind != "wordpiece" else models.WordPiece(known, unk_token=unknown)
    )
    if kind != "no words":  # without it a whole document is one word
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


@pytest.mark.parametrize("kind", ["words", "no words", "wordpiece", "unigram"])
def test_a_tokenizer_that_does_not_know_the_text(tmp_path: Path, settings: Settings, kind: str) -> None:
    texts = [f"the cat number {number} sat on the mat and looked at you" for number in range(40)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    foreign = tmp_path / "foreign.json"
    foreign.write_text(tokenizer_of(kind, "Страница за страницей").to_str())
    with raises_naming(UsageError, "data.tokenizer", foreign, "[UNK]", "id 0", "bpe", "bytes") as caught:
        prepare(settings(tmp_path / "x.jsonl", tokenizer=str(foreign)))
    assert "\n" not in caught.value.message
    assert not list((tmp_path / "cache").rglob("*.bin"))
    if kind != "no words":
        own = tmp_path / "own.json"
        own.write_text(tokenizer_of(kind, " ".join(texts[:20])).to_str())  # half of the numbers are not in it
        data, _ = prepare(settings(tmp_path / "x.jsonl", tokenizer=str(own)))
        assert data.train.n_tokens > 0
