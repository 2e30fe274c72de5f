"""Capturing hidden states beside the bare forward pass of `transformers`, and reading them beside computing them again.

    python -m benchmarks.capture [--width 512] [--blocks 8] [--rows 32] [--rounds 5]

A LLaMA of random weights is written as a checkpoint. In each round the same rows go, in batches of the same size,
through the blocks of `transformers` (whose results are thrown away), and through `stackwise.capture` into a fresh store
(with fsync); then they are read from there, in shuffled order, through a fresh reader, which checks every digest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Result, Spread, parser, positive, refuse, run_command, shown, table
from benchmarks.document import Section
from stackwise import words

VOCABULARY = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("capture", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("capture", __doc__)
    add = made.add_argument
    add("--width", type=positive, default=512, metavar="N", help="d_model, in heads of 64; default 512")
    add("--blocks", type=positive, default=8, metavar="N", help="blocks; default 8")
    add("--rows", type=positive, default=32, metavar="N", help="rows; default 32")
    add("--batch-size", type=positive, default=8, metavar="N", help="rows that go forward together; default 8")
    add("--seq-len", type=positive, default=256, metavar="N", help="tokens of a row; default 256")
    add("--codec", default="bf16", help="codec of the boundary; default bf16")
    add("--rounds", type=positive, default=5, metavar="N", help="rounds of all three; default and least 5")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dir", metavar="DIR", help="where checkpoint and stores go; default: the system's temporary directory")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Measure it."""
    import torch

    from stackwise.pipeline.device import describe, resolve_device

    if options.width % 64:
        raise refuse(f"--width {options.width} is no multiple of 64", "heads are 64 wide")
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=options.dir) as name:
        root = Path(name)
        model = _checkpoint(options, root).to(device)
        if (precision := describe(device)["precision"]) == "bf16":
            model.to(torch.bfloat16)
        race = _Race(options, root, model, device)
        race.forward()  # kernels, memory
        rounds = [race.round(number) for number in range(max(5, options.rounds))]
    return {
        "device": describe(device)["name"],
        "precision": precision,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": options.rows,
        "seq_len": options.seq_len,
        "batch_size": options.batch_size,
        "codec": options.codec,
        "rounds": len(rounds),
        **{key: Spread.of(one[key] for one in rounds).plain() for key in rounds[0]},
    }


def _checkpoint(options: argparse.Namespace, root: Path) -> Any:
    """A checkpoint of random weights, and a prepared set of random tokens; the model without its head."""
    import numpy as np
    import torch
    import transformers

    from stackwise.config import DataConfig
    from stackwise.data import prepare

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.width // 64,
        max_position_embeddings=options.seq_len,
    )
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(root / "model")
    tokens = np.random.default_rng(0).integers(0, VOCABULARY - 2, (2 * options.rows + 4, options.seq_len))
    lines = (json.dumps({"input_ids": row.tolist()}) for row in tokens)
    (root / "rows.jsonl").write_text("\n".join(lines))
    prepare(DataConfig(paths=[str(root / "rows.jsonl")], vocab_size=VOCABULARY), out=root / "data")
    return model.model.eval()


class _Race:
    """The same rows through `transformers`, through a capture, and out of the store."""

    def __init__(self, options: argparse.Namespace, root: Path, model: Any, device: Any) -> None:
        import torch

        self.options, self.root, self.model, self.device = options, root, model, device
        self.tokens = options.rows * options.seq_len
        captured, _ = self.capture("first")
        with contextlib.closing(iter(captured.dataset(options.blocks, options.rows, batches=1))) as batches:
            self.rows_BS: torch.Tensor = next(batches)[2]

    def round(self, number: int) -> dict[str, float]:
        """One round; what comes first in it takes turns."""
        if number % 2:
            forward, (captured, seconds) = self.forward(), self.capture(str(number))
        else:
            captured, seconds = self.capture(str(number))
            forward = self.forward()
        read = self.read(captured)
        return {
            "forward": self.tokens / forward,
            "capture": self.tokens / captured.seconds,
            "read": self.tokens / read,
            "share": forward / captured.seconds,
            "share_with_start": forward / seconds,
            "read_share": forward / read,
        }

    def capture(self, name: str) -> tuple[Any, float]:
        """A capture into a fresh store, and the seconds of the whole call."""
        import stackwise

        options, begun = self.options, time.perf_counter()
        captured = stackwise.capture(
            self.root / "model",
            [self.root / "data"],
            at=[options.blocks],
            store=self.root / name,
            rows=options.rows,
            seq_len=options.seq_len,
            batch_size=options.batch_size,
            codec=options.codec,
            device=options.device,
        )
        return captured, time.perf_counter() - begun

    def forward(self) -> float:
        """Seconds of the bare forward pass."""
        import torch

        begun = time.perf_counter()
        with torch.inference_mode():
            for tokens_BS in torch.split(self.rows_BS, self.options.batch_size):
                self.model(tokens_BS.to(self.device), use_cache=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    def read(self, captured: Any) -> float:
        """Seconds of reading every row once, tokens beside them."""
        begun, size = time.perf_counter(), 8
        for _ in captured.dataset(self.options.blocks, size, batches=-(-self.options.rows // size)):
            pass
        return time.perf_counter() - begun


def _section(result: Result) -> Section:
    speed = {key: shown(result[key], lambda value: f"{words.count(value)}/s") for key in ("forward", "capture", "read")}
    share = {key: shown(result[key], lambda value: f"{value:.2f}") for key in ("share", "share_with_start")}
    body = table(
        ("what", "tokens", "of the bare forward pass"),
        [
            ("transformers, blocks alone", speed["forward"], "1"),
            ("capture into a fresh store", speed["capture"], share["share"]),
            ("the same, from the call to its return", "", share["share_with_start"]),
            ("reading what was captured", speed["read"], shown(result["read_share"], lambda value: f"{value:.0f}")),
        ],
    )
    text = (
        f"A LLaMA of {words.count(result['parameters'])} parameters without its head, in {result['precision']}; "
        f"{result['rows']} rows of {result['seq_len']} tokens through all blocks, {result['batch_size']} at a time, "
        f"stored as {result['codec']} with fsync, read in shuffled order with every digest checked; "
        f"{result['rounds']} rounds, in each of which all three take turns: median (smallest to largest), shares "
        "within a round. From call to return counts what does not grow with the rows too: opening checkpoint and "
        "data, loading the weights, finishing the boundary."
    )
    return Section("capture", "Capturing hidden states", text, body, result["device"], result)


if __name__ == "__main__":
    sys.exit(main())
