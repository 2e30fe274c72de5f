"""Two kinds from outside the package, as a user's file would have them: an attention and a feed-forward.

The attention looks at near positions alone and keeps no cache. The feed-forward mixes experts and has a loss of its
own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stackwise.batch import Term
from stackwise.config.kinds import ATTENTIONS, FEED_FORWARDS, Attention, FeedForward, Matrix
from stackwise.config.model import ModelConfig
from stackwise.model.attention import AttentionPattern


@ATTENTIONS.register("near")
class Near(Attention):
    """Softmax attention over the positions that are at most `reach` away."""

    caches: ClassVar[bool] = False

    reach: int = Field(8, ge=1, description="how far a position sees")

    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        d = model.d_model
        return {"qkv": Matrix(3 * d, d), "o": Matrix(d, d)}

    def kept(self, model: ModelConfig) -> int:
        return 9 * model.d_model

    def build(self, model: ModelConfig) -> nn.Module:
        return NearAttention(model, self.reach)


class NearAttention(nn.Module):
    distances: Tensor

    def __init__(self, model: ModelConfig, reach: int) -> None:
        super().__init__()
        self.heads, self.reach, self.longest = model.n_heads, reach, model.max_seq_len or 512
        self.qkv = nn.Linear(model.d_model, 3 * model.d_model, bias=False)
        self.o = nn.Linear(model.d_model, model.d_model, bias=False)
        self.register_buffer("distances", torch.empty(self.longest, self.longest), persistent=False)

    def rebuild(self, device: torch.device | str) -> None:
        places = torch.arange(self.longest, device=device)
        self.distances = (places[:, None] - places).abs().float()

    def forward(self, x_BSD: Tensor, *, causal: Any, segments_BS: Tensor | None, cache: None = None) -> Tensor:
        B, S, D = x_BSD.shape
        q, k, v = self.qkv(x_BSD).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        seen = self.distances[:S, :S] <= self.reach
        pattern = AttentionPattern(causal, segments_BS).mask(S, x_BSD.device)
        mask = seen[None, None] if pattern is None else pattern & seen
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y_BSD: Tensor = self.o(y.transpose(1, 2).reshape(B, S, D))
        return y_BSD


@FEED_FORWARDS.register("experts")
class Experts(FeedForward):
    """Experts, each position weighing all of them; an entropy keeps the weights apart."""

    residual: ClassVar[tuple[str, ...]] = ("down",)

    experts: int = Field(3, ge=1, description="how many there are")
    balance: float = Field(0.01, ge=0, description="weight of the entropy")

    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        return {"router": Matrix(self.experts, model.d_model, narrow=False)}

    def other_parameters(self, model: ModelConfig) -> int:
        return 2 * self.experts * model.d_model * model.ffn_width

    def kept(self, model: ModelConfig) -> int:
        return self.experts * (2 * model.ffn_width + model.d_model)

    def build(self, model: ModelConfig) -> nn.Module:
        return ExpertLayer(model, self)


class ExpertLayer(nn.Module):
    def __init__(self, model: ModelConfig, kind: Experts) -> None:
        super().__init__()
        d, f, n = model.d_model, model.ffn_width, kind.experts
        self.balance = kind.balance
        self.router = nn.Linear(d, n, bias=False)
        self.up = nn.Parameter(torch.empty(n, d, f))
        self.down = nn.Parameter(torch.empty(n, f, d))
        self.terms: dict[str, Term] = {}

    def forward(self, x_BSD: Tensor) -> Tensor:
        shares = self.router(x_BSD).softmax(-1)
        entropy = -(shares * shares.clamp(min=1e-9).log()).sum().float()
        self.terms = {"balance": Term(entropy, x_BSD.shape[0] * x_BSD.shape[1], self.balance)}
        x = x_BSD.to(self.up.dtype)
        each = torch.stack([F.gelu(x @ up) @ down for up, down in zip(self.up, self.down, strict=True)], -1)
        y_BSD: Tensor = (each * shares[..., None, :]).sum(-1)
        return y_BSD
