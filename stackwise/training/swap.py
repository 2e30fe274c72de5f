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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stackwise.config import StageTraining
from stackwise.errors import StackWiseError
from stackwise.identity import derive_seed
from stackwise.training.engine import Stepped
from stackwise.training.optim import make_optimizer
from stackwise.training.parts import FRONT, HEAD, Group, Loaded, Parts, in_turn, make_groups
from stackwise.training.redo import RedoLog
from stackwise.training.spill import Spill
from stackwise.training.stage import Batch, StageModel



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
    ) -> None:
        self.parts, self.settings, self.seed, self.device = parts, settings, seed, device
        self.groups = make_groups(parts, groups)
        self.log = RedoLog(directory, parts.trains)
        self.log.open(warn)
        self.spill = Spill(directory / "step", memory)
        trained = [group.index for group in self.groups if set(group.names) & set(parts.trains)]
        self.lowest = min(trained, default=len(self.groups))
        # The gradient of a tied projection arrives at the front from the head too, so the front waits for it.
        self.tied = parts.tied and FRONT in parts.trains

    @property
    def steps_done(self) -> int:
        """Steps that are published: a kill loses nothing of them."""
        return self.log.committed.step

    def step(self, microbatches: Sequence[Batch], step: int, rate: float) -> Stepped:
        """One optimizer step (see `Engine.step`), durable when it returns.

        Raises:
            StackWiseError: The loss or the gradient is no finite number; the step is not taken.
            NoSpaceError: The disk is full; the step is not taken.
        """
        assert step == self.steps_done, f"step {step} after {self.steps_done}"
        self.spill.clear()
        norms: dict[int, list[Tensor]] = {}
        total, scored = self._up(microbatches, step, norms)
        nominal = microbatches[-1].tokens_BS.numel() / scored if scored else None
        self._down(microbatches, step, nominal, norms)
        loss = total / max(scored, 1)
        norm, scale = self._clip([norm for index in sorted(norms) for norm in norms[index]] if scored else [])
        if not (math.isfinite(float(loss)) and math.isfinite(float(norm))):
            raise StackWiseError(
                f"the loss or its gradient is no longer a finite number at step {step + 1}",
                hint="lower training.learning_rate (for this stage: stages.K.training.learning_rate) or "
                "training.grad_clip, and run again",
            )
        self.log.commit(rate, scale, float(loss))
        self.spill.clear()
        return Stepped(loss, norm)

    def state(self) -> dict[str, Tensor]:
        """Nothing: what it holds is on the disk already, step by step."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: it took up its own directory."""

    def settle(self) -> None:
        """Bring every part up to the last step published."""
        for loaded in in_turn(self._load_to_update, [g for g in self.groups if set(g.names) & set(self.parts.trains)]):
            loaded.to(self.device)
            self._update(loaded)
        self.log.flush()

    def weights(self, part: str) -> dict[str, Tensor]:
        """The state dict, as it is committed, of a part; after `settle`."""
        embedding = self._embedding() if part == HEAD and self.parts.tied else None
        return self.parts.make(part, self.log.weights(part), embedding).state_dict()

    def close(self) -> None:
        """End its thread; what lives for one step is dropped."""
        self.log.close()
        self.spill.clear()

    def _up(
        self, microbatches: Sequence[Batch], step: int, norms: dict[int, list[Tensor]]
    ) -> tuple[Tensor, int]:
        """Everything forward, the loss at the top and its gradient; the sum of the losses and how many were scored."""
        total, scored = torch.zeros((), device=self.device), 0
        for loaded in in_turn(self._load_to_update, self.groups):
            index = loaded.group.index
            loaded.to(self.device)
            self._update(loaded)
            model, top = self.parts.model(loaded.parts), index + 1 == len(self.groups)
            for number, cpu_batch in enumerate(microbatches):
                batch = self._entering(index, number, cpu_batch)
                seeded = self._draw(step, index, number)
                if top:
                    loss, count = self._loss(model, batch)
                    (loss / batch.tokens_BS.numel()).backward()
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
                nominal = microbatches[-1].tokens_BS.numel() / scored if scored else None
                self._write_gradients(loaded, nominal, norms)
        return total, scored

    def _down(
        self, microbatches: Sequence[Batch], step: int, nominal: float | None, norms: dict[int, list[Tensor]]
    ) -> None:
        """Group by group from the top, each forward again and backward, to the lowest that trains."""
        for loaded in in_turn(self._load, self.groups[self.lowest : -1][::-1]):
            index = loaded.group.index
            loaded.to(self.device)
            model = self.parts.model(loaded.parts)
            head = self._tied_head(loaded) if self.tied and index == 0 else None
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
                        loss = loss / above.tokens_BS.numel()
                        roots, slopes = [leaving, loss], [slopes[0], torch.ones_like(loss)]
                torch.autograd.backward(roots, slopes)
                self._hand_down(index, number, batch)
            self._write_gradients(loaded, nominal, norms)

    def _tied_head(self, loaded: Loaded) -> StageModel:
        """The head above the front's own parameter: its gradient is taken again where the front's is, in one sum."""
        front = loaded.parts[FRONT]
        embedding = front.get_parameter("embedding.weight")
        head = self.parts.make(HEAD, self.log.weights(HEAD), embedding)
        return self.parts.model({HEAD: head.requires_grad_(False).to(self.device)})

    def _loss(self, model: StageModel, batch: Batch) -> tuple[Tensor, int]:
        with model.numerics(self.device):
            found: tuple[Tensor, int] = model(batch)
        return found

    def _entering(self, index: int, number: int, batch: Batch, *, track: bool = True) -> Batch:
        """A microbatch as it enters a group, on the device; with `track`, gradients flow to it if a part below trains."""
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
        seeded = _generator(self.device)
        if ("draw", index, number) in self.spill:
            _set_generator(self.device, self.spill.get(("draw", index, number)))
        return seeded

    def _keep_draw(self, seeded: Tensor, index: int, number: int) -> None:
        """Keep the generator's state for the group above, unless nothing was drawn yet."""
        now = _generator(self.device)
        if not torch.equal(now, seeded):
            self.spill.put(("draw", index, number), now)

    def _load(self, group: Group) -> Loaded:
        """A group's parts with their trained weights. In the loader's thread."""
        made: dict[str, nn.Module] = {}
        for name in group.names:
            embedding = self._embedding() if name == HEAD and self.parts.tied else None
            made[name] = self.parts.make(name, self.log.weights(name), embedding)
        return Loaded(group, made)

    def _load_to_update(self, group: Group) -> Loaded:
        """A group's parts with their moments, and the gradients that they still lack. In the loader's thread."""
        loaded = Loaded(group, {})
        for name in group.names:
            gradients = self.log.gradients(name)
            if gradients is not None:
                loaded.gradients[name] = gradients
                loaded.states[name] = self.log.state(name) or {}
                found = {key: value for key, value in loaded.states[name].items() if key.startswith("weight/")}
                trained = {key.removeprefix("weight/"): loaded.states[name].pop(key) for key in found} or None
            else:
                trained = self.log.weights(name)
            embedding = self._embedding() if name == HEAD and self.parts.tied else None
            loaded.parts[name] = self.parts.make(name, trained, embedding)
        return loaded

    def _embedding(self) -> Tensor:
        """The front's embedding as it stands, for a tied head."""
        found = self.log.weights(FRONT)
        if found is not None and "embedding.weight" in found:
            return found["embedding.weight"]
        return self.parts.make(FRONT, None).get_parameter("embedding.weight").detach()

    def _update(self, loaded: Loaded) -> None:
        """Apply the last step published to the parts that lack it, and write their state, behind."""
        if not loaded.gradients:
            return
        trained = [(part, name, p) for part, name, p in loaded.parameters() if part in loaded.gradients]
        optimizer = make_optimizer([p for _, _, p in trained], self.settings)
        for part, name, p in trained:
            state = {key.removesuffix(f"/{name}"): v for key, v in loaded.states[part].items() if key.endswith(f"/{name}")}
            if state:
                optimizer.state[p] = {kind: value.to(p.device) for kind, value in state.items()}
            if (gradient := loaded.gradients[part].pop(name, None)) is not None:
                p.grad = gradient.to(p.device)
        commit = self.log.committed
        gradients = [p.grad for _, _, p in trained if p.grad is not None]
        if gradients and commit.scale is not None:
            torch._foreach_mul_(gradients, torch.tensor(commit.scale, dtype=gradients[0].dtype, device=self.device))
        for group in optimizer.param_groups:
            group["lr"] = commit.rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        states: dict[str, dict[str, Tensor]] = {part: {} for part in loaded.gradients}
        for part, name, p in trained:
            states[part][f"weight/{name}"] = p.detach().cpu().contiguous()
            for kind, value in optimizer.state.get(p, {}).items():
                states[part][f"{kind}/{name}"] = value.detach().cpu().contiguous()
        loaded.states.clear()
        loaded.gradients.clear()
        self.log.write_states(states)

    def _write_gradients(self, loaded: Loaded, nominal: float | None, norms: dict[int, list[Tensor]]) -> None:
        """Scale a group's gradients by the true count, note their norms, and write them, behind."""
        trained = list(loaded.parameters())
        gradients = [p.grad for _, _, p in trained if p.grad is not None]
        if gradients and nominal is not None:
            torch._foreach_mul_(gradients, nominal)
        norms[loaded.group.index] = list(torch._foreach_norm(gradients)) if gradients else []
        found: dict[str, dict[str, Tensor]] = {name: {} for name in loaded.group.names if name in self.log.at}
        for part, name, p in trained:
            if p.grad is not None:
                found[part][name] = p.grad.detach().cpu().contiguous()
        if found:
            self.log.write_gradients(found)

    def _clip(self, norms: list[Tensor]) -> tuple[Tensor, float | None]:
        """The gradient's norm, from the norms of its tensors as `clip_grad_norm_` has it, and the scale it gives."""
        if not norms:
            return torch.zeros((), device=self.device), None
        norm = torch.linalg.vector_norm(torch.stack(norms))
        limit = self.settings.grad_clip
        return norm, float(torch.clamp(limit / (norm + 1e-6), max=1.0)) if limit > 0 else None


def _generator(device: torch.device) -> Tensor:
    """The state of the generator that draws on a device."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()


def _set_generator(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)
