"""Capturing hidden states beside the bare forward pass of `transformers`, and reading them beside computing them again.

    python -m benchmarks.capture [--width 512] [--blocks 8] [--rows 32] [--rounds 5] [--model DIR …]

A LLaMA of random weights is written as a checkpoint; others may be named. In each round the same rows go, in batches
of the same size, through the blocks of `transformers` (whose results are thrown away), and through `stackwise.capture`
into a fresh store (with fsync); then they are read from there, in shuffled order, through a fresh reader, which checks
every digest. Processor time is compared beside the clock's, which whatever else the machine does lengthens.
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
TEXT = Path(__file__).parent.parent / "docs"
"""What a checkpoint with a tokenizer of its own goes over."""


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
    add(
        "--model",
        action="append",
        default=[],
        metavar="DIR",
        help="a checkpoint with a tokenizer.json to capture too; may be repeated",
    )
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
    precision, models = describe(device)["precision"], []
    with tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=options.dir) as name:
        for number, given in enumerate((None, *options.model)):
            root = Path(name) / str(number)
            directory = root / "model" if given is None else Path(given)
            model = (_written(options, directory) if given is None else _opened(directory)).to(device)
            if precision == "bf16":
                model.to(torch.bfloat16)
            root.mkdir(exist_ok=True)
            data = TEXT if given is not None else _prepared(options, root, model.config.vocab_size)
            race = _Race(options, root, (directory, data), model, device)
            race.forward()  # kernels, memory
            rounds = [race.round(number) for number in range(max(5, options.rounds))]
            about = {"model": given, "blocks": race.blocks, "parameters": sum(p.numel() for p in model.parameters())}
            models.append(about | {key: Spread.of(one[key] for one in rounds).plain() for key in rounds[0]})
    return {
        "device": describe(device)["name"],
        "precision": precision,
        "rows": options.rows,
        "seq_len": options.seq_len,
        "batch_size": options.batch_size,
        "codec": options.codec,
        "rounds": len(rounds),
        "models": models,
    }


def _written(options: argparse.Namespace, directory: Path) -> Any:
    """A checkpoint of random weights, and its model without the head."""
    import torch
    import transformers

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
    model.save_pretrained(directory)
    return model.model.eval()


def _opened(directory: Path) -> Any:
    """The model of a checkpoint that is there, without its head."""
    import transformers

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers.AutoModel.from_pretrained(directory).eval()


def _prepared(options: argparse.Namespace, root: Path, vocab_size: int) -> Path:
    """A prepared set of random tokens."""
    import numpy as np

    from stackwise.config import DataConfig
    from stackwise.data import prepare

    tokens = np.random.default_rng(0).integers(0, vocab_size - 2, (2 * options.rows + 4, options.seq_len))
    lines = (json.dumps({"input_ids": row.tolist()}) for row in tokens)
    (root / "rows.jsonl").write_text("\n".join(lines))
    prepare(DataConfig(paths=[str(root / "rows.jsonl")], vocab_size=vocab_size), out=root / "data")
    return root / "data"


class _Race:
    """The same rows through `transformers`, through a capture, and out of the store."""

    def __init__(
        self, options: argparse.Namespace, root: Path, given: tuple[Path, Path], model: Any, device: Any
    ) -> None:
        import torch

        self.options, self.root, self.model, self.device = options, root, model, device
        self.directory, self.data = given
        self.tokens, self.blocks = options.rows * options.seq_len, int(model.config.num_hidden_layers)
        captured, *_ = self.capture("first")
        with contextlib.closing(iter(captured.dataset(self.blocks, options.rows, batches=1))) as batches:
            self.rows_BS: torch.Tensor = next(batches)[2]

    def round(self, number: int) -> dict[str, float]:
        """One round; what comes first in it takes turns."""
        if number % 2:
            (forward, processor), (captured, seconds, spent) = self.forward(), self.capture(str(number))
        else:
            captured, seconds, spent = self.capture(str(number))
            forward, processor = self.forward()
        read = self.read(captured)
        return {
            "forward": self.tokens / forward,
            "capture": self.tokens / captured.seconds,
            "read": self.tokens / read,
            "share": forward / captured.seconds,
            "share_with_start": forward / seconds,
            "share_of_processor": processor / spent,
            "read_share": forward / read,
        }

    def capture(self, name: str) -> tuple[Any, float, float]:
        """A capture into a fresh store, the seconds of the call, the processor's from the first row to its return."""
        import stackwise

        options, begun = self.options, time.perf_counter()
        weights_loaded: list[float] = []

        def progress(progress: Any) -> None:
            if progress.tokens:  # rows go through the blocks
                weights_loaded.append(time.process_time())

        captured = stackwise.capture(
            self.directory,
            [self.data],
            at=[self.blocks],
            store=self.root / name,
            rows=options.rows,
            seq_len=options.seq_len,
            batch_size=options.batch_size,
            codec=options.codec,
            device=options.device,
            progress=progress,
        )
        return captured, time.perf_counter() - begun, time.process_time() - weights_loaded[0]

    def forward(self) -> tuple[float, float]:
        """Seconds of the bare forward pass, and the processor's."""
        import torch

        begun, spent = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            for tokens_BS in torch.split(self.rows_BS, self.options.batch_size):
                self.model(tokens_BS.to(self.device), use_cache=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun, time.process_time() - spent

    def read(self, captured: Any) -> float:
        """Seconds of reading every row once, tokens beside them."""
        begun, size = time.perf_counter(), 8
        for _ in captured.dataset(self.blocks, size, batches=-(-self.options.rows // size)):
            pass
        return time.perf_counter() - begun


def _section(result: Result) -> Section:
    rows = []
    for model in result["models"]:
        kind = "random LLaMA" if model["model"] is None else Path(model["model"]).name
        name = f"{kind}, {words.count(model['parameters'])}"
        speed = {key: shown(model[key], lambda v: f"{words.count(v)}/s") for key in ("forward", "capture", "read")}
        shares = ("share", "share_with_start", "share_of_processor")
        share = {key: shown(model[key], lambda v: f"{v:.2f}") for key in shares}
        rows += [
            (name, "transformers, blocks alone", speed["forward"], "1", "1"),
            ("", "capture into a fresh store", speed["capture"], share["share"], share["share_of_processor"]),
            ("", "the same, from the call to its return", "", share["share_with_start"], ""),
            ("", "reading what was captured", speed["read"], shown(model["read_share"], lambda v: f"{v:.0f}"), ""),
        ]
    text = (
        f"Models without their heads, in {result['precision']}; {result['rows']} rows of {result['seq_len']} tokens "
        f"(random ones; of a named checkpoint those of text) through all blocks, {result['batch_size']} at a time, "
        f"stored as {result['codec']} with fsync, read in shuffled order with every digest checked; "
        f"{result['rounds']} rounds, in each of which all three take turns: median (smallest to largest), shares "
        "within a round. From call to return counts what does not grow with the rows too: opening checkpoint and "
        "data, loading the weights, finishing the boundary. Of processor time counts every thread from the first row "
        "to the return, and does not depend on what else the machine does."
    )
    header = ("model, parameters", "what", "tokens", "of the bare forward pass", "of its processor time")
    return Section("capture", "Capturing hidden states", text, table(header, rows), result["device"], result)


if __name__ == "__main__":
    sys.exit(main())
