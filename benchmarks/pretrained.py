"""A pretrained model by its size: the first step of a run from it, and evaluating and exporting it in little memory.

    python -m benchmarks.pretrained [--sizes 0.1,1,7] [--limit 4]

For each size a LLaMA of random bf16 weights is written as a checkpoint (7 billion: 13.5 GB on the disk, twice while
it is exported). Then `stackwise run --init` goes until its first step, two blocks a stage; `eval --model` scores some
rows; `export --model` writes the model anew, and its tensors are compared. The last two stand under a limit of memory,
a control group's (version 1), which counts every process of the command and the page cache too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Result, parser, positive, refuse, run_command, say, table
from benchmarks.document import Section
from stackwise import words
from stackwise.errors import UsageError

SIZES: dict[str, tuple[int, int, int, int]] = {
    "0.1": (768, 2048, 12, 12),
    "1": (2048, 5632, 22, 32),
    "7": (4096, 11008, 32, 32),
}
"""Width, width of the feed-forward, blocks and heads, by billions of parameters."""
VOCABULARY = 32_000
SEQ_LEN, ROWS = 128, 8

GROUPS = Path("/sys/fs/cgroup/memory")
ENTER = (
    "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid())); "
    "os.execv(sys.executable, [sys.executable, '-m', 'stackwise', *sys.argv[2:]])"
)
"""Joins a control group, then becomes the command: what it starts is in the group too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("pretrained", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("pretrained", __doc__)
    add = made.add_argument
    add("--sizes", default="0.1,1,7", metavar="N,…", help=f"billions of parameters, of {', '.join(SIZES)}; default all")
    add("--limit", type=positive, default=4, metavar="N", help="GiB of memory for eval and export; default 4")
    add("--dir", metavar="DIR", help="where the files go; default: the system's temporary directory")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Measure it."""
    sizes = options.sizes.split(",")
    if unknown := [size for size in sizes if size not in SIZES]:
        raise refuse(f"--sizes: {unknown[0]} is none of {', '.join(SIZES)}", "choose some of them")
    models = []
    with tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=options.dir) as name:
        for size in sizes:
            root = Path(name) / size
            say(f"{size} billion parameters: writing the checkpoint")
            parameters, nbytes, part = _checkpoint(root / "model", *SIZES[size])
            text = "".join(chr(97 + i * i % 26) for i in range(SEQ_LEN * ROWS * 4))
            (root / "text.txt").write_text(text)
            (root / "rows.txt").write_text(text[: SEQ_LEN * ROWS])
            models.append(
                {"size": size, "parameters": parameters, "bytes": nbytes, "largest_part": part}
                | _first_step(root)
                | _limited(root, options.limit)
            )
            shutil.rmtree(root)
    return {"device": "cpu", "limit": options.limit, "seq_len": SEQ_LEN, "models": models}


def _checkpoint(directory: Path, width: int, inner: int, blocks: int, heads: int) -> tuple[int, int, int]:
    """A LLaMA of random weights: its parameters, its bytes, and those of its largest part."""
    import torch
    from safetensors.torch import save_file

    from stackwise.data.tokenizer import bytes_tokenizer

    directory.mkdir(parents=True)
    drawn = torch.empty(1 << 24).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).bfloat16()

    def weight(rows: int, columns: int) -> torch.Tensor:
        repeats = -(-rows * columns // len(drawn))
        return drawn.repeat(repeats)[: rows * columns].view(rows, columns)

    def norm() -> torch.Tensor:
        return torch.ones(width, dtype=torch.bfloat16)

    ends = {
        "model.embed_tokens.weight": weight(VOCABULARY, width),
        "lm_head.weight": weight(VOCABULARY, width),
        "model.norm.weight": norm(),
    }
    where, total, count = dict.fromkeys(ends, "ends.safetensors"), 0, 0
    save_file(ends, directory / "ends.safetensors", metadata={"format": "pt"})
    block_bytes = 0
    for index in range(blocks):
        prefix = f"model.layers.{index}."
        tensors = {f"self_attn.{name}_proj.weight": weight(width, width) for name in "qkvo"}
        tensors |= {f"mlp.{name}_proj.weight": weight(inner, width) for name in ("gate", "up")}
        tensors |= {"mlp.down_proj.weight": weight(width, inner)}
        tensors |= {"input_layernorm.weight": norm(), "post_attention_layernorm.weight": norm()}
        named = {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, directory / f"block-{index:03d}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(named, f"block-{index:03d}.safetensors")
        block_bytes = sum(tensor.nbytes for tensor in named.values())
    total = sum(tensor.nbytes for tensor in ends.values()) + blocks * block_bytes
    count = total // 2
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where})
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": heads, "max_position_embeddings": SEQ_LEN, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(bytes_tokenizer().json)
    return count, total, max(VOCABULARY * width * 2, block_bytes)


def _first_step(root: Path) -> dict[str, Any]:
    """Seconds until the first step of a run from the checkpoint, two blocks a stage, and the worker's peak memory.

    Twice: weights are hashed the first time, and remembered.
    """
    found: dict[str, Any] = {}
    for key in ("first", "again"):
        settings = {
            "training.mode": "{name: blockwise, block_size: 2}",
            "training.steps": "3",
            "training.batch_size": "1",
        }
        settings |= {"data.paths": f"[{root / 'text.txt'}]", "training.seq_len": str(SEQ_LEN), "precision": "fp32"}
        settings |= {"data.cache_dir": str(root / "cache"), "evaluation.samples": "1", "data.held_out": "0.2"}
        options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
        command = [sys.executable, "-m", "stackwise", "run", "--init", str(root / "model"), "--json", *options]
        command += ["--run", str(root / key)]
        begun = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "step":
                    found |= {f"{key}_seconds": time.perf_counter() - begun, "step_memory": event["memory"]}
                    process.send_signal(signal.SIGTERM)
                    break
            _, why = process.communicate()
        shutil.rmtree(root / key, ignore_errors=True)
        if f"{key}_seconds" not in found:
            raise UsageError(f"the run did not come to a step: {why.strip()[-300:]}", hint=" ".join(command))
        say(f"  to the first step: {found[f'{key}_seconds']:.0f} s")
    return found


@contextlib.contextmanager
def _group(gib: int) -> Iterator[Path | None]:
    """A control group that holds its processes to so many GiB; None: there are none here."""
    group = GROUPS / f"stackwise-benchmark-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(gib << 30))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def _limited(root: Path, gib: int) -> dict[str, Any]:
    """Evaluation and export under the limit: seconds, and the memory that no page cache is (peak of each process)."""
    found: dict[str, Any] = {}
    commands = {
        "eval": ["eval", "--model", str(root / "model"), "--data", str(root / "rows.txt"), "--json"],
        "export": ["export", "--model", str(root / "model"), "--out", str(root / "out"), "--json"],
    }
    with _group(gib) as group:
        for name, command in commands.items():
            begun, start = time.perf_counter(), ["-m", "stackwise"] if group is None else ["-c", ENTER, str(group)]
            made = subprocess.run([sys.executable, *start, *command], capture_output=True, text=True, check=False)
            if made.returncode:
                raise UsageError(f"stackwise {name} ended with {made.returncode}: {made.stderr.strip()[-300:]}")
            found[f"{name}_seconds"] = time.perf_counter() - begun
            say(f"  {name}: {found[f'{name}_seconds']:.0f} s")
        found["limited"] = group is not None
    stored = _tensors(root / "model")
    found["equal"] = stored == _tensors(root / "out")
    return found


def _tensors(directory: Path) -> dict[str, str]:
    """A digest of every tensor, by name."""
    import torch
    from safetensors import safe_open

    from stackwise.identity import digest

    digests = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                digests[name] = digest(file.get_tensor(name).view(torch.uint8).numpy().data)
    return digests


def _section(result: Result) -> Section:
    def seconds(value: float) -> str:
        return f"{value:.0f} s"

    body = table(
        ("parameters", "checkpoint", "largest part", "first step", "again", "worker's peak", "eval", "export", "equal"),
        [
            (
                words.count(model["parameters"]),
                words.size(model["bytes"]),
                words.size(model["largest_part"]),
                seconds(model["first_seconds"]),
                seconds(model["again_seconds"]),
                words.size(model["step_memory"]),
                seconds(model["eval_seconds"]),
                seconds(model["export_seconds"]),
                "yes" if model["equal"] else "no",
            )
            for model in result["models"]
        ],
    )
    limited = all(model["limited"] for model in result["models"])
    limit = f"under a limit of {result['limit']} GiB, page cache included" if limited else "without a limit of memory"
    text = (
        "LLaMA of random bf16 weights. First step: from `stackwise run --init` to the first step of stage 0 (front, "
        f"two blocks, head; fp32 with AdamW, one row of {result['seq_len']} tokens), the first time with every weight "
        f"hashed, then with the digests remembered. `eval --model` of {ROWS} rows and `export --model` {limit}. Equal: "
        "every tensor of the export, name, dtype and bytes."
    )
    return Section("pretrained", "Pretrained models by size", text, body, result["device"], result)


if __name__ == "__main__":
    sys.exit(main())
