"""One stage of any preset, trained from a real activation store on whatever device is there.

    python -m benchmarks.stage                                             # stages on a CPU, llama-70b on a GPU
    python -m benchmarks.stage --preset llama-70b --blocks 1,7 --batch-size 1,8 --write

Rounds of training steps and a large matrix product take turns; then the forward-only pass writes the boundary above.
Several numbers with commas between measure every combination, each in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import Result, numbers, overrides, parser, positive, refuse, run_command, say, shown, table
from benchmarks.document import Section
from stackwise import words
from stackwise.config import StackWiseConfig

if TYPE_CHECKING:
    from benchmarks.setting import Setting

ROUNDS = 5
REFUSED = 2
"""Exit code of a shape that does not fit."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("stage", arguments, _measure)


def _measure(arguments: Sequence[str]) -> Section:
    options = _parser().parse_args(arguments)
    if len(options.blocks or [0]) * len(options.batch_size or [0]) == 1:
        return _section([measure(options)], [])
    return _section(*_each(options, list(arguments)))


def _parser() -> argparse.ArgumentParser:
    made = parser("stage", __doc__)
    add = made.add_argument
    add("--preset", metavar="NAME", help="whose stage; default: llama-70b on a GPU, stages elsewhere")
    add("--blocks", type=numbers, metavar="N", help="blocks in the stage; default: the preset's")
    add("--steps", type=positive, default=20, metavar="N", help="timed steps in all, in five rounds; default 20")
    add("--batch-size", type=numbers, metavar="B", help="rows in a microbatch; default: the preset's")
    add("--accumulation", type=positive, metavar="N", help="microbatches a step; default: the preset's rows a step")
    add("--seq-len", type=positive, metavar="S", help="tokens in a row; default: the preset's")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--store-bytes", type=positive, default=8 << 30, metavar="N", help="most that two boundaries take; 8 GiB")
    add("--dir", metavar="DIR", help="where the temporary store goes; default: the system's temporary directory")
    add("--profile", metavar="FILE", help="profile one more step: FILE.json gets a trace, any other name a table")
    return made


def _each(options: argparse.Namespace, arguments: list[str]) -> tuple[list[Result], list[str]]:
    """Every combination in a process of its own, so that peak memory is its own; also those that do not fit."""
    results, refused = [], []
    base = [word for word in arguments if word not in ("--json", "--write")]
    for blocks, batch in itertools.product(options.blocks or [None], options.batch_size or [None]):
        own = [*(["--blocks", str(blocks)] if blocks else []), *(["--batch-size", str(batch)] if batch else [])]
        say(f"measuring {' '.join(own)}")
        command = [sys.executable, "-m", "benchmarks.stage", *base, *own, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            results.append(json.loads(done.stdout))
        elif done.returncode == REFUSED:
            refused.append(" ".join(own))
        else:
            raise refuse(f"{' '.join(own)} failed with exit code {done.returncode}", "its message is above")
    if not results:
        raise refuse("nothing that was asked for fits", "each refusal is above")
    return results, refused


def choose(options: argparse.Namespace) -> Setting:
    """The stage that the options name, on the device that is there."""
    import torch

    from benchmarks.setting import Setting, resolved
    from stackwise.pipeline.device import resolve_device

    device = resolve_device(options.device)
    preset = options.preset or ("llama-70b" if device.type == "cuda" else "stages")
    config = StackWiseConfig.from_preset(preset, overrides(options.overrides))
    training = config.training
    rows = training.batch_size * training.accumulation
    training.batch_size = (options.batch_size or [training.batch_size])[0]
    training.accumulation = options.accumulation or max(1, rows // training.batch_size)
    training.seq_len = options.seq_len or training.seq_len
    blocks = (options.blocks or [config.partition[0][1] + 1])[0]
    if blocks > config.model.n_blocks:
        raise refuse(f"--blocks {blocks}: preset {preset} has {config.model.n_blocks}", "name fewer")
    torch.manual_seed(config.seed)
    return Setting(resolved(config, device), blocks, device, options.store_bytes)


def measure(options: argparse.Namespace) -> Result:
    """Measure one setting."""
    import torch

    from benchmarks import rounds
    from benchmarks.workbench import fresh_model, workbench
    from stackwise.pipeline.device import describe, peak_memory

    setting = choose(options)
    config, device = setting.config, setting.device
    with tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=options.dir) as name:
        estimate = setting.check(Path(name))
        with workbench(setting, Path(name)) as bench:
            begun = time.perf_counter()
            model = fresh_model(setting)
            built = time.perf_counter() - begun
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            result: Result = {
                "preset": config.name,
                "device": describe(device)["name"],
                "device_type": device.type,
                "precision": config.precision,
                "deterministic": config.deterministic,
                "compile": config.training.compile,
                "blocks": setting.blocks,
                "batch_size": config.training.batch_size,
                "accumulation": config.training.accumulation,
                "seq_len": config.training.seq_len,
                "d_model": config.model.d_model,
                "parameters": sum(p.numel() for p in model.parameters()),
                "rows": bench.rows,
                "build_seconds": built,
                "memory_estimate": estimate,
            }
            per_round = max(1, round(options.steps / ROUNDS))
            result["training"] = rounds.training(bench, model, ROUNDS, per_round, options.profile)
            result["peak_memory_bytes"] = peak_memory(device)
            result["forward"] = rounds.forward(bench, model)
    return result


def _section(results: list[Result], refused: list[str]) -> Section:
    from benchmarks.arithmetic import FORMULA

    first = results[0]
    gpu = first["device_type"] != "cpu"
    setup = f"Precision {first['precision']}" + (", deterministic kernels" if gpu and first["deterministic"] else "")
    text = (
        f"{setup}{', blocks compiled' if first['compile'] else ''}. Rows a step are microbatch x accumulation. Medians "
        f"of {ROUNDS} rounds, smallest to largest in brackets. The matrix product is "
        f"{first['training']['reference']}, timed on the same device before and after each round; the share is of the "
        f"mean of the two. {_memory_note(first)} Writing the boundary above the stage is one forward-only pass over "
        f"{words.plural(first['rows'], 'row')}, reading and fsync included. {FORMULA}"
        + (f" Refused, as it does not fit: {'; '.join(refused)}." if refused else "")
    )
    where = "GPU" if gpu else "CPU"
    columns = [_column(result) for result in results]
    header, *rows = ([name, *(column[name] for column in columns)] for name in columns[0])
    return Section(
        f"stage on a {where}",
        f"One stage, trained from the store ({where})",
        text,
        table(header, rows),
        first["device"] if gpu else "CPU",
        first if len(results) == 1 else {"settings": results},
    )


def _memory_note(result: Result) -> str:
    if result["device_type"] == "cuda":
        return "Peak memory is what the process held on the GPU at most (torch.cuda.max_memory_allocated)."
    return "Peak memory is the process's largest resident size, Python and torch included."


def _column(result: Result) -> dict[str, str]:
    """What the table says of one setting, by the name of the row."""
    training, forward = result["training"], result["forward"]

    def three(value: float) -> str:
        return f"{value:.3g}"

    return {
        "stage": f"{result['preset']}, {words.plural(result['blocks'], 'block')}",
        "parameters trained": words.count(result["parameters"]),
        "rows a step x tokens": f"{result['batch_size']} x {result['accumulation']} x {result['seq_len']:,}",
        "seconds a step": shown(training["seconds_per_step"], three),
        "tokens/s": shown(training["tokens_per_second"], words.count),
        "TFLOP/s": shown(training["tflops"], three),
        "the matrix product's TFLOP/s": shown(training["reference_tflops"], three),
        "share of the matrix product's": shown(training["share"], words.percent),
        "share of the time waiting for data": shown(training["wait_share"], words.percent),
        "peak memory": words.size(result["peak_memory_bytes"]),
        "memory that a run's check foresees": words.size(result["memory_estimate"]),
        "writing the boundary above, tokens/s": words.count(forward["tokens_per_second"]),
        "writing the boundary above, bytes/s": f"{words.size(forward['bytes_per_second'])}/s",
        "writing the boundary above, TFLOP/s": three(forward["tflops"]),
    }


if __name__ == "__main__":
    sys.exit(main())
