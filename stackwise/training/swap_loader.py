"""Brings groups of a swapped stage's parts from the disk, updates them, and takes what they become there.

Of a block that has experts, each is a *piece*: it comes when a row reaches it, is brought up to date then, and is
neither read nor written before. The resident engine moves it by its moments and its decay where its gradient is zero,
so these updates are made up for, one by one, in their order: the bits are the same.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from stackwise.config import StageTraining
from stackwise.training.engine import MEAN, OPTIMIZER, WEIGHT, State, optimizer_state
from stackwise.training.optim import Rising, Stepper, make_optimizer, set_rates, state_tensors
from stackwise.training.ranks import Reducer
from stackwise.training.stage import StageModel
from stackwise.training.swap_kept import KeptPasses
from stackwise.training.swap_parts import FRONT, HEAD, Loaded, PartGroup, Parts, lend, lender_of, pieces_of
from stackwise.training.swap_pieces import Lender, parameter_of, piece_name
from stackwise.training.swap_spill import Spill
from stackwise.training.swap_state import RedoLog, Tensors, Update


def weights_apart(state: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """The weights of a part's state by their names, and the rest of it."""
    weights = {key.removeprefix(WEIGHT): value for key, value in state.items() if key.startswith(WEIGHT)}
    return weights, {key: value for key, value in state.items() if not key.startswith(WEIGHT)}


class PartLoader:
    """Brings groups of parts from the disk, updates them, and takes their gradients and states there.

    Args:
        spill: Holds gradients of pieces that are away.
        most_pieces: Pieces of a part that are in memory at once; None: all that rows have reached.
    """

    def __init__(
        self,
        parts: Parts,
        log: RedoLog,
        settings: StageTraining,
        device: torch.device,
        rising: Rising | None = None,
        *,
        spill: Spill,
        most_pieces: int | None = None,
    ) -> None:
        self.kept = KeptPasses(0)
        """Has the parts of groups that wait without their weights."""
        self.ahead = True
        """Whether groups come to the device while another one computes; else when it has gone."""
        self.parts, self.log, self.settings, self.device, self.rising = parts, log, settings, device, rising
        self.spill, self.most_pieces, self.lane = spill, most_pieces, log.lane
        self.pieces = pieces_of(parts)
        self.owners = {piece_name(part, path): (part, path) for part, paths in self.pieces.items() for path in paths}

    def load(self, group: PartGroup, *, moments: bool = False) -> Loaded:
        """A group's parts with their trained weights, on the device. In the loader's thread.

        Args:
            moments: And with what else their update needs.
        """
        waiting = self.kept.parts(group.index)
        parts = {}
        for name in group.names:
            weights = self.log.read(name, WEIGHT)
            if waiting is None:
                parts[name] = self._without_pieces(name, weights)
                continue
            parts[name] = waiting[name]
            if weights is None:
                weights = {key: p.detach() for key, p in self.make(name, None).named_parameters()}
            for key, value in weights.items():
                parts[name].get_parameter(key).data = value
        states = {name: self.log.beside(name, WEIGHT) for name in group.names if moments and name in self.log.at}
        return self._sent(Loaded(group, parts, states))

    def load_to_update(self, group: PartGroup) -> Loaded:
        """The same; with their moments and gradients where they lack an update. In the loader's thread."""
        loaded = Loaded(group, {})
        for name in group.names:
            gradients = self.log.gradients(name)
            loaded.parts[name] = self._without_pieces(name, self.log.read(name, WEIGHT) or None)
            if gradients is not None:
                loaded.states[name], loaded.gradients[name] = self.log.beside(name, WEIGHT), gradients
        return self._sent(loaded)

    def _sent(self, loaded: Loaded) -> Loaded:
        if self.ahead:
            with self.lane.sending():
                loaded.to(self.device)
        return loaded

    def receive(self, loaded: Loaded) -> None:
        """Have a group that was loaded on the device. In the thread that computes."""
        if not self.ahead:
            self.log.wait_for_copies()  # of the group before, whose memory it takes
            loaded.to(self.device)
        self.lane.use(loaded.tensors())

    def fill(self, loaded: Loaded) -> None:
        """Have the weights of a group's parts whole, as its passes need them."""

    def sums(self, loaded: Loaded) -> Reducer:
        """What adds up a group's gradients: the backward passes of one process do."""
        return Reducer()

    def over_ranks(self, norm: Tensor) -> Tensor:
        """The norm of the whole gradient, of the norm of what this process has of it."""
        return norm

    def make(self, name: str, trained: Mapping[str, Tensor] | None) -> nn.Module:
        """A part, whole; a tied head projects with the front's embedding as it stands."""
        tied = name == HEAD and self.parts.tied
        return self.parts.make(name, trained, self._embedding(self.log.read(FRONT, WEIGHT)) if tied else None)

    def _without_pieces(self, name: str, trained: dict[str, Tensor] | None) -> nn.Module:
        if not (paths := self.pieces.get(name)):
            return self.make(name, trained)
        part, most = self.parts.make(name, trained, whole=False), self.most_pieces
        lend(part, Lender(part, paths, partial(self._current, name), self.spill, self.device, most=most, name=name))
        return part

    def _current(self, name: str, path: str) -> dict[str, Tensor]:
        """The weights of a piece, their means and perhaps its moments, every update that it missed made up for."""
        piece, log = piece_name(name, path), self.log
        if not (updates := log.missing(piece)):
            weights = log.read(piece, WEIGHT) or self.parts.piece(name, path)
            means = (log.read(piece, MEAN) if self.settings.ema else None) or {}
            kinds = (WEIGHT, weights), (MEAN, means)
            return {f"{kind}{key}": value for kind, values in kinds for key, value in values.items()}
        gradients, state = log.gradients(piece), log.read(piece, "") or {}
        log.cache.forget(piece)  # the update is in place
        weights, state = weights_apart(state)
        weights = weights or dict(self.parts.piece(name, path))
        trained = [(name, key, nn.Parameter(value.to(self.device))) for key, value in weights.items()]
        states = self.advance(trained, {name: state}, {name: gradients}, updates)
        log.write_states({piece: states[name]})
        return states[name]

    def named(self, group: PartGroup) -> list[str]:
        """What of a group the log knows: parts that train, and their pieces."""
        names = [one for name in group.names for one in (name, *self._piece_names(name))]
        return [name for name in names if name in self.log.at]

    def make_up(self, group: PartGroup) -> None:
        """Bring the pieces of a group up to the last update, one after the other."""
        for name in group.names:
            for path in self.pieces.get(name, ()):
                if self.log.missing(piece_name(name, path)):
                    self._current(name, path)

    def _read(self, name: str, prefix: str) -> dict[str, Tensor] | None:
        """What of the state of a part with its pieces begins with a prefix, without it; None: it is as it was made."""
        states = [self.log.read(one, prefix) for one in (name, *self._piece_names(name))]
        if all(state is None for state in states):
            return None
        return {key: value for state in states if state is not None for key, value in state.items()}

    def _in_piece(self, part: str, name: str) -> bool:
        return name.startswith(tuple(f"{path}." for path in self.pieces.get(part, ())))

    def _piece_names(self, name: str) -> list[str]:
        return [piece_name(name, path) for path in self.pieces.get(name, ())]

    def committed(self, name: str) -> dict[str, Tensor] | None:
        """A part's trained weights as they are committed: their mean where one is kept."""
        return self._read(name, MEAN if self.settings.ema else WEIGHT)

    def carried(self, name: str) -> dict[str, Tensor]:
        """What going on needs of a part beside what is committed: its moments, and what trains under a mean."""
        kept = OPTIMIZER, *((WEIGHT,) if self.settings.ema else ())
        return {key: value for key, value in (self._read(name, "") or {}).items() if key.startswith(kept)}

    def begun(self, name: str, carried: Mapping[str, State]) -> dict[str, Tensor]:
        """The state that a part or a piece begins with where it goes on: what was committed is then the mean."""
        part, path = self.owners.get(name, (name, None))
        if part not in carried:  # it is frozen, and has no state
            return {}

        def mine(key: str) -> bool:
            return key.startswith(f"{path}.") if path is not None else not self._in_piece(part, key)

        state = {key: value for key, value in carried[part]().items() if mine(parameter_of(key))}
        if any(key.startswith(WEIGHT) for key in state):
            committed = dict(self.make(part, None).named_parameters()) if path is None else self.parts.piece(part, path)
            state |= {
                f"{MEAN}{key}": value.detach().clone()
                for key, value in committed.items()
                if (path is not None or value.requires_grad) and mine(key)
            }
        return state

    @torch.no_grad()
    def take_mean(self, loaded: Loaded) -> None:
        """Let updated parts have the weights that would be committed."""
        if not self.settings.ema:
            return
        for name, part in loaded.parts.items():
            for key, mean in (loaded.means.get(name) or self._read(name, MEAN) or {}).items():
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
        """Apply the last step to the parts of a group that lack it, and write their state, behind."""
        self.receive(loaded)
        if not loaded.gradients:
            return
        trained = self._trained(loaded, loaded.gradients)
        if not trained:  # a tied head without a norm has no weight of its own, and no optimizer
            self.log.write_states({part: {} for part in loaded.gradients})
            loaded.gradients.clear()
            return
        (update,) = self.log.missing(next(iter(loaded.gradients)))  # a part lacks the last one alone
        modules = loaded.parts.values()
        states = self.advance(trained, loaded.states, loaded.gradients, [update], modules)
        for part, name, p in trained if self.settings.ema else ():
            loaded.means.setdefault(part, {})[name] = states[part][f"{MEAN}{name}"].to(p.device)
        loaded.states.clear()
        loaded.gradients.clear()
        self.log.write_states(states)

    def _trained(self, loaded: Loaded, parts: Container[str]) -> list[tuple[str, str, nn.Parameter]]:
        """What an update moves of some parts of a group: part, name, parameter."""
        return [(part, name, p) for part, name, p in loaded.parameters() if part in parts and not p.is_meta]

    def advance(
        self,
        trained: Sequence[tuple[str, str, nn.Parameter]],
        states: Mapping[str, Mapping[str, Tensor]],
        gradients: Mapping[str, Tensors | None],
        updates: Sequence[Update],
        modules: Iterable[nn.Module] = (),
    ) -> dict[str, Tensors]:
        """Parameters moved by updates, in place; the states of their parts after them, on the device.

        Args:
            trained: Part, name, parameter.
            states: What their parts keep beside weights, before these updates.
            gradients: Of the first update, by part and name; None: zero, as those of the others are.
        """
        optimizer = make_optimizer([(part, p) for part, _, p in trained], self.settings, self.rising, modules=modules)
        means: list[Tensor] = []
        for part, name, p in trained:
            if state := optimizer_state(states[part], name):
                optimizer.state[p] = {kind: value.to(p.device) for kind, value in state.items()}
            if self.settings.ema:
                mean = states[part].get(f"{MEAN}{name}")  # none yet: it begins with the weight itself
                means.append(p.detach().clone() if mean is None else mean.to(p.device))
        for number, update in enumerate(updates):
            for part, name, p in trained:
                of_part = gradients[part] if not number else None
                gradient = torch.zeros_like(p) if of_part is None else of_part.get(name)
                p.grad = None if gradient is None else gradient.to(p.device)
            self._take(optimizer, [p for _, _, p in trained], means, update)
        after: dict[str, Tensors] = {part: {} for part in gradients}
        for part, name, p in trained:  # weights first: most readings are of them alone
            after[part][f"{WEIGHT}{name}"] = p.detach()
        for part, name, p in trained:
            for kind, value in state_tensors(optimizer, p).items():
                after[part][f"{OPTIMIZER}{kind}/{name}"] = value.detach()
        for (part, name, _), mean in zip(trained, means, strict=False):
            after[part][f"{MEAN}{name}"] = mean
        return after

    @torch.no_grad()
    def _take(self, optimizer: Stepper, trained: list[nn.Parameter], means: list[Tensor], update: Update) -> None:
        """One update by the gradients that are there, and the weights' means after it."""
        gradients = [p.grad for p in trained if p.grad is not None]
        if gradients and update.clip not in (None, 1.0):  # by 1 they would be what they are
            torch._foreach_mul_(gradients, torch.tensor(update.clip, dtype=gradients[0].dtype, device=self.device))
        set_rates(optimizer.param_groups, update.rate, update.last)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if means:
            decay = min(self.settings.ema, (1.0 + update.last) / (10.0 + update.last))
            torch._foreach_lerp_(means, [p.detach() for p in trained], 1.0 - decay)

    def update_ahead(self, loaded: Loaded, share: float | None, norms: dict[str, list[Tensor]], update: Update) -> None:
        """Update a group that has its gradients and `moments`, and write what it becomes if the step is published."""
        gradients = self._scaled(loaded, share, norms)
        by_part: dict[str, Tensors] = {name: {} for name in loaded.group.names if name in self.log.at}
        trained = self._trained(loaded, by_part)
        for (part, name), gradient in gradients.items():
            by_part[part][name] = gradient
        if not by_part:
            return
        if not trained:  # a tied head without a norm
            self.log.write_ahead({part: {} for part in by_part})
            return
        self.log.write_ahead(self.advance(trained, loaded.states, by_part, [update], loaded.parts.values()))
        loaded.states.clear()

    def _scaled(
        self, loaded: Loaded, share: float | None, norms: dict[str, list[Tensor]]
    ) -> dict[tuple[str, str], Tensor]:
        """A group's gradients by part and name, scaled by the true count; their norms are noted by part."""
        gradients = {(part, name): p.grad for part, name, p in loaded.parameters() if p.grad is not None}
        tensors = list(gradients.values())
        if tensors and share is not None:
            torch._foreach_mul_(tensors, share)
        for (part, _), norm in zip(gradients, torch._foreach_norm(tensors) if tensors else (), strict=True):
            norms.setdefault(part, []).append(norm)
        return gradients

    def write_gradients(self, loaded: Loaded, share: float | None, norms: dict[str, list[Tensor]]) -> None:
        """Scale a group's gradients by the true count, note their norms by part, and write them, behind."""
        norms_of: dict[tuple[str, str], Tensor] = {}

        def scaled(gradients: dict[tuple[str, str], Tensor]) -> None:
            tensors = list(gradients.values())
            if tensors and share is not None:
                torch._foreach_mul_(tensors, share)
            norms_of.update(zip(gradients, torch._foreach_norm(tensors) if tensors else (), strict=True))

        lenders = {name: lender for name, part in loaded.parts.items() if (lender := lender_of(part)) is not None}
        parameters = [(part, name, p) for part, name, p in loaded.parameters() if not self._in_piece(part, name)]
        gradients = {(part, name): p.grad for part, name, p in parameters if p.grad is not None}
        scaled(gradients)
        by_part: dict[str, dict[str, Tensor]] = {name: {} for name in loaded.group.names if name in self.log.at}
        for (part, name), gradient in gradients.items():
            by_part[part][name] = gradient.detach()
        if by_part:
            self.log.write_gradients(by_part)
        reached = {part for part, _ in gradients}
        for part, lender in lenders.items():
            for path in self.pieces[part]:
                piece, of_piece = piece_name(part, path), lender.take_gradients(path)
                if of_piece:
                    scaled({(part, name): gradient for name, gradient in of_piece.items()})
                elif part in reached:
                    continue  # its gradient is zero
                else:  # nothing reached the part at all, and so no update moves it: not one by a gradient of zero
                    self._current(part, path)
                self.log.write_gradients({piece: of_piece})
            self.log.sync_pieces(part)
        for part, name, p in loaded.parameters():
            if (norm := norms_of.get((part, name))) is not None:
                norms.setdefault(part, []).append(norm)
            elif part in lenders and part in reached and self._in_piece(part, name):
                # In its place, as sums go by places.
                norms.setdefault(part, []).append(torch.zeros((), dtype=p.dtype, device=self.device))

    def tied_head(self, loaded: Loaded) -> StageModel:
        """The head above the front's own parameter: its gradient is taken again where the front's is, in one sum."""
        front = loaded.parts[FRONT]
        embedding = front.get_parameter("embedding.weight")
        head = self.parts.make(HEAD, self._read(HEAD, WEIGHT), embedding)
        return self.parts.model({HEAD: head.requires_grad_(False).to(self.device)})
