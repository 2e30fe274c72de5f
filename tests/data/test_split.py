"""Samples of a split, against the same things written out by hand."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash

from stackwise.config import DataConfig
from stackwise.data import PreparedData, Split, prepare, sample_ids
from tests.data.conftest import written


@pytest.fixture(scope="module")
def prepared(library_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set; not to be changed."""
    home = tmp_path_factory.mktemp("split")
    corpus = written(home / "corpus", library_texts)
    return prepare(DataConfig(paths=[str(corpus)], cache_dir=str(home / "cache"), vocab_size=900, held_out=0.2))[
        0
    ].directory


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> PreparedData:
    """A copy of it, to do anything with."""
    return PreparedData.open(Path(shutil.copytree(prepared, tmp_path / "data")))


def test_samples_are_the_stream(data: PreparedData) -> None:
    stream = np.asarray(data.train.tokens)
    for seq_len in (1, 7, 128, 1000):
        n = data.train.n_samples(seq_len)
        assert n == len(stream) // seq_len
        rows = data.train.samples(range(n), seq_len)
        assert rows.dtype == np.int64
        assert rows.shape == (n, seq_len)
        assert np.array_equal(rows.ravel(), stream[: n * seq_len])
    assert np.array_equal(data.train.samples([5, 2, 5], 64), data.train.samples(range(6), 64)[[5, 2, 5]])
    assert data.train.samples([], 64).shape == (0, 64)
    assert data.train.targets([0], 64) is None


def test_out_of_range(data: PreparedData) -> None:
    for bad in ([data.train.n_samples(64)], [-1]):
        for ask in (data.train.samples, data.train.segments, data.train.sample_bytes):
            with pytest.raises(IndexError):
                ask(bad, 64)


def test_counts_and_documents(data: PreparedData) -> None:
    for split in (data.train, data.held_out):
        assert np.array_equal(split.counts, np.bincount(split.tokens, minlength=data.vocab_size))
        assert split.counts[data.separator_id] == split.n_documents
        assert split.counts[data.mask_id] == 0
        ends = np.flatnonzero(split.tokens == data.separator_id)
        assert np.array_equal(split.documents, [0, *(ends[:-1] + 1)])


@pytest.mark.parametrize("seq_len", [1, 50, 777, 20_000])
def test_segments(data: PreparedData, seq_len: int) -> None:
    split = data.train
    n = split.n_samples(seq_len)
    indices = np.random.default_rng(3).permutation(n)[:200]
    expected = []
    for index in indices:
        row, segment = [], 0
        for token in split.tokens[index * seq_len : (index + 1) * seq_len]:
            row.append(segment)
            segment += int(token == data.separator_id)
        expected.append(row)
    found = split.segments(indices, seq_len)
    assert found.dtype == np.int32
    assert np.array_equal(found, np.array(expected).reshape(len(indices), seq_len))


def test_bytes_add_up_exactly(data: PreparedData) -> None:
    split = data.train
    assert split.sample_bytes(range(split.n_tokens), 1).sum() == split.n_bytes
    for seq_len in (64, 1000):
        n = split.n_samples(seq_len)
        sizes = split.sample_bytes(range(n), seq_len)
        rows = split.samples(range(n), seq_len)
        # a sample may begin or end inside a character; bytes count all the same
        for row, size in zip(rows[:20], sizes[:20], strict=True):
            text = row[row != data.separator_id]
            table = data.tokenizer.bytes_per_token()
            assert table is not None
            assert size == table[text].sum()
    ends = [*split.documents[1:], split.n_tokens]
    one = split.sample_bytes(range(split.n_tokens), 1)
    for start, end in list(zip(split.documents, ends, strict=True))[:10]:
        assert one[start:end].sum() == len(data.tokenizer.decode(split.tokens[start : end - 1]).encode())


def test_sample_ids(data: PreparedData) -> None:
    rows = data.train.samples(range(10), 96)
    ids = data.train.sample_ids(96)
    assert ids.dtype == np.uint8
    assert ids.shape == (data.train.n_samples(96), 16)
    assert [bytes(row) for row in ids[:10]] == [xxhash.xxh3_128_digest(row.astype("<u4").tobytes()) for row in rows]
    assert np.array_equal(sample_ids(rows), ids[:10])
    assert len({bytes(row) for row in ids}) == len({bytes(row) for row in data.train.samples(range(len(ids)), 96)})


def test_sample_ids_are_kept_and_checked(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.train.sample_ids(64)
    kept = data.train.directory / "sample_ids-64.bin"
    monkeypatch.setattr("stackwise.data.split.sample_ids", lambda rows: pytest.fail("computed again"))
    assert np.array_equal(PreparedData.open(data.directory).train.sample_ids(64), first)
    monkeypatch.undo()
    raw = bytearray(kept.read_bytes())
    raw[40] ^= 1
    for damaged in (bytes(raw), b"", kept.read_bytes()[:-16]):
        kept.write_bytes(damaged)
        assert np.array_equal(data.train.sample_ids(64), first)
    os.replace(kept, data.held_out.directory / "sample_ids-64.bin")
    assert len(data.held_out.sample_ids(64)) == data.held_out.n_samples(64)


def test_a_set_that_cannot_be_written_still_serves(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("stackwise.data.split.write_bytes", refuse)
    assert len(data.train.sample_ids(32)) == data.train.n_samples(32)


def test_one_set_serves_every_length_and_moves(data: PreparedData, tmp_path: Path) -> None:
    data.directory.rename(tmp_path / "moved")
    moved = PreparedData.open(tmp_path / "moved")
    assert moved.id == data.id
    assert isinstance(moved.train, Split)
    assert moved.train.n_samples(512) == moved.train.n_tokens // 512
