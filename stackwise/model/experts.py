"""The mixture of experts: each token goes to the best of many feed-forwards (arXiv 1701.06538).

Shapes in names: T tokens, D d_model, E experts, K experts of a token, N = T K rows of expert work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.batch import Batch, Term
from stackwise.model.layers import GatedFeedForward
from stackwise.model.moe import Annealing

if TYPE_CHECKING:
    from stackwise.config.model import ModelConfig
    from stackwise.model.moe import MoE

BALANCE, ROUTER_Z = "balance", "router_z"
"""Names of the terms that a mixture leaves."""
USAGE = "experts."
"""What the name of its counts begins with; the block's place follows."""
STEERING = 1e-6
"""Weight of the term that brings a bias its gradient: none of the loss or of the gradient's norm, to float32."""
TILE = 16
"""Rows that an expert computes at a time are a multiple of it where nothing trains: narrower products round otherwise,
and a row's bits would depend on the batch."""


@dataclass(frozen=True)
class Routing:
    """Which experts tokens go to.

    Args:
        weights_TK: What a token's experts weigh, float32 (or wider).
        experts_TK: Which they are.
        terms: Losses and counts of the choice.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    terms: dict[str, Term]


@dataclass(frozen=True)
class Order:
    """Rows of work sorted by expert; of one expert, in the order of the tokens.

    Args:
        row_N: For each row in that order, which of the T K it is.
        place_N: For each of the T K, its place in that order.
        ends_E: Where each expert's rows end, int32 on the device.
    """

    row_N: Tensor
    place_N: Tensor
    ends_E: Tensor

    @classmethod
    def of(cls, experts_TK: Tensor, experts: int) -> Order:
        """The order of a routing."""
        sorted_N, row_N = experts_TK.flatten().sort(stable=True)
        place_N = torch.empty_like(row_N).scatter_(0, row_N, torch.arange(len(row_N), device=row_N.device))
        every = torch.arange(experts, device=row_N.device, dtype=sorted_N.dtype)
        return cls(row_N, place_N, torch.searchsorted(sorted_N, every, right=True).to(torch.int32))

    @property
    def counts_E(self) -> Tensor:  # noqa: N802
        """Rows of each expert."""
        return self.ends_E.diff(prepend=self.ends_E.new_zeros(1))


class _Spread(torch.autograd.Function):
    """Token rows, each K times, in the order of experts. The backward pass adds in a fixed order, without atomics."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Order, k: int) -> Tensor:
        ctx.order, ctx.k = order, k
        return x_TD.index_select(0, order.row_N // k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        back_ND = gradients[0].index_select(0, ctx.order.place_N)
        return back_ND.view(-1, ctx.k, back_ND.shape[-1]).sum(1), None, None


class _Gather(torch.autograd.Function):
    """The rows of work back in the order of tokens."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return y_ND.index_select(0, order.place_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, ctx.order.row_N), None


class MixtureFeedForward(nn.Module):
    """Routed experts, and those that every token goes to.

    The router computes in float32 (or wider), whatever the surroundings: it chooses (arXiv 2101.03961, section 2.4).

    Args:
        model: The rack's configuration, as the block has it.
        kind: Its settings.
    """

    def __init__(self, model: ModelConfig, kind: MoE) -> None:
        super().__init__()
        self.kind = kind
        self.router = nn.Linear(model.d_model, kind.experts, bias=False)
        width = kind.expert_width(model)
        self.experts = nn.ModuleList(GatedFeedForward(model.d_model, width) for _ in range(kind.experts))
        self.shared = GatedFeedForward(model.d_model, kind.shared_width(model)) if kind.shared_experts else None
        self.shared_gate = nn.Linear(model.d_model, 1, bias=False) if kind.shared_gate else None
        if kind.balance == "bias":
            self.balance = nn.Parameter(torch.empty(kind.experts))
        self.steered = {"balance": kind.balance_rate} if kind.balance == "bias" else {}
        self.temperature = kind.last_temperature
        self.terms: dict[str, Term] = {}
        self.lend: Callable[[nn.Module, Tensor], Tensor] | None = None
        self.routed: Callable[[int, Tensor], None] | None = None

    def prepare(self, batch: Batch) -> None:
        """Take the temperature that the batch is taken at: a function of the step."""
        if isinstance(schedule := self.kind.temperature, Annealing):
            self.temperature = schedule.after(batch.passes)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        routing = self.route(x_TD)
        if self.routed is not None:  # [rows, choices] of each row's tokens
            self.routed(self.kind.place or 0, routing.experts_TK.reshape(len(x_BSD), -1))
        order = Order.of(routing.experts_TK, self.kind.experts)
        weights_TK, dropped = self._limited(routing, order)
        y_ND = self._computed(_spread(x_TD, order, self.kind.top_k), order)
        y_TKD = _gather(y_ND, order).view(len(x_TD), self.kind.top_k, -1)
        y_TD = (y_TKD * weights_TK.to(y_TKD.dtype)[..., None]).sum(1)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            if self.shared_gate is not None:
                shared_TD = torch.sigmoid(self.shared_gate(x_TD)) * shared_TD
            y_TD = y_TD + shared_TD
        if self.kind.place is not None:
            usage = torch.cat([order.counts_E, dropped[None]]).float()
            routing.terms[f"{USAGE}{self.kind.place}"] = Term(usage, len(x_TD), 0.0)
        self.terms = routing.terms
        return y_TD.view(x_BSD.shape)

    def route(self, x_TD: Tensor) -> Routing:
        """Choose each token's experts."""
        kind, tokens = self.kind, len(x_TD)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(wide), self.router.weight.to(wide))
            terms: dict[str, Term] = {}
            if kind.router_z:
                terms[ROUTER_Z] = Term(logits_TE.logsumexp(-1).square().sum(), tokens, kind.router_z)
            if self.training and kind.noise:
                logits_TE = logits_TE + kind.noise * torch.randn_like(logits_TE)
            shares_TE = (logits_TE / self.temperature if self.temperature != 1.0 else logits_TE).softmax(-1)
            choice_TE = shares_TE.detach()
            if kind.balance == "bias":
                choice_TE = choice_TE + self.balance.detach()
            experts_TK = choice_TE.topk(kind.top_k, dim=-1).indices
            weights_TK = shares_TE.gather(-1, experts_TK)
            if kind.normalizes:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            if kind.balance != "none":
                terms[BALANCE] = self._balance(shares_TE, experts_TK)
        return Routing(weights_TK, experts_TK, terms)

    def _balance(self, shares_TE: Tensor, experts_TK: Tensor) -> Term:
        """E times the sum over experts of their share of choices times their mean probability: 1 where all are even.

        Source: Switch (arXiv 2101.03961), equation 4. A bias is moved by a rule (arXiv 2408.15664, algorithm 1), which
        asks for the experts' loads of a whole step: they are the gradient of the bias in this term, so that they are
        added up over microbatches and ranks as gradients are, and each counts once.
        """
        tokens, experts = shares_TE.shape
        load_E = F.one_hot(experts_TK, experts).sum((0, 1)).to(shares_TE.dtype)
        even = experts / (tokens * self.kind.top_k)
        if self.kind.balance == "loss":
            return Term((load_E * shares_TE.mean(0)).sum() * even * tokens, tokens, self.kind.aux_weight)
        shown = (load_E * shares_TE.detach().mean(0)).sum() * even * tokens
        steering = (self.balance.to(load_E.dtype) * load_E).sum()
        return Term(shown + (steering - steering.detach()), tokens, STEERING)

    def _limited(self, routing: Routing, order: Order) -> tuple[Tensor, Tensor]:
        """The weights, zero where an expert has no room for a token, and how many these are.

        A training-time device: what is stored or evaluated drops nothing, as a row would depend on its batch.
        """
        tokens = len(routing.weights_TK)
        if not self.training or self.kind.capacity_factor is None:
            return routing.weights_TK, order.ends_E.new_zeros(())
        starts_E = order.ends_E - order.counts_E
        within_TK = order.place_N.view(tokens, -1) - starts_E[routing.experts_TK]
        kept_TK = within_TK < self.kind.capacity(tokens)
        return routing.weights_TK * kept_TK, (~kept_TK).sum().to(order.ends_E.dtype)

    def _computed(self, x_ND: Tensor, order: Order) -> Tensor:
        """Each expert over its rows."""
        if x_ND.is_cuda and self.lend is None and (products := self.stacked(x_ND)) is not None:
            gate_EFD, up_EFD, down_EDF = products
            x_ND = x_ND.to(gate_EFD.dtype)
            gate = F.grouped_mm(x_ND, gate_EFD.transpose(1, 2), offs=order.ends_E)
            up = F.grouped_mm(x_ND, up_EFD.transpose(1, 2), offs=order.ends_E)
            return F.grouped_mm(F.silu(gate) * up, down_EDF.transpose(1, 2), offs=order.ends_E)
        return self.looped(x_ND, order.counts_E.tolist())

    def looped(self, x_ND: Tensor, counts: Sequence[int]) -> Tensor:
        """The experts one after the other: the reference, and what a CPU does.

        Each takes part, rows or none, unless they are lent (see `BlockPart`): then rows alone bring one.
        """
        outputs = []
        for expert, x in zip(self.experts, torch.split(x_ND, list(counts)), strict=True):
            if self.lend is not None and not len(x):
                continue
            missing = 0 if torch.is_grad_enabled() else -len(x) % TILE
            padded = F.pad(x, (0, 0, 0, missing)) if missing else x
            y = expert(padded) if self.lend is None else self.lend(expert, padded)
            outputs.append(y[: len(x)])
        return torch.cat(outputs) if outputs else x_ND

    def stacked(self, x_ND: Tensor) -> list[Tensor] | None:
        """The weights of each layer of all experts as one tensor, in the dtype that is computed in.

        None: they are in a narrow format or have adapters, or the device multiplies no groups of that dtype.
        """
        kind = x_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_ND.dtype
        layers: list[list[Any]] = [[getattr(e, name) for e in self.experts] for name in ("gate", "up", "down")]
        if dtype is not torch.bfloat16 or any(type(layer) is not nn.Linear for one in layers for layer in one):
            return None
        if any(side % 8 for side in layers[0][0].weight.shape):  # rows of a multiple of 16 bytes alone
            return None
        return [torch.stack([layer.weight.to(dtype) for layer in one]) for one in layers]


def _spread(x_TD: Tensor, order: Order, k: int) -> Tensor:
    y: Tensor = _Spread.apply(x_TD, order, k)  # type: ignore[no-untyped-call]
    return y


def _gather(y_ND: Tensor, order: Order) -> Tensor:
    y: Tensor = _Gather.apply(y_ND, order)  # type: ignore[no-untyped-call]
    return y


def experts_used(observed: Mapping[str, Sequence[float]], *, shares: bool = False) -> dict[str, Any]:
    """How the experts of each block were used, under `experts`, by the block's place; empty where there are none.

    Args:
        observed: Of each block the mean choices of each expert by a token, then those that no expert had room for.
        shares: Give each expert's share too.

    Returns:
        Of a block the `entropy` of the experts' shares, 1 where all are even; the shares of the `least` and the `most`
        used one; `dropped`, the share of choices that went past their expert.
    """
    blocks = {int(name.removeprefix(USAGE)): usage for name, usage in observed.items() if name.startswith(USAGE)}
    figures: dict[str, Any] = {}
    for block, (*counts, dropped) in sorted(blocks.items()):
        total = sum(counts) or 1.0
        parts = [count / total for count in counts]
        entropy = -sum(part * math.log(part) for part in parts if part > 0) / math.log(max(2, len(parts)))
        figures[str(block)] = {"entropy": entropy, "least": min(parts), "most": max(parts), "dropped": dropped / total}
        figures[str(block)] |= {"shares": parts} if shares else {}
    return {"experts": figures} if figures else {}
