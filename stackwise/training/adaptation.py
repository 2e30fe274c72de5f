"""Inner steps: weights that adapt to a task's support rows, and the gradient that makes this quick.

Sources: MAML and its first-order form (Finn et al., arXiv 1703.03400); Reptile (Nichol et al., arXiv 1803.02999).
Adapted weights are tensors beside the model's own, which it runs with through `torch.func.functional_call`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from stackwise.batch import Batch, Term
from stackwise.config.meta import Meta
from stackwise.model import Head
from stackwise.objectives.cross_entropy import ProjectionHead, whole_graph
from stackwise.training.optim import steered_in
from stackwise.training.scaling import BACKWARD, FORWARD, PhaseClock
from stackwise.training.stage import StageModel, StepLoss

Weights = Mapping[str, Tensor]

ADAPTATION = "adaptation"
"""What is looked at on tasks held out: the query loss before the inner steps and after each, in nats."""


class Adaptation:
    """What a stage's weights become by a few steps on a task's support rows.

    A task is a microbatch: its first `meta.support` rows, and the query rows after them.

    Args:
        parameters: Those that adapt, by their name in the model; what a rule moves (`steered`) is frozen.
        device: Where the model computes.
    """

    def __init__(
        self, model: StageModel, meta: Meta, parameters: Mapping[str, nn.Parameter], device: torch.device
    ) -> None:
        self._model, self._meta, self._device = model, meta, device
        ruled = steered_in([model])
        self._parameters = {name: p for name, p in parameters.items() if id(p) not in ruled}
        projection = model.head.weight if isinstance(model.head, Head) and model.head.tied else None
        self._tied = next((name for name, p in self._parameters.items() if p is projection), None)

    def query(self, task: Batch) -> Batch:
        """The rows that judge."""
        return task.part(self._meta.support, len(task.rows_B))

    def gradient(self, task: Batch, losses: StepLoss, phases: PhaseClock) -> dict[str, Term]:
        """Add the gradient of one task to the parameters.

        MAML: of the query loss at the adapted weights, with respect to the weights before them. First-order MAML takes
        it at the adapted weights as if inner steps had no slope; Reptile adds the inner steps' own gradients, so that
        it is (weights before - weights after a last step on the query rows) / inner rate.

        Returns:
            The terms of the query loss at the adapted weights.
        """
        support, query = task.part(0, self._meta.support), self.query(task)
        weights: Weights = self._parameters
        slopes: dict[str, Tensor] = {}
        with self._differentiable():
            for _ in range(self._meta.inner_steps):
                inner = self._slopes(weights, support, phases, through=self._meta.second_order)
                weights = self._moved(weights, inner)
                if self._meta.adds_steps:
                    slopes = {name: slope + slopes[name] if slopes else slope for name, slope in inner.items()}
            with phases(FORWARD):
                terms = self._terms(weights, query)
                root = losses.root(terms, query)
            with phases(BACKWARD):
                root.backward()  # type: ignore[no-untyped-call]
        share = losses.portion(terms)
        for name, slope in slopes.items():
            p = self._parameters[name]
            p.grad = slope * share if p.grad is None else p.grad.add_(slope, alpha=share)
        return terms

    def judged(self, task: Batch) -> dict[str, Term]:
        """The terms of the query loss at the adapted weights, and `ADAPTATION` beside them; no parameter changes."""
        support, query = task.part(0, self._meta.support), self.query(task)
        weights, curve, count = dict[str, Tensor](self._parameters), list[Tensor](), 1
        for step in range(self._meta.inner_steps + 1):
            with torch.no_grad():
                terms = self._terms(weights, query)
            count = next(iter(terms.values())).count
            curve.append(_mean(terms).detach() * count)
            if step < self._meta.inner_steps:
                with torch.enable_grad(), self._differentiable():
                    inner = self._slopes(weights, support, None, through=False)
                weights = {name: w.detach().requires_grad_() for name, w in self._moved(weights, inner).items()}
        return {**terms, ADAPTATION: Term(torch.stack(curve), count)}

    def _slopes(
        self, weights: Weights, support: Batch, phases: PhaseClock | None, *, through: bool
    ) -> dict[str, Tensor]:
        """The gradient of the mean loss on support rows at some weights; of those alone that it reaches.

        Args:
            through: Whether it has a gradient itself.
        """
        forward = contextlib.nullcontext() if phases is None else phases(FORWARD)
        backward = contextlib.nullcontext() if phases is None else phases(BACKWARD)
        with forward:
            loss = _mean(self._terms(weights, support))
        if not loss.requires_grad:  # no position of these rows is scored
            return {}
        with backward:
            slopes: Sequence[Tensor | None] = torch.autograd.grad(
                loss, list(weights.values()), create_graph=through, allow_unused=True
            )
        return {name: slope for name, slope in zip(weights, slopes, strict=True) if slope is not None}

    def _moved(self, weights: Weights, slopes: Weights) -> dict[str, Tensor]:
        rate = self._meta.inner_rate
        return {name: w.sub(slopes[name], alpha=rate) if name in slopes else w for name, w in weights.items()}

    def _terms(self, weights: Weights, batch: Batch) -> dict[str, Term]:
        changed = dict(weights)
        if self._tied is not None:  # a tied projection is no parameter of the head
            changed["head.projection"] = changed[self._tied]
        with self._model.numerics(self._device):
            terms: dict[str, Term] = functional_call(self._model, changed, (batch,))
        return terms

    @contextlib.contextmanager
    def _differentiable(self) -> Iterator[None]:
        """Kernels whose gradients have gradients, where those are needed."""
        with contextlib.ExitStack() as stack:
            if self._meta.second_order:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # What is recomputed in a backward pass would be so with the model's own weights.
            if self._meta.second_order or not isinstance(self._model.head, ProjectionHead):
                stack.enter_context(whole_graph())
            yield


def _mean(terms: Mapping[str, Term]) -> Tensor:
    """The loss of a batch: the sum of its terms' means, each times its weight."""
    weighed = [term.sum * (term.weight / max(1, term.count)) for term in terms.values() if not term.sum.ndim]
    return torch.stack([part.to(weighed[0].dtype) for part in weighed]).sum()
