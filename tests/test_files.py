"""Files that may come from elsewhere, and strings that leave the process."""

from __future__ import annotations

import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from stackwise import files
from stackwise.durable import FileLock
from stackwise.errors import UsageError
from stackwise.files import IrregularFile, open_to_write, read_bytes, read_json, read_text
from stackwise.text import check_plain, printable


def plant(path: Path, what: str) -> None:
    """Put something else than a regular file at a path."""
    if what == "link":
        victim = path.with_name("victim")
        victim.write_bytes(b"precious")
        path.symlink_to(victim)
    elif what == "dangling link":
        path.symlink_to(path.with_name("nowhere"))
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif what == "device":
        path.symlink_to("/dev/zero")


IRREGULAR = ["link", "dangling link", "fifo", "directory", "socket", "device"]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", IRREGULAR)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, what: str) -> None:
    path = tmp_path / "file"
    plant(path, what)
    with pytest.raises(IrregularFile):
        read_bytes(path)
    with pytest.raises(IrregularFile):
        open_to_write(path, append=True)
    with pytest.raises(IrregularFile):
        FileLock(path, "it").acquire()
    if what == "link":
        assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "nowhere").exists()


def test_writing_does_not_reach_another_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    os.link(tmp_path / "victim", tmp_path / "log")
    with pytest.raises(IrregularFile):
        open_to_write(tmp_path / "log", append=True)
    assert read_bytes(tmp_path / "log") == b"precious"


def test_no_directory_below_the_root_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root").symlink_to(tmp_path / "run")
    root = tmp_path / "root"  # the root itself is the user's own way of naming it
    with open_to_write(root / "logs" / "a", root=root) as file:
        file.write(b"x")
    assert read_bytes(root / "logs" / "a", root=root) == b"x"
    with pytest.raises(IrregularFile):
        open_to_write(root / "linked" / "a", root=root)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    with pytest.raises(IrregularFile):
        files.make_directory(root / "linked")


def test_reading_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_text(tmp_path / "a", limit=5) == "12345"
    with pytest.raises(IrregularFile):
        read_bytes(tmp_path / "a", limit=4)
    (tmp_path / "deep").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="deep"):
        read_json(tmp_path / "deep")
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")


def test_reading_takes_memory_for_what_is_there_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    tracemalloc.start()
    try:
        assert read_bytes(tmp_path / "a", limit=1 << 28) == b"12345"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b[2Jb\u202ec\ud800") == "a\\x1b[2Jb\\u202ec\\ud800"
    assert printable("a\n\tb\r", lines=True) == "a\n\tb\\x0d"
    assert printable("Grüße, 世界 🙂") == "Grüße, 世界 🙂"
    assert check_plain("gpu", "slurm.partition") == "gpu"
    with pytest.raises(UsageError):
        check_plain("gpu\ntouch x", "slurm.partition")
