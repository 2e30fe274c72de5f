"""What an experiment is judged by: ahead of a dense rack of equal training, by more than chance, or it fails."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stackwise.errors import UsageError

Result = Mapping[str, Any]

NOISE = 0.01
"""A loss this share of ln V below a uniform guess, or less, is that of a model that has learned nothing."""
FLOPS = 0.02
"""Share of dense training's products by which an experiment may be above and still count as equal."""
LEAST_USED = 0.05
"""Share of the tokens that the least used expert gets where all are in use, as the seed of this module has it."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on an experiment.

    Args:
        loss: Mean held-out cross entropy over its seeds, in nats; dense: that of the dense racks.
        gains: By seed how far it is below the dense rack of that seed, in nats; empty: they are not paired.
        spread: The gains' standard deviation over seeds; None: one seed has none.
        learned_nothing: Its loss is within noise of a uniform guess, ln V.
        reason: Why it passes or fails.
        least_used: Share of the least used expert, the lowest over blocks and seeds; None: not known.
        tokens_per_second: Mean over seeds; None: not known.
    """

    passed: bool
    reason: str
    loss: float
    dense: float
    gains: tuple[float, ...]
    spread: float | None
    learned_nothing: bool
    least_used: float | None
    entropy: float | None
    tokens_per_second: float | None


def evaluate_success_criteria(
    results: Mapping[str, Result | Sequence[Result]],
    dense_baseline_loss: float | Sequence[float],
    dense_flops: float | None = None,
    *,
    quiet: bool = False,
) -> dict[str, Verdict]:
    """Judge experiments, and print each verdict.

    Both are compared seed by seed: a seed draws weights and rows for both alike, and what it does to both says nothing
    of either. An experiment passes where it is below the dense rack with every seed, in the mean by more than the
    standard deviation of these gains, and its training took no more products. Anything that is not known (one seed, no
    products) lets it fail, as does a rack, its own or the dense one, that has learned nothing.

    Args:
        results: By name what `run_single_experiment` gave, of one seed or several.
        dense_baseline_loss: Held-out cross entropy of the dense rack in nats, of the same seeds in the same order.
        dense_flops: Products of the dense rack's training.
        quiet: Print nothing.

    Raises:
        UsageError: No results, or none of the dense rack.
    """
    dense = [dense_baseline_loss] if isinstance(dense_baseline_loss, int | float) else list(dense_baseline_loss)
    if not dense:
        raise UsageError("dense_baseline_loss: an experiment is judged beside a dense rack: give its losses")
    verdicts = {}
    for name, result in results.items():
        runs = [result] if isinstance(result, Mapping) else list(result)
        if not runs:
            raise UsageError(f"{name}: there are no results of it")
        verdicts[name] = _verdict(runs, dense, dense_flops)
        if not quiet:
            print(_line(name, verdicts[name]))
    return verdicts


def _verdict(runs: Sequence[Result], dense: Sequence[float], dense_flops: float | None) -> Verdict:
    losses = [math.nan if run["loss"] is None else float(run["loss"]) for run in runs]
    loss, other = sum(losses) / len(losses), sum(dense) / len(dense)
    gains = tuple(o - one for one, o in zip(losses, dense, strict=True)) if len(losses) == len(dense) else ()
    spread = statistics.stdev(gains) if len(gains) > 1 and all(map(math.isfinite, gains)) else None
    uniform = math.log(runs[0]["vocab_size"])
    flops = [run.get("flops") for run in runs]

    def nothing(value: float) -> bool:
        # Written so that what is no number has learned nothing.
        return not value < uniform - max(NOISE * uniform, spread or 0.0)

    guess = f"a uniform guess over {runs[0]['vocab_size']:,} ids is {uniform:.4f} nats"
    passed, gain = False, other - loss
    if nothing(loss):
        reason = f"it has learned nothing: its loss is {loss:.4f}, and {guess}"
    elif nothing(other):
        reason = f"the dense rack has learned nothing ({other:.4f}, and {guess}): to be ahead of it says nothing"
    elif not gain > 0:
        reason = f"its loss {loss:.4f} is not below the dense rack's {other:.4f}"
    elif not gains:
        reason = f"{len(losses)} seeds beside {len(dense)} of the dense rack: run both with the same seeds"
    elif spread is None:
        reason = f"{gain:.4f} below the dense rack, but one seed has no spread to judge that by: run several"
    elif not min(gains) > 0:
        behind = sum(not one > 0 for one in gains)
        reason = f"{gain:.4f} below the dense rack in the mean, but not with {behind} of {len(gains)} seeds"
    elif not gain > spread:
        reason = f"{gain:.4f} below the dense rack, no more than the gains' spread of {spread:.4f}"
    elif dense_flops is None or any(value is None for value in flops):
        reason = f"{gain:.4f} below the dense rack, but what training took is not known (flops): not to be compared"
    elif max(map(float, flops)) > (1 + FLOPS) * dense_flops:  # type: ignore[arg-type]
        ratio = max(map(float, flops)) / dense_flops  # type: ignore[arg-type]
        reason = f"{gain:.4f} below the dense rack, but its training took {ratio:.2f} times the products"
    else:
        passed = True
        reason = f"below the dense rack with every seed, by {gain:.4f}, more than the gains' spread of {spread:.4f}"
    used = [block for run in runs for block in _used(run)]
    speeds = [speed for run in runs for speed in run["metrics"].get("tokens_per_sec", []) if speed]
    return Verdict(
        passed=passed,
        reason=reason,
        loss=loss,
        dense=other,
        gains=gains,
        spread=spread,
        learned_nothing=nothing(loss),
        least_used=min((block["least"] for block in used), default=None),
        entropy=min((block["entropy"] for block in used), default=None),
        tokens_per_second=sum(speeds) / len(speeds) if speeds else None,
    )


def _used(run: Result) -> list[dict[str, float]]:
    """How a run's experts were used in the end, block by block."""
    history = run["metrics"].get("expert_stats_history") or []
    return list(history[-1]["experts"].values()) if history else []


def _line(name: str, verdict: Verdict) -> str:
    more = []
    if verdict.least_used is not None:
        idle = "" if verdict.least_used >= LEAST_USED else ", not all are in use"
        more.append(f"least used expert {verdict.least_used:.1%}, entropy {verdict.entropy:.2f}{idle}")
    if verdict.tokens_per_second is not None:
        more.append(f"{verdict.tokens_per_second:,.0f} tokens/s")
    return "; ".join([f"{name}: {'passed' if verdict.passed else 'failed'}: {verdict.reason}", *more])
