"""On paper: a large rack on many GPUs, what it takes of compute, wire and disk, and what failures cost.

    python -m benchmarks.scale [--gpus 8,64,1000] [--write]

Every figure follows from the preset, a machine's rates and the figures of one machine that `docs/benchmarks.md` has; a
discrete simulation, step by step and failure by failure, checks what the formulas say of lost time. No GPU is asked.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arithmetic import work_of
from benchmarks.common import Result, numbers, overrides, parser, positive, refuse, run_command, table
from benchmarks.document import Section
from stackwise import words
from stackwise.config import StackWiseConfig
from stackwise.pipeline.planning.machines import MACHINES, Machine
from stackwise.training.ranks import BUCKET

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
DAY = 86400.0


@dataclass(frozen=True)
class Site:
    """Where it is trained; each of these is assumed, with where it comes from.

    Args:
        gpus: How many.
        machine: One GPU, with a share of its host.
        per_host: GPUs of a host.
        near: Bytes a second between GPUs of a host, one way (NVLink of H100 and H200).
        far: Bytes a second between hosts for each GPU, one way (400 Gb/s InfiniBand for each).
        latency: Seconds of a hop.
        disks: NVMe drives of a host.
        gpu_hours: Between two failures of a GPU or what belongs to it (Llama 3, arXiv 2407.21783, section 3.3.4: 419 in
            54 days of 16,384 GPUs).
        spread: Standard deviation of a rank's step, of its mean.
    """

    gpus: int
    machine: Machine = field(default_factory=lambda: MACHINES["h200"])
    per_host: int = 8
    near: float = 450e9
    far: float = 50e9
    latency: float = 20e-6
    disks: int = 4
    gpu_hours: float = 54 * 24 * 16384 / 419
    spread: float = 0.02

    @property
    def hosts(self) -> int:
        """How many."""
        return -(-self.gpus // self.per_host)

    @property
    def link(self) -> float:
        """Bytes a second of the slowest link of a ring over all GPUs, for each of them."""
        return self.near if self.hosts == 1 else self.far

    @property
    def failures(self) -> float:
        """A second."""
        return self.gpus / self.gpu_hours / 3600


@dataclass(frozen=True)
class Measured:
    """What one machine has shown (docs/benchmarks.md), and what is taken over from it.

    Args:
        again: Seconds from the command that starts a run again to its first step, beside reading its state.
        found: Seconds in which a rank that was killed has ended its group.
    """

    again: float = 3.1
    found: float = 2.0


@dataclass(frozen=True)
class Training:
    """What is trained.

    Args:
        blocks: Of a stage.
        rows: Of a step.
        window: Tokens that go through every stage before the next ones do.
        minutes: Between checkpoints.
    """

    config: StackWiseConfig
    blocks: int = 7
    seq_len: int = 2048
    rows: int = 8000
    tokens: float = 1.4e12
    window: float = 1e9
    minutes: float = 10.0

    @property
    def parameters(self) -> int:
        """Of a stage with its head."""
        model = self.config.model
        return self.blocks * model.block_parameters + self.vocabulary * model.d_model

    @property
    def vocabulary(self) -> int:
        """Its size."""
        return self.config.model.vocab_size or 32000

    @property
    def stages(self) -> float:
        """How many there are, the last one by its part."""
        return self.config.model.n_blocks / self.blocks


@dataclass(frozen=True)
class Estimate:
    """A stage on a site; seconds are of a step, unless they say otherwise.

    Args:
        compute: Of the slowest rank.
        ordered: Of gradients added up in the order of microbatches.
        plain: Of one all-reduce.
        narrow: The same in 16 bits.
        reading: Reading the boundary, beside the rest.
        forward: For each token: writing the next boundary, where each host writes its part.
        whole: The same where each host writes all of it.
        stopped: Of a checkpoint: while it is copied.
        written: Of a checkpoint: until it is on the disk.
        again: After a failure: until the first step.
        interval: Between two checkpoints.
    """

    site: Site
    training: Training
    compute: float
    ordered: float
    plain: float
    narrow: float
    reading: float
    forward: float
    whole: float
    stopped: float
    written: float
    again: float
    interval: float

    def step(self, wire: float) -> float:
        """Seconds of a step; gradients travel once all are computed."""
        return max(self.compute + wire, self.reading)

    def lost(self, wire: float) -> float:
        """Seconds lost for each second of training: checkpoints, work done again, restarts."""
        every = self.interval + self.step(wire) / 2  # it is taken at the end of the step in hand
        again = self.site.failures * (every / 2 + self.written + self.step(wire) / 2 + self.again)
        return (self.stopped / every + again) / (1 - again)

    def days(self, wire: float, forward: float) -> dict[str, float]:
        """Days of the whole training, by what they go to."""
        training, seen = self.training, self.training.tokens * self.training.stages
        steps = seen / (training.rows * training.seq_len)
        parts = {"compute": steps * self.compute, "wire": steps * (self.step(wire) - self.compute)}
        parts["boundaries"] = seen * forward
        parts["lost"] = self.lost(wire) * sum(parts.values())
        return {name: seconds / DAY for name, seconds in parts.items()}


def largest_of(count: int) -> float:
    """The mean of the largest of so many standard normal draws (Blom 1958)."""
    return statistics.NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def estimate(training: Training, site: Site, measured: Measured = Measured()) -> Estimate:
    """What a stage takes.

    Raises:
        UsageError: The GPUs do not divide a step's rows.
    """
    N, model, machine = site.gpus, training.config.model, site.machine
    if training.rows % N:
        raise refuse(f"{training.rows} rows of a step are not divided by {N} GPUs", "set --rows")
    mine = training.rows // N
    microbatches = mine // max(size for size in range(1, 9) if mine % size == 0)
    tokens = training.rows * training.seq_len
    vocabulary = training.vocabulary
    work = work_of(model, training.blocks, training.seq_len, vocabulary, causal=False, trained_head=True)
    alone = work.training(tokens, tokens // 2) / (N * machine.rate)
    gradients, ring = 4.0 * training.parameters, (N - 1) / N
    hops = -(-training.parameters // BUCKET) * 2 * math.ceil(math.log2(N)) * site.latency
    row = 2.0 * model.d_model  # bytes of a token's activations
    disk = machine.disk

    def forward(hosts: int) -> float:
        """Seconds for each token, where so many hosts each have a part: reading, computing, writing go on together."""
        on_disk = row * max(1 / disk.read, 1 / disk.write) / (site.disks * hosts)
        return max(on_disk, work.forward(1) / (min(N, hosts * site.per_host) * machine.rate))

    state = 12.0 * training.parameters  # weights and two moments
    written = state / disk.write
    return Estimate(
        site,
        training,
        compute=alone * (1 + site.spread * largest_of(N)),
        ordered=ring * gradients * (microbatches + 1) / site.link + microbatches * hops,
        plain=2 * ring * gradients / site.link + hops,
        narrow=ring * gradients / site.link + hops,
        reading=row * tokens / site.hosts / (disk.read * site.disks),
        forward=forward(site.hosts),
        whole=forward(1),
        stopped=state / machine.host,
        written=written,
        again=measured.found + measured.again + state / disk.read + state / site.link,
        interval=max(60 * training.minutes, written),
    )


def simulate(stage: Estimate, wire: float, failures: int, seed: int) -> float:
    """Seconds lost for each second of training, over so many failures: each step, checkpoint and failure in its turn.

    A rank's step is drawn from a normal distribution, a step is as long as its slowest rank's, failures come as a
    Poisson process; the newest checkpoint that is whole is what is left after one.
    """
    draw, site = np.random.default_rng(seed), stage.site
    alone = stage.compute / (1 + site.spread * largest_of(site.gpus))
    slowest = [statistics.NormalDist().inv_cdf(float(u)) for u in draw.random(5000) ** (1 / site.gpus)]
    lengths = alone * (1 + site.spread * np.asarray(slowest)) + wire
    elapsed, kept = 0.0, 0.0  # kept: seconds that the steps which count took
    for _ in range(failures):
        until = draw.exponential(1 / site.failures)
        count = int(until / (alone + wire) * 1.05) + 50
        steps = draw.choice(lengths, count)
        ends = np.cumsum(steps)  # seconds of training alone
        clock, saved, at = 0.0, 0.0, 0.0
        pending = math.inf, 0.0  # when the newest checkpoint is whole, and of which moment it is
        while True:
            due = int(np.searchsorted(ends, at + stage.interval))  # the step in hand when a checkpoint is due
            end = float(ends[min(due, count - 1)]) - at
            if pending[0] <= min(clock + end, until):
                saved, pending = pending[1], (math.inf, 0.0)
            if clock + end >= until:
                break
            clock, at = clock + end + stage.stopped, float(ends[due])
            pending = clock + stage.written, at
        kept += saved
        elapsed += until + stage.again
    return elapsed / kept - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("scale", arguments, lambda given: _section(measure(_parser().parse_args(given))), PAGE)


def _parser() -> argparse.ArgumentParser:
    made = parser("scale", __doc__)
    add = made.add_argument
    add("--preset", default="llama-70b", help="the rack; default llama-70b")
    add("--gpus", type=numbers, default=[8, 64, 1000], metavar="N,N", help="how many; default 8,64,1000")
    add("--machine", default="h200", choices=sorted(MACHINES), help="the GPU; default h200")
    add("--blocks", type=positive, default=7, metavar="N", help="of a stage; default 7")
    add("--rows", type=positive, default=8000, metavar="N", help="of a step; default 8000")
    add("--failures", type=positive, default=300, metavar="N", help="that the simulation goes through; default 300")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Compute it.

    Raises:
        UsageError: A preset or numbers that do not go together.
    """
    config = StackWiseConfig.from_preset(options.preset, overrides(options.overrides))
    training = Training(config, options.blocks, rows=options.rows)
    sites = [Site(gpus, MACHINES[options.machine]) for gpus in options.gpus]
    return {
        "preset": options.preset,
        "training": {"blocks": training.blocks, "rows": training.rows, "seq_len": training.seq_len}
        | {"tokens": training.tokens, "window": training.window, "parameters": training.parameters},
        "machine": options.machine,
        "reached": sites[0].machine.reached,
        "failures": options.failures,
        "window_bytes": 2.0 * config.model.d_model * training.window,
        "sites": [_site(estimate(training, site), options.failures) for site in sites],
    }


def _site(stage: Estimate, failures: int) -> dict[str, Any]:
    site = stage.site
    return {
        "gpus": site.gpus,
        "hosts": site.hosts,
        **{name: getattr(stage, name) for name in ("compute", "ordered", "plain", "narrow", "reading")},
        **{name: getattr(stage, name) for name in ("stopped", "written", "again", "interval")},
        "failures_a_day": site.failures * DAY,
        "lost": stage.lost(stage.plain),
        "simulated": simulate(stage, stage.plain, failures, seed=0),
        "days": stage.days(stage.plain, stage.forward),
        "days_whole": stage.days(stage.plain, stage.whole),
        "days_ordered": stage.days(stage.ordered, stage.forward),
    }


def _section(result: Result) -> Section:
    sites, training = result["sites"], result["training"]

    def row(name: str, form: Callable[[dict[str, Any]], str]) -> list[str]:
        return [name, *(form(site) for site in sites)]

    def wire(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda one: f"{words.duration(one[key])} ({words.percent(one[key] / (one['compute'] + one[key]))})"

    def total(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda one: f"{sum(one[key].values()):,.0f}"

    steps = table(
        ["a step", *(f"{site['gpus']:,} GPUs" for site in sites)],
        [
            row("hosts", lambda one: f"{one['hosts']:,}"),
            row("both passes, the slowest rank", lambda one: words.duration(one["compute"])),
            row("gradients, in the order of microbatches", wire("ordered")),
            row("gradients, one all-reduce", wire("plain")),
            row("the same in 16 bits", wire("narrow")),
            row("reading the boundary, beside it", lambda one: words.duration(one["reading"])),
        ],
    )
    lost = table(
        ["failures", *(f"{site['gpus']:,} GPUs" for site in sites)],
        [
            row("a day", lambda one: f"{one['failures_a_day']:.2f}"),
            row("a checkpoint: training pauses", lambda one: words.duration(one["stopped"])),
            row("a checkpoint: on the disk after", lambda one: words.duration(one["written"])),
            row("from a failure to the next step", lambda one: words.duration(one["again"])),
            row("time lost, by the formula", lambda one: f"{100 * one['lost']:.2f}%"),
            row("time lost, simulated", lambda one: f"{100 * one['simulated']:.2f}%"),
        ],
    )
    days = table(
        ["days of the whole training", *(f"{site['gpus']:,} GPUs" for site in sites)],
        [
            *(
                row(name, lambda one, key=key: f"{one['days'][key]:,.1f}")  # type: ignore[misc]
                for name, key in (
                    ("both passes", "compute"),
                    ("wire, one all-reduce", "wire"),
                    ("writing boundaries, each host its ranks' rows", "boundaries"),
                    ("failures and checkpoints", "lost"),
                )
            ),
            row("all", total("days")),
            row("all, gradients in the order of microbatches", total("days_ordered")),
            row("all, where every host needs all rows", total("days_whole")),
        ],
    )
    window = words.size(result["window_bytes"])
    text = (
        f"The preset {result['preset']} in stages of {training['blocks']} blocks "
        f"({training['parameters'] / 1e9:.2f} billion parameters with the head), {training['tokens'] / 1e12:g} "
        f"trillion tokens, {training['rows']:,} rows of {training['seq_len']:,} tokens a step, each GPU with the whole "
        f"stage (`parallel.data`). {result['machine']}: {words.percent(result['reached'])} of its rated products are "
        "taken to be reached; 8 GPUs a host, 450 GB/s between them, 50 GB/s for each between hosts, 4 drives of 7 GB/s "
        "reading and 5 GB/s writing; a rank's step varies by 2%; a failure every 50,700 GPU hours, as training Llama 3 "
        "had (arXiv 2407.21783, section 3.3.4). Measured on one machine (docs/benchmarks.md): 3.1 s until a run that "
        "is started again takes its first step, 2 s until the ranks of one that was killed have ended; to read a "
        f"checkpoint comes on top. Windows of {training['window'] / 1e9:g} billion tokens: a boundary takes {window}, "
        "and two are there during a handoff. A checkpoint every 10 minutes, by rank 0. The simulation goes through "
        f"{result['failures']} failures, step by step."
    )
    return Section("scale", "On paper: 8, 64, 1,000 GPUs", text, "\n\n".join([steps, lost, days]), "computed", result)


if __name__ == "__main__":
    sys.exit(main())
