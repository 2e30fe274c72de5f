"""What masked-language modelling shows at the positions it selects. No torch here.

Source: BERT (arXiv 1810.04805), 3.1: of the positions selected, 80% show the mask token, 10% a random token, 10%
themselves. Shapes in names: B rows, S positions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stackwise.errors import UsageError
from stackwise.identity import digest
from stackwise.objectives.hashing import child, mix, sample_keys, seed_key, uniform


def token_sample_ids(tokens_BS: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Ids made of the tokens themselves, for callers that have no sample ids. uint8 [B, 16]."""
    rows = np.ascontiguousarray(tokens_BS, dtype="<i8")
    ids = b"".join(bytes.fromhex(digest(row)) for row in rows)
    return np.frombuffer(ids, dtype=np.uint8).reshape(-1, 16)


def corrupt(
    tokens_BS: NDArray[np.int64],
    masks_BS: NDArray[np.bool_],
    sample_ids: NDArray[np.uint8] | None,
    *,
    mask_token_id: int,
    vocab_size: int,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Tokens as they are shown: a pure function of (seed, sample, mask).

    Args:
        tokens_BS: The tokens.
        masks_BS: The positions selected.
        sample_ids: uint8 [B, 16]; None: made of the tokens.
        mask_token_id: Shown at `mask_share` of the positions selected, and never as a random token.
        vocab_size: Random tokens are uniform over the others.
        mask_share: Share that shows the mask token.
        random_share: Share that shows a random token; the rest shows itself.
        seed: The run's seed.

    Returns:
        int64 [B, S].

    Raises:
        UsageError: Shares that are negative or sum to more than 1.
    """
    check_shares(mask_share, random_share)
    length = tokens_BS.shape[1]
    samples = sample_keys(
        seed_key(seed, "corruption"), token_sample_ids(tokens_BS) if sample_ids is None else sample_ids
    )
    positions_S = np.arange(length, dtype=np.uint64)
    weights_S = child(np.full(length, seed_key("mask fingerprint"), np.uint64), positions_S)
    with np.errstate(over="ignore"):
        fingerprints_B = np.where(masks_BS, weights_S, np.uint64(0)).sum(axis=1, dtype=np.uint64)
    keys_BS = child(mix(samples ^ fingerprints_B)[:, None], positions_S)
    draw_BS = uniform(keys_BS)
    # One of the other tokens: counted as if the mask token were not there.
    other_BS = (child(keys_BS, 0) % np.uint64(max(1, vocab_size - 1))).astype(np.int64)
    if 0 <= mask_token_id < vocab_size:
        other_BS += other_BS >= mask_token_id
    shown_BS = np.where(masks_BS & (draw_BS < mask_share), mask_token_id, tokens_BS)
    random_BS = masks_BS & (draw_BS >= mask_share) & (draw_BS < mask_share + random_share)
    return np.asarray(np.where(random_BS, other_BS, shown_BS), dtype=np.int64)


def check_shares(mask_share: float, random_share: float) -> None:
    """Refuse shares that cannot be.

    Raises:
        UsageError: Negative, or more than 1 together.
    """
    if mask_share < 0 or random_share < 0 or mask_share + random_share > 1.0 + 1e-9:
        raise UsageError(f"mlm shares {mask_share} (mask) and {random_share} (random) are not shares of a whole")
