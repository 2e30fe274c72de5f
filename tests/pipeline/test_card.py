"""A GPU that other processes hold, by what the driver's own tool says (here: a script in its place)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stackwise.errors import BusyError
from stackwise.pipeline.device import check_free

GB = 10**9


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`nvidia-smi` of a card of 24 GiB: 10,000 MiB are used, 8,000 by another process, 1,000 by this one."""
    tool = tmp_path / "nvidia-smi"
    apps = f"1, 8000, python\x1b[2J\n{os.getpid()}, 1000, x"
    tool.write_text(f"#!/bin/sh\ncase $1 in --query-gpu*) echo '10000, 24576';; *) echo '{apps}';; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tool


def test_a_card_that_others_hold_is_refused(card: Path) -> None:
    with pytest.raises(BusyError) as refused:
        check_free("cuda", 18 * GB)
    assert refused.value.exit_code == 4
    for part in ("process 1", "8.39 GB", "18"):
        assert part in refused.value.message
    assert str((24576 - 9000) * 2**20) in str(refused.value.hint)  # what is free, as training.memory takes it
    assert "\x1b" not in refused.value.message, "a process's name does not reach the terminal as it is"


def test_room_enough_no_room_at_all_and_no_card_are_other_matters(card: Path) -> None:
    check_free("cuda:0", 15 * GB)  # 24 GiB less 9,000 MiB of others
    check_free("cuda", 80 * GB)  # an empty card would not hold it either: swapping and plans speak of that
    check_free("cpu", 18 * GB)
    card.write_text("#!/bin/sh\nexit 9\n")
    check_free("cuda", 18 * GB)
