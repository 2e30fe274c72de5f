"""Healing: identical bytes again where they can be recomputed, an index made anew, and the truth about the rest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from stackwise.errors import DamageError, NotFound
from stackwise.store import ActivationStore, BoundaryInfo, repair_store
from tests.conftest import raises_naming

from .test_damage import HURTS
from .tools import pairs, values, write

Chunks = Iterator[tuple[int, np.ndarray]]


def recompute(info: BoundaryInfo, chunks: Sequence[int]) -> Chunks:
    """What `write` of the same seed wrote; depth 9 cannot be recomputed."""
    if info.depth == 9:
        raise NotFound("no trunk")
    for chunk in chunks:
        start, stop = info.chunk_span(chunk)
        yield chunk, values(info.rows)[start:stop]


@pytest.mark.parametrize("codec", ["fp32", "bf16-zstd", "int8"])
@pytest.mark.parametrize("how", list(HURTS))
def test_a_chunk_comes_back_with_the_same_bytes(store: ActivationStore, codec: str, how: str) -> None:
    info = write(store, values(12), codec=codec)
    path = store.path / "boundaries" / info.id / "activations/c/1/0/0"
    before = path.read_bytes()
    HURTS[how](path, path.parents[2] / "2/0/0")
    if how == "directory":
        shutil.rmtree(path)
    assert store.repair(recompute, dry_run=True)["repaired"]
    report = store.repair(recompute)
    assert {d["chunk"] for d in report["repaired"]} == ({1, 2} if how == "swapped" else {1})
    assert report["gone"] == []
    assert path.read_bytes() == before
    assert not path.is_symlink()
    assert store.boundary(info.id).state == "complete"


@pytest.mark.parametrize("able", [False, True])
def test_what_cannot_be_recomputed_is_named_and_written_anew(store: ActivationStore, able: bool) -> None:
    info = write(store, values(12), depth=9)
    path = store.path / "boundaries" / info.id / "activations/c/1/0/0"
    path.unlink()
    report = store.repair(recompute if able else None)
    assert report["gone"] == [{"boundary": info.id, "chunk": 1, "fault": "missing"}]
    assert store.boundary(info.id).state == "writing"
    assert store.verify()["damaged"] == []
    with store.reader(info.id) as reader, raises_naming(NotFound, info.id, "chunk 1"):
        reader.read([5])
    assert write(store, values(12), depth=9).published == 3, "a writer finds it missing"


def test_what_comes_out_otherwise_is_not_accepted(store: ActivationStore) -> None:
    info = write(store, values(12))
    (store.path / "boundaries" / info.id / "activations/c/1/0/0").unlink()
    report = store.repair(lambda about, chunks: ((c, values(12)[4:8] + 1) for c in chunks))
    (gone,) = report["gone"]
    assert (gone["boundary"], gone["chunk"]) == (info.id, 1)
    assert gone["fault"] != "missing", "what is more, it cannot be made again"
    write(store, values(12))


def _garbage(index: Path) -> None:
    (index / "data.mdb").write_bytes(np.random.default_rng(0).bytes(1 << 16))


def _truncate(index: Path) -> None:
    path = index / "data.mdb"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zeros(index: Path) -> None:
    data = bytearray((index / "data.mdb").read_bytes())
    data[8192:] = bytes(len(data) - 8192)
    (index / "data.mdb").write_bytes(data)


@pytest.mark.parametrize(
    "hurt",
    [lambda i: (i / "data.mdb").unlink(), shutil.rmtree, _garbage, _truncate, _zeros],
    ids=["deleted", "no index", "garbage", "truncated", "zeroed"],
)
@pytest.mark.parametrize("codec", ["fp32", "bf16-blosc", "fp8"])
def test_a_lost_index_is_rebuilt_from_the_boundaries(
    tmp_path: Path, hurt: Callable[[Path], object], codec: str
) -> None:
    path = tmp_path / "s"
    with ActivationStore(path) as store:
        info = write(store, values(12), codec=codec, attributes={"k": [1]})
        other = write(store, values(12), codec="fp16", trunk="cd" * 16, depth=2)
        chunk = path / "boundaries" / other.id / "activations/c/2/0/0"
        with store.reader(info.id) as reader:
            before = reader.read(np.arange(12)).clone()
    chunk.write_bytes(chunk.read_bytes()[::-1])
    hurt(path / "index")
    with pytest.raises(DamageError, match="index"):
        ActivationStore(path)
    assert repair_store(path, dry_run=True)["index"] == "damaged"
    report = repair_store(path, recompute)
    assert report["index"] == "rebuilt"
    assert sorted(report["rebuilt"]) == sorted([info.id, other.id])
    assert report["repaired"] == [{"boundary": other.id, "chunk": 2, "fault": "changed"}]
    assert report["gone"] == []
    with ActivationStore(path, create=False) as store:
        found = store.boundary(info.id)
        assert (found.shape, found.codec, found.attributes, found.state) == (info.shape, codec, {"k": [1]}, "complete")
        assert found.stored_bytes == info.stored_bytes
        with store.reader(info.id) as reader:
            assert torch.equal(reader.read(np.arange(12)), before)
        samples, masks = pairs(12)
        assert torch.equal(store.lookup(info.trunk, samples[7], store.put_masks(masks)[7]), before[7])
        assert (store.masks(store.rowset(info.rowset).mask_ids) == masks).all()
        assert store.verify()["damaged"] == []


def test_a_damaged_rowset_and_metadata_are_put_back(store: ActivationStore) -> None:
    info = write(store, values(12))
    rowset = store.path / "index" / "rowsets" / info.rowset
    before = rowset.read_bytes()
    for hurt in (lambda p: p.unlink(), lambda p: p.write_bytes(before[:-5]), lambda p: p.write_bytes(b"x" + before)):
        hurt(rowset)
        assert store.verify()["damaged"]
        report = store.repair()
        assert report["rebuilt"] == [f"rowset {info.rowset}"]
        assert rowset.read_bytes() == before
    base = store.path / "boundaries" / info.id
    for name in ("zarr.json", "sample/c/0/0", "mask/c/0/0", "digest/c/0"):
        right = (base / name).read_bytes()
        (base / name).write_bytes(b"{" + right[1:-1] + b"\0")
        assert [d["boundary"] for d in store.verify()["damaged"]] == [info.id], name
        assert store.repair()["rebuilt"] == [f"metadata {info.id}"]
        assert (base / name).read_bytes() == right


def test_a_broken_record_is_replaced(store: ActivationStore) -> None:
    info = write(store, values(12))
    key = bytes.fromhex(info.id)
    store._index.update(lambda view: view.put("boundaries", key, b'{"rows": 1e99}'))
    with pytest.raises(DamageError, match="record"):
        store.reader(info.id)
    assert store.boundaries() == []
    assert store.repair()["rebuilt"] == [info.id]
    assert store.boundary(info.id).state == "complete"


@pytest.mark.parametrize("gone", ["locks", "stages", "boundaries"])
def test_a_directory_of_a_store_that_is_gone_is_made_again(tmp_path: Path, gone: str) -> None:
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, values(6))
    shutil.rmtree(tmp_path / "s" / gone)
    with ActivationStore(tmp_path / "s") as store:
        assert bool(store.verify()["damaged"]) == (gone == "boundaries")
        store.repair()
        write(store, values(6))
        assert store.boundary(info.id).state == "complete"
        assert store.verify()["damaged"] == []
