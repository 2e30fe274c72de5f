"""Groups of parts on their way between the disk and the device: loaded, updated, their gradients written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stackwise.config import StageTraining
from stackwise.training.optim import make_optimizer
from stackwise.training.parts import FRONT, HEAD, Group, Loaded, Parts
from stackwise.training.redo import RedoLog
from stackwise.training.stage import StageModel


class Turns:
    """What a group goes through in its turn beside computing.

    Args:
        parts: Makes the parts.
        log: Their state on disk.
        settings: The optimizer's.
        device: Where to compute.
    """

    def __init__(self, parts: Parts, log: RedoLog, settings: StageTraining, device: torch.device) -> None:
        self.parts, self.log, self.settings, self.device = parts, log, settings, device

    def load(self, group: Group) -> Loaded:
        """A group's parts with their trained weights. In the loader's thread."""
        made: dict[str, nn.Module] = {}
        for name in group.names:
            embedding = self.embedding() if name == HEAD and self.parts.tied else None
            made[name] = self.parts.make(name, self.log.weights(name), embedding)
        return Loaded(group, made)

    def load_to_update(self, group: Group) -> Loaded:
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
            embedding = self.embedding() if name == HEAD and self.parts.tied else None
            loaded.parts[name] = self.parts.make(name, trained, embedding)
        return loaded

    def embedding(self) -> Tensor:
        """The front's embedding as it stands, for a tied head."""
        found = self.log.weights(FRONT)
        if found is not None and "embedding.weight" in found:
            return found["embedding.weight"]
        return self.parts.make(FRONT, None).get_parameter("embedding.weight").detach()

    def update(self, loaded: Loaded) -> None:
        """Apply the last step published to the parts that lack it, and write their state, behind."""
        if not loaded.gradients:
            return
        trained = [(part, name, p) for part, name, p in loaded.parameters() if part in loaded.gradients]
        optimizer = make_optimizer([(part, p) for part, _, p in trained], self.settings)
        for part, name, p in trained:
            state = {
                key.removesuffix(f"/{name}"): v for key, v in loaded.states[part].items() if key.endswith(f"/{name}")
            }
            if state:
                optimizer.state[p] = {kind: value.to(p.device) for kind, value in state.items()}
            if (gradient := loaded.gradients[part].pop(name, None)) is not None:
                p.grad = gradient.to(p.device)
        commit = self.log.committed
        gradients = [p.grad for _, _, p in trained if p.grad is not None]
        if gradients and commit.scale is not None:
            torch._foreach_mul_(gradients, torch.tensor(commit.scale, dtype=gradients[0].dtype, device=self.device))
        for group in optimizer.param_groups:
            group["lr"] = commit.rate * group["scale"]
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

    def write_gradients(self, loaded: Loaded, nominal: float | None, norms: dict[int, list[Tensor]]) -> None:
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

    def tied_head(self, loaded: Loaded) -> StageModel:
        """The head above the front's own parameter: its gradient is taken again where the front's is, in one sum."""
        front = loaded.parts[FRONT]
        embedding = front.get_parameter("embedding.weight")
        head = self.parts.make(HEAD, self.log.weights(HEAD), embedding)
        return self.parts.model({HEAD: head.requires_grad_(False).to(self.device)})
