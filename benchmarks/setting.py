"""Which stage is measured, on what, with how many rows; and whether that fits."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.common import refuse
from stackwise import words
from stackwise.config import StackWiseConfig
from stackwise.errors import NoSpaceError
from stackwise.pipeline.device import describe
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.recipe import codec_name
from stackwise.pipeline.schedule import HEAD, Stage, block_part
from stackwise.store import codec_named


@dataclass(frozen=True)
class Setting:
    """A stage to be measured.

    Args:
        config: The configuration, device and precision resolved.
        blocks: Blocks in the stage.
        device: Where it computes.
        store_bytes: Most bytes that two boundaries may take together.
        most_rows: Rows of the boundary, where the bytes allow it.
    """

    config: StackWiseConfig
    blocks: int
    device: torch.device
    store_bytes: int
    most_rows: int = 512

    @property
    def stage(self) -> Stage:
        """The second stage of such a schedule: one that reads a boundary."""
        parts = tuple(block_part(self.blocks + i) for i in range(self.blocks))
        return Stage(1, self.blocks, 2 * self.blocks - 1, (*parts, HEAD), reads_boundary=True, rowset=0)

    @property
    def vocab_size(self) -> int:
        """Width of the logits: the model's, else the tokenizer's."""
        bpe = self.config.data.vocab_size or 4096
        return self.config.model.vocab_size or (bpe if self.config.data.tokenizer == "bpe" else 258)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk."""
        return codec_named(codec_name(self.config.store)).row_bytes(
            self.config.training.seq_len, self.config.model.d_model
        )

    @property
    def rows(self) -> int:
        """Rows of the boundary: `most_rows`, or as many as fit twice into `store_bytes`."""
        return min(self.most_rows, self.store_bytes // 2 // self.row_bytes)

    def check(self, directory: Path) -> int:
        """Refuse what cannot fit.

        Args:
            directory: Where the store will be.

        Returns:
            The estimate of its memory, in bytes.

        Raises:
            UsageError: The stage does not fit into the device's memory, or not one batch into the store.
            NoSpaceError: The boundaries do not fit on the disk.
        """
        training = self.config.training
        need, there = Estimate(self.config, self.vocab_size, self.stage).memory, free_memory(self.device)
        if need > there:
            raise refuse(
                f"a stage of {words.plural(self.blocks, 'block')}, {training.batch_size} x {training.seq_len} tokens, "
                f"takes about {words.size(need)} of memory; {words.size(there)} are free on {self.device.type}",
                "lower --blocks, --batch-size or --seq-len",
            )
        if self.rows < training.batch_size:
            least = words.size(2 * training.batch_size * self.row_bytes)
            raise refuse(
                f"--store-bytes {self.store_bytes} does not hold one batch of {training.batch_size} rows twice",
                f"{least} are the least",
            )
        disk, free = 2 * self.rows * self.row_bytes, shutil.disk_usage(directory).free
        if disk > 0.9 * free:
            raise NoSpaceError(
                f"two boundaries take {words.size(disk)}; {directory} has {words.size(free)} free",
                hint="lower --store-bytes, or name a larger disk with --dir",
            )
        return need


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def resolved(config: StackWiseConfig, device: torch.device) -> StackWiseConfig:
    """A configuration with device, precision and whether blocks are compiled settled, checked.

    Raises:
        ConfigError: Its settings contradict each other.
    """
    config.device = device.type
    if config.precision == "auto":
        config.precision = describe(device)["precision"]
    if config.training.compile is None:
        config.training.compile = bool(describe(device).get("compiles"))
    return config.validate()
