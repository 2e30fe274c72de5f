"""Products and copies of this machine, measured; run as a program, it prints them as JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

SECONDS, WIDTH = 0.5, {"cpu": 1024, "cuda": 8192, "mps": 2048}
NARROW_WIDTH = 256  # of a product in bf16 on a CPU, which may emulate it
BLOCK = {"cpu": (256, 4, 128), "cuda": (4096, 4, 2048)}
"""Of the block whose training is timed: width, rows, positions."""


def measure() -> dict[str, Any]:
    """FLOP/s by dtype and of a block in training, bytes a second of copies, bytes that a process takes for itself."""
    import torch

    from stackwise.host import process_bytes
    from stackwise.model import fp8
    from stackwise.pipeline.device import describe, resolve_device, warm_up

    device = resolve_device("auto")
    warm_up()
    base = process_bytes("VmRSS") if sys.platform == "linux" else 0

    def seconds(work: Callable[[], object]) -> float:
        """The median time of some work, repeated."""
        times: list[float] = []
        work()
        while sum(times) < SECONDS or len(times) < 3:
            begun = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    about = describe(device)
    rates: dict[str, Any] = {"device": device.type if device.type == "cuda" else "cpu", "name": about["name"]}
    rates |= {"memory": about["memory"], "base": base}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        n = WIDTH[device.type] if device.type == "cuda" or dtype is torch.float32 else NARROW_WIDTH
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        rates[f"products {name}"] = 2 * n**3 / seconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    if device.type == "cuda" and fp8.by_kernel(device):
        n = WIDTH["cuda"]
        codes, ones = torch.ones(n, n, device=device).to(torch.float8_e4m3fn), torch.ones(n, 1, device=device)

        def multiply() -> object:
            return torch._scaled_mm(codes, codes.t(), ones, ones.t(), out_dtype=torch.bfloat16)

        rates["products fp8"] = 2 * n**3 / seconds(multiply)
    big = torch.zeros(1 << 24, device=device)
    rates["memory copies"] = 2 * big.nbytes / seconds(lambda: big.add_(1.0))
    host = torch.zeros(1 << 24, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)
    rates["copies"] = host.nbytes / seconds(lambda: there.copy_(host))
    rates["training"] = _training(device, seconds)
    return rates


def _training(device: Any, seconds: Callable[[Callable[[], object]], float]) -> float:
    """FLOP/s that a block reaches in a stage's own training, forward and backward."""
    import torch

    from stackwise.config.model import ModelConfig
    from stackwise.model import build_block

    on_gpu = device.type == "cuda"
    width, rows, positions = BLOCK["cuda" if on_gpu else "cpu"]
    config = ModelConfig(d_model=width, n_heads=max(1, width // 64))
    block = build_block(config, 0, 0, device).train()
    x = torch.randn(rows, positions, width, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    x.requires_grad_()

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
            y = block(x, causal=False, segments_BS=None)
        y.backward(torch.ones_like(y))
        block.zero_grad(set_to_none=True)
        x.grad = None

    row = 2 * config.block_parameters * positions + 4 * positions * positions * config.heads_width
    return 3.0 * rows * row / seconds(step)


if __name__ == "__main__":
    print(json.dumps(measure()))
