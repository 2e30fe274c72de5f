"""The swapped engine: a stage larger than memory trains out of core, with the exact gradient of the whole.

Groups of its parts take turns. Up: group by group, all microbatches of the step go forward, each group leaving its
boundary. At the top the loss. Down: group by group, each goes forward again from the boundary below it, with the same
dropout, takes the gradient from above, and writes its own gradients. One record then publishes the step, with the
scale that clipping gives; each part is updated when it is next loaded, on the next way up. Weights and moments so move
once a step, whatever the number of microbatches (compare layer-to-layer execution, arXiv 2002.05645).

The bits are those of `ResidentEngine`: the same operations on the same tensors in the same order of microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from stackwise.config import StageTraining
from stackwise.errors import StackWiseError
from stackwise.identity import derive_seed
from stackwise.training.draws import generator_state, set_generator
from stackwise.training.engine import Accept, Stepped
from stackwise.training.groups import Turns
from stackwise.training.lazily import Lazily
from stackwise.training.parts import FRONT, Parts, in_turn, make_groups
from stackwise.training.redo import RedoLog
from stackwise.training.scaling import LossScale
from stackwise.training.spill import Spill
from stackwise.training.stage import Batch, StageModel
from stackwise.training.trainer import Trainer

SCALER = "scaler/state"
"""What `LossScale` calls its state."""


class SwappedEngine:
    """Trains a stage group by group.

    Args:
        parts: The stage's parts.
        settings: Clipping, accumulation and the optimizer's.
        seed: The parts that its randomness follows from, such as (seed, stage).
        device: Where to compute.
        directory: Where its state lives, its own alone; taken up where there is one.
        groups: Groups that the blocks make.
        memory: Bytes of boundaries kept in memory; the rest goes to files.
        warn: Told what of the directory is damaged.
        before: Steps that the stage has taken already, in windows before this one.
    """

    def __init__(
        self,
        parts: Parts,
        settings: StageTraining,
        *,
        seed: tuple[int | str, ...],
        device: torch.device,
        directory: Path,
        groups: int,
        memory: int,
        warn: Callable[[str], None],
        before: int = 0,
    ) -> None:
        self.before = before
        self.parts, self.settings, self.seed, self.device = parts, settings, seed, device
        self.groups = make_groups(parts, groups)
        self.log = RedoLog(directory, parts.trains)
        self.log.open(warn)
        self.spill = Spill(directory / "step", memory)
        self.turns = Turns(parts, self.log, settings, device)
        self.scale = LossScale(settings.loss_scale) if parts.precision == "fp16" else None
        if self.scale is not None and self.log.committed.scaler is not None:
            self.scale.restore({SCALER: torch.tensor(self.log.committed.scaler, dtype=torch.float64)})
        trained = [group.index for group in self.groups if set(group.names) & set(parts.trains)]
        self.lowest = min(trained, default=len(self.groups))
        # The gradient of a tied projection arrives at the front from the head too, so the front waits for it.
        self.tied = parts.tied and FRONT in parts.trains

    @property
    def steps_done(self) -> int:
        """Steps that are published: a kill loses nothing of them."""
        return self.log.committed.step

    def step(self, microbatches: Sequence[Batch], step: int, rate: float, accept: Accept | None = None) -> Stepped:
        """One optimizer step (see `Engine.step`), durable when it returns.

        Raises:
            StackWiseError: The loss or the gradient is no finite number, and nobody was asked; the step is not taken.
            NoSpaceError: The disk is full; the step is not taken.
        """
        assert step == self.before + self.steps_done, f"step {step} after {self.before} and {self.steps_done}"
        self.spill.clear()
        norms: dict[str, list[Tensor]] = {}
        total, scored = self._up(microbatches, step, norms)
        self._down(microbatches, step, self._share(microbatches, scored), norms)
        loss = total / max(scored, 1)
        norm, clip = self._clip([norm for name in self.parts.order for norm in norms.get(name, [])] if scored else [])
        finite, taken, refused = math.isfinite(float(norm)), True, False
        if self.scale is not None and math.isfinite(float(loss)) and not finite:
            self.scale.overflowed()
            taken = False
        elif accept is not None:
            taken = accept(float(loss), float(norm))
            refused = not taken
        elif not (finite and math.isfinite(float(loss))):
            raise StackWiseError(
                f"the loss or its gradient is no longer a finite number at step {step + 1}",
                hint="lower training.learning_rate (for this stage: stages.K.training.learning_rate) or "
                "training.grad_clip, and run again",
            )
        if taken and self.scale is not None:
            self.scale.taken()
        scaler = None if self.scale is None else self.scale.state()[SCALER].tolist()
        told = math.nan if refused else float(loss)
        self.log.commit(rate, clip, told, number=step, taken=taken, scaler=scaler)
        self.spill.clear()
        return Stepped(loss, norm, taken)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """The mean loss over some batches (see `Engine.evaluate`)."""
        held, total, scored = list(batches), torch.zeros((), dtype=torch.float64), 0
        self.spill.clear()
        for loaded in in_turn(self.turns.load_to_update, self.groups):
            index = loaded.group.index
            loaded.to(self.device)
            self.turns.update(loaded)
            self.turns.take_mean(loaded)
            model = self.parts.model(loaded.parts).eval()
            for number, cpu_batch in enumerate(held):
                batch = self._entering(index, number, cpu_batch, track=False)
                self.spill.drop(("x", index, number))
                if index + 1 == len(self.groups):
                    loss, count = self._loss(model, batch)
                    total += loss.double().cpu()
                    scored += int(count)
                else:
                    with model.numerics(self.device):
                        self.spill.put(("x", index + 1, number), model.activations(batch))
        loss_of_all = float(total) / max(scored, 1)
        self.log.note_evaluation(loss_of_all)
        return loss_of_all

    def state(self) -> dict[str, Tensor]:
        """Nothing: what it holds is on the disk already, step by step."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: it took up its own directory."""

    def resume(self, trainer: Trainer) -> bool:
        """Put a trainer where the steps on the disk end, which may be beyond the record that it has.

        Returns:
            Whether there is a step on the disk.
        """
        record, done = trainer.record, self.steps_done
        trainer.step, record.losses = done, self.losses()
        told = {step: loss for step, loss in (*record.held_out, *self.log.evaluations()) if step <= done}
        record.held_out = sorted(told.items())
        known = {one["step"] for one in record.divergences}
        refused = [number for number, loss in enumerate(record.losses, 1) if loss is None and number not in known]
        record.divergences += [{"step": number, "why": "told before a kill", "action": "skip"} for number in refused]
        return done > 0

    def settle(self) -> None:
        """Bring every part up to the last step published."""
        trained = [group for group in self.groups if set(group.names) & set(self.parts.trains)]
        for loaded in in_turn(self.turns.load_to_update, trained):
            loaded.to(self.device)
            self.turns.update(loaded)
        self.log.flush()

    def losses(self) -> list[float | None]:
        """The loss of each step that is published; None where `accept` refused it."""
        return self.log.losses()

    def carried(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What going on needs (see `Engine.carried`)."""
        return Lazily(self.log.parts, self.turns.carried, {} if self.scale is None else self.scale.state())

    def take_up(self, carried: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from it (see `Engine.take_up`); with steps on the disk, these have gone on already."""
        self.log.begin = lambda part: self.turns.begun(part, carried[part])
        if self.scale is not None and not self.steps_done:
            self.scale.restore(carried[""])

    def weights(self, part: str) -> dict[str, Tensor]:
        """The state dict, as it is committed, of a part; after `settle`."""
        return self.turns.make(part, self.turns.committed(part)).state_dict()

    def close(self) -> None:
        """End its thread; what lives for one step is dropped."""
        self.log.close()
        self.spill.clear()

    def _up(self, microbatches: Sequence[Batch], step: int, norms: dict[str, list[Tensor]]) -> tuple[Tensor, int]:
        """Everything forward, the loss at the top and its gradient; the sum of the losses and how many were scored."""
        total, scored = torch.zeros((), device=self.device), 0
        for loaded in in_turn(self.turns.load_to_update, self.groups):
            index = loaded.group.index
            loaded.to(self.device)
            self.turns.update(loaded)
            model, top = self.parts.model(loaded.parts), index + 1 == len(self.groups)
            for number, cpu_batch in enumerate(microbatches):
                batch = self._entering(index, number, cpu_batch)
                seeded = self._draw(step, index, number)
                if top:
                    loss, count = self._loss(model, batch)
                    scaled = loss if self.scale is None else loss * self.scale.scale
                    (scaled / batch.tokens_BS.numel()).backward()  # type: ignore[no-untyped-call]
                    total += loss.detach()
                    scored += int(count)
                    self._hand_down(index, number, batch)
                else:
                    # With the graph that the way down needs, so that these are the same operations.
                    with model.numerics(self.device):
                        leaving = model.activations(batch).detach()
                    self._keep_draw(seeded, index + 1, number)
                    self.spill.put(("x", index + 1, number), leaving)
                if index < self.lowest:
                    self.spill.drop(("x", index, number))
            if top:
                self.turns.write_gradients(loaded, self._share(microbatches, scored), norms)
        return total, scored

    def _down(
        self, microbatches: Sequence[Batch], step: int, share: float | None, norms: dict[str, list[Tensor]]
    ) -> None:
        """Group by group from the top, each forward again and backward, to the lowest that trains."""
        for loaded in in_turn(self.turns.load, self.groups[self.lowest : -1][::-1]):
            index = loaded.group.index
            loaded.to(self.device)
            model = self.parts.model(loaded.parts)
            head = self.turns.tied_head(loaded) if self.tied and index == 0 else None
            for number, cpu_batch in enumerate(microbatches):
                if ("g", index, number) not in self.spill:
                    continue
                batch = self._entering(index, number, cpu_batch)
                self._draw(step, index, number)
                with model.numerics(self.device):
                    leaving = model.activations(batch)
                roots, slopes = [leaving], [self.spill.take(("g", index, number)).to(self.device)]
                if head is not None:
                    above = self._entering(len(self.groups) - 1, number, cpu_batch, track=False)
                    self._draw(step, len(self.groups) - 1, number)
                    loss, _ = self._loss(head, above)
                    if loss.requires_grad:
                        scaled = loss if self.scale is None else loss * self.scale.scale
                        loss = scaled / above.tokens_BS.numel()
                        roots, slopes = [leaving, loss], [slopes[0], torch.ones_like(loss)]
                torch.autograd.backward(roots, slopes)
                self._hand_down(index, number, batch)
            self.turns.write_gradients(loaded, share, norms)

    def _share(self, microbatches: Sequence[Batch], scored: int) -> float | None:
        """What makes a gradient of the microbatches' nominal means that of the step's mean; None: nothing is scored."""
        scale = 1.0 if self.scale is None else self.scale.scale
        return microbatches[-1].tokens_BS.numel() / scored / scale if scored else None

    def _loss(self, model: StageModel, batch: Batch) -> tuple[Tensor, int]:
        with model.numerics(self.device):
            found: tuple[Tensor, int] = model(batch)
        return found

    def _entering(self, index: int, number: int, batch: Batch, *, track: bool = True) -> Batch:
        """A microbatch as it enters a group, on the device; `track`: its gradient is taken if a part below trains."""
        if index:
            batch = replace(batch, x_BSD=self.spill.get(("x", index, number)))
        batch = batch.to(self.device)
        if track and index > self.lowest and batch.x_BSD is not None:
            batch = replace(batch, x_BSD=batch.x_BSD.detach().requires_grad_())
        return batch

    def _hand_down(self, index: int, number: int, batch: Batch) -> None:
        """Keep the gradient of what entered a group for the one below; what entered has done its duty."""
        if index > self.lowest and batch.x_BSD is not None and batch.x_BSD.grad is not None:
            self.spill.put(("g", index - 1, number), batch.x_BSD.grad)
        if not (self.tied and index + 1 == len(self.groups)):
            self.spill.drop(("x", index, number))
            self.spill.drop(("draw", index, number))

    def _draw(self, step: int, index: int, number: int) -> Tensor:
        """Set the generators to where they stood when the microbatch first entered the group.

        Returns:
            Their state as it was seeded.
        """
        torch.manual_seed(derive_seed(*self.seed, step, number, "dropout"))
        seeded = generator_state(self.device)
        if ("draw", index, number) in self.spill:
            set_generator(self.device, self.spill.get(("draw", index, number)))
        return seeded

    def _keep_draw(self, seeded: Tensor, index: int, number: int) -> None:
        """Keep the generator's state for the group above, unless nothing was drawn yet."""
        now = generator_state(self.device)
        if not torch.equal(now, seeded):
            self.spill.put(("draw", index, number), now)

    def _clip(self, norms: list[Tensor]) -> tuple[Tensor, float | None]:
        """The gradient's norm, from the norms of its tensors as `clip_grad_norm_` has it, and the scale it gives."""
        if not norms:
            return torch.zeros((), device=self.device), None
        norm = torch.linalg.vector_norm(torch.stack(norms))
        limit = self.settings.grad_clip
        return norm, float(torch.clamp(limit / (norm + 1e-6), max=1.0)) if limit > 0 else None
