"""Engines: how a stage's weights are held while they train.

The loop (`trainer.py`) says when a step is taken, when to save and when to end; an engine takes the step. It alone
knows where weights, gradients and the optimizer's state are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from stackwise.batch import Batch
from stackwise.config import StageTraining
from stackwise.identity import derive_seed
from stackwise.training.group import Group, SingleProcess
from stackwise.training.optim import BLOCK, make_optimizer
from stackwise.training.scaling import LossScale
from stackwise.training.stage import MeanLoss, StageModel, StepLoss, Tally

WEIGHT, MEAN, OPTIMIZER = "weight/", "mean/", "optimizer/"
"""What names in an engine's state begin with."""


@dataclass(frozen=True)
class Stepped:
    """What a step came to: scalars on the device, so that whoever reads them waits for it.

    Args:
        loss: Mean loss over the scored positions of all microbatches, in nats.
        gradient_norm: Norm of the gradient of that mean over all that trains, before clipping.
        taken: Whether the weights moved: not where `accept` refused, nor where gradients overflowed half precision.
        terms: The mean of each term by name, where the loss has several; `loss` is their weighted sum.
    """

    loss: Tensor
    gradient_norm: Tensor
    taken: bool = True
    terms: Mapping[str, Tensor] = field(default_factory=dict)


Accept = Callable[[float, float], bool]
"""Asked, at every step, with its loss and gradient norm whether it is taken."""


class Engine(Protocol):
    """Holds what a stage trains, and takes its steps.

    Every draw is a pure function of (seed, step, microbatch), so an engine restored at step n goes on as one that was
    never stopped: its state is the weights, the optimizer's state, and nothing else.
    """

    device: torch.device
    """Where it computes."""

    def step(self, microbatches: Sequence[Batch], step: int, rate: float, accept: Accept | None = None) -> Stepped:
        """One optimizer step: the gradient of the mean loss over all scored positions of all microbatches.

        Args:
            microbatches: On the CPU, `accumulation` of them.
            step: Which step this is, from 0; dropout follows from it.
            rate: Its learning rate.
            accept: Asked before anything moves; where it refuses, weights and optimizer stay as they were. None: no
                figure has to be read off the device.

        Raises:
            StackWiseError: Half precision overflows however the loss is scaled.
        """

    def evaluate(self, batches: Iterable[Batch]) -> MeanLoss:
        """Mean loss in nats over the scored positions of some batches, under the weights that would be committed now.

        Nothing of the training changes by it.
        """

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds beside the step, by name; tensors in use, so copy what must not change."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave, in place.

        Args:
            tensors: Looked up one by one: a look-up may read from disk, so nothing is asked for twice.
        """

    def settle(self) -> None:
        """Called once after the last step: from then on its `weights` are what is committed."""

    def carried(self) -> Mapping[str, Mapping[str, Tensor]]:
        """By part, what going on with the stage at another time needs beside the weights committed; after `settle`.

        The optimizer's state as `optimizer/KIND/NAME`; where a mean is committed, what trains as `weight/NAME`; names
        within the part. Under an empty name the loss scale.
        """

    def take_up(self, carried: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up what `carried` gave, before the first step; a weight that is not in it is the committed one."""


class ResidentEngine:
    """The whole stage on the device: weights, gradients and the optimizer's state.

    Args:
        model: The stage, on `device`; what of it requires gradients is trained.
        settings: Clipping, accumulation and the optimizer's.
        seed: The parts that its randomness follows from, such as (seed, stage).
        device: Where `model` is.
        first_block: The number in the rack of the stage's first block.
        beyond: The parts that are beyond its blocks, in forward order.
        group: The ranks that train the stage together.
    """

    def __init__(
        self,
        model: StageModel,
        settings: StageTraining,
        *,
        seed: tuple[int | str, ...],
        device: torch.device,
        first_block: int = 0,
        beyond: Sequence[str] = (),
        group: Group | None = None,
    ) -> None:
        self.group = group or SingleProcess()
        self.model, self.settings, self.seed, self.device = model.train(), settings, seed, device
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(
            [(part_of(name, first_block, beyond), p) for name, p in self.parameters.items()], settings
        )
        self.scale = LossScale(settings.loss_scale) if model.in_half else None
        self._mean = {name: p.detach().clone() for name, p in self.parameters.items()} if settings.ema else {}
        self._trained: dict[str, Tensor] = {}  # what lies under a mean that is committed
        self._places = {name: (part_of(name, first_block, beyond), _within(name)) for name in self.parameters}

    def step(self, microbatches: Sequence[Batch], step: int, rate: float, accept: Accept | None = None) -> Stepped:
        """One optimizer step (see `Engine.step`)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        losses, norm = self._gradients(microbatches, step)
        loss = losses.total()
        taken = True
        over = self.scale is not None and math.isfinite(float(loss)) and not math.isfinite(float(norm))
        if accept is not None:  # that gradients overflow is the scale's affair
            taken = accept(float(loss), 0.0 if over else float(norm))
        if over and self.scale is not None:
            self.scale.overflowed()
            taken = False
        if taken:
            self.optimizer.step()
            if self.scale is not None:
                self.scale.taken()
            self._average(step)
        self.optimizer.zero_grad(set_to_none=True)
        means = losses.means()
        return Stepped(loss, norm, taken, means if len(means) > 1 else {})

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> MeanLoss:
        """The mean loss over some batches (see `Engine.evaluate`)."""
        tally = Tally()
        self.model.eval()
        self._exchange()
        try:
            for cpu_batch in batches:
                with self.model.numerics(self.device):
                    tally.add(self.model(cpu_batch.to(self.device)))
        finally:
            self._exchange()
            self.model.train()
        return tally.mean(self.group)

    def state(self) -> dict[str, Tensor]:
        """Weights as `weight/NAME`, their mean as `mean/NAME`, the optimizer's state as `KIND/NAME`."""
        tensors = {f"{WEIGHT}{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"{MEAN}{name}": mean for name, mean in self._mean.items()}
        if self.scale is not None:
            tensors |= self.scale.state()
        for name, p in self.parameters.items():
            tensors |= {f"{OPTIMIZER}{key}/{name}": value for key, value in self.optimizer.state.get(p, {}).items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave, one tensor at a time."""
        for name, p in self.parameters.items():
            p.data.copy_(tensors[f"{WEIGHT}{name}"])
        for name, mean in self._mean.items():
            mean.copy_(tensors[f"{MEAN}{name}"])
        if self.scale is not None:
            self.scale.restore(tensors)
        kinds: dict[str, list[str]] = {}
        for key in tensors:
            if key.startswith(OPTIMIZER):
                kind, _, name = key.removeprefix(OPTIMIZER).partition("/")
                kinds.setdefault(name, []).append(kind)
        for name, p in self.parameters.items():
            known = self.optimizer.state.pop(p, {})
            if name in kinds:
                known = {kind: _taken_up(known, kind, tensors[f"{OPTIMIZER}{kind}/{name}"], p) for kind in kinds[name]}
                self.optimizer.state[p] = known

    def settle(self) -> None:
        """The modules hold what is committed; where a mean is kept, that is the mean."""
        self._exchange()
        self._trained, self._mean = self._mean, {}

    def carried(self) -> dict[str, dict[str, Tensor]]:
        """What going on needs (see `Engine.carried`)."""
        found: dict[str, dict[str, Tensor]] = {"": self.scale.state() if self.scale is not None else {}}
        for name, (part, own) in self._places.items():
            state = self.optimizer.state.get(self.parameters[name], {})
            kept = found.setdefault(part, {})
            kept |= {f"{OPTIMIZER}{kind}/{own}": value for kind, value in state.items()}
            if name in self._trained:
                kept[f"{WEIGHT}{own}"] = self._trained[name]
        return found

    @torch.no_grad()
    def take_up(self, carried: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from it (see `Engine.take_up`)."""
        if self.scale is not None:
            self.scale.restore(carried[""])
        found, state = None, dict[str, Tensor]()
        for name, (part, own) in self._places.items():
            if part != found:  # a look-up may read from disk
                found, state = part, dict(carried[part])
            p = self.parameters[name]
            if f"{WEIGHT}{own}" in state:
                p.copy_(state[f"{WEIGHT}{own}"])
            kinds = [key for key in state if key.startswith(OPTIMIZER) and key.endswith(f"/{own}")]
            if kinds:
                self.optimizer.state[p] = {
                    key.removeprefix(OPTIMIZER).removesuffix(f"/{own}"): state[key].to(p.device) for key in kinds
                }

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The state dict, as it is committed, of the front, a block or the head of the model; after `settle`."""
        return module.state_dict()

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Move the mean of the weights. Its decay grows with the steps, so that it forgets where they began."""
        if self._mean:
            decay = min(self.settings.ema, (1.0 + step) / (10.0 + step))
            torch._foreach_lerp_(list(self._mean.values()), list(self.parameters.values()), 1.0 - decay)

    def _exchange(self) -> None:
        """Let weights and mean change places; nothing is copied."""
        for name, mean in self._mean.items():
            p = self.parameters[name]
            p.data, self._mean[name] = mean, p.data

    def _gradients(self, microbatches: Sequence[Batch], step: int) -> tuple[StepLoss, Tensor]:
        """Leave the step's clipped gradient on the parameters; its loss, and its norm before clipping."""
        scale = 1.0 if self.scale is None else self.scale.scale
        losses = StepLoss(self.model.objective, microbatches, self.device, self.group, scale)
        for number, cpu_batch in enumerate(microbatches):
            batch = cpu_batch.to(self.device)
            torch.manual_seed(derive_seed(*self.seed, step, number, "dropout"))
            with self.model.numerics(self.device):
                terms = self.model(batch)
            losses.root(terms, batch).backward()  # type: ignore[no-untyped-call]
            losses.add(terms)
        losses.finish()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients or not losses.scored:
            return losses, torch.zeros((), device=self.device)
        self.group.sum_tensors(gradients)
        if (share := losses.share) is not None:
            torch._foreach_mul_(gradients, share)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.settings.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.settings.grad_clip, norm)
        return losses, norm


def part_of(name: str, first_block: int, beyond: Sequence[str] = ()) -> str:
    """The part that a parameter of a `StageModel` is in: front, block.N (its number in the rack), head, one beyond."""
    part, _, rest = name.partition(".")
    if part not in ("blocks", "beyond"):
        return part
    index = int(rest.partition(".")[0])
    return f"{BLOCK}{first_block + index}" if part == "blocks" else beyond[index]


def _within(name: str) -> str:
    """What a parameter of a `StageModel` is called within its part."""
    part, _, rest = name.partition(".")
    return rest.partition(".")[2] if part in ("blocks", "beyond") else rest


def _taken_up(known: Mapping[str, Tensor], kind: str, saved: Tensor, p: nn.Parameter) -> Tensor:
    """Optimizer state as saved: into the memory that is there, else new; where the optimizer would have it."""
    if kind in known:
        return known[kind].copy_(saved)
    return saved.to(p.device)
