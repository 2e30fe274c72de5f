"""What the driver says of a GPU, asked through nvidia-smi: the runner imports no torch."""

from __future__ import annotations

import os
import subprocess

import psutil

from stackwise.errors import BusyError
from stackwise.text import printable
from stackwise.words import size as in_bytes

SECONDS = 10.0  # that nvidia-smi may take
MIB = 1 << 20


def ask(query: str, fields: str, card: str | None = None) -> list[list[str]]:
    """Rows of what nvidia-smi says; none where it is not there, fails or hangs.

    Args:
        query: `gpu` or `compute-apps`.
        fields: Names, between commas.
        card: Index or UUID; None: all.
    """
    command = ["nvidia-smi", f"--query-{query}={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*command, *(["-i", card] if card is not None else [])], capture_output=True, text=True, timeout=SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return (
        [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()] if not done.returncode else []
    )


def check_free(device: str, needed: int) -> None:
    """Refuse a card whose memory other processes hold.

    Args:
        device: As of a plan, `cuda` or `cuda:N`; any other has no card.
        needed: Bytes that the largest stage takes.

    Raises:
        BusyError: What is free beside them does not hold `needed`.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return
    index = int(number or 0)
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    card = visible[index] if index < len(visible) else str(index)
    try:
        ((used, total),) = ((int(a) * MIB, int(b) * MIB) for a, b in ask("gpu", "memory.used,memory.total", card))
    except ValueError:  # unknown to the driver, or a field is "[N/A]"
        return
    mine = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    others, held_by_us = [], 0
    for row in ask("compute-apps", "pid,used_memory,process_name", card):
        if len(row) < 3 or not (row[0].isdigit() and row[1].isdigit()):
            continue
        if int(row[0]) in mine:
            held_by_us += int(row[1]) * MIB
        else:
            others.append(f"process {row[0]} ({printable(row[2])}) {in_bytes(int(row[1]) * MIB)}")
    held = max(0, used - held_by_us)
    if needed <= total - held or needed > total:  # what no empty card holds is another matter
        return
    who = "; ".join(others) or "by processes that this one does not see"
    raise BusyError(
        f"device {device}: {in_bytes(held)} of its {in_bytes(total)} are held by others ({who}), and the largest stage "
        f"takes about {in_bytes(needed)}",
        hint="wait for them, name another device, or set training.memory to what is free",
    )
