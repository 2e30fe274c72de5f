"""The benchmarks' own parts on tiny settings: what they compare is the same, and their figures are sane."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.store import beyond, codecs, profiling, reading, writing
from stackwise.store import codec_names


def test_every_codec_is_measured_on_the_same_activations(tmp_path: Path) -> None:
    found = codecs.speeds(tmp_path, torch.randn(64, 16, 32, generator=torch.Generator().manual_seed(0)), rounds=1)
    assert set(found) == set(codec_names())
    size, error, decoded, wrote, read = found["fp32"]
    assert (size, error, decoded) == (128, 0, 64 * 16 * 32 * 4)
    assert wrote > 0
    assert read > 0
    assert found["bf16"][0] == 64
    assert found["int8"][0] == found["fp8"][0] == 32 + 4
    assert found["bf16-zstd"][1] == found["bf16"][1] < found["int8"][1] < found["fp8"][1] < 0.1


def test_a_configuration_differs_by_its_codec_alone(tmp_path: Path) -> None:
    one, other = (codecs.configuration(tmp_path, codec=name, seed=1, steps=5) for name in ("bf16", "fp8"))
    assert one.n_stages == 2
    assert one.model_dump(exclude={"store": {"codec"}}) == other.model_dump(exclude={"store": {"codec"}})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a peer's file is not closed
def test_peers_read_what_they_were_given(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 1 << 15, (8, reading.SEQ, reading.DIM), np.uint16)
    reads, absent = reading.opened(tmp_path, x, [5, 0, 7, 5], ["readinto", "memmap"])
    assert (set(reads), absent) == ({"readinto", "memmap"}, [])


def test_calls_are_counted_and_timed_once(tmp_path: Path) -> None:
    shown = profiling.reads(tmp_path / "read", mib=32, rounds=1)
    assert shown.count("\n") == 6
    watch = profiling.Watch()
    with watch.on(profiling.WATCHED):
        writing.by_store(tmp_path / "s", np.zeros((4, 1024), np.float32), behind=False)
    assert watch.calls["row digests"] == 4
    assert watch.calls["replace"] >= 4
    assert min(watch.seconds.values()) >= 0


def test_without_control_groups_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beyond, "GROUPS", tmp_path / "none")
    assert "not measured" in beyond.run(tmp_path, mib=64, limit=16, rounds=1)
