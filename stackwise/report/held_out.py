"""Held-out figures as people read them, the same in the terminal and in the report: a table and its footnote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from stackwise import words

_BASELINES = {"unigram": "unigram frequencies"}
_FIRST_STAGE = "first_stage"
"""A baseline that is the first of the stages, and is called so there."""


_OF = {
    "pairs": "pairs; accuracy is the share of them that are ranked right, loss the objective's",
    "answers": "prompts, each answered once; kl in nats an answer, length in tokens",
}


class Row(NamedTuple):
    """A row: what it is about, its figures as text, and what it is: a stage, the last stage, a baseline."""

    name: str
    cells: list[str]
    kind: Literal["stage", "last", "baseline"]


def scored(figures: Mapping[str, Any]) -> bool:
    """Whether there is a loss at some masked share."""
    return any(loss is not None for loss in (figures.get("loss") or {}).values())


def stages_of(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The figures of each stage that has some; of an evaluation without stages, its own."""
    return [stage for stage in result.get("stages") or [] if scored(stage)] or [result]


def baselines_of(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The figures of what the rack is compared with, by name."""
    baselines = (result.get("baselines") or {}).items()
    return {_BASELINES.get(name, name.replace("_", " ")): of for name, of in baselines if name != _FIRST_STAGE}


def depth_name(depth: int, stages: int) -> str:
    """What the rack up to a stage is called."""
    if stages == 1:
        return "the rack"
    return f"stages 0–{depth}" if depth else "first stage only"


def rows(result: Mapping[str, Any]) -> tuple[list[str], list[Row]]:
    """The names of the columns, and a row for each depth and each baseline; what is missing is a dash."""
    if by_name := result.get("figures"):  # of pairs, or of answers: by name
        texts = [f"{value:.4g}" if value is not None else "–" for value in by_name.values()]
        return list(by_name), [Row("the rack", texts, "last")]
    stages = stages_of(result)
    fractions = list(stages[-1].get("loss") or {})

    def cells(figures: Mapping[str, Any]) -> list[str]:
        bits, loss, accuracy = figures.get("bits_per_byte"), figures.get("loss") or {}, figures.get("accuracy") or {}
        texts = [f"{bits:.3f}" if bits is not None else "–"]
        texts += [f"{loss[f]:.3f}" if loss.get(f) is not None else "–" for f in fractions]
        return texts + [f"{100 * accuracy[f]:.1f}%" if accuracy.get(f) is not None else "–" for f in fractions]

    columns = ["bits/byte", *(f"{name} {words.fraction(f)}" for name in ("loss", "accuracy") for f in fractions)]
    last = len(stages) - 1
    lines = [
        Row(depth_name(depth, len(stages)), cells(stage), "last" if depth == last else "stage")
        for depth, stage in enumerate(stages)
    ]
    return columns, lines + [Row(name, cells(figures), "baseline") for name, figures in baselines_of(result).items()]


def footnote(result: Mapping[str, Any]) -> str:
    """How much text that was, and what its figures mean."""
    if what := result.get("of"):
        return f"{words.count(result['samples'])} held-out {_OF.get(what, what)}"
    text = f"{words.count(result['tokens'])} tokens" if result.get("tokens") else "held-out text"
    if result.get("bytes"):
        text += f", {words.size(result['bytes'])} of text"
    likelihood = result.get("likelihood", "bound")
    if likelihood is None:
        return f"{text}; loss in nats a scored token, which is no likelihood of the text: no bits/byte"
    exact = likelihood == "exact"
    # A rack that was made causal at last: its earlier stages have a bound, itself the likelihood.
    adapted = exact and any(stage.get("likelihood") == "bound" for stage in result.get("stages") or [])
    token = "token, at the positions that would be masked" if exact and not adapted else "masked token"
    kind = "the likelihood" if exact else "an upper bound, from the masked-diffusion likelihood"
    if adapted:
        kind += " (before the rack was made causal, an upper bound)"
    error = result.get("bits_per_byte_error")
    text += f"; loss in nats a {token}; bits/byte is {kind}" + (f", standard error {error:.3f}" if error else "")
    unigram = (result.get("baselines") or {}).get("unigram", {}).get("bits_per_byte")
    if unigram is not None and result.get("bits_per_byte") is not None and result["bits_per_byte"] > unigram:
        text += "; the rack is behind unigram frequencies: it lacks text, or steps"
    return text
