"""A boundary filled on demand, against the same boundary written by a pass of its own."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from stackwise.config import ModelConfig
from stackwise.config.model import ArchitectureConfig
from stackwise.model import build_block, build_front
from stackwise.objectives import MaskDiffusionObjective
from stackwise.pipeline.library import LoadedSamples
from stackwise.store import ActivationStore, RowOrder, codec_named
from stackwise.training import forward
from stackwise.training.feed import Feed
from stackwise.training.forward import FilledBoundary, write_boundary
from stackwise.training.stage import StageModel

VOCAB, S, D, ROWS, CHUNK = 24, 12, 16, 90, 16
CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=VOCAB, d_model=D, n_heads=2, architecture=ArchitectureConfig(n_stacks=2, blocks_per_stack=1)
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows go forward together: three pieces a chunk and a short one."""
    monkeypatch.setattr(forward, "forward_rows", lambda seq_len: 5)


class Bench:
    """Rows, two stages over their tokens, and what a pass of its own writes above them."""

    def __init__(self, store: ActivationStore, codec: str) -> None:
        draw = np.random.default_rng(0)
        self.store, self.codec = store, codec_named(codec)
        data = LoadedSamples(draw.integers(0, VOCAB - 1, (ROWS, S)))
        masks = store.put_masks(draw.random((ROWS, S)) < 0.4)
        self.rowset = store.put_rowset(data.sample_ids(S), masks)
        self.feed = Feed.stored(store, store.rowset(self.rowset), data, np.arange(ROWS), S)
        objective = MaskDiffusionObjective(VOCAB - 1)
        front = build_front(CONFIG, VOCAB, 0, S)
        self.stages = [
            StageModel(front if depth == 0 else None, [build_block(CONFIG, depth, 0)], None, objective, "fp32")
            for depth in (0, 1)
        ]
        for stage in self.stages:
            stage.requires_grad_(False).eval()
        self.order = RowOrder(ROWS, seed=(0,), chunk_rows=8, window_chunks=2)

    def writer(self, trunk: str) -> object:
        return self.store.writer(
            trunk=trunk, rowset=self.rowset, depth=2, seq_len=S, d_model=D, codec=self.codec.name, chunk_rows=CHUNK
        )

    def written(self) -> torch.Tensor:
        with self.writer("11" * 16) as writer:  # type: ignore[attr-defined]
            write_boundary(self.stages, self.feed, writer, CPU)
            boundary = writer.info.id
        with self.store.reader(boundary) as reader:
            return reader.read(np.arange(ROWS))


@pytest.fixture(params=["fp32", "bf16-zstd", "int8"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    with ActivationStore(tmp_path / "store") as store:
        yield Bench(store, request.param)  # type: ignore[misc]


def test_rows_that_are_computed_are_those_that_would_have_been_written(bench: Bench) -> None:
    expected = bench.written()
    filled = FilledBoundary(bench.feed, bench.stages, codec=bench.codec, chunk_rows=CHUNK, device=CPU)
    for start in (0, 5):
        for rows, x in itertools.islice(filled.stream(bench.order, 4, start), 60):
            assert torch.equal(x, expected[torch.from_numpy(rows)])
    picked = np.array([89, 0, 16, 15, 0])
    assert torch.equal(filled.read(picked), expected[torch.from_numpy(picked)])


def test_memory_holds_two_windows_whatever_the_rows(bench: Bench) -> None:
    filled = FilledBoundary(bench.feed, bench.stages, codec=bench.codec, chunk_rows=CHUNK, device=CPU)
    batches = itertools.islice(filled.stream(bench.order, 4), 40)
    held = [filled.rows_held for _ in batches]
    # Two windows of 16 rows, in pieces of 5: at most a piece more at each of their four edges.
    assert max(held) <= 2 * (16 + 2 * 2 * 5)
    assert filled.rows_computed <= 2.5 * 40 * 4


@pytest.mark.parametrize("stops_at", [1, 9, 30])
def test_what_is_kept_is_written_once_and_goes_on_after_a_stop(bench: Bench, stops_at: int) -> None:
    expected = bench.written()
    computed = 0
    for start, batches in ((0, stops_at), (stops_at, 60)):
        with bench.writer("22" * 16) as writer, bench.store.reader(writer.info.id) as reader:  # type: ignore[attr-defined]
            filled = FilledBoundary(
                bench.feed, bench.stages, codec=bench.codec, chunk_rows=CHUNK, device=CPU, stored=(reader, writer)
            )
            for rows, x in itertools.islice(filled.stream(bench.order, 4, start), batches):
                assert torch.equal(x, expected[torch.from_numpy(rows)])
            computed += filled.rows_computed
            boundary = writer.info.id
            if start:
                writer.finish()
    assert computed == ROWS
    with bench.store.reader(boundary) as reader:
        assert torch.equal(reader.read(np.arange(ROWS)), expected)
    assert bench.store.verify()["damaged"] == []
