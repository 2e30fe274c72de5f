"""Engines: how a stage's weights are held while they train.

The loop (`trainer.py`) says when a step is taken, when to save and when to end; an engine takes the step. It alone
knows where weights, gradients and the optimizer's state are, and nobody asks which engine it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from stackwise.batch import Batch, Term
from stackwise.config import StageTraining
from stackwise.identity import derive_seed
from stackwise.training.anchor import Squares, row_loss
from stackwise.training.lanes import seed_generator
from stackwise.training.optim import BLOCK, Rising, make_optimizer, over_ranks, set_rates, state_tensors
from stackwise.training.phases import BACKWARD, FORWARD, PhaseClock
from stackwise.training.phases import OPTIMIZER as UPDATE
from stackwise.training.pinned import Arrivals
from stackwise.training.ranks import Ranks, Reducer, SingleProcess
from stackwise.training.scaling import LastNorm, LossScale, clip_factor, judged, narrow_weights
from stackwise.training.stage import MeanLoss, Microbatches, StageModel, StepLoss, Tally, casts_held
from stackwise.training.tasks import Adaptation

if TYPE_CHECKING:
    from stackwise.training.trainer import Trainer

WEIGHT, MEAN, OPTIMIZER = "weight/", "mean/", "optimizer/"  # what names in an engine's state begin with

State = Callable[[], Mapping[str, Tensor]]
"""Makes some tensors when they are wanted: of a stage that does not fit, not all are in memory."""

LOWER_RATE = "lower training.learning_rate (for this stage: stages.K.training.learning_rate) or training.grad_clip"


@dataclass(frozen=True)
class Stepped:
    """What a step came to: scalars on the device, so that whoever reads them waits for it.

    Args:
        taken: Whether the weights moved: not where `accept` refused, nor where gradients overflowed half precision.
        terms: The mean of each term by name, where the loss has several; `loss` is the weighted sum of the scalars.
    """

    loss: Tensor  # mean loss over the scored positions of all microbatches, in nats
    gradient_norm: Tensor  # norm of the gradient of that mean over all that trains, before clipping
    taken: bool = True
    terms: Mapping[str, Tensor] = field(default_factory=dict)


Accept = Callable[[float, float], bool]  # asked, at every step, with its loss and gradient norm whether it is taken


class Engine(Protocol):
    """Holds what a stage trains, and takes its steps.

    Every draw is a pure function of (seed, step, microbatch), so an engine restored at step n goes on as one that was
    never stopped: its state is the weights, the optimizer's state, and nothing else.
    """

    device: torch.device  # where it computes
    ranks: Ranks  # those that train the stage together
    phases: PhaseClock  # the time of its steps, and how far the one in hand is
    gathers: bool  # whether all ranks have to ask for `state` together, as each has a part of it
    checkpoints: str
    """The directory of its checkpoints below the stage's own: one kind of engine cannot take up another's."""

    def step(self, microbatches: Iterable[Batch], step: int, rate: float, accept: Accept | None = None) -> Stepped:
        """One optimizer step: the gradient of the mean loss over all scored positions of all microbatches.

        Args:
            microbatches: On the CPU, this rank's share of `accumulation`; each may be made when it is asked for.
            step: Which step this is, from 0; dropout follows from it.
            accept: Asked before anything moves; where it refuses, weights and optimizer stay as they were. None: no
                figure has to be read off the device.

        Raises:
            StackWiseError: Half precision overflows however the loss is scaled.
        """

    def evaluate(self, batches: Iterable[Batch]) -> MeanLoss:
        """Mean loss in nats over the scored positions of some batches, under the weights that would be committed now.

        Nothing of the training changes by it.
        """

    def squared_gradients(self, batches: Sequence[Batch]) -> dict[str, dict[str, Tensor]]:
        """By part and name, the mean over batches of a row of the squared gradient of its loss, without dropout.

        After `settle`; of the weights that are committed.
        """

    def state(self) -> Mapping[str, Tensor]:
        """All that a checkpoint holds beside the step, by name; tensors in use, so copy what must not change.

        Where ranks have parts of them (`gathers`), each tensor becomes whole as it is looked up, by all of them in one
        order, and once.
        """

    def outline(self) -> Mapping[str, Tensor]:
        """Tensors like those of `state`, whatever their values; without the optimizer's. One rank may ask for them."""

    def keeps(self, name: str, whole: Tensor) -> Tensor | None:
        """Of a tensor of `state` what `restore` wants of it on this rank, in memory of its own; None: nothing."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave, in place, or what is kept of it.

        Args:
            tensors: Looked up one by one: a look-up may read from disk, so nothing is asked for twice.
        """

    def resume(self, trainer: Trainer) -> bool:
        """Called when a trainer has taken up its newest checkpoint, if there is one: go on from what else there is.

        Returns:
            Whether any step was taken before.
        """

    def settle(self) -> None:
        """Called once after the last step: from then on its `weights` are what is committed."""

    def weights(self, part: str) -> dict[str, Tensor]:
        """The state dict of the front, a block with its adapters, or the head, as committed; after `settle`.

        Where the engine `gathers`, all ranks ask together, and the main one gets it.
        """

    def carried(self) -> dict[str, State]:
        """By part, what going on with the stage at another time needs beside the weights committed; after `settle`.

        The optimizer's state as `optimizer/KIND/NAME`; where a mean is committed, what trains as `weight/NAME`; names
        within the part. Under an empty name the loss scale.
        """

    def take_up(self, carried: Mapping[str, State]) -> None:
        """Take up what `carried` gave, before the first step; a weight that is not in it is the committed one."""

    def close(self) -> None:
        """Let go of threads and files."""

    def discard(self) -> None:
        """Remove what this rank keeps on the disk outside the checkpoints' directory; the stage is committed."""


class ResidentEngine(Engine):
    """The whole stage on the device: weights, gradients and the optimizer's state.

    Args:
        seed: The parts that its randomness follows from, such as (seed, stage).
        parts: The model's modules by the names of their parts; None: its blocks count from 0.
    """

    checkpoints = ""
    gathers = False

    def __init__(
        self,
        model: StageModel,
        settings: StageTraining,
        *,
        seed: tuple[int | str, ...],
        device: torch.device,
        parts: Mapping[str, nn.Module] | None = None,
        ranks: Ranks | None = None,
        rising: Rising | None = None,
    ) -> None:
        self.ranks = ranks or SingleProcess()
        self.model, self.settings, self.seed, self.device = model.train(), settings, seed, device
        model.recomputed_every = settings.recomputed_every
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parts = dict(parts or _parts(model))
        self._places: dict[str, tuple[str, str]] = {}  # for each of `parameters` its part, and its name within it
        by_id = {id(p): (part, name) for part, m in reversed(self.parts.items()) for name, p in m.named_parameters()}
        self._places = {name: by_id[id(p)] for name, p in self.parameters.items()}
        trained = [(self._places[name][0], p) for name, p in self.parameters.items()]
        self.optimizer = make_optimizer(trained, settings, rising, modules=self.parts.values())
        self._reducer = self._reducer_of(list(self.parameters.values()))
        self.gathers |= self._reducer.gathers
        self.scale = LossScale(settings.loss_scale) if model.in_half else None
        self.last = LastNorm() if settings.clip_by == "last" and settings.grad_clip > 0 else None
        self.phases, self._arrivals = PhaseClock(device), Arrivals(device)
        self._adaptation: Adaptation | None = None
        if settings.meta is not None:
            self._adaptation = Adaptation(model, settings.meta, self.parameters, device)
        self._mean = {name: p.detach().clone() for name, p in self.parameters.items()} if settings.ema else {}
        self._trained: dict[str, Tensor] = {}  # what lies under a mean that is committed

    def step(self, microbatches: Iterable[Batch], step: int, rate: float, accept: Accept | None = None) -> Stepped:
        set_rates(self.optimizer.param_groups, rate, step)
        losses, norm = self._gradients(microbatches, step)
        loss = losses.total()
        taken, _ = judged(loss, norm, self.scale, accept)
        with self.phases(UPDATE):
            if taken:
                self.optimizer.step()
                if self.scale is not None:
                    self.scale.taken()
                if self.last is not None:
                    self.last.norm = norm.detach()
                self._average(step)
            self.optimizer.zero_grad(set_to_none=True)
        means = losses.means()
        return Stepped(loss, norm, taken, means if len(means) > 1 else {})

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> MeanLoss:
        tally = Tally()
        self.model.eval()
        self._exchange()
        try:
            for cpu_batch, counts in self._judging(batches):
                batch = cpu_batch.to(self.device)
                if self._adaptation is not None:
                    tally.add(self._adaptation.judged(batch))
                    continue
                with self.model.numerics(self.device):
                    terms = self._judged(batch)
                if counts:
                    tally.add(terms)
        finally:
            self._exchange()
            self.model.train()
        return tally.mean(self.ranks)

    def squared_gradients(self, batches: Sequence[Batch]) -> dict[str, dict[str, Tensor]]:
        squares = Squares()
        self.model.eval()
        for cpu_batch in batches:
            with self.model.numerics(self.device):
                loss = row_loss(self.model(cpu_batch.to(self.device)))
            loss.backward()  # type: ignore[no-untyped-call]
            squares.take((*self._places[name], p) for name, p in self.parameters.items())
        self.model.train()
        return squares.means(len(batches))

    def state(self) -> Mapping[str, Tensor]:
        """Weights as `weight/NAME`, their mean as `mean/NAME`, the optimizer's state as `KIND/NAME`."""
        tensors = {f"{WEIGHT}{name}": self._whole(p.detach()) for name, p in self.parameters.items()}
        tensors |= {f"{MEAN}{name}": mean for name, mean in self._mean.items()}
        tensors |= self._figures()
        for name, p in self.parameters.items():
            state = state_tensors(self.optimizer, p)
            tensors |= {f"{OPTIMIZER}{kind}/{name}": self._whole(value) for kind, value in state.items()}
        return tensors | self._reducer.state()

    def outline(self) -> dict[str, Tensor]:
        tensors = {f"{WEIGHT}{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"{MEAN}{name}": mean for name, mean in self._mean.items()}
        return tensors | self._figures() | self._reducer.outline()

    def _figures(self) -> dict[str, Tensor]:
        """What steps hand on beside weights and moments."""
        kept = [one.state() for one in (self.scale, self.last) if one is not None]
        return {key: value for state in kept for key, value in state.items()}

    def keeps(self, name: str, whole: Tensor) -> Tensor | None:
        """See `Engine.keeps`: all of it."""
        return whole

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave, one tensor at a time."""
        for name, p in self.parameters.items():
            p.detach().copy_(self._slice(tensors[f"{WEIGHT}{name}"], p))
        for name, mean in self._mean.items():
            mean.copy_(tensors[f"{MEAN}{name}"])
        for figure in (self.scale, self.last):
            if figure is not None:
                figure.restore(tensors)
        self._reducer.restore(tensors)
        kinds: dict[str, list[str]] = {}
        for key in tensors:
            if key.startswith(OPTIMIZER):
                kind, _, name = key.removeprefix(OPTIMIZER).partition("/")
                kinds.setdefault(name, []).append(kind)
        for name, p in self.parameters.items():
            before = self.optimizer.state.pop(p, {})
            if name in kinds:
                saved = {kind: self._slice(tensors[f"{OPTIMIZER}{kind}/{name}"], p) for kind in kinds[name]}
                # Into the memory that is there, else into new memory, where the optimizer would have it.
                self.optimizer.state[p] = {
                    kind: before[kind].copy_(value) if kind in before else value.to(p.device)
                    for kind, value in saved.items()
                }

    def settle(self) -> None:
        """The modules hold what is committed; where a mean is kept, that is the mean."""
        self._exchange()
        self._trained, self._mean = self._mean, {}

    def resume(self, trainer: Trainer) -> bool:
        """See `Engine.resume`: a checkpoint holds all that there is."""
        return trainer.step > 0

    def weights(self, part: str) -> dict[str, Tensor]:
        return self.parts[part].state_dict()

    def carried(self) -> dict[str, State]:
        by_part: dict[str, dict[str, Tensor]] = {"": self._figures()}
        for name, (part, within) in self._places.items():
            state = state_tensors(self.optimizer, self.parameters[name])
            kept = by_part.setdefault(part, {})
            kept |= {f"{OPTIMIZER}{kind}/{within}": self._whole(value) for kind, value in state.items()}
            if name in self._trained:
                kept[f"{WEIGHT}{within}"] = self._trained[name]
        return {part: partial(dict[str, Tensor], tensors) for part, tensors in by_part.items()}

    @torch.no_grad()
    def take_up(self, carried: Mapping[str, State]) -> None:
        for figure in (self.scale, self.last):
            if figure is not None:
                figure.restore(carried[""]())
        for part in dict.fromkeys(part for part, _ in self._places.values()):
            state = carried[part]() if part in carried else {}  # a new part has none
            for name in (name for name, (of, _) in self._places.items() if of == part):
                p, within = self.parameters[name], self._places[name][1]
                if f"{WEIGHT}{within}" in state:
                    p.copy_(self._slice(state[f"{WEIGHT}{within}"], p))
                kept = {
                    kind: self._slice(value, p).to(p.device) for kind, value in optimizer_state(state, within).items()
                }
                if kept:
                    self.optimizer.state[p] = kept

    def close(self) -> None:
        """See `Engine.close`: there are none."""

    def discard(self) -> None:
        """See `Engine.discard`: there is nothing."""

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

    def _reducer_of(self, parameters: list[nn.Parameter]) -> Reducer:
        """What adds up the gradients of all ranks."""
        return self.ranks.reducer(parameters)

    def _before_backward(self, number: int) -> None:
        """Called before the backward pass of this rank's microbatch `number` of a step."""

    def _whole(self, tensor: Tensor) -> Tensor:
        """Of what this rank holds of a parameter, or of the state of one, the whole; it may be a view."""
        return tensor

    def _slice(self, whole: Tensor, p: Tensor) -> Tensor:
        """The inverse: what this rank holds of a parameter's whole tensor, or of one of its state."""
        return whole

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of all gradients together."""
        return torch.nn.utils.get_total_norm(gradients)

    def _gradients(self, microbatches: Iterable[Batch], step: int) -> tuple[StepLoss, Tensor]:
        """Leave the step's clipped gradient on the parameters; its loss, and its norm before clipping."""
        scale = 1.0 if self.scale is None else self.scale.scale
        pulled = Microbatches(microbatches)
        losses = StepLoss(self.model.objective, partial(self._scored, pulled), self.device, self.ranks, scale)
        # Inner steps of meta-learning have gradients of gradients, which must reach the weights themselves.
        narrow = narrow_weights(self.model) if self._adapting is None else contextlib.nullcontext()
        with casts_held(self.device), narrow:
            self._passes(pulled, step, losses)
        losses.finish()
        share = losses.share
        self._reducer.finish(1.0 if share is None else share)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients or not losses.scored:
            return losses, torch.zeros((), device=self.device)
        with self.phases(UPDATE):
            if share is not None:
                for group in alike(gradients):
                    torch._foreach_mul_(group, share)
            norm = self._norm(gradients)
            if self.settings.grad_clip > 0:
                by = norm if self.last is None else self.last.instead_of(norm)
                small = clip_factor(self.settings.grad_clip, by) == 1.0  # then each would be read for a product by 1
                for group in () if small else alike(self.parameters.values()):
                    torch.nn.utils.clip_grads_with_norm_(group, self.settings.grad_clip, by)
        return losses, norm

    def _passes(self, pulled: Microbatches, step: int, losses: StepLoss) -> None:
        """Both passes of all microbatches of a step: their gradients on the parameters, their terms in `losses`."""
        self.phases.begin_step(self.settings.accumulation // self.ranks.shares)
        for number, batch in self.phases.counted(self._arrivals.each(pulled)):
            seed_generator(self.device, derive_seed(*self.seed, step, self.ranks.microbatch(number), "dropout"))
            losses.add(self._gradient(batch, losses, number))
            self._reducer.add()

    def _judging(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
        """The batches of an evaluation, each with whether it counts."""
        return ((batch, True) for batch in batches)

    def _judged(self, batch: Batch) -> Mapping[str, Term]:
        """The terms of a batch's loss, of no training."""
        return self.model(batch)  # type: ignore[no-any-return]

    def _scored(self, pulled: Microbatches) -> Sequence[Batch]:
        """The rows that are scored of the microbatches still to come."""
        adaptation = self._adapting
        return pulled.following() if adaptation is None else [adaptation.query(task) for task in pulled.following()]

    def _gradient(self, batch: Batch, losses: StepLoss, number: int) -> dict[str, Term]:
        """Add the gradient of one microbatch to the parameters.

        Args:
            number: Which one of this rank's in the step.

        Returns:
            The terms of its loss.
        """
        if self._adapting is not None:
            return self._adapting.gradient(batch, losses, self.phases)
        with self.phases(FORWARD):
            with self.model.numerics(self.device):
                terms: dict[str, Term] = self.model(batch)
            root = losses.root(terms, batch)
        self._before_backward(number)
        with self.phases(BACKWARD):
            root.backward()  # type: ignore[no-untyped-call]
        return terms

    @property
    def _adapting(self) -> Adaptation | None:
        """What training takes inner steps with; None: it takes none."""
        meta = self.settings.meta
        return self._adaptation if meta is not None and meta.adapts else None


def alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those that lie over the same ranks together, as kernels of many tensors want them; in order."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(over_ranks(tensor), []).append(tensor)
    return list(groups.values())


def optimizer_state(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Of a part's state the optimizer's for one parameter, by kind."""
    return {
        key.removeprefix(OPTIMIZER).removesuffix(f"/{name}"): state[key]
        for key in state
        if key.startswith(OPTIMIZER) and key.endswith(f"/{name}")
    }


def _parts(model: StageModel) -> dict[str, nn.Module]:
    named = {"front": model.front, **{f"{BLOCK}{i}": block for i, block in enumerate((*model.blocks, *model.beyond))}}
    return {name: module for name, module in (*named.items(), ("head", model.head)) if module is not None}
