"""The parts of a stage that is swapped: made one at a time, in groups that take turns in memory.

A group is a `StageModel` of its own: the front, some blocks, or the head, above a boundary that lives for one step.

Of a block that has experts, each is a *piece*: it comes when a row reaches it, is brought up to date then, and is
neither read nor written before. The resident engine moves it by its moments and its decay where its gradient is zero,
so these updates are made up for, one by one, in their order: the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from stackwise.config import StageTraining
from stackwise.training.engine import MEAN, OPTIMIZER, WEIGHT, State, optimizer_state
from stackwise.training.optim import Rising, Stepper, make_optimizer, set_rates, state_tensors
from stackwise.training.stage import StageModel
from stackwise.training.swap_kept import KeptPasses
from stackwise.training.swap_pieces import Lender, piece_name
from stackwise.training.swap_state import RedoLog, Spill, Tensors, Update

L = TypeVar("L")

FRONT, HEAD = "front", "head"


class Parts(Protocol):
    """Makes the parts of one stage."""

    names: Sequence[str]  # in forward order: "front" where the stage reads tokens, the blocks, "head" where it has one
    order: Sequence[str]  # the same names in the order in which a whole stage's model has them
    trains: Sequence[str]  # those with parameters that train
    precision: str  # what the stage computes in
    tied: bool  # whether the head projects with the front's embedding, both of them held here

    def pieces(self, name: str) -> Sequence[str]:
        """The modules in a part that are there only while rows reach them, by their paths: they train, whole."""

    def make(
        self,
        name: str,
        trained: Mapping[str, Tensor] | None,
        embedding_VD: Tensor | None = None,
        *,
        whole: bool = True,
    ) -> nn.Module:
        """A part on the CPU, gradients required for what trains. Called in threads: it draws from no global generator.

        Args:
            trained: Values of its trained parameters; None: it starts as it does in a fresh stage.
            embedding_VD: What a tied head projects with.
            whole: Otherwise its pieces are without values, and `trained` has none of theirs.
        """

    def piece(self, name: str, path: str) -> Mapping[str, Tensor]:
        """The parameters of a piece as it starts, by their names in the part."""

    def model(self, parts: Mapping[str, nn.Module]) -> StageModel:
        """Some neighbouring parts as the model of a stage, in training mode."""


@dataclass(frozen=True)
class PartGroup:
    """Neighbouring parts that are resident together."""

    index: int
    names: tuple[str, ...]


def make_groups(parts: Parts, count: int) -> list[PartGroup]:
    """The front, the blocks in `count` groups of about one size, the head."""
    blocks = [name for name in parts.names if name not in (FRONT, HEAD)]
    count = max(1, min(count, len(blocks)))
    edges = [len(blocks) * k // count for k in range(count + 1)]
    middle = [tuple(blocks[edges[k] : edges[k + 1]]) for k in range(count)]
    front, head = ([(name,)] if name in parts.names else [] for name in (FRONT, HEAD))
    return [PartGroup(index, names) for index, names in enumerate([*front, *middle, *head])]


@dataclass
class Loaded:
    """A group in memory: its parts, and what an update needs of the disk, by part."""

    group: PartGroup
    parts: dict[str, nn.Module]
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    gradients: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    means: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def to(self, device: torch.device) -> None:
        """Move the parts and what an update needs, in place; pieces that are not there stay away."""
        for module in self.parts.values():
            module._apply(lambda t: t if t.is_meta else t.to(device, non_blocking=True))  # type: ignore[no-untyped-call]
        for tensors in (*self.states.values(), *self.gradients.values()):
            for name, tensor in tensors.items():
                tensors[name] = tensor.to(device, non_blocking=True)

    def tensors(self) -> Iterator[Tensor]:
        """All that it has on the device."""
        for module in self.parts.values():
            yield from (t for t in (*module.parameters(), *module.buffers()) if not t.is_meta)
        for tensors in (*self.states.values(), *self.gradients.values()):
            yield from tensors.values()

    def parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Part, name and parameter of all that trains, as a whole stage has them in order; on meta: not there."""
        for part, module in self.parts.items():
            for name, p in module.named_parameters():
                if p.requires_grad:
                    yield part, name, p


def in_turn(turns: Sequence[Callable[[], L]]) -> Iterator[L]:
    """Each turn's group loaded; the next one is being loaded, in a thread, while the caller works with one.

    Whoever works with one lets go of it before asking for the next: three would be in memory otherwise.
    """
    with ThreadPoolExecutor(1, "swap-loader") as pool:
        following = pool.submit(turns[0]) if turns else None
        for place in range(len(turns)):
            assert following is not None
            loaded = following.result()
            following = pool.submit(turns[place + 1]) if place + 1 < len(turns) else None
            yield loaded
            del loaded


def pieces_of(parts: Parts) -> dict[str, Sequence[str]]:
    """The paths of the pieces of each part that trains and has some."""
    return {name: paths for name in parts.names if name in parts.trains and (paths := parts.pieces(name))}


def lend(part: nn.Module, lender: Lender) -> None:
    """Let a part ask for its pieces when rows reach them."""
    for module in part.modules():
        if hasattr(module, "lend"):
            setattr(module, "lend", lender)  # noqa: B010


def lender_of(part: nn.Module) -> Lender | None:
    """What lends a part its pieces."""
    lenders = (getattr(module, "lend", None) for module in part.modules())
    return next((lender for lender in lenders if lender is not None), None)


def weights_apart(state: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """The weights of a part's state by their names, and the rest of it."""
    weights = {key.removeprefix(WEIGHT): value for key, value in state.items() if key.startswith(WEIGHT)}
    return weights, {key: value for key, value in state.items() if not key.startswith(WEIGHT)}


def _within(key: str) -> str:
    """The name in its part of the parameter that a tensor of a state is of."""
    kind, _, rest = key.partition("/")
    return rest.partition("/")[2] if f"{kind}/" == OPTIMIZER else rest


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
        states = self._advance(trained, {name: state}, {name: gradients}, updates)
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

        state = {key: value for key, value in carried[part]().items() if mine(_within(key))}
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
            for key, mean in (loaded.means.get(name) or self.log.read(name, MEAN) or {}).items():
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
        trained = [
            (part, name, p) for part, name, p in loaded.parameters() if part in loaded.gradients and not p.is_meta
        ]
        if not trained:  # a tied head without a norm has no weight of its own, and no optimizer
            self.log.write_states({part: {} for part in loaded.gradients})
            loaded.gradients.clear()
            return
        (update,) = self.log.missing(next(iter(loaded.gradients)))  # a part lacks the last one alone
        modules = loaded.parts.values()
        states = self._advance(trained, loaded.states, loaded.gradients, [update], modules)
        for part, name, p in trained if self.settings.ema else ():
            loaded.means.setdefault(part, {})[name] = states[part][f"{MEAN}{name}"].to(p.device)
        loaded.states.clear()
        loaded.gradients.clear()
        self.log.write_states(states)

    def _advance(
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
        if gradients and update.clip is not None:
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
        trained = [(part, name, p) for part, name, p in loaded.parameters()]
        by_part: dict[str, Tensors] = {name: {} for name in loaded.group.names if name in self.log.at}
        for (part, name), gradient in gradients.items():
            by_part[part][name] = gradient
        if not by_part:
            return
        if not trained:  # a tied head without a norm
            self.log.write_ahead({part: {} for part in by_part})
            return
        self.log.write_ahead(self._advance(trained, loaded.states, by_part, [update], loaded.parts.values()))
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
        head = self.parts.make(HEAD, self.log.read(HEAD, WEIGHT), embedding)
        return self.parts.model({HEAD: head.requires_grad_(False).to(self.device)})
