"""Engines: how a stage's weights are held while they train.

The loop (`trainer.py`) says when a step is taken, when to save and when to end; an engine takes the step. It alone
knows where weights, gradients and the optimizer's state are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from stackwise.config import StageTraining
from stackwise.identity import derive_seed
from stackwise.training.optim import make_optimizer
from stackwise.training.stage import Batch, StageModel


@dataclass(frozen=True)
class Stepped:
    """What a step came to: scalars on the device, so that whoever reads them waits for it.

    Args:
        loss: Mean loss over the scored positions of all microbatches, in nats.
        gradient_norm: Norm of the gradient of that mean over all that trains, before clipping.
    """

    loss: Tensor
    gradient_norm: Tensor


class Engine(Protocol):
    """Holds what a stage trains, and takes its steps.

    Every draw is a pure function of (seed, step, microbatch), so an engine restored at step n goes on as one that was
    never stopped: its state is the weights, the optimizer's state, and nothing else.
    """

    device: torch.device
    """Where it computes."""

    def step(self, microbatches: Sequence[Batch], step: int, rate: float) -> Stepped:
        """One optimizer step: the gradient of the mean loss over all scored positions of all microbatches.

        Args:
            microbatches: On the CPU, `accumulation` of them.
            step: Which step this is, from 0; dropout follows from it.
            rate: Its learning rate.
        """

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds beside the step, by name; tensors in use, so copy what must not change."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave, in place.

        Args:
            tensors: Looked up one by one: a look-up may read from disk, so nothing is asked for twice.
        """

    def settle(self) -> None:
        """Called once after the last step: from then on the model's modules hold what is committed."""

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The state dict, as it is committed, of the front, a block or the head of the model; after `settle`."""


class ResidentEngine:
    """The whole stage on the device: weights, gradients and the optimizer's state.

    Args:
        model: The stage, on `device`; what of it requires gradients is trained.
        settings: Clipping, accumulation and the optimizer's.
        seed: The parts that its randomness follows from, such as (seed, stage).
        device: Where `model` is.
    """

    def __init__(
        self, model: StageModel, settings: StageTraining, *, seed: tuple[int | str, ...], device: torch.device
    ) -> None:
        self.model, self.settings, self.seed, self.device = model.train(), settings, seed, device
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters.values(), settings)

    def step(self, microbatches: Sequence[Batch], step: int, rate: float) -> Stepped:
        """One optimizer step (see `Engine.step`)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, norm = self._gradients(microbatches, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Stepped(loss, norm)

    def state(self) -> dict[str, Tensor]:
        """Weights as `weight/NAME`, the optimizer's state as `KIND/NAME`."""
        tensors = {f"weight/{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state.get(p, {}).items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave, one tensor at a time."""
        for name, p in self.parameters.items():
            p.data.copy_(tensors[f"weight/{name}"])
        moments: dict[str, list[str]] = {}
        for key in tensors:
            kind, _, name = key.partition("/")
            if kind != "weight":
                moments.setdefault(name, []).append(kind)
        for name, p in self.parameters.items():
            if name in moments:
                self.optimizer.state[p] = {
                    kind: value if kind == "step" and value.device == p.device else value.to(p.device)
                    for kind in moments[name]
                    for value in (tensors[f"{kind}/{name}"],)
                }

    def settle(self) -> None:
        """Nothing to do: the modules hold what is committed."""

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's state dict."""
        return module.state_dict()

    def _gradients(self, microbatches: Sequence[Batch], step: int) -> tuple[Tensor, Tensor]:
        """Leave the step's clipped gradient on the parameters; its mean loss and its norm before clipping."""
        total = torch.zeros((), device=self.device)
        scored = 0
        for number, cpu_batch in enumerate(microbatches):
            batch = cpu_batch.to(self.device)
            torch.manual_seed(derive_seed(*self.seed, step, number, "dropout"))
            with self.model.numerics(self.device):
                loss, count = self.model(batch)
            # Scaled by a constant now and by the true count below, which is known only at the last microbatch.
            (loss / batch.tokens_BS.numel()).backward()
            total += loss.detach()
            scored += int(count)
            nominal = batch.tokens_BS.numel()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients or not scored:
            return total / max(scored, 1), torch.zeros((), device=self.device)
        torch._foreach_mul_(gradients, nominal / scored)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.settings.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.settings.grad_clip, norm)
        return total / scored, norm
