"""Stages trained for integers: resident and swapped alike, killed or not, and what is above them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stackwise.config.loading import dump
from tests.conftest import Micro, run
from tests.pipeline.storm import Command
from tests.pipeline.test_run import weights

LEARNED = {"bits": 4, "group": 8, "symmetric": False, "scale": "learned", "activations": 8}


@pytest.mark.parametrize("mode", ["blockwise", "end_to_end"])
def test_swapped_and_resident_are_the_same(mode: str, micro: Micro, tmp_path: Path) -> None:
    settings = {"training__mode": mode, "training__quantization": LEARNED}
    for swap in ("never", "always"):
        run(micro(**settings, training__swap=swap, store__path=str(tmp_path / swap / "store")), tmp_path / swap)
    assert weights(tmp_path / "never") == weights(tmp_path / "always")


def test_a_killed_run_ends_with_the_same_weights(micro: Micro, tmp_path: Path) -> None:
    config = micro(training__quantization=LEARNED, training__steps=60, training__checkpoint_steps=4)
    run(config, tmp_path / "undisturbed")
    (tmp_path / "stackwise.yaml").write_text(dump(config))
    first = Command(tmp_path / "stackwise.yaml", tmp_path / "run")
    first.until("checkpoint", 1)
    first.process.kill()
    first.end()
    again = Command(tmp_path / "stackwise.yaml", tmp_path / "run")
    code, err = again.end()
    assert code == 0, err
    assert weights(tmp_path / "run") == weights(tmp_path / "undisturbed")


def test_what_is_above_reads_the_rounded_blocks(micro: Micro, tmp_path: Path) -> None:
    """A stage above others reads another trunk with each way of rounding them, and is not trained twice on one."""
    store = {"store__path": str(tmp_path / "store")}
    rounded = store | {"stages": {0: {"training": {"quantization": {"bits": 3}}}}}
    plain, bits = run(micro(**store), tmp_path / "plain"), run(micro(**rounded), tmp_path / "bits")
    again = run(micro(**rounded), tmp_path / "again")
    reused = [[event["stage"] for event in events if event["event"] == "reused"] for events in (plain, bits, again)]
    assert reused == [[], [], [0, 1]]
    assert not {*weights(tmp_path / "plain")} & {*weights(tmp_path / "bits")}
    assert weights(tmp_path / "bits") == weights(tmp_path / "again")
