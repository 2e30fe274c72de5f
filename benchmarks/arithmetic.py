"""Floating-point operations that a stage's training takes, and the rate of a large matrix product beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from stackwise.config import ModelConfig

FORMULA = (
    "TFLOP/s counts 6 x the parameters of the blocks' matrices x tokens, 12 x blocks x d_model x seq_len x tokens of "
    "attention (half of it where attention is causal), and 6 x d_model x vocabulary x scored positions of the head "
    "(4 x where the projection is frozen): forward and backward, nothing that is recomputed, neither norms nor "
    "optimizer. Forward alone is a third of it, without the head."
)

SIDE = {"cuda": 8192, "mps": 4096, "cpu": 2048}
"""Rows and columns of the matrices of the reference product."""

REFERENCE_SECONDS = 0.3
"""How long the reference product is repeated for one figure."""


@dataclass(frozen=True)
class Work:
    """Operations of a stage.

    Args:
        blocks: Of a forward pass of the blocks, for each token.
        head: Of forward and backward pass of the head, for each scored position.
    """

    blocks: float
    head: float

    def training(self, tokens: int, scored: int) -> float:
        """Operations of forward and backward pass."""
        return 3 * self.blocks * tokens + self.head * scored

    def forward(self, tokens: int) -> float:
        """Operations of a forward pass, without the head."""
        return self.blocks * tokens


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters of a block's matrices."""
    matrices = (*model.attention.matrices(model).values(), *model.ffn.matrices(model).values())
    return sum(matrix.outputs * matrix.inputs for matrix in matrices)


def work_of(
    model: ModelConfig, blocks: int, seq_len: int, vocab_size: int, *, causal: bool, trained_head: bool
) -> Work:
    """The operations of a stage of `blocks` blocks and a head, at samples of `seq_len` tokens."""
    attention = 4 * seq_len * model.d_model * (0.5 if causal else 1.0)
    head = (6 if trained_head else 4) * model.d_model * vocab_size
    return Work(blocks * (2 * matrix_parameters(model) + attention), head)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Reference:
    """A large square matrix product on a device: random normal values, bfloat16 on a GPU, float32 on a CPU.

    Its matrices exist only while it is timed, so that they are no part of anyone's peak memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = SIDE.get(device.type, SIDE["cpu"])
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._times = 1
        self.rate()  # the first one pays for loading, and says how many make up the time

    @property
    def name(self) -> str:
        """In words: `2048 x 2048 x 2048 float32`."""
        return f"{self.side} x {self.side} x {self.side} {str(self.dtype).removeprefix('torch.')}"

    def rate(self) -> float:
        """FLOP/s, measured now."""
        draw = torch.Generator(self.device).manual_seed(0)
        shape = (self.side, self.side)
        a, b = (torch.randn(shape, device=self.device, dtype=self.dtype, generator=draw) for _ in range(2))
        out = a @ b
        synchronise(self.device)
        begun = time.perf_counter()
        for _ in range(self._times):
            torch.mm(a, b, out=out)
        synchronise(self.device)
        seconds = time.perf_counter() - begun
        rate = self._times * 2 * self.side**3 / seconds
        self._times = max(1, round(REFERENCE_SECONDS / (seconds / self._times)))
        return rate
