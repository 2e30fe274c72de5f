"""The whole way: files into a prepared set, and when one is made anew."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stackwise.config import DataConfig
from stackwise.data import PreparedData, prepare
from stackwise.errors import UsageError
from tests.conftest import raises_naming

from .conftest import all_text, documents_of

Settings = Callable[..., DataConfig]


def test_every_document_comes_back_on_one_side(corpus: Path, settings: Settings) -> None:
    data, reused = prepare(settings(corpus, vocab_size=1000))
    assert not reused
    train, held = (documents_of(split, data.tokenizer.decode) for split in (data.train, data.held_out))
    assert sorted(train + held) == sorted(raw.decode() for raw in all_text(corpus).values())
    assert train
    assert held
    summary = data.summary()
    assert summary["documents"] == len(train) + len(held) == summary["train"]["documents"] + len(held)
    assert summary["bytes"] == sum(len(raw) for raw in all_text(corpus).values())
    assert summary["tokens"] == data.train.n_tokens + data.held_out.n_tokens
    assert data.vocab_size == 1000 == data.tokenizer.vocab_size
    assert summary["tokens"] < summary["bytes"] / 2


def test_order_is_that_of_sorted_paths(tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "texts"
    for name in ("b/1", "a/2", "a.txt", "c"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name} of the corpus\n" * 3)
    data, _ = prepare(settings(folder, tokenizer="bytes", held_out=0.01))
    found = documents_of(data.train, data.tokenizer.decode)
    order = [f"this is {name} of the corpus\n" * 3 for name in ("a/2", "a.txt", "b/1", "c")]
    assert found == [text for text in order if text in found]
    assert len(found) == 3


def test_the_same_again_is_found(corpus: Path, settings: Settings) -> None:
    phases: list[str] = []
    first, _ = prepare(settings(corpus))
    again, reused = prepare(settings(corpus), progress=lambda phase, done, total: phases.append(phase))
    assert reused
    assert again.id == first.id
    assert again.directory == first.directory
    assert set(phases) == {"reading"}


def test_content_alone_decides(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    first, _ = prepare(settings(corpus, tokenizer="bytes"))
    for file in corpus.rglob("*.py"):
        os.utime(file, (1, 1))
    shutil.copytree(corpus, tmp_path / "copy")
    for paths in ([corpus], [tmp_path / "copy"], [corpus / "part0", corpus / "part1", corpus / "part2"]):
        data, reused = prepare(settings(*paths, tokenizer="bytes", text_column="unused"))
        assert reused
        assert data.id == first.id
    changed = sorted(corpus.rglob("*.py"))[4]
    stat = changed.stat()
    changed.write_bytes(changed.read_bytes().replace(b"e", b"f", 1))
    data, reused = prepare(settings(corpus, tokenizer="bytes"))
    assert not reused
    assert data.id != first.id
    assert changed.stat().st_size == stat.st_size


@pytest.mark.parametrize(
    "change", [{"held_out": 0.2}, {"vocab_size": 500}, {"tokenizer": "bytes"}, {"max_bytes": 9999}]
)
def test_settings_that_matter_prepare_anew(corpus: Path, settings: Settings, change: dict[str, object]) -> None:
    first, _ = prepare(settings(corpus, vocab_size=400))
    data, reused = prepare(settings(corpus, **{"vocab_size": 400, **change}))
    assert not reused
    assert data.id != first.id
    assert prepare(settings(corpus, vocab_size=400))[1]


def test_model_vocab_sets_the_size_of_bpe(corpus: Path, settings: Settings) -> None:
    data, _ = prepare(settings(corpus), model_vocab=700)
    assert data.vocab_size == 700
    assert prepare(settings(corpus, vocab_size=700))[1]


def test_two_runs_make_the_same_bytes(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    first, _ = prepare(settings(corpus, vocab_size=800), out=tmp_path / "one")
    shutil.rmtree(tmp_path / "cache")
    second, _ = prepare(settings(corpus, vocab_size=800), out=tmp_path / "two")
    assert first.id == second.id
    assert all_text(tmp_path / "one") == all_text(tmp_path / "two")


def test_sides_do_not_depend_on_other_documents(corpus: Path, settings: Settings) -> None:
    def held(config: DataConfig) -> set[str]:
        data, _ = prepare(config)
        return set(documents_of(data.held_out, data.tokenizer.decode))

    everything = held(settings(corpus, tokenizer="bytes", held_out=0.3))
    part = held(settings(corpus / "part2", corpus / "part0", tokenizer="bytes", held_out=0.3))
    texts = {file.read_text(encoding="utf-8") for name in ("part0", "part2") for file in (corpus / name).iterdir()}
    assert part == everything & texts
    assert held(settings(corpus, tokenizer="bytes", held_out=0.5)) > everything


def test_held_out_share_is_met(tmp_path: Path, settings: Settings) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "document number {i}"}}\n' for i in range(4000)))
    data, _ = prepare(settings(rows, tokenizer="bytes", held_out=0.1))
    assert data.held_out.n_documents == pytest.approx(400, abs=80)


def test_identical_documents_stay_together(tmp_path: Path, settings: Settings) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "document number {i % 50}"}}\n' for i in range(500)))
    data, _ = prepare(settings(rows, tokenizer="bytes", held_out=0.3))
    train, held = (set(documents_of(split, data.tokenizer.decode)) for split in (data.train, data.held_out))
    assert not train & held
    assert len(train) + len(held) == 50
    assert data.train.n_documents + data.held_out.n_documents == 500


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_few_documents_still_have_two_sides(tmp_path: Path, settings: Settings, share: float) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"the text of {name}\n")
    paths = [tmp_path / f"{name}.txt" for name in "abc"]
    data, _ = prepare(settings(*paths, tokenizer="bytes", held_out=share))
    assert (data.train.n_documents, data.held_out.n_documents) == ((2, 1) if share < 0.5 else (1, 2))


def test_a_single_document_is_divided_at_a_line_end(
    tmp_path: Path, settings: Settings, library_texts: list[str]
) -> None:
    file = tmp_path / "book.txt"
    text = "".join(library_texts)
    file.write_text(text, encoding="utf-8")
    data, _ = prepare(settings(file, tokenizer="bytes", held_out=0.1))
    (train,), (held,) = (documents_of(split, data.tokenizer.decode) for split in (data.train, data.held_out))
    assert train + held == text
    assert train.endswith("\n")
    assert len(held) == pytest.approx(0.1 * len(text), rel=0.01)
    assert data.summary()["bytes"] == len(text.encode())
    assert "divided" in data.summary()["notes"][0]


def test_max_bytes(corpus: Path, settings: Settings) -> None:
    everything = b"".join(file.read_bytes() for file in sorted(corpus.rglob("*.py")))
    data, _ = prepare(settings(corpus, tokenizer="bytes", max_bytes=100_000, held_out=0.2))
    assert 100_000 - 200 < data.summary()["bytes"] <= 100_000
    assert all(text.encode() in everything for text in documents_of(data.train, data.tokenizer.decode))


def test_default_is_the_standard_library(settings: Settings) -> None:
    data, _ = prepare(settings(tokenizer="bytes", max_bytes=600_000))
    texts = documents_of(data.train, data.tokenizer.decode) + documents_of(data.held_out, data.tokenizer.decode)
    assert any("def abstractmethod(funcobj):" in text for text in texts)
    assert not any("unittest.main()" in text and "import idlelib" in text for text in texts)


def test_out_of_a_set_is_a_place_of_its_own(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "sets" / "mine"
    data, reused = prepare(settings(corpus, tokenizer="bytes"), out=out)
    assert (data.directory, reused) == (out, False)
    assert prepare(settings(corpus, tokenizer="bytes"), out=out)[1]
    assert [path.name for path in out.parent.iterdir()] == ["mine"]
    opened, reused = prepare(settings(out))
    assert reused
    assert opened.id == data.id
    with raises_naming(UsageError, out):
        prepare(settings(corpus, tokenizer="bytes", held_out=0.5), out=out)
    with raises_naming(UsageError, out):
        prepare(settings(out), out=tmp_path / "other")
    with raises_naming(UsageError, out):
        prepare(settings(out, corpus))


def test_out_must_not_be_somebodys_folder(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    before = all_text(corpus)
    with raises_naming(UsageError, corpus):
        prepare(settings(corpus), out=corpus)
    with pytest.raises(UsageError, match="not a folder"):
        prepare(settings(corpus), out=next(corpus.rglob("*.py")))
    assert all_text(corpus) == before
    assert not (tmp_path / "cache").exists()
    (tmp_path / "empty").mkdir()
    assert not prepare(settings(corpus, tokenizer="bytes"), out=tmp_path / "empty")[1]


def test_a_damaged_set_in_the_cache_is_made_anew(corpus: Path, settings: Settings) -> None:
    first, _ = prepare(settings(corpus, tokenizer="bytes"))
    with (first.directory / "train" / "tokens.bin").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00")
    data, reused = prepare(settings(corpus, tokenizer="bytes"))
    assert not reused
    assert data.id == first.id
    data.verify()
    meta = data.directory / "meta.json"
    meta.write_text(meta.read_text().replace(data.key, data.key[::-1]))
    assert prepare(settings(corpus, tokenizer="bytes"))[0].key == first.key
    shutil.rmtree(data.directory)
    os.mkfifo(data.directory)
    assert prepare(settings(corpus, tokenizer="bytes"))[0].id == first.id


def test_a_damaged_tokenizer_in_the_cache_is_trained_again(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    first, _ = prepare(settings(corpus, vocab_size=300))
    (kept,) = (tmp_path / "cache" / "tokenizers").iterdir()
    whole = kept.read_text()
    for damaged in (whole[:50], whole.replace("e", "f", 5), ""):
        kept.write_text(damaged)
        shutil.rmtree(first.directory)
        assert prepare(settings(corpus, vocab_size=300))[0].id == first.id


def test_progress_is_in_bytes(corpus: Path, settings: Settings) -> None:
    told: dict[str, list[tuple[int, int | None]]] = {}
    data, _ = prepare(
        settings(corpus), progress=lambda phase, done, total: told.setdefault(phase, []).append((done, total))
    )
    assert list(told) == ["reading", "tokenizer", "tokenizing"]
    for steps in told.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1] == (data.summary()["bytes"],) * 2


def test_the_user_cache_directory(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data, _ = prepare(DataConfig(paths=[str(corpus)], tokenizer="bytes"))
    assert data.directory == tmp_path / "xdg" / "stackwise" / "prepared" / data.directory.name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data, _ = prepare(DataConfig(paths=[str(corpus)], tokenizer="bytes"))
    assert data.directory.is_relative_to(tmp_path / "home" / ".cache" / "stackwise")


def test_ids_are_stored_as_small_as_they_fit(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    data, _ = prepare(settings(corpus, tokenizer="bytes"))
    assert data.train.tokens.dtype == np.uint16
    rows = tmp_path / "ids.jsonl"
    rows.write_text("".join(f'{{"input_ids": [{i}, 70000]}}\n' for i in range(50)))
    data, _ = prepare(settings(rows))
    assert data.train.tokens.dtype == np.uint32
    assert isinstance(PreparedData.open(data.directory).train.tokens, np.memmap)


def test_all_held_out_for_evaluation(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    trained, _ = prepare(settings(corpus, vocab_size=400))
    tokenizer = str(trained.directory / "tokenizer.json")
    (tmp_path / "one.txt").write_text("a single\ndocument\n")
    data, reused = prepare(
        settings(tmp_path / "one.txt", tokenizer=tokenizer), out=tmp_path / "eval", all_held_out=True
    )
    assert not reused
    assert documents_of(data.held_out, data.tokenizer.decode) == ["a single\ndocument\n"]
    assert data.tokenizer_id == trained.tokenizer_id
    assert data.train.n_documents == data.train.n_samples(1) == len(data.train.sample_ids(8)) == 0
    assert data.train.segments([], 8).shape == (0, 8)
    # a prepared set is taken as it is, its tokenizer being the same
    assert prepare(settings(trained.directory, tokenizer=tokenizer), out=tmp_path / "x", all_held_out=True)[1]
    with raises_naming(UsageError, trained.directory):
        prepare(settings(trained.directory, tokenizer="bytes"), all_held_out=True)
    with raises_naming(UsageError, "data.tokenizer: bpe"):
        prepare(settings(corpus), all_held_out=True)
    (tmp_path / "empty.txt").write_text("")
    with raises_naming(UsageError, "data.paths"):
        prepare(settings(tmp_path / "empty.txt", tokenizer="bytes"), all_held_out=True)
