"""Text from a run's committed weights: holes filled in, or a prompt continued where the run was trained causally."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch

from stackwise.config.model import BlockCausal
from stackwise.data import Tokenizer, require_samples
from stackwise.errors import UsageError
from stackwise.identity import generator
from stackwise.inference import (
    Continuing,
    Filling,
    FillStep,
    LoadedModel,
    StageModules,
    Stages,
    fill,
    sample_causal,
)
from stackwise.inference.generate import Order
from stackwise.pipeline.committed.load import CommittedRack

HOLE = re.compile(r"\[MASK(?:\*(\d{1,5}))?\]")  # a hole in a user's text: `[MASK]`, or `[MASK*12]` for twelve tokens

DEFAULT_LENGTH = 64  # tokens that are added to a text where it is not said how many

PASSAGE_TOKENS, PASSAGE_SHARE = 96, 0.3
"""The held-out passage that a run shows: its length, and the share of it that is masked."""


@dataclass(frozen=True)
class Sampling:
    """How text is made. What a rack cannot use is a note in the result.

    Attributes:
        steps: Rounds of unmasking; None: one for each hole. Of a causal rack, where `length` is None: tokens to add.
        length: Masked positions behind the text, or tokens to add; None: what fits, 64 at most, behind a text without
            holes.
        exit: "auto", and None: a rack whose stages trained on masked fractions of their own leaves at the stage that a
            round's fraction asks for; "last": the last stage always answers.
    """

    steps: int | None = None
    length: int | None = None
    order: Order = "confidence"  # which predictions a round keeps: the most confident, or random ones
    block: int | None = None  # finish so many holes before the next ones are begun, from the left; None: all at once
    temperature: float = 0.0  # 0 takes the likeliest token
    seed: int = 0  # of what is drawn
    exit: Literal["auto", "last"] | None = None
    causal: bool = False  # go on token by token, and refuse a rack that cannot


def generate(
    rack: CommittedRack,
    text: str | None,
    sampling: Sampling | None = None,
    *,
    on_step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Fill holes in text, or go on from a prompt.

    Args:
        text: With holes (`[MASK]`, `[MASK*12]`), or a prompt; None: a masked passage of held-out text.

    Returns:
        `before`, `after`, `spans` (the pieces of `after`, each with "given", "filled", "right" or "wrong"), and
        `notes`, lines on what was not used.

    Raises:
        UsageError: The text is empty, or longer than the model takes; holes for a causal rack, or token by token for
            one that is none.
    """
    sampling = sampling or Sampling()
    if text is not None and not text:
        raise UsageError("the text is empty", hint="give a prompt, or holes such as [MASK*12]")
    tokenizer, truth = rack.data.tokenizer, None
    forbidden = {tokenizer.separator_id, rack.mask_token, *range(tokenizer.vocab_size, rack.vocab_size)}
    if rack.objective.causal is True:
        return _continue(rack, text, sampling, forbidden - {tokenizer.separator_id}, on_step)
    if sampling.causal:
        in_blocks = isinstance(rack.objective.causal, BlockCausal)
        way = "goes on block by block" if in_blocks else "fills masked positions behind the text"
        raise UsageError(
            f"this rack was trained {'in blocks' if in_blocks else 'bidirectionally'}: it cannot go on token by token",
            hint=f"without --causal it {way}; a run with training.adaptation: causal makes one that can",
        )
    if text is None:
        truth, holes = _passage(rack)
        ids = np.where(holes, rack.mask_token, truth)
    else:
        ids, holes = _canvas(rack, text, sampling.length)

    def show(step: FillStep) -> None:
        if on_step is not None:
            on_step(_render(step.ids.cpu().numpy(), step.open.cpu().numpy(), tokenizer))

    notes: list[str] = []
    direction = rack.objective.causal
    if isinstance(direction, BlockCausal):
        direction = BlockCausal(direction.size)
        if sampling.block not in (None, direction.size):
            notes.append(f"--block is unused: the rack was trained in blocks of {direction.size} tokens")
        exit_at = None
    else:
        exit_at = None if sampling.exit == "last" else _exits(rack)
    if sampling.exit is not None and exit_at is None and _exits(rack) is None:
        notes.append(f"--exit {sampling.exit} is unused: the last stage answers at every masked fraction")
    how = Filling(
        mask_token_id=rack.mask_token,
        steps=min(sampling.steps or int(holes.sum()), int(holes.sum())),
        order=sampling.order,
        block=sampling.block,
        temperature=sampling.temperature,
        seed=sampling.seed,
        forbidden=forbidden,
        exit_at=exit_at,
    )
    stages = resident_stages(rack, rack.modules if exit_at is None else rack.exits)
    model = LoadedModel(rack.front(), stages, direction, rack.autocast, rack.config.model.keeps_cache)
    canvas, is_hole = (torch.from_numpy(array).to(rack.device) for array in (ids, holes))
    filled = fill(model, canvas, is_hole, how, callback=show)
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
        "notes": notes,
    }


def resident_stages(rack: CommittedRack, load: Callable[[], Iterator[StageModules]]) -> Stages:
    """The stages, resident where they fit into half of the free memory; otherwise loaded one by one for each pass."""
    paths = {Path(source.path) for source in rack.parts.values() if source.path is not None}
    files = [file for path in paths for file in (path.glob("*.safetensors") if path.is_dir() else (path,))]
    size = sum(file.stat().st_size for file in files)
    on_gpu = rack.device.type == "cuda"
    free = torch.cuda.mem_get_info(rack.device)[0] if on_gpu else psutil.virtual_memory().available
    return list(load()) if size <= free // 2 else load


def _exits(rack: CommittedRack) -> Callable[[float], int] | None:
    """From the share of open positions to the stage that trained on it; None where no stage has its own."""
    config = rack.config
    if not config.time_as_depth or not 1 < len(rack.stages) == config.n_sections:  # a fusion has seen all fractions
        return None
    length = config.training.seq_len
    return lambda share: int(rack.exit_of(np.array([max(1, round(share * length))]))[0])


def _canvas(rack: CommittedRack, text: str, length: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 [S] and holes bool [S]: of a text with holes, and of `length` masked positions behind it."""
    ids, holes = parse_holes(text, rack.data.tokenizer, rack.mask_token)
    longest = rack.config.model.max_seq_len or rack.config.training.seq_len
    if length is None:
        length = 0 if holes.any() else min(DEFAULT_LENGTH, max(1, longest - len(ids)))
    if len(ids) + length > longest:
        behind = f", with {length} behind it {len(ids) + length}," if length else ""
        raise UsageError(
            f"the text makes {len(ids)} tokens{behind} and this rack takes {longest}",
            hint="shorten the text, its holes or --length; or train with a longer training.seq_len",
        )
    return np.append(ids, [rack.mask_token] * length), np.append(holes, [True] * length)


def parse_holes(text: str, tokenizer: Tokenizer, mask_token: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 [S] and holes bool [S] of a text with `[MASK]` and `[MASK*n]`.

    Raises:
        UsageError: Something that looks like a hole and is none.
    """
    for written in re.findall(r"\[MASK\*[^\]]{0,20}\]?", text):
        if not (hole := HOLE.fullmatch(written)) or int(hole[1]) == 0:
            raise UsageError(f"{written} is no hole", hint="write [MASK], or [MASK*12] for twelve tokens, up to 99999")
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
    return np.array(ids, dtype=np.int64), np.array(holes, dtype=np.bool_)


def _continue(
    rack: CommittedRack,
    text: str | None,
    sampling: Sampling,
    forbidden: set[int],
    on_step: Callable[[str], None] | None,
) -> dict[str, Any]:
    tokenizer = rack.data.tokenizer
    if text and HOLE.search(text):
        raise UsageError(
            "this rack was trained causally: it continues a prompt and fills no holes",
            hint="leave the holes out, or train one that fills them with training.objective: mask_diffusion",
        )
    prompt = _prompt(rack) if text is None else tokenizer.encode_batch([text])[0]
    if not len(prompt):
        raise UsageError("the prompt is empty")
    unused = [name for name in ("order", "block", "exit") if getattr(sampling, name) != getattr(Sampling, name)]
    if sampling.length is not None and sampling.steps is not None:
        unused.append("steps")

    def show(ids: torch.Tensor) -> None:
        if on_step is not None:
            on_step(tokenizer.decode(ids.cpu().numpy()))

    how = Continuing(
        temperature=sampling.temperature,
        seed=sampling.seed,
        forbidden=forbidden,
        stop_token_id=tokenizer.separator_id,
    )
    keeps_cache = rack.config.model.keeps_cache
    model = LoadedModel(rack.front(), resident_stages(rack, rack.modules), True, rack.autocast, keeps_cache)
    prompt_ids = torch.from_numpy(np.asarray(prompt, dtype=np.int64)).to(rack.device)
    ids = sample_causal(model, prompt_ids, sampling.length or sampling.steps or DEFAULT_LENGTH, how, callback=show)
    before, after = tokenizer.decode(prompt), tokenizer.decode(ids.cpu().numpy())
    new = tokenizer.decode(ids.cpu().numpy()[len(prompt) :])
    return {
        "before": before,
        "after": after,
        "spans": [[before, "given"], [new, "filled"]],
        "notes": [f"--{name} is unused: a causal rack adds one token after another" for name in unused],
    }


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


def _prompt(rack: CommittedRack) -> np.ndarray:
    """A prompt of held-out text: one that answers are drawn to, or the beginning of a passage."""
    objective, seq_len = rack.config.objective, rack.config.training.seq_len
    if not objective.rolls_out:
        return _passage(rack)[0][: PASSAGE_TOKENS // 2]
    require_samples(split := rack.data.held_out, seq_len, "held-out")
    first = np.array([0])
    marks = split.column(objective.inputs[0], first, seq_len)[0]
    return np.asarray(split.samples(first, seq_len)[0][marks > 0])


def _render(ids: np.ndarray, holes: np.ndarray, tokenizer: Tokenizer) -> str:
    """Text with `[MASK]` where a hole is open."""
    pieces = []
    for hole, group in itertools.groupby(range(len(ids)), key=lambda i: bool(holes[i])):
        run = list(group)
        pieces.append("[MASK]" * len(run) if hole else tokenizer.decode(ids[run]))
    return "".join(pieces)
