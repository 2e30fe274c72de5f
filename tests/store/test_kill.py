"""A real writer process, really killed: nothing published is lost, nothing half is visible."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stackwise.store import ActivationStore

from .tools import TRUNK, published

ROWS, SEQ, DIM, CHUNK = 240, 16, 64, 4

WRITER = f"""
import sys
import numpy as np
from stackwise.store import ActivationStore
with ActivationStore(sys.argv[1]) as store:
    rows, trunk = {ROWS}, sys.argv[2]
    samples = np.arange(rows, dtype=np.uint64).repeat(2).view(np.uint8).reshape(rows, 16)
    masks = (np.arange(rows)[:, None] >> np.arange({SEQ})[None]) % 2 == 0
    rowset = store.put_rowset(samples, store.put_masks(masks))
    with store.writer(trunk=trunk, rowset=rowset, depth=1, seq_len={SEQ}, d_model={DIM}, codec="fp32",
                      chunk_rows={CHUNK}) as writer:
        for chunk in writer.missing:
            start, stop = writer.chunk_rows_of(chunk)
            x = np.arange(start, stop, dtype=np.float32)[:, None, None] + np.zeros((1, {SEQ}, {DIM}), np.float32)
            writer.write_chunk(chunk, x)
            print(chunk, flush=True)  # said to be published
        writer.finish()
        print("finished", flush=True)
assert "torch" not in sys.modules
"""


def kill_a_writer(path: Path, trunk: str, after: float) -> tuple[list[int], bool]:
    """Run a writer, kill it; the chunks that it said were published, and whether it had finished."""
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(path), trunk], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    time.sleep(after)
    os.kill(child.pid, signal.SIGKILL)
    said, _ = child.communicate(timeout=30)
    lines = said.split("\n")[:-1]  # what follows the last newline may be cut off
    return [int(line) for line in lines if line != "finished"], "finished" in lines


def check(path: Path, trunk: str, said: list[int], finished: bool) -> bool:
    """The store opens, has all that was said, nothing half; whether the boundary is complete."""
    with ActivationStore(path) as store:
        result = store.verify()
        assert result["damaged"] == []
        infos = [info for info in store.boundaries() if info.trunk == trunk]
        if not infos:
            assert not said
            return False
        (info,) = infos
        chunks = published(store, info)
        for chunk, values in chunks.items():
            start, stop = info.chunk_span(chunk)
            assert (values == np.arange(start, stop, dtype=np.float32)[:, None, None]).all()
        assert set(said) <= set(chunks)
        assert info.published == len(chunks)
        assert not finished or info.state == "complete"
        return info.state == "complete"


def kills(path: Path, count: int, seed: int) -> int:
    """Kill `count` writers at random moments, each going on where the last stopped; boundaries completed."""
    rng = random.Random(seed)
    completed, number = 0, 0
    for _ in range(count):
        trunk = f"{number:032x}"
        said, finished = kill_a_writer(path, trunk, rng.uniform(0.12, 0.6))
        if check(path, trunk, said, finished):
            completed, number = completed + 1, number + 1
            with ActivationStore(path) as store:
                for info in store.boundaries():
                    store.drop(info.id)
    return completed


def test_a_killed_writer_loses_nothing_published(tmp_path: Path) -> None:
    kills(tmp_path / "s", 20, seed=1)
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path / "s"), TRUNK], capture_output=True, text=True, timeout=60
    )
    said = [int(line) for line in done.stdout.split()[:-1]]
    assert check(tmp_path / "s", TRUNK, said, finished=True), done.stderr


@pytest.mark.stress
def test_many_kills(tmp_path: Path, times: int) -> None:
    assert kills(tmp_path / "s", 200 * times, seed=int(os.environ.get("STACKWISE_STRESS_SEED", "0"))) >= 3
