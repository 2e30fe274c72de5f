"""The memory that a container leaves a process, as both versions of control groups say it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stackwise import host


def group(directory: Path, limit: str, used: int, cached: int, *, first: bool = False) -> None:
    names = ("limit_in_bytes", "usage_in_bytes", "total_") if first else ("max", "current", "")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"memory.{names[0]}").write_text(f"{limit}\n")
    (directory / f"memory.{names[1]}").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 7\n{names[2]}inactive_file {cached}\n")


@pytest.mark.parametrize("first", [False, True])
def test_the_tightest_group_around_a_process_bounds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    root = tmp_path / "memory" if first else tmp_path
    lines = "3:cpu,cpuacct:/\n4:memory:/slice/job\n" if first else "0::/slice/job\n"
    (tmp_path / "self").write_text(lines)
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    monkeypatch.setattr(host, "GROUPS", tmp_path / "self")
    group(root / "slice/job", str(1 << 63) if first else "max", 10, 0, first=first)
    group(root / "slice", str(3 << 20), 2 << 20, 1 << 19, first=first)
    assert host.host_total() == 3 << 20
    memory = host.host_memory()
    assert memory.room == 3 << 19


def test_a_path_of_the_host_s_own_is_read_at_the_root_that_a_container_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "self").write_text("0::/../../elsewhere/job\n")
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    monkeypatch.setattr(host, "GROUPS", tmp_path / "self")
    group(tmp_path, str(5 << 20), 1 << 20, 0)
    assert host.host_total() == 5 << 20
    monkeypatch.setattr(host, "GROUPS", tmp_path / "gone")
    assert host.host_total() > 5 << 20


AGAIN = """
import resource, torch
from stackwise.host import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        x = torch.ones(4 << 20)
        del x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told")
def test_freed_memory_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4096, "20 times 16 MB are 81,920 pages of 4 kB"
