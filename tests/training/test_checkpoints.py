"""Checkpoints written beside training: whole or not there, as they were at their step, however the clock runs."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from stackwise.errors import NoSpaceError
from stackwise.training import checkpoint
from stackwise.training.checkpoint import Checkpoints, sealed
from stackwise.training.tensor_files import TensorFile, write_tensors
from tests.training.test_trainer import batch, resident, save, trainer


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until the event is set."""
    go = threading.Event()
    write = checkpoint.write_tensors

    def later(*arguments: object) -> str:
        assert go.wait(20)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_tensors", later)
    return go


def test_a_checkpoint_holds_the_state_of_its_step_though_training_goes_on(
    tmp_path: Path, slow: threading.Event
) -> None:
    one = trainer()
    one.train_step([batch(0)])
    before = {name: tensor.clone() for name, tensor in one.engine.state().items()}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(one)
        one.train_step([batch(1)])
        assert checkpoints.busy
        assert steps(tmp_path) == []
        assert checkpoints.written() == []
        slow.set()
        checkpoints.finish()
        (saved,) = checkpoints.written()
    assert saved.step == 1
    assert 0 < saved.stopped < saved.seconds
    other = trainer()
    assert checkpoint.restore_latest(tmp_path, other, pytest.fail)
    assert other.step == 1
    after = other.engine.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_at_most_one_is_on_its_way(tmp_path: Path, slow: threading.Event) -> None:
    one = trainer()
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        one.train_step([batch(0)])
        checkpoints.save(one)
        one.train_step([batch(1)])
        threading.Timer(0.2, slow.set).start()
        checkpoints.save(one)
        assert steps(tmp_path)[0] == 1, "the second one waited for the first"
    assert steps(tmp_path) == [1, 2]


def test_memory_that_was_taken_ahead_is_used(tmp_path: Path) -> None:
    one = trainer()
    one.train_step([batch(0)])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.prepare(one)
        checkpoints.finish()
        places = {name: copy.data_ptr() for name, copy in checkpoints._copy.items()}
        assert places.keys() == one.engine.state().keys()
        checkpoints.save(one)
        checkpoints.finish()
        assert {name: copy.data_ptr() for name, copy in checkpoints._copy.items()} == places
    other = trainer()
    assert checkpoint.restore_latest(tmp_path, other, pytest.fail)
    assert other.step == 1


def test_the_newest_and_those_that_are_needed_stay(tmp_path: Path) -> None:
    one = trainer()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for number in range(8):
            one.train_step([batch(number)])
            checkpoints.save(one, protect={2})
    assert steps(tmp_path) == [2, 6, 7, 8]


def test_a_full_disk_is_told_and_what_was_complete_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer()
    one.train_step([batch(0)])
    save(tmp_path, one)

    def full(*arguments: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    one.train_step([batch(1)])
    with pytest.raises(NoSpaceError), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(one)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_where_memory_is_short_training_waits_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Short)
    one = trainer()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(one)
        assert steps(tmp_path) == [0]
        (saved,) = checkpoints.written()
        assert saved.stopped == saved.seconds


def test_a_clock_that_is_set_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    one = trainer()
    for number in range(4):
        one.train_step([batch(number)])
        monkeypatch.setattr(time, "time", lambda number=number: now - 86_400 * number)
        path = save(tmp_path, one)
        os.utime(path, (now - 86_400 * number,) * 2)
    assert steps(tmp_path) == [3, 4]
    again = trainer()
    assert checkpoint.restore_latest(tmp_path, again, pytest.fail)
    assert again.step == 4


def halved(path: Path) -> None:
    """A state as sound as any, of another shape."""
    tensors = {
        name: tensor[: len(tensor) // 2].clone() if tensor.ndim else tensor for name, tensor in load_file(path).items()
    }
    path.unlink()
    digest = write_tensors(path, tensors)
    meta = path.with_name("checkpoint.json")
    record = json.loads(meta.read_text()) | {"digest": digest}
    record.pop("seal")
    meta.write_text(json.dumps(sealed(record)))


HARM: dict[str, Callable[[Path, Path], object]] = {
    "cut": lambda state, meta: os.truncate(state, 1000),
    "empty": lambda state, meta: os.truncate(state, 0),
    "altered": lambda state, meta: state.write_bytes(state.read_bytes()[:-3] + b"abc"),
    "link": lambda state, meta: (state.rename(state.with_name("other")), state.symlink_to("other")),
    "FIFO": lambda state, meta: (state.unlink(), os.mkfifo(state)),
    "record is a FIFO": lambda state, meta: (meta.unlink(), os.mkfifo(meta)),
    "directory is a link": lambda state, meta: (
        state.parent.rename(state.parent.parent / "elsewhere"), state.parent.symlink_to("elsewhere")
    ),
    "record is no JSON": lambda state, meta: meta.write_text("[" * 10**5),
    "record is a list": lambda state, meta: meta.write_text("[]"),
    "record was changed": lambda state, meta: meta.write_text(meta.read_text().replace('"tokens": ', '"tokens": 1')),
    "another version": lambda state, meta: meta.write_text(meta.read_text().replace('"format": 2', '"format": 1')),
    "of another shape": lambda state, meta: halved(state),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, harm: str) -> None:
    one = trainer()
    for number in range(2):
        one.train_step([batch(number)])
        save(tmp_path, one)
    state, meta = (tmp_path / "step-00000002" / name for name in ("state.safetensors", "checkpoint.json"))
    HARM[harm](state, meta)
    said: list[str] = []
    again = trainer()
    assert checkpoint.restore_latest(tmp_path, again, said.append)
    assert again.step == 1
    (line,) = said
    assert "step-00000002" in line
    assert "step-00000001" in line
    assert "\n" not in line


def test_restoring_reads_one_tensor_at_a_time_into_the_memory_that_is_there(tmp_path: Path) -> None:
    one = trainer()
    one.train_step([batch(0)])
    save(tmp_path, one)
    one.train_step([batch(1)])
    places = {name: tensor.data_ptr() for name, tensor in one.engine.state().items() if name.startswith("weight/")}
    checkpoint.restore_step(tmp_path, one, 1)
    assert {name: one.engine.state()[name].data_ptr() for name in places} == places
    assert one.step == 1


def test_what_a_checkpoint_holds_is_named(tmp_path: Path) -> None:
    one = trainer(ema=0.5, precision="fp16")
    one.train_step([batch(0)])
    kinds = {name.split("/")[0] for name in TensorFile(save(tmp_path, one) / "state.safetensors")}
    assert kinds == {"weight", "mean", "optimizer", "scaler"}
    assert resident(one).optimizer.state
