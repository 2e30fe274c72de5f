"""What held-out samples are shown as, which of their positions are scored, and the figures that follow.

One pass for each way of masking. Shapes in names: N samples, S positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from stackwise.batch import MASKS, TOKENS, Batch
from stackwise.config.model import Direction
from stackwise.errors import UsageError
from stackwise.identity import generator
from stackwise.objectives.masks import Bools, child, seed_key, uniform_masks
from stackwise.objectives.objective import RuntimeObjective
from stackwise.objectives.objectives import (
    BlockDiffusionObjective,
    CLMObjective,
    CustomObjective,
    MaskDiffusionObjective,
)

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]


AT_FRACTIONS = ("loss", "accuracy", "f1", "bleu")
"""What is measured at each masked fraction."""


@dataclass
class Scores:
    """What a stage said at each position of every sample.

    Attributes:
        nats_NS: -log probability of the target; only where it was scored.
        likeliest_NS: The likeliest token; only where it was scored.
    """

    nats_NS: Floats
    likeliest_NS: NDArray[np.int64]

    @classmethod
    def empty(cls, samples: int, length: int) -> Scores:
        """Nothing scored yet."""
        return cls(np.zeros((samples, length)), np.zeros((samples, length), dtype=np.int64))

    def take(self, other: Scores, samples: slice | NDArray[np.bool_]) -> None:
        """Take over some samples' figures."""
        self.nats_NS[samples], self.likeliest_NS[samples] = other.nats_NS[samples], other.likeliest_NS[samples]

    def over(self, masks_NS: Bools, targets_NS: Tokens, length: int) -> dict[str, float]:
        """Figures over the positions of a mask.

        Args:
            masks_NS: Where.
            targets_NS: What is right.
            length: Positions of a sample, the first ones, that are text.

        Returns:
            `loss` in nats a token; `accuracy`; `f1`, see `macro_f1`; `bleu`, see there, of the text with the likeliest
            token at these positions, beside the text.
        """
        count = max(1, int(masks_NS.sum()))
        right_n, said_n = targets_NS[masks_NS], self.likeliest_NS[masks_NS]
        filled_NS = np.where(masks_NS, self.likeliest_NS, targets_NS)
        return {
            "loss": float(self.nats_NS[masks_NS].sum() / count),
            "accuracy": float((right_n == said_n).sum() / count),
            "f1": macro_f1(right_n, said_n),
            "bleu": bleu(targets_NS[:, :length], filled_NS[:, :length]),
        }


def macro_f1(right_n: NDArray[np.int64], said_n: NDArray[np.int64]) -> float:
    """F1 of each token that is right or said somewhere, 2 hits / (times right + times said); their mean."""
    size = 1 + max(right_n.max(initial=0), said_n.max(initial=0))
    hits_V = np.bincount(right_n[right_n == said_n], minlength=size)
    either_V = np.bincount(right_n, minlength=size) + np.bincount(said_n, minlength=size)
    known_V = either_V > 0
    return float((2 * hits_V[known_V] / either_V[known_V]).mean()) if known_V.any() else 0.0


def bleu(right_NS: NDArray[np.int64], said_NS: NDArray[np.int64]) -> float:
    """BLEU of a corpus, from 0 to 100: its tokens are the words, n-grams of 1 to 4, no smoothing (Papineni, 2002).

    Both sides are as long as each other, so there is no penalty for brevity. Of different tokenizers it is not to be
    compared.
    """
    if not right_NS.size:
        return 0.0
    samples, length = right_NS.shape
    both_NS = np.concatenate([right_NS, said_NS])
    place_N1 = np.tile(np.arange(samples), 2)[:, None]  # n-grams are matched within their sample
    grams_NS, precisions = np.repeat(place_N1, length, 1), []
    for n in range(1, min(4, length) + 1):  # an n-gram's number: that of its first n - 1 tokens with the last one's
        kept = length - n + 1
        pairs_NS = grams_NS[:, :kept] * (1 + both_NS.max()) + both_NS[:, n - 1 :]
        names, numbers = np.unique(pairs_NS, return_inverse=True)
        grams_NS = numbers.reshape(pairs_NS.shape)
        right, total = (np.bincount(half_NS.ravel(), minlength=len(names)) for half_NS in np.split(grams_NS, 2))
        precisions.append(float(np.minimum(right, total).sum() / (samples * kept)))
    return 100 * math.exp(sum(map(math.log, precisions)) / len(precisions)) if all(precisions) else 0.0


def bits_per_byte(nats_N: Floats, bytes_N: ArrayLike) -> tuple[float | None, float | None]:
    """Bits a byte over all samples, and its standard error: that of a ratio of sums over independent samples.

    Strata make the true error smaller, so this one is on the safe side.

    Args:
        nats_N: Nats of each sample.
        bytes_N: Bytes of text in each.

    Returns:
        None for both where no bytes are known, and for the error of a single sample.
    """
    sizes_N = np.asarray(bytes_N, dtype=np.float64)
    total = sizes_N.sum()
    if total <= 0:
        return None, None
    rate = nats_N.sum() / total
    n = len(nats_N)
    bits = float(rate / math.log(2))
    if n < 2:
        return bits, None
    spread = np.square(nats_N - rate * sizes_N).sum()
    return bits, float(math.sqrt(spread * n / (n - 1)) / total / math.log(2))


def figures(
    by_fraction: Mapping[str, Mapping[str, float]], nats_N: Floats | None, bytes_N: ArrayLike, tokens: int
) -> dict[str, Any]:
    """The shape that every figure of an evaluation has, plain data.

    Args:
        by_fraction: The figures of `Scores.over`, by masked fraction.
        nats_N: Nats of each sample, of a bound or a likelihood; None where there is neither.
        bytes_N: Bytes of text in each sample.
        tokens: Tokens that the nats are of.
    """
    bits, error = (None, None) if nats_N is None else bits_per_byte(nats_N, bytes_N)
    return {
        "bits_per_byte": bits,
        "bits_per_byte_error": error,
        **{name: {key: values[name] for key, values in by_fraction.items()} for name in AT_FRACTIONS},
        "tokens": tokens,
        "bytes": int(np.sum(bytes_N)),
    }


def by_sample(passes: Sequence[Pass], scores: Sequence[Scores], bytes_N: ArrayLike) -> dict[str, Any]:
    """Nats of each sample and what they are of, for comparisons sample by sample: two racks have the same samples.

    Returns:
        `{"nats": [N], "of": [N], "unit"}`: of the likelihood or bound, the unit a byte of text (a token where bytes are
        not known); where a rack has neither, of the positions at the smallest masked fraction, the unit a token.
    """
    pairs = list(zip(passes, scores, strict=True))
    known = [nats_N for way, score in pairs if (nats_N := way.sample_nats(score)) is not None]
    sizes_N, unit = np.asarray(bytes_N, dtype=np.float64), "byte"
    if known:
        nats_N = np.sum(known, axis=0)
        if not sizes_N.sum():
            sizes_N, unit = np.full(len(nats_N), float(passes[0].targets_NS.shape[1])), "token"
    else:
        by_fraction = [(float(key), score, mask) for way, score in pairs for key, mask in way.fractions.items()]
        _, score, mask_NS = min(by_fraction, key=lambda one: one[0])
        nats_N, sizes_N, unit = np.where(mask_NS, score.nats_NS, 0.0).sum(1), mask_NS.sum(1), "token"
    return {"nats": [round(float(nats), 4) for nats in nats_N], "of": [int(size) for size in sizes_N], "unit": unit}


def unigram(counts_V: ArrayLike, targets_NS: NDArray[np.int64], vocab_size: int) -> Scores:
    """What the training side's token frequencies say, each count raised by one.

    Args:
        counts_V: How often each token occurs in training; shorter than the vocabulary, the rest is 0.
        targets_NS: What each position is to say.
        vocab_size: Token ids that share the probability.
    """
    counts = np.zeros(vocab_size)
    frequencies = np.asarray(counts_V, dtype=np.float64)[:vocab_size]
    counts[: len(frequencies)] = frequencies
    nats_V = math.log(counts.sum() + vocab_size) - np.log(counts + 1.0)
    return Scores(nats_V[targets_NS], np.full_like(targets_NS, counts.argmax()))


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples.

    Attributes:
        tokens_NS: Their tokens.
        bytes_N: Bytes of text in each; all 0 where they are not known, then bits per byte are None.
        segments_NS: Attention stays within equal values; None: it does not.
        targets_NS: For a custom objective: what each position is to say; negative: nothing.
        separator_id: The separator, which a causal rack's first token follows.
        tasks_N: The task of each, where the rack answers tasks by columns of their own; None: it does not.
        columns: What an objective from outside needs beside these, by name.
    """

    tokens_NS: NDArray[Any]
    bytes_N: ArrayLike
    segments_NS: NDArray[Any] | None = None
    targets_NS: NDArray[Any] | None = None
    separator_id: int | None = None
    tasks_N: ArrayLike | None = None
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens_NS", "segments_NS", "targets_NS"):
            if (array := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.asarray(array, dtype=np.int64))


@dataclass(frozen=True)
class Measure:
    """How held-out samples are measured.

    Attributes:
        fractions: Masked shares at which loss and accuracy are measured.
        batch_size: Samples in a batch.
        seed: Of the masks: the same for every stage, rack and baseline.
        draws: Masks of each sample that the bound is averaged over.
        device: Where to compute.
        autocast: Narrow dtype to compute in, the residual stream too, as in training; None: as the front gives it.
        unigram_counts: How often each token occurs in training: adds the unigram baseline (add-one smoothing), on
            the same positions; its bits per byte are exact.
        vocab_size: Token ids that the baseline spreads over; None: the width of the last head's logits.
    """

    fractions: Sequence[float] = (0.15, 0.5, 0.9)
    batch_size: int = 16
    seed: int = 0
    draws: int = 1
    device: torch.device | str = "cpu"
    autocast: torch.dtype | None = None
    unigram_counts: ArrayLike | None = None
    vocab_size: int | None = None


@dataclass
class Pass:
    """One forward over all samples.

    Attributes:
        ids_NS: What the front is shown.
        scored_NS: Where the head is asked.
        targets_NS: What is right there.
        segments_NS: Which positions see each other; None: all do.
        fractions: Figures read off it: the key, and the positions that count.
        weights: Factor on the nats in the bound or likelihood, of each sample [N] or position [N, S]; None: the pass
            is for no such thing.
        times: The masked share that a front may take as input: of each sample [N], or position [N, S]; None: nothing
            is masked.
        causal: The direction of attention.
    """

    ids_NS: Tokens
    scored_NS: Bools
    targets_NS: Tokens
    segments_NS: NDArray[np.int64] | None
    fractions: dict[str, Bools] = field(default_factory=dict)
    weights: Floats | None = None
    times: Floats | None = None
    causal: Direction = False

    def times_of(self, part: slice) -> torch.Tensor:
        """`times` of some samples, float32."""
        times = np.zeros(len(self.ids_NS)) if self.times is None else self.times
        return torch.from_numpy(times[part]).float()

    def sample_nats(self, scores: Scores) -> Floats | None:
        """Nats of each sample: the weighted sum over its scored positions."""
        if self.weights is None:
            return None
        nats_NS: Floats = np.where(self.scored_NS, scores.nats_NS, 0.0)
        if self.weights.ndim == 1:
            return np.asarray(nats_NS.sum(1) * self.weights)
        return np.asarray((nats_NS * self.weights).sum(1))


def fraction_masks(samples: int, length: int, fraction: float, seed: int) -> Bools:
    """Masks that cover a fraction of the positions, at least one; a function of (seed, fraction, sample's place)."""
    keys = np.full(samples, seed_key(seed, "evaluation", f"{fraction:g}"), dtype=np.uint64)
    count = min(length, max(1, round(fraction * length)))
    return uniform_masks(child(keys, np.arange(samples, dtype=np.uint64)), count, length)


def bound_masks(samples: int, length: int, seed: int, draw: int = 0) -> Bools:
    """Masks for the likelihood bound: k uniform on 1 … length, in strata over the samples; exactly k masked."""
    rng = generator(seed, "evaluation", "bound", draw)
    times_N = (rng.permutation(samples) + rng.random(samples)) / samples
    counts_N = np.minimum(length, 1 + np.floor(times_N * length).astype(np.int64))
    keys = np.full(samples, seed_key(seed, "evaluation", "bound", draw), dtype=np.uint64)
    return uniform_masks(child(keys, np.arange(samples, dtype=np.uint64)), counts_N, length)


def make_passes(objective: RuntimeObjective, held_out: HeldOut, how: Measure) -> list[Pass]:
    """The passes that an objective needs.

    Masked objectives: one for each fraction, and `draws` for the bound; masked positions show the mask token, also
    for masked-language modelling, whose corruption is for training. Causal: one, each token predicted from the
    separator and what precedes it; a fraction's figures are those of the positions that would be masked. Custom:
    one, scored at the positions that have a target.

    Raises:
        UsageError: A causal objective without a separator, a custom one without targets, no samples.
    """
    tokens_NS, segments_NS, targets_NS = held_out.tokens_NS, held_out.segments_NS, held_out.targets_NS
    samples, length = tokens_NS.shape
    if not samples:
        raise UsageError("there are no held-out samples to evaluate on")
    masks = {f"{fraction:g}": fraction_masks(samples, length, fraction, how.seed) for fraction in how.fractions}
    if isinstance(objective, CLMObjective):
        if held_out.separator_id is None:
            raise UsageError("a causal rack's likelihood needs the separator, which its first token follows")
        shifted = np.concatenate([np.full((samples, 1), held_out.separator_id), tokens_NS[:, :-1]], axis=1)
        # The separator before the first token is taken for a part of that token's document.
        same = None if segments_NS is None else np.concatenate([segments_NS[:, :1], segments_NS[:, :-1]], axis=1)
        everywhere = np.ones_like(tokens_NS, dtype=np.bool_)
        return [Pass(shifted, everywhere, tokens_NS, same, masks, np.ones(samples))]
    if isinstance(objective, CustomObjective):
        if targets_NS is None:
            raise UsageError("a custom objective is evaluated on targets", hint="pass targets_NS")
        known = targets_NS >= 0
        subsets = {key: mask & known for key, mask in masks.items()}
        return [Pass(tokens_NS, known, np.maximum(targets_NS, 0), segments_NS, subsets)]
    if not isinstance(objective, MaskDiffusionObjective):
        return [_own_pass(objective, held_out, key, mask) for key, mask in masks.items()]
    if isinstance(objective, BlockDiffusionObjective):
        return _block_passes(objective, held_out, how, masks)
    passes = []
    for key, mask in masks.items():
        shown = np.where(mask, objective.mask_token_id, tokens_NS)
        passes.append(Pass(shown, mask, tokens_NS, segments_NS, {key: mask}, times=mask.mean(1)))
    for draw in range(how.draws):
        mask = bound_masks(samples, length, how.seed, draw)
        shown = np.where(mask, objective.mask_token_id, tokens_NS)
        weights_N = length / mask.sum(1) / how.draws
        passes.append(Pass(shown, mask, tokens_NS, segments_NS, weights=weights_N, times=mask.mean(1)))
    return passes


def _own_pass(objective: RuntimeObjective, held_out: HeldOut, key: str, mask_NS: Bools) -> Pass:
    """What an objective from outside shows, scores and asks for, at one fraction."""
    arrays = {TOKENS: held_out.tokens_NS, MASKS: mask_NS, **held_out.columns}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    batch = Batch(np.arange(len(mask_NS)), None, tensors)
    scored_NS, times = objective.positions(batch).numpy(), objective.times(batch).double().numpy()
    targets_NS = np.where(scored_NS, objective.targets(batch).numpy(), 0).astype(np.int64)
    shown_NS = objective.shown(batch).numpy()
    causal, segments_NS = objective.causal, held_out.segments_NS
    if objective.sequences > 1:  # each is a row of its own
        apart = len(mask_NS) * objective.sequences, -1
        shown_NS, scored_NS, targets_NS = (array.reshape(apart) for array in (shown_NS, scored_NS, targets_NS))
        segments_NS = None if segments_NS is None else segments_NS.reshape(apart)
        times = np.repeat(times, objective.sequences, 0)
    return Pass(shown_NS, scored_NS, targets_NS, segments_NS, {key: scored_NS}, times=times, causal=causal)


def _block_passes(
    objective: BlockDiffusionObjective, held_out: HeldOut, how: Measure, masks: dict[str, Bools]
) -> list[Pass]:
    """As for masked diffusion, but that every block of a sample draws its own k of its positions, weighted size/k.

    The bound is then that of each block given the clean ones before it, summed (arXiv 2503.09573, section 3.1). What
    is shown is a pair of copies; the clean one is never scored.
    """
    tokens_NS, size = held_out.tokens_NS, objective.block
    samples, length = tokens_NS.shape

    def paired(mask_NS: Bools, key: str | None, weights_NS: Floats | None = None) -> Pass:
        clean_NS = np.zeros_like(mask_NS)
        scored = np.concatenate([mask_NS, clean_NS], axis=1)
        shown = np.concatenate([np.where(mask_NS, objective.mask_token_id, tokens_NS), tokens_NS], axis=1)
        shares_NS = np.repeat(mask_NS.reshape(samples, -1, size).mean(2), size, axis=1)
        return Pass(
            shown,
            scored,
            np.concatenate([tokens_NS, tokens_NS], axis=1),
            held_out.segments_NS,
            {} if key is None else {key: scored},
            None if weights_NS is None else np.concatenate([weights_NS, clean_NS], axis=1),
            np.concatenate([shares_NS, clean_NS], axis=1),
            objective.causal,
        )

    passes = [paired(mask_NS, key) for key, mask_NS in masks.items()]
    for draw in range(how.draws):
        mask_NS = bound_masks(samples * (length // size), size, how.seed, draw).reshape(samples, length)
        counts_NS = np.repeat(mask_NS.reshape(samples, -1, size).sum(2), size, axis=1)
        passes.append(paired(mask_NS, None, size / counts_NS / how.draws))
    return passes


def tensor(array: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A batch on the device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
