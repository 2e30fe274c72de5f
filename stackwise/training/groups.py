"""Groups of parts on their way between the disk and the device: loaded, updated, their gradients written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stackwise.config import StageTraining
from stackwise.training.engine import MEAN, OPTIMIZER, WEIGHT
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
        return Loaded(group, {name: self.make(name, self.log.read(name, WEIGHT)) for name in group.names})

    def load_to_update(self, group: Group) -> Loaded:
        """A group's parts; with their moments and gradients where they lack an update. In the loader's thread."""
        loaded = Loaded(group, {})
        for name in group.names:
            if (gradients := self.log.gradients(name)) is None:
                loaded.parts[name] = self.make(name, self.log.read(name, WEIGHT))
                continue
            state = self.log.read(name, "") or {}
            weights = {key.removeprefix(WEIGHT): state.pop(key) for key in list(state) if key.startswith(WEIGHT)}
            loaded.parts[name] = self.make(name, weights or None)
            loaded.states[name], loaded.gradients[name] = state, gradients
        return loaded

    def make(self, name: str, trained: dict[str, Tensor] | None) -> nn.Module:
        """A part; a tied head projects with the front's embedding as it stands."""
        tied = name == HEAD and self.parts.tied
        return self.parts.make(name, trained, self._embedding(self.log.read(FRONT, WEIGHT)) if tied else None)

    def committed(self, name: str) -> dict[str, Tensor] | None:
        """A part's trained weights as they are committed: their mean where one is kept."""
        return self.log.read(name, MEAN if self.settings.ema else WEIGHT)

    def carried(self, name: str) -> dict[str, Tensor]:
        """What going on needs of a part beside what is committed: its moments, and what trains under a mean."""
        kept = OPTIMIZER, *((WEIGHT,) if self.settings.ema else ())
        return {key: value for key, value in (self.log.read(name, "") or {}).items() if key.startswith(kept)}

    def begun(self, name: str, carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state that a part begins with where it goes on: what was committed is then the mean."""
        state = dict(carried)
        if any(key.startswith(WEIGHT) for key in state):
            committed = self.make(name, None).named_parameters()
            state |= {f"{MEAN}{key}": p.detach().clone() for key, p in committed if p.requires_grad}
        return state

    @torch.no_grad()
    def take_mean(self, loaded: Loaded) -> None:
        """Let updated parts have the weights that would be committed."""
        if not self.settings.ema:
            return
        for name, part in loaded.parts.items():
            for key, mean in (loaded.means.get(name) or self.committed(name) or {}).items():
                # Not copied over the weights, which may be on their way to the disk.
                part.get_parameter(key).data = mean.to(self.device)
        if HEAD in loaded.parts and self.parts.tied:
            embedding = self._embedding(self.committed(FRONT))
            loaded.parts[HEAD] = self.parts.make(HEAD, self.committed(HEAD), embedding).to(self.device)

    def _embedding(self, front: dict[str, Tensor] | None) -> Tensor:
        if front is not None and "embedding.weight" in front:
            return front["embedding.weight"]
        return self.parts.make(FRONT, None).get_parameter("embedding.weight").detach()

    def update(self, loaded: Loaded) -> None:
        """Apply the last step published to the parts that lack it, and write their state, behind."""
        if not loaded.gradients:
            return
        trained = [(part, name, p) for part, name, p in loaded.parameters() if part in loaded.gradients]
        optimizer = make_optimizer([(part, p) for part, _, p in trained], self.settings)
        for part, name, p in trained:
            state = {
                key.removeprefix(OPTIMIZER).removesuffix(f"/{name}"): value.to(p.device)
                for key, value in loaded.states[part].items()
                if key.startswith(OPTIMIZER) and key.endswith(f"/{name}")
            }
            if state:
                optimizer.state[p] = state
            if (gradient := loaded.gradients[part].pop(name, None)) is not None:
                p.grad = gradient.to(p.device)
        commit = self.log.committed
        gradients = [p.grad for _, _, p in trained if p.grad is not None]
        if gradients and commit.clip is not None:
            torch._foreach_mul_(gradients, torch.tensor(commit.clip, dtype=gradients[0].dtype, device=self.device))
        for group in optimizer.param_groups:
            group["lr"] = commit.rate * group["scale"]
        means = [self._mean_of(loaded, part, name, p) for part, name, p in trained] if self.settings.ema else []
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if means:
            decay = min(self.settings.ema, (1.0 + commit.last) / (10.0 + commit.last))
            torch._foreach_lerp_(means, [p.detach() for _, _, p in trained], 1.0 - decay)
        states: dict[str, dict[str, Tensor]] = {part: {} for part in loaded.gradients}
        for part, name, p in trained:
            states[part][f"{WEIGHT}{name}"] = p.detach().cpu().contiguous()
            for kind, value in optimizer.state.get(p, {}).items():
                states[part][f"{OPTIMIZER}{kind}/{name}"] = value.detach().cpu().contiguous()
        for (part, name, _), mean in zip(trained, means, strict=False):
            states[part][f"{MEAN}{name}"] = mean.cpu().contiguous()
            loaded.means.setdefault(part, {})[name] = mean
        loaded.states.clear()
        loaded.gradients.clear()
        self.log.write_states(states)

    def _mean_of(self, loaded: Loaded, part: str, name: str, p: nn.Parameter) -> Tensor:
        """The mean of a weight as it stands before an update; it begins with the weight itself."""
        mean = loaded.states[part].get(f"{MEAN}{name}")
        return p.detach().clone() if mean is None else mean.to(p.device)

    def write_gradients(self, loaded: Loaded, share: float | None, norms: dict[str, list[Tensor]]) -> None:
        """Scale a group's gradients by the true count, note their norms by part, and write them, behind."""
        trained = [(part, name, p.grad) for part, name, p in loaded.parameters() if p.grad is not None]
        gradients = [gradient for _, _, gradient in trained]
        if gradients and share is not None:
            torch._foreach_mul_(gradients, share)
        found: dict[str, dict[str, Tensor]] = {name: {} for name in loaded.group.names if name in self.log.at}
        for (part, name, gradient), norm in zip(
            trained, torch._foreach_norm(gradients) if trained else [], strict=True
        ):
            norms.setdefault(part, []).append(norm)
            found[part][name] = gradient.detach().cpu().contiguous()
        if found:
            self.log.write_gradients(found)

    def tied_head(self, loaded: Loaded) -> StageModel:
        """The head above the front's own parameter: its gradient is taken again where the front's is, in one sum."""
        front = loaded.parts[FRONT]
        embedding = front.get_parameter("embedding.weight")
        head = self.parts.make(HEAD, self.log.read(HEAD, WEIGHT), embedding)
        return self.parts.model({HEAD: head.requires_grad_(False).to(self.device)})
