"""A store made by a stranger is refused in a line or read safely: no code, no file outside it, no memory bomb."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackwise.errors import DamageError, NotFound, StackWiseError, UsageError
from stackwise.store import ActivationStore, ChunkDamage, repair_store
from tests.conftest import raises_naming

from .test_stages import part
from .tools import TRUNK, values, write

CONSUME = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
from stackwise.errors import StackWiseError
from stackwise.store import ActivationStore
from stackwise.store.chunks import ChunkSource
from stackwise.store import repair_store
from tests.conftest import raises_naming
def consume(store):
    store.verify(); store.inspect(); store.usage(); store.runs(); store.evicted()
    for name in store.stages():
        try: store.stage(name)
        except StackWiseError: pass
    for info in store.boundaries():
        try:
            source = ChunkSource(store._index, store._files, info)
            for chunk in range(min(info.chunks, 3)): source.load(chunk)
        except StackWiseError: pass
        try:
            rowset = store.rowset(info.rowset)
            store.masks(rowset.mask_ids[:50])
            rowset.find(rowset.sample_ids[:50], rowset.mask_ids[:50])
            rowset.row(rowset.sample_ids[0], rowset.mask_ids[0])
        except StackWiseError: pass
for path in sys.argv[1:]:
    for again in range(2):
        try:
            with ActivationStore(path, create=False) as store: consume(store)
        except StackWiseError as error:
            assert "\\n\\n" not in str(error)
        if not again:
            try: repair_store(path)
            except StackWiseError: pass
print("survived")
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "s"
    with ActivationStore(path) as store:
        write(store, values(12))
        write(store, values(12), trunk="cd" * 16, codec="bf16-blosc", depth=2)
        write(store, values(12), trunk="ef" * 16, codec="int8-zstd", depth=3)
        store.commit_stage("12" * 16, {"front": part(1)}, {"a": 1})
        store.register_run("run", recipes=["12" * 16], boundaries=[])
    return path


def consume(paths: list[Path], home: Path) -> None:
    """Have a process of a stranger to these stores read all it can; it must neither crash nor grow."""
    env = {**os.environ, "XDG_CACHE_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", CONSUME, *map(str, paths)], capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "survived"


def test_a_sound_store_from_elsewhere_is_read(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "s")
    consume([tmp_path / "s"], tmp_path / "home")
    with ActivationStore(tmp_path / "s") as store:
        assert len(store.boundaries()) == 3
        assert store.verify()["damaged"] == []


def mangle(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut, doubled, or taken to extremes."""
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        at = rng.randrange(len(raw)) if raw else 0
        match rng.randrange(6):
            case 0 if raw:
                raw[at] ^= 1 << rng.randrange(8)
            case 1 if raw:
                raw[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, rng.randbytes(8)])
            case 2:
                del raw[at : at + rng.randrange(1, 200)]
            case 3:
                raw[at:at] = rng.randbytes(rng.randrange(1, 64))
            case 4:
                raw[at : at + 16] = raw[rng.randrange(len(raw) or 1) :][:16]
            case _:
                if len(raw) > 4096:  # a page of an LMDB file over another
                    one, other = (rng.randrange(len(raw) // 4096) * 4096 for _ in range(2))
                    raw[one : one + 4096] = raw[other : other + 4096]
    return bytes(raw)


def fuzz(sound: Path, tmp_path: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    names = sorted(str(p.relative_to(sound)) for p in sound.rglob("*") if p.is_file() and p.stat().st_size)
    names = [name for name in names if name not in ("reserve", "index/checked", "index/lock.mdb")]
    paths = []
    for number in range(count):
        path = tmp_path / f"{seed}-{number}"
        shutil.copytree(sound, path, ignore=shutil.ignore_patterns("reserve", "lock.mdb"))
        # The index is the most dangerous file, and is hurt most often.
        for name in rng.sample(names, rng.choice([0, 1, 2])) + ["index/data.mdb"] * (rng.random() < 0.6):
            (path / name).write_bytes(mangle((path / name).read_bytes(), rng))
        paths.append(path)
    consume(paths, tmp_path / "home")


def test_mangled_stores_neither_crash_nor_grow(sound: Path, tmp_path: Path) -> None:
    fuzz(sound, tmp_path, 30, seed=int(os.environ.get("STACKWISE_FUZZ_SEED", "3")))


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(20))
def test_many_mangled_stores(sound: Path, tmp_path: Path, seed: int) -> None:
    fuzz(sound, tmp_path, 100, seed=1000 + seed)


def forge(path: Path, **changes: Any) -> str:
    """Change fields of the first boundary's record, whatever they are."""
    with ActivationStore(path) as store:
        info = store.boundaries()[0]
        key = bytes.fromhex(info.id)
        value = json.loads(info.encode()) | changes
        store._index.update(lambda view: view.put("boundaries", key, json.dumps(value).encode()))
    return info.id


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 1 << 60},
        {"rows": -1},
        {"rows": 12.0},
        {"rows": True},
        {"seq_len": 1 << 50},
        {"d_model": 1 << 39, "seq_len": 1 << 30},
        {"chunk_rows": 0},
        {"chunk_rows": 13},
        {"codec": "../../x"},
        {"codec": ["fp32"]},
        {"codec": {"a": 1}},
        {"rowset": "../" * 10},
        {"trunk": 7},
        {"created": float("nan")},
        {"created": "now"},
        {"attributes": []},
        {"state": "done"},
        {"published": 99},
        {"surplus": 1},
        {"depth": None},
        {"cost": -1},
    ],
)
def test_a_forged_record_is_refused(sound: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(sound, tmp_path / "s")
    boundary = forge(tmp_path / "s", **changes)
    with ActivationStore(tmp_path / "s") as store:
        with pytest.raises(DamageError, match=boundary):
            store.reader(boundary)
        assert [damage["boundary"] for damage in store.verify()["damaged"]] == [boundary]


def test_absurd_sizes_take_no_memory(sound: Path, tmp_path: Path) -> None:
    """A record may claim huge rows that are in range: what is on disk decides what is taken."""
    shutil.copytree(sound, tmp_path / "s")
    boundary = forge(tmp_path / "s", seq_len=1 << 20, d_model=1 << 14, chunk_rows=4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ActivationStore(tmp_path / "s") as store:
        with store.reader(boundary) as reader, pytest.raises(StackWiseError):
            reader._source.load(0)
        assert {damage["boundary"] for damage in store.verify()["damaged"]} == {boundary}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_decompression_bomb_is_not_set_off(sound: Path, tmp_path: Path) -> None:
    from numcodecs.zstd import Zstd

    shutil.copytree(sound, tmp_path / "s")
    with ActivationStore(tmp_path / "s") as store:
        info = next(info for info in store.boundaries() if info.codec == "int8-zstd")
        bomb = Zstd(level=1).encode(np.zeros(1 << 30, np.uint8))
        (tmp_path / "s/boundaries" / info.id / "activations/c/0/0/0").write_bytes(bomb)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with store.reader(info.id) as reader, pytest.raises(ChunkDamage):
            reader.read([0])
        with raises_naming(ValueError, "size"):
            info.codec_object.decompress(bomb, np.empty(100, np.int8))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_links_lead_nowhere(sound: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "keep").write_text("mine")
    for place in ("boundaries", "stages", "index/rowsets", "locks"):
        path = tmp_path / place.replace("/", "-")
        shutil.copytree(sound, path)
        (path / place / ("ff" * 16)).symlink_to(secret)
        with ActivationStore(path) as store:
            store.verify()
            store.register_run("run", recipes=[], boundaries=[])
            store.gc(all=True)
        assert (secret / "keep").read_text() == "mine", place
    for place in ("boundaries", "stages", "index", "locks"):
        path = tmp_path / f"{place}-itself"
        shutil.copytree(sound, path, ignore=shutil.ignore_patterns(place))
        (path / place).symlink_to(secret)
        with pytest.raises(UsageError, match="is a link"):
            ActivationStore(path)
    path = tmp_path / "inside"
    shutil.copytree(sound, path)
    with ActivationStore(path) as store:
        info = store.boundaries()[0]
        inside = path / "boundaries" / info.id / "activations"
        shutil.rmtree(inside)
        inside.symlink_to(secret)
        assert store.verify()["damaged"]
        with contextlib.suppress(OSError, StackWiseError):
            store.repair(lambda about, chunks: ((c, values(12)[slice(*about.chunk_span(c))]) for c in chunks))
        store.drop(info.id)
    path = tmp_path / "index-link"
    shutil.copytree(sound, path)
    (path / "index/data.mdb").unlink()
    (path / "index/data.mdb").symlink_to(secret / "keep")
    with raises_naming(DamageError, path / "index/data.mdb"):
        ActivationStore(path)
    assert [p.name for p in secret.iterdir()] == ["keep"]
    assert (secret / "keep").read_text() == "mine"


def test_a_store_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stackwise.store.layout.file_system", lambda path: "nfs4")
    with raises_naming(UsageError, "nfs4", "store.path"):
        ActivationStore(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_repair_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(NotFound):
        repair_store(tmp_path / "none")
    with ActivationStore(tmp_path / "s") as store:
        (store.path / "boundaries" / TRUNK).mkdir()
        (store.path / "boundaries" / TRUNK / "zarr.json").write_text('{"attributes": {"stackwise": ' + "[" * 5000)
        assert [gone["boundary"] for gone in store.repair()["gone"]] == [TRUNK]
