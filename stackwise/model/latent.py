"""Multi-head latent attention: keys and values of all heads from one small vector a position.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1. Shapes in names: B batch, S positions that ask, T positions that
are asked, D d_model, H heads, E width of a head, C the latent, Q the queries' latent, R the rotary part of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.direction import Direction
from stackwise.config.model import ModelConfig
from stackwise.errors import UsageError
from stackwise.model.attention import attend, is_paired
from stackwise.model.cache import Cache
from stackwise.model.layers import RMSNorm, Rotary
from stackwise.model.quantized import weight_of
from stackwise.model.sight import Sight


class LatentAttention(nn.Module):
    """Low-rank joint compression of keys and values, with the rotary positions in dimensions of their own.

    The layers are the paper's matrices (equations 9 to 19): `kv_down` W^DKV, `k_up` W^UK, `v_up` W^UV, `k_rotary`
    W^KR, `q_down` W^DQ, `q_up` W^UQ, `q_rotary` W^QR, `o` W^O, with its norms behind the compressions (section 3.1.2).
    Only `o` has a bias where the configuration asks for biases. A cache holds the latent and the one rotary key.

    Raises:
        UsageError: Heads that do not divide the width; a rotary part of odd width.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, self.heads = config.d_model, config.n_heads
        if d % self.heads:
            raise UsageError(f"model.n_heads {self.heads} does not divide model.d_model {d}")
        self.width, self.rank, self.turned = d // self.heads, config.latent_rank, config.rotary_width
        inner = config.q_rank or d
        self.q_down = nn.Linear(d, inner, bias=False) if config.q_rank else None
        self.q_norm = RMSNorm(inner, eps=config.norm_eps) if config.q_rank else None
        self.q_up = nn.Linear(inner, self.heads * self.width, bias=False)
        self.kv_down = nn.Linear(d, self.rank, bias=False)
        self.kv_norm = RMSNorm(self.rank, eps=config.norm_eps)
        self.k_up = nn.Linear(self.rank, self.heads * self.width, bias=False)
        self.v_up = nn.Linear(self.rank, self.heads * self.width, bias=False)
        self.o = nn.Linear(d, d, bias=config.bias)
        self.rotary = Rotary(self.turned, config.rope_theta, config.max_seq_len) if self.turned else None
        self.q_rotary = nn.Linear(inner, self.heads * self.turned, bias=False) if self.turned else None
        self.k_rotary = nn.Linear(d, self.turned, bias=False) if self.turned else None
        self.scale = (self.width + self.turned) ** -0.5

    def forward(
        self,
        x_BSD: Tensor,
        *,
        causal: Direction = False,
        segments_BS: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend. [B, S, D] to [B, S, D]; the arguments are those of `Attention`."""
        B, S, D = x_BSD.shape
        start = 0 if cache is None else cache.length
        sight = Sight(causal, segments_BS, start)
        c_BSQ = x_BSD
        if self.q_down is not None and self.q_norm is not None:
            c_BSQ = self.q_norm(self.q_down(x_BSD))
        q_BHSE = self._heads(self.q_up(c_BSQ))
        c_B1SC = self.kv_norm(self.kv_down(x_BSD))[:, None]
        if self.rotary is not None and self.q_rotary is not None and self.k_rotary is not None:
            tables = self.rotary.copies(S, start, is_paired(causal))
            q_BSHR = self.q_rotary(c_BSQ).view(B, S, self.heads, self.turned)
            q_BHSR = self.rotary.rotate(q_BSHR, tables).transpose(1, 2)
            k_B1SR = self.rotary.rotate(self.k_rotary(x_BSD).view(B, S, 1, self.turned), tables).transpose(1, 2)
        else:
            q_BHSR, k_B1SR = q_BHSE[..., :0], c_B1SC[..., :0]
        if cache is not None:
            # Under autocast the norm is float32 and the matrices are not: what is kept is what they would be given.
            dtype = q_BHSE.dtype
            c_B1SC, k_B1SR = cache.join(c_B1SC.to(dtype), k_B1SR.to(dtype))
        if start and type(self.k_up) is type(self.v_up) is nn.Linear:
            y_BHSE = self._absorbed(q_BHSE, q_BHSR, c_B1SC, k_B1SR, sight)
        else:
            k_BHTE, v_BHTE = self._heads(self.k_up(c_B1SC[:, 0])), self._heads(self.v_up(c_B1SC[:, 0]))
            k_BHTR = k_B1SR.expand(-1, self.heads, -1, -1)
            q, k = torch.cat((q_BHSE, q_BHSR), -1), torch.cat((k_BHTE, k_BHTR.to(k_BHTE.dtype)), -1)
            # Fused kernels want values as wide as keys.
            y_BHSE = attend(q, k, F.pad(v_BHTE, (0, self.turned)), sight, self.scale)[..., : self.width]
        y_BSD: Tensor = self.o(y_BHSE.transpose(1, 2).reshape(B, S, D))
        return y_BSD

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, self.width).transpose(1, 2)

    def _absorbed(self, q_BHSE: Tensor, q_BHSR: Tensor, c_B1TC: Tensor, k_B1TR: Tensor, sight: Sight) -> Tensor:
        """The same without making keys and values: `k_up` goes into the queries, `v_up` behind the sum."""
        up_HEC = weight_of(self.k_up, q_BHSE.dtype).view(self.heads, self.width, self.rank)
        down_HEC = weight_of(self.v_up, q_BHSE.dtype).view(self.heads, self.width, self.rank)
        q = torch.cat((torch.einsum("bhse,hec->bhsc", q_BHSE, up_HEC), q_BHSR), -1)
        kept = torch.cat((c_B1TC, k_B1TR), -1)
        y_BHSC = attend(q, kept, kept, sight, self.scale)[..., : self.rank]
        return torch.einsum("bhsc,hec->bhse", y_BHSC, down_HEC)
