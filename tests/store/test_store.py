"""What is written is what is read: by row, in batches, after a reopen, in a fork, once for every pattern."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stackwise.errors import BusyError, DamageError, NotFound, UsageError
from stackwise.store import ActivationStore, RowOrder, codec_named, codec_names, default_chunk_rows, repair_store
from stackwise.store.records import boundary_id_of
from tests.conftest import raises_naming

from .tools import DIM, SEQ, TRUNK, pairs, put_rowset, values, write


def test_fp32_comes_back_bit_for_bit_after_a_reopen(tmp_path: Path) -> None:
    x = values(10)
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, x)
        assert (info.state, info.chunks, info.shape, info.dtype) == ("complete", 3, (10, SEQ, DIM), "float32")
    with ActivationStore(tmp_path / "s", create=False) as store, store.reader(info.id) as reader:
        rows = np.array([9, 0, 3, 3, 7])
        assert torch.equal(reader.read(rows), torch.from_numpy(x[rows]))
        out = torch.empty(5, SEQ, DIM)
        assert reader.read(rows, out=out) is out
        assert torch.equal(out, torch.from_numpy(x[rows]))
        assert reader.read([]).shape == (0, SEQ, DIM)
        assert store.boundaries() == [info]
        assert store.find(trunk=TRUNK, rowset=info.rowset, codec="fp32") == info
        assert store.find(trunk=TRUNK, rowset=info.rowset, codec="bf16") is None


@pytest.mark.parametrize("codec", codec_names())
def test_every_codec_reads_as_torch_rounds(store: ActivationStore, codec: str) -> None:
    x = values(11) * 50
    x[3] = 0
    info = write(store, x, codec=codec)
    base = codec.partition("-")[0]
    with store.reader(info.id) as reader:
        got = reader.read(np.arange(11)[::-1].copy()).flip(0)
        assert str(got.dtype) == f"torch.{info.dtype}"
        again = reader.read([2, 10])
    assert torch.equal(again, got[[2, 10]])
    exact = torch.from_numpy(x)
    if base in ("fp32", "bf16", "fp16"):
        assert torch.equal(got, exact.to(got.dtype))
        assert codec_named(codec).lossless
    else:
        largest = exact.abs().amax(-1, keepdim=True)
        # Half a step of the format, and bfloat16's own rounding of the product.
        step = largest / 127 / 2 if base == "int8" else exact.abs() / 16 + largest / 448 / 512
        assert ((got.float() - exact).abs() <= step + exact.abs() / 250).all()
        assert not got[3].any()


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "fp8", "int8"])
def test_tensors_and_arrays_are_stored_alike(store: ActivationStore, codec: str) -> None:
    x = np.concatenate([values(3).ravel(), np.float32([0.0, -0.0, 1e-8, 65504, 3e-5, 1 / 3] * 2)])
    x = np.resize(x, (5, SEQ, DIM))
    for one, other in zip(codec_named(codec).encode(x), codec_named(codec).encode(torch.from_numpy(x)), strict=True):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()


def test_bf16_rounds_every_kind_of_number_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint32)
    x = bits.view(np.float32)[:, None, None]
    (ours,) = codec_named("bf16").encode(x)
    (theirs,) = codec_named("bf16").encode(torch.from_numpy(x))
    numbers = ~np.isnan(x)
    assert (ours[numbers] == theirs[numbers]).all()
    assert torch.from_numpy(ours[~numbers].copy()).view(torch.bfloat16).isnan().all()


@pytest.mark.parametrize(("codec", "bad"), [("fp16", 1e6), ("int8", np.nan), ("fp8", np.inf)])
def test_what_a_codec_cannot_store_is_refused(store: ActivationStore, codec: str, bad: float) -> None:
    x = values(4)
    x[1, 2, 3] = bad
    with pytest.raises(UsageError, match=codec):
        write(store, x, codec=codec)


def test_an_equal_mask_is_stored_once(store: ActivationStore) -> None:
    _, masks = pairs(300, patterns=7)
    ids = store.put_masks(masks)
    assert ids.shape == (300, 16)
    assert len(np.unique(ids, axis=0)) == len(np.unique(masks, axis=0)) == 7
    assert (store.masks(ids) == masks).all()
    assert (store.masks(ids[:0], seq_len=SEQ)).shape == (0, SEQ)
    store.put_masks(masks[::-1])
    assert store.inspect()["masks"]["unique"] == 7
    longer = np.concatenate([masks, np.zeros((300, 1), bool)], axis=1)
    assert not (store.put_masks(longer) == ids).all(axis=1).any(), "the length is part of the id"
    with raises_naming(UsageError, "lengths"):
        store.masks(np.stack([ids[0], store.put_masks(longer)[0]]))
    with pytest.raises(UsageError, match="12 positions"):
        store.masks(ids, seq_len=11)
    with pytest.raises(NotFound):
        store.masks(np.zeros((1, 16), np.uint8))


def test_a_rowset_finds_every_pair(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, masks = pairs(500, patterns=3)
    samples = samples[np.arange(500) // 3]  # each sample under up to three masks
    ids = store.put_masks(masks)
    rowset = store.rowset(store.put_rowset(samples, ids))
    assert store.put_rowset(samples, ids) == rowset.id
    assert rowset.rows == 500
    assert (rowset.sample_ids == samples).all()
    assert (rowset.mask_ids == ids).all()
    found = rowset.find(samples, ids)
    first = {}
    for row in range(499, -1, -1):
        first[samples[row].tobytes() + ids[row].tobytes()] = row
    assert found.tolist() == [first[samples[r].tobytes() + ids[r].tobytes()] for r in range(500)]
    assert [rowset.row(samples[r], ids[r].tobytes()) for r in range(500)] == found.tolist()
    assert rowset.find(samples[:4], ids[:4] ^ 1).tolist() == [-1] * 4
    for small in (True, False):
        monkeypatch.setattr("stackwise.store.rows.DICTIONARY_ROWS", 1000 if small else 0)
        assert [rowset.row(samples[r].tobytes(), ids[r].tobytes()) for r in range(500)] == found.tolist()
        with pytest.raises(NotFound):
            rowset.row(bytes(16), bytes(16))
    assert store.put_rowset(samples[::-1], ids[::-1]) != rowset.id, "the order is part of it"
    with pytest.raises(NotFound, match="put_masks"):
        store.put_rowset(samples, ids ^ 1)


def test_lookup_by_trunk_sample_and_mask(store: ActivationStore) -> None:
    x, other = values(9), values(9, 5)
    samples, masks = pairs(9)
    info = write(store, x)
    write(store, other, trunk="cd" * 16)
    ids = store.put_masks(masks)
    assert torch.equal(store.lookup(TRUNK, samples[7], ids[7]), torch.from_numpy(x[7]))
    assert torch.equal(store.lookup("cd" * 16, samples[7].tobytes(), ids[7].tobytes()), torch.from_numpy(other[7]))
    with pytest.raises(NotFound):
        store.lookup("ef" * 16, samples[7], ids[7])
    store.drop(info.id)
    with pytest.raises(NotFound):
        store.lookup(TRUNK, samples[7], ids[7])


@pytest.mark.parametrize("codec", ["fp32", "bf16", "bf16-zstd", "int8"])
@pytest.mark.parametrize("dim", [DIM, 1024])
def test_a_stream_follows_its_order_from_anywhere(store: ActivationStore, codec: str, dim: int) -> None:
    x = values(23, dim=dim)
    info = write(store, x, codec=codec)
    order = RowOrder(23, seed=("s", 1), chunk_rows=5, window_chunks=2)
    with store.reader(info.id) as reader:
        whole = reader.read(np.arange(23)).clone()
        kept = []
        stream = reader.stream(order, 6)
        for number in range(9):
            rows, batch = next(stream)
            assert (rows == order.batch(number, 6)).all()
            kept.append((rows, batch))
        for rows, batch in kept:  # a batch that is kept is not overwritten by later ones
            assert torch.equal(batch, whole[rows])
        with reader.batches(order, 6, start=5) as ahead:
            rows, batch = next(ahead)
            assert (rows == kept[5][0]).all()
            assert torch.equal(batch, whole[rows])


def test_several_writers_resume_and_share_a_boundary(store: ActivationStore) -> None:
    x = values(13)
    rowset = put_rowset(store, 13)
    given = {"trunk": TRUNK, "rowset": rowset, "depth": 2, "seq_len": SEQ, "d_model": DIM, "codec": "fp32"}
    with store.writer(**given, chunk_rows=4) as one, store.writer(**given) as two:
        assert one.missing == two.missing == [0, 1, 2, 3]
        assert one.write_chunk(1, x[4:8])
        assert not two.write_chunk(1, x[4:8] + 1), "a published chunk stays as it is"
        assert two.write_chunk(3, torch.from_numpy(x[12:]))
        with pytest.raises(UsageError, match="lacks 2"):
            one.finish()
    with store.writer(**given) as later:
        assert later.missing == [0, 2]
        assert later.info.state == "writing"
        with store.reader(later.info.id) as reader:
            assert torch.equal(reader.read([4, 12]), torch.from_numpy(x[[4, 12]]))
            with raises_naming(NotFound, later.info.id, "chunk 0"):
                reader.read([0])
        for chunk in later.missing:
            start, stop = later.chunk_rows_of(chunk)
            later.write_chunk(chunk, x[start:stop])
        info = later.finish()
        assert later.finish() == info
    with store.reader(info.id) as reader:
        assert torch.equal(reader.read(np.arange(13)), torch.from_numpy(x))
    with raises_naming(UsageError, info.id, [13, SEQ, DIM], [13, SEQ + 1, DIM]):
        store.writer(**{**given, "seq_len": SEQ + 1})
    with pytest.raises(UsageError, match="is \\[1, "), store.writer(**given) as writer:
        writer.write_chunk(3, x[:2])


def test_a_boundary_in_use_is_not_dropped(store: ActivationStore) -> None:
    info = write(store, values(5))
    with store.reader(info.id):
        with pytest.raises(BusyError):
            store.drop(info.id)
    assert store.drop(info.id) > 0
    with pytest.raises(NotFound):
        store.reader(info.id)
    with pytest.raises(NotFound):
        store.drop(info.id)
    assert not list((store.path / "boundaries").iterdir())
    assert store.verify()["orphans"] == []


def _child_reads(store: ActivationStore, boundary: str, queue: multiprocessing.Queue[object]) -> None:
    with store.reader(boundary) as reader:
        queue.put(reader.read([3]).tolist())
    queue.put(store.put_masks(np.ones((1, 3), bool)).tolist())


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_forked_child_opens_an_index_of_its_own(store: ActivationStore) -> None:
    x = values(5)
    info = write(store, x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_child_reads, args=(store, info.id, queue)) for _ in range(2)]
    for child in children:
        child.start()
    seen = [queue.get(timeout=30) for _ in range(4)]
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert seen.count(x[[3]].tolist()) == 2
    assert store.masks(np.array(store.put_masks(np.ones((1, 3), bool)), np.uint8)).all()


def test_metadata_needs_no_torch(tmp_path: Path) -> None:
    with ActivationStore(tmp_path / "s") as store:
        write(store, values(6))
    code = (
        "import sys; from stackwise.store import ActivationStore, CODECS\n"
        f"s = ActivationStore({str(tmp_path / 's')!r}, create=False)\n"
        "print(s.inspect()['boundaries'][0]['rows'], s.verify()['checked_chunks'], s.usage()['total'] > 0)\n"
        "assert not {'torch', 'zarr', 'numcodecs'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["6", "2", "True"], done.stderr


def test_inspect_says_what_the_contract_asks(store: ActivationStore) -> None:
    info = write(store, values(10), codec="bf16")
    shown = json.loads(json.dumps(store.inspect()))
    assert shown["format"] == 1
    assert shown["masks"] == {"unique": 5, "referenced": 10}
    assert set(shown["index"]) == {"entries", "bytes"}
    (boundary,) = shown["boundaries"]
    expected = {"id": info.id, "depth": 1, "trunk": TRUNK, "rows": 10, "shape": [10, SEQ, DIM], "dtype": "bfloat16"}
    expected |= {"codec": "bf16", "chunks": 3, "state": "complete"}
    expected |= {"logical_bytes": 10 * SEQ * DIM * 2, "disk_bytes": 12 * SEQ * DIM * 2}
    assert expected.items() <= boundary.items()


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with raises_naming(NotFound, tmp_path / "none"):
        ActivationStore(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "notes.txt").write_text("mine")
    with raises_naming(UsageError, tmp_path, "notes.txt"):
        ActivationStore(tmp_path)
    ActivationStore(tmp_path / "s").close()
    path = tmp_path / "s" / "format.json"
    path.write_text('{"format": 99}')
    with pytest.raises(UsageError, match="format 99"):
        ActivationStore(tmp_path / "s")
    for text in ("[1]", "{", "[" * 9999, '{"format": 1, "ids": "md5"}', '{"format": true}'):
        path.write_text(text)
        with pytest.raises(DamageError):
            ActivationStore(tmp_path / "s")
        assert "format.json" in repair_store(tmp_path / "s")["rebuilt"]
        ActivationStore(tmp_path / "s", create=False).close()


def test_ids_never_become_paths_unchecked(store: ActivationStore) -> None:
    for name in ("../../etc", "A" * 32, "", "ab" * 15 + "/.", None, 7):
        for call in (store.reader, store.rowset, store.drop, store.stage, store.drop_stage):
            with pytest.raises(NotFound):
                call(name)  # type: ignore[arg-type]
    assert os.listdir(store.path / "locks") == ["open.lock"]


def test_default_chunks_are_of_about_8_mib() -> None:
    assert default_chunk_rows(512, 8192, 2, 10**6) == 1
    assert default_chunk_rows(128, 128, 2, 10**6) == 256
    assert default_chunk_rows(128, 128, 2, 100) == 100
    assert default_chunk_rows(10**6, 10**4, 4, 5) == 1
    assert boundary_id_of(TRUNK, TRUNK, "bf16") != boundary_id_of(TRUNK, TRUNK, "fp16")
