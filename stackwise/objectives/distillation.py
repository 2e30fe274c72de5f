"""A student's objective beside a teacher: its hidden states, or its likeliest tokens, at the same rows.

Shapes in names: B rows, S positions, D d_model, T the teacher's d_model, V vocabulary, K likeliest tokens, n positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stackwise.batch import Batch, Term
from stackwise.config.schema import DistillationConfig
from stackwise.objectives.cross_entropy import slice_rows
from stackwise.objectives.objective import Outputs, RuntimeObjective, flat_index

TEACHER, LOGITS = "teacher", "teacher_logits"
"""Inputs: the teacher's hidden states [B, S, T], and its likeliest tokens [B, S, 2 K] (see `likeliest`)."""


class DistillationObjective(RuntimeObjective):
    """A task's objective, weighted, and a term that draws the stage to its teacher, where the batch has the teacher.

    Args:
        task: What the student learns by itself, and what is shown.
        settings: How it is drawn.
        weight: Of the teacher's terms.
    """

    def __init__(self, task: RuntimeObjective, settings: DistillationConfig, weight: float = 1.0) -> None:
        self.task, self.settings, self.weight = task, settings, weight
        self.name, self.causal, self.likelihood, self.inputs = task.name, task.causal, task.likelihood, task.inputs
        self.sequences = task.sequences

    def shown(self, batch: Batch) -> Tensor:
        return self.task.shown(batch)

    def times(self, batch: Batch) -> Tensor:
        return self.task.times(batch)

    def positions(self, batch: Batch) -> Tensor:
        return self.task.positions(batch)

    def targets(self, batch: Batch) -> Tensor:
        return self.task.targets(batch)

    def factors(self, batch: Batch) -> Tensor | None:
        return self.task.factors(batch)

    def counts(self, batch: Batch) -> dict[str, int]:
        counts = self.task.counts(batch)
        if TEACHER in batch:
            counts["hidden"] = batch.masks_BS.numel()
        if LOGITS in batch:
            counts["logits"] = int(self.positions(batch).sum())
        return counts

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Term]:
        """The terms of the task, each by `task_weight`; hidden states at all positions, tokens at the scored ones."""
        weight = self.settings.task_weight
        terms = {name: replace(t, weight=t.weight * weight) for name, t in self.task.loss(outputs, batch).items()}
        if TEACHER in batch:
            total = hidden_distance(self._matched(outputs), batch[TEACHER], self.settings.match)
            terms["hidden"] = Term(total, batch.masks_BS.numel(), self.weight)
        if LOGITS in batch:
            index_n = flat_index(self.positions(batch), outputs.x_BSD.device)
            x_nD, likeliest_n2K = (
                tensor.flatten(0, 1).index_select(0, index_n) for tensor in (outputs.x_BSD, batch[LOGITS])
            )
            total = divergence(outputs.head, x_nD, likeliest_n2K, self.settings.temperature)
            terms["logits"] = Term(total, len(index_n), self.weight)
        return terms

    def _matched(self, outputs: Outputs) -> Tensor:
        """The student's hidden states in the teacher's width."""
        match: Callable[[Tensor], Tensor] | None = getattr(outputs.head, "match", None)
        return outputs.x_BSD if match is None else match(outputs.x_BSD)


def hidden_distance(x_BST: Tensor, teacher_BST: Tensor, match: str) -> Tensor:
    """The sum over positions of how far two hidden states are apart, float32.

    `mse`: mean squared difference, each brought to a mean square of 1 first, as norms at entry of a block see them;
    `cosine`: 1 less the cosine; `both`: their sum.
    """
    x, teacher = x_BST.float(), teacher_BST.float().to(x_BST.device)
    x, teacher = (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-6) for v in (x, teacher))
    # Of vectors with a mean square of 1 the cosine is the mean product.
    distance = torch.zeros((), device=x.device)
    if match in ("mse", "both"):
        distance = distance + (x - teacher).square().mean(-1).sum()
    if match in ("cosine", "both"):
        distance = distance + (1.0 - (x * teacher).mean(-1)).sum()
    return distance


def likeliest(logits: Tensor, count: int) -> Tensor:
    """The highest logits […, V] and their ids as float32 […, 2 K], logits first: ids below 2^24 are exact."""
    values, ids = logits.float().topk(count, dim=-1)
    return torch.cat([values, ids.float()], -1)


class LikeliestTokens(nn.Module):
    """A head's likeliest tokens among the first ids, in place of its logits: from [B, S, D] to [B, S, 2 K].

    Args:
        head: The head.
        top_k: K.
        ids: How many ids there are to choose among; None: all.
    """

    def __init__(self, head: nn.Module, top_k: int, ids: int | None = None) -> None:
        super().__init__()
        self.head, self.top_k, self.ids = head, top_k, ids

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Row by row: the logits of one are in memory."""
        return torch.stack([likeliest(self.head(x_SD)[:, : self.ids], self.top_k) for x_SD in x_BSD])


def divergence(head: Callable[[Tensor], Tensor], x_nD: Tensor, likeliest_n2K: Tensor, temperature: float) -> Tensor:
    """Sum over positions of T^2 KL(teacher, student) over the teacher's likeliest tokens alone (arXiv 1503.02531).

    The student's probabilities are those among these tokens, as are the teacher's: the rest of the vocabulary is the
    task's to lower. Logits are made in slices, which the backward pass makes again.
    """

    def part(x: Tensor, likeliest_: Tensor) -> Tensor:
        values, ids = likeliest_.chunk(2, -1)
        logits = head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).gather(1, ids.long())
        student = F.log_softmax(logits / temperature, -1)
        teacher = F.log_softmax(values.to(student.dtype) / temperature, -1)
        return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2

    if not len(x_nD):
        return x_nD.sum(dtype=torch.float32)
    likeliest_n2K = likeliest_n2K.to(x_nD.device)
    with torch.no_grad():
        rows = slice_rows(head(x_nD[:1]).shape[-1], x_nD.device)
    if len(x_nD) <= rows:  # nothing to take in turn; recomputing would have torch import its compiler
        return part(x_nD, likeliest_n2K)
    parts = [
        cast(Tensor, checkpoint(part, x_nD[i : i + rows], likeliest_n2K[i : i + rows], use_reentrant=False))
        for i in range(0, len(x_nD), rows)
    ]
    return torch.stack(parts).sum()
