"""Text from a run's committed weights: holes filled in, or a prompt continued where the run was trained causally."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from stackwise.data import Tokenizer, require_samples
from stackwise.errors import UsageError
from stackwise.identity import generator
from stackwise.inference import FillStep, fill, sample_causal
from stackwise.pipeline.device import resolve_device
from stackwise.pipeline.load import CommittedRack, load_rack
from stackwise.pipeline.run import RunDirectory

HOLE = re.compile(r"\[MASK(?:\*(\d{1,5}))?\]")
"""A hole in a user's text: `[MASK]`, or `[MASK*12]` for twelve tokens."""

PASSAGE_TOKENS, PASSAGE_SHARE = 96, 0.3
"""The held-out passage that a run shows: its length, and the share of it that is masked."""


def generate_text(
    run: RunDirectory,
    text: str | None,
    *,
    steps: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    on_step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Fill holes in text, or go on from a prompt where the run was trained causally.

    Args:
        run: The run; all of its stages are committed.
        text: With holes (`[MASK]`, `[MASK*12]`), or a prompt; None: a masked passage of held-out text.
        steps: Rounds of unmasking (causal: tokens to add); None: one for each hole (64 tokens).
        temperature: 0 takes the likeliest token.
        seed: Of what is drawn.
        device: Where to compute.
        on_step: Told the text as it grows.

    Returns:
        `before`, `after`, and `spans`: the pieces of `after`, each with "given", "filled", "right" or "wrong".

    Raises:
        UsageError: The text has no hole, or is longer than the model takes.
    """
    rack = load_rack(run, resolve_device(device))
    return generate(rack, text, steps=steps, temperature=temperature, seed=seed, on_step=on_step)


def generate(
    rack: CommittedRack,
    text: str | None,
    *,
    steps: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    on_step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """What `generate_text` does, with a rack that is loaded already."""
    tokenizer, truth = rack.data.tokenizer, None
    forbidden = {tokenizer.separator_id, rack.mask_token, *range(tokenizer.vocab_size, rack.vocab_size)}
    if rack.objective.causal:
        return _continue(rack, text, steps or 64, temperature, seed, forbidden - {tokenizer.separator_id}, on_step)
    if text is None:
        truth, holes = _passage(rack)
        ids = np.where(holes, rack.mask_token, truth)
    else:
        ids, holes = parse_holes(text, tokenizer, rack.mask_token)
        longest = rack.config.model.max_seq_len or rack.config.training.seq_len
        if len(ids) > longest:
            raise UsageError(
                f"the text makes {len(ids)} tokens, and this rack takes {longest}", hint="shorten it, or its holes"
            )

    def show(step: FillStep) -> None:
        if on_step is not None:
            on_step(_render(step.ids.cpu().numpy(), step.open.cpu().numpy(), tokenizer))

    filled = fill(
        rack.front(),
        list(rack.modules()),
        torch.from_numpy(ids).to(rack.device),
        torch.from_numpy(holes).to(rack.device),
        mask_token_id=rack.mask_token,
        steps=min(steps or int(holes.sum()), int(holes.sum())),
        temperature=temperature,
        seed=seed,
        forbidden=forbidden,
        autocast=rack.autocast,
        callback=show,
    )
    result = filled.cpu().numpy()
    closed = np.zeros_like(holes)
    states = np.where(holes, "filled" if truth is None else np.where(result == truth, "right", "wrong"), "given")
    return {
        "before": _render(ids, holes, tokenizer),
        "after": _render(result, closed, tokenizer),
        "spans": [
            [tokenizer.decode(result[list(group)]), state]
            for state, group in itertools.groupby(range(len(result)), key=lambda i: str(states[i]))
        ],
    }


def parse_holes(text: str, tokenizer: Tokenizer, mask_token: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 [S] and holes bool [S] of a text with `[MASK]` and `[MASK*n]`.

    Raises:
        UsageError: There is no hole.
    """
    ids: list[int] = []
    holes: list[bool] = []
    position = 0
    for match in [*HOLE.finditer(text), None]:
        piece = text[position : match.start()] if match else text[position:]
        tokens = tokenizer.encode_batch([piece])[0].tolist() if piece else []
        ids += tokens
        holes += [False] * len(tokens)
        if match:
            count = int(match.group(1) or 1)
            ids += [mask_token] * count
            holes += [True] * count
            position = match.end()
    if not any(holes):
        raise UsageError("the text has no hole to fill", hint="write [MASK], or [MASK*12] for twelve tokens")
    return np.array(ids, dtype=np.int64), np.array(holes)


def _continue(
    rack: CommittedRack,
    text: str | None,
    count: int,
    temperature: float,
    seed: int,
    forbidden: set[int],
    on_step: Callable[[str], None] | None,
) -> dict[str, Any]:
    tokenizer = rack.data.tokenizer
    if text and HOLE.search(text):
        raise UsageError("this rack was trained causally: it continues a prompt and fills no holes")
    prompt = tokenizer.encode_batch([text])[0] if text else _passage(rack)[0][: PASSAGE_TOKENS // 2]
    if not len(prompt):
        raise UsageError("the prompt is empty")

    def show(ids: torch.Tensor) -> None:
        if on_step is not None:
            on_step(tokenizer.decode(ids.cpu().numpy()))

    ids = sample_causal(
        rack.front(),
        list(rack.modules()),
        torch.from_numpy(np.asarray(prompt, dtype=np.int64)).to(rack.device),
        count,
        temperature=temperature,
        seed=seed,
        forbidden=forbidden,
        stop_token_id=tokenizer.separator_id,
        autocast=rack.autocast,
        callback=show,
    )
    before, after = tokenizer.decode(prompt), tokenizer.decode(ids.cpu().numpy())
    new = tokenizer.decode(ids.cpu().numpy()[len(prompt) :])
    return {"before": before, "after": after, "spans": [[before, "given"], [new, "filled"]]}


def _passage(rack: CommittedRack) -> tuple[np.ndarray, np.ndarray]:
    """A passage of held-out text, and which of its tokens are masked."""
    config = rack.config
    length = min(PASSAGE_TOKENS, config.training.seq_len)
    require_samples(rack.data.held_out, config.training.seq_len, "held-out")
    draw = generator(config.seed, "passage")
    sample = int(draw.integers(rack.data.held_out.n_samples(config.training.seq_len)))
    ids = rack.data.held_out.samples(np.array([sample]), config.training.seq_len)[0][:length]
    holes = np.zeros(length, dtype=bool)
    holes[draw.permutation(length)[: max(1, round(PASSAGE_SHARE * length))]] = True
    return ids, holes


def _render(ids: np.ndarray, holes: np.ndarray, tokenizer: Tokenizer) -> str:
    """Text with `[MASK]` where a hole is open."""
    pieces = []
    for hole, group in itertools.groupby(range(len(ids)), key=lambda i: bool(holes[i])):
        run = list(group)
        pieces.append("[MASK]" * len(run) if hole else tokenizer.decode(ids[run]))
    return "".join(pieces)
