"""Linear attention: a feature map in the place of the softmax, so that its cost grows with the length alone.

Source: Katharopoulos et al. (arXiv 2006.16236), sections 3.2 and 3.3; random features of the softmax: Performer
(arXiv 2009.14794), section 2.3. Shapes in names: B batch, S positions, H heads, E width of a head, F features,
V = E + 1 values and a one, N chunks, C positions of a chunk.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise.config.model import BlockCausal, ModelConfig
from stackwise.identity import derive_seed
from stackwise.model.attention import AttentionPattern, Cache, SoftmaxAttention, sees
from stackwise.model.kinds import Linear

CHUNK = 64
"""Positions of a chunk: inside it scores are made, between chunks a state is handed on."""


class LinearAttention(SoftmaxAttention):
    """y_i = phi(q_i) · Σ phi(k_j) v_jᵀ / (phi(q_i) · Σ phi(k_j)), over the positions j that i sees.

    Rotary positions turn queries and keys before the feature map, so that no weight is negative. Sums are made in
    float32 or wider. Documents are runs of equal values: a value that comes back after another is a new document.

    Raises:
        UsageError: As `SoftmaxAttention`.
    """

    def __init__(self, config: ModelConfig, kind: Linear) -> None:
        super().__init__(config, kind)
        self.feature_map = kind.feature_map
        self._omega_EF: Tensor | None = None
        if features := kind.features(config):
            self._omega_EF = projection(self.width, features)

    def phi(self, x_BHSE: Tensor, query: bool) -> Tensor:
        """The features of queries or keys, none negative, [B, H, S, F]."""
        if self.feature_map == "elu":
            return F.elu(x_BHSE) + 1.0
        if self.feature_map == "relu":
            return F.relu(x_BHSE) + 1e-3  # arXiv 2009.14794, section 4: a floor, so that no sum is zero
        assert self._omega_EF is not None
        if self._omega_EF.device != x_BHSE.device:
            self._omega_EF = self._omega_EF.to(x_BHSE.device)
        x_BHSE = x_BHSE * self.width**-0.25
        exponent = x_BHSE @ self._omega_EF.to(x_BHSE.dtype) - x_BHSE.square().sum(-1, keepdim=True) / 2
        # Factors that are the same for all keys, or for all features of a query, cancel in the quotient, but for the
        # floor, which keeps the sums from zero where keys are very long.
        shift = exponent.amax(-1, keepdim=True) if query else self.width / 4
        return (exponent - shift).exp() + 1e-6

    def mix(
        self, q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, pattern: AttentionPattern, cache: Cache | None
    ) -> Tensor:
        """What each head brings together, [B, H, S, E]."""
        dtype = q_BHSE.dtype
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(q_BHSE.device.type, enabled=False):
            repeats = self.heads // self.kv_heads
            k_BHSE = k_BKSE.to(wide).repeat_interleave(repeats, 1)
            v_BHSV = F.pad(v_BKSE.to(wide), (0, 1), value=1.0).repeat_interleave(repeats, 1)
            q_BHSF, k_BHSF = self.phi(q_BHSE.to(wide), True), self.phi(k_BHSE, False)
            y_BHSV = summed(q_BHSF, k_BHSF, v_BHSV, pattern, cache)
        return torch.div(y_BHSV[..., :-1], y_BHSV[..., -1:]).to(dtype)


@lru_cache(maxsize=8)
def projection(width: int, features: int) -> Tensor:
    """Directions of the random features, float32 [E, F] on the CPU: orthogonal in groups of E, normal lengths.

    A pure function of the sizes, the same in every block: like rotary tables no part of a state dict.
    """
    generator = torch.Generator("cpu").manual_seed(derive_seed("random features", width, features))
    with torch.device("cpu"):
        groups = [
            torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))[0]
            for _ in range(-(-features // width))
        ]
        lengths_F = torch.randn(features, width, dtype=torch.float64, generator=generator).norm(dim=1)
        omega_EF: Tensor = torch.cat(groups, 1)[:, :features] * lengths_F
    # Features are averages: 1/sqrt(F) on both sides cancels in the quotient.
    return omega_EF.float()


def summed(
    q_BHSF: Tensor, k_BHSF: Tensor, v_BHSV: Tensor, pattern: AttentionPattern, cache: Cache | None = None
) -> Tensor:
    """For each position the sum of (q · k) v over what it sees, [B, H, S, V]."""
    direction, segments_BS = pattern.direction, pattern.segments_BS
    if direction is False and segments_BS is None:
        return q_BHSF @ (k_BHSF.transpose(-1, -2) @ v_BHSV)
    size = CHUNK if isinstance(direction, bool) else direction.size * max(1, CHUNK // direction.size)
    runs_BS = None if segments_BS is None else _runs(segments_BS)
    if isinstance(direction, BlockCausal) and direction.paired:
        return _paired(q_BHSF, k_BHSF, v_BHSV, direction.size, runs_BS)
    length = q_BHSF.shape[2]
    q, k, v = (_chunks(x, size) for x in (q_BHSF, k_BHSF, v_BHSV))
    runs = None if runs_BS is None else _run_chunks(runs_BS, size)
    places = torch.arange(size, device=q.device)
    # Chunks are whole blocks, so inside a chunk the rule is that of its first one.
    seen = sees(direction, places[:, None], places[None], size)
    state = cache.kept[0] if cache is not None and cache.kept else None
    left, state = _states(k, v, runs, state)
    y = _inside(q, k, v, seen, runs) + _sums_in_front(q, left, runs)
    if direction is False:
        back = None if runs is None else runs.flip(1, 2)
        right, _ = _states(k.flip(2, 3), v.flip(2, 3), back)
        y = y + _sums_in_front(q.flip(2, 3), right, back).flip(2, 3)
    if cache is not None:
        cache.replace(length, state)
    return y.flatten(2, 3)[:, :, :length]


def _paired(q: Tensor, k: Tensor, v: Tensor, size: int, runs_BS: Tensor | None) -> Tensor:
    """Rows of a noised and a clean copy: both look back on the clean blocks, and at the own block of their copy."""
    half = q.shape[2] // 2

    def blocks(x: Tensor, copy: int) -> Tensor:
        return _chunks(x[:, :, copy * half : (copy + 1) * half], size)

    # The copies are one sample: the first one's documents are the second's.
    runs = None if runs_BS is None else _run_chunks(runs_BS[:, :half], size)
    left, _ = _states(blocks(k, 1), blocks(v, 1), runs)
    copies = [
        _inside(blocks(q, copy), blocks(k, copy), blocks(v, copy), None, runs)
        + _sums_in_front(blocks(q, copy), left, runs)
        for copy in (0, 1)
    ]
    return torch.cat([y.flatten(2, 3)[:, :, :half] for y in copies], 2)


def _inside(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, runs: Tensor | None) -> Tensor:
    """The sums over a position's own chunk, [B, H, N, C, V]."""
    scores = q @ k.transpose(-1, -2)
    if seen is not None:
        scores = scores * seen
    if runs is not None:
        scores = scores * (runs[..., :, None] == runs[..., None, :])[:, None]
    return scores @ v


def _states(k: Tensor, v: Tensor, runs: Tensor | None, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Σ k vᵀ over the chunks in front of each one, [B, H, N, F, V], and over all.

    Of the chunks in front those count whose end is in one document with the end of the last of them, and of these what
    lies in that document. Summed by a matrix of zeros and ones: a GPU's cumulative sums have no fixed order.

    Args:
        k: Features of the keys, in chunks.
        v: Values, in chunks.
        runs: Documents, in chunks; None: one.
        first: The sum over what precedes the first chunk.
    """
    count = k.shape[2]
    places = torch.arange(count + 1, device=k.device)
    before = places[:, None] > places[None, :count]
    if runs is not None:
        last = runs[..., -1]
        k = k * (runs == last[..., None])[:, None, :, :, None]
        # The chunk in front of each: in front of the first is none.
        before = (before & (F.pad(last, (1, 0))[..., None] == last[:, None]))[:, None]
    sums_of_chunk = (k.transpose(-1, -2) @ v).flatten(-2)
    sums = (before.to(sums_of_chunk.dtype) @ sums_of_chunk).view(
        *sums_of_chunk.shape[:2], count + 1, k.shape[-1], v.shape[-1]
    )
    if first is not None:
        sums = sums + first[:, :, None]
    return sums[:, :, :-1], sums[:, :, -1]


def _sums_in_front(q: Tensor, left: Tensor, runs: Tensor | None) -> Tensor:
    """The sums over the chunks in front, [B, H, N, C, V]: of a position's own document, where given."""
    y = q @ left
    if runs is None:
        return y
    before = F.pad(runs[:, :-1, -1], (1, 0), value=-2)
    return y * (runs == before[..., None])[:, None, :, :, None]


def _chunks(x_BHS: Tensor, size: int) -> Tensor:
    """[B, H, S, W] to [B, H, N, C, W], zeros behind the end."""
    B, H, S, W = x_BHS.shape
    return F.pad(x_BHS, (0, 0, 0, -S % size)).view(B, H, -1, size, W)


def _run_chunks(runs_BS: Tensor, size: int) -> Tensor:
    """[B, S] to [B, N, C], a run of its own behind the end."""
    return F.pad(runs_BS, (0, -runs_BS.shape[1] % size), value=-1).view(len(runs_BS), -1, size)


def _runs(segments_BS: Tensor) -> Tensor:
    """Numbers of the runs of equal values, int64 [B, S]."""
    return F.pad((segments_BS[:, 1:] != segments_BS[:, :-1]).long(), (1, 0)).cumsum(1)
