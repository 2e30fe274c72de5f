"""Curricula against random order: held-out bits per byte of the standard library's source, three seeds.

`python -m benchmarks.curriculum --out DIR [--steps N]`; where it was interrupted it goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ORDERS = {
    "random": "null",
    "rarity, sqrt": "{by: rarity, competence: sqrt}",
    "rarity, linear": "{by: rarity, competence: linear}",
    "compression, sqrt": "{by: compression, competence: sqrt}",
}
SEEDS = (0, 1, 2)


def command(*arguments: str) -> str:
    """What a command of StackWise prints.

    Raises:
        CalledProcessError: It failed.
    """
    run = [sys.executable, "-m", "stackwise", *arguments]
    return subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout


def bits_per_byte(out: Path, order: str, seed: int, steps: int) -> float:
    """Of one run, which goes on where it was interrupted."""
    run = str(out / f"{'-'.join(order.replace(',', '').split())}-{seed}")
    library = Path(sysconfig.get_path("stdlib"))
    values = {
        "data.paths": json.dumps([str(library / part) for part in ("asyncio", "email", "json", "unittest", "xml")]),
        "store.path": str(out / "store"),
        "seed": seed,
        "training.objective": "clm",
        "training.mode": "end_to_end",
        "training.steps": steps,
        "training.batch_size": 8,
        "training.seq_len": 128,
        "training.curriculum": ORDERS[order],
        "model.d_model": 64,
        "model.architecture.n_stacks": 2,
    }
    command("run", "--preset", "micro", "--run", run, *(x for k, v in values.items() for x in ("-o", f"{k}={v}")))
    return float(json.loads(command("eval", "--run", run, "--json"))["bits_per_byte"])


def main() -> None:
    """Run all, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    results: dict[str, Any] = {order: [] for order in ORDERS}
    print(
        "| order of rows | held-out bits per byte, seeds 0, 1, 2 | mean | mean difference from random |",
        "|---|---|---|---|",
        sep="\n",
    )
    for order, values in results.items():
        values += [bits_per_byte(arguments.out, order, seed, arguments.steps) for seed in SEEDS]
        difference = statistics.mean(a - b for a, b in zip(values, results["random"], strict=True))
        shown = ", ".join(f"{value:.3f}" for value in values)
        print(f"| {order} | {shown} | {statistics.mean(values):.3f} | {difference:+.3f} |", flush=True)
    (arguments.out / "curriculum.json").write_text(json.dumps({"steps": arguments.steps, "bits_per_byte": results}))


if __name__ == "__main__":
    main()
