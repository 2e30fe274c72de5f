"""The parts of a stage that is swapped: made one at a time, in groups that take turns in memory.

A group is a `StageModel` of its own: the front, some blocks, or the head, above a boundary that lives for one step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from stackwise.batch import Batch
from stackwise.config import StageTraining
from stackwise.store import Codec
from stackwise.training.engine import MEAN, OPTIMIZER, WEIGHT, optimizer_state
from stackwise.training.forward import MakeOutputs, pass_through
from stackwise.training.optim import Rising, make_optimizer, set_rates, state_tensors
from stackwise.training.stage import StageModel
from stackwise.training.swap_state import RedoLog

L = TypeVar("L")

FRONT, HEAD = "front", "head"


class Parts(Protocol):
    """Makes the parts of one stage."""

    names: Sequence[str]  # in forward order: "front" where the stage reads tokens, the blocks, "head" where it has one
    order: Sequence[str]  # the same names in the order in which a whole stage's model has them
    trains: Sequence[str]  # those with parameters that train
    precision: str  # what the stage computes in
    tied: bool  # whether the head projects with the front's embedding, both of them held here

    def make(self, name: str, trained: Mapping[str, Tensor] | None, embedding_VD: Tensor | None = None) -> nn.Module:
        """A part on the CPU, gradients required for what trains. Called in threads: it draws from no global generator.

        Args:
            trained: Values of its trained parameters; None: it starts as it does in a fresh stage.
            embedding_VD: What a tied head projects with.
        """

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
        """Move the parts, in place."""
        for module in self.parts.values():
            module.to(device)

    def parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Part, name and parameter of everything that trains, in the order in which a whole stage has them."""
        for part, module in self.parts.items():
            for name, p in module.named_parameters():
                if p.requires_grad:
                    yield part, name, p


def in_turn(load: Callable[[PartGroup], L], groups: Sequence[PartGroup]) -> Iterator[L]:
    """Each group loaded; the next one is being loaded, in a thread, while the caller works with one."""
    with ThreadPoolExecutor(1, "swap-loader") as pool:
        following = pool.submit(load, groups[0]) if groups else None
        for place in range(len(groups)):
            assert following is not None
            loaded = following.result()
            following = pool.submit(load, groups[place + 1]) if place + 1 < len(groups) else None
            yield loaded
            del loaded


class PartLoader:
    """Brings groups of parts from the disk, updates them, and takes their gradients and states there."""

    def __init__(
        self,
        parts: Parts,
        log: RedoLog,
        settings: StageTraining,
        device: torch.device,
        rising: Rising | None = None,
    ) -> None:
        self.parts, self.log, self.settings, self.device, self.rising = parts, log, settings, device, rising

    def load(self, group: PartGroup) -> Loaded:
        """A group's parts with their trained weights. In the loader's thread."""
        return Loaded(group, {name: self.make(name, self.log.read(name, WEIGHT)) for name in group.names})

    def load_to_update(self, group: PartGroup) -> Loaded:
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
        """Move a group to the device, apply the last step to the parts that lack it, write their state, behind."""
        loaded.to(self.device)
        if not loaded.gradients:
            return
        trained = [(part, name, p) for part, name, p in loaded.parameters() if part in loaded.gradients]
        if not trained:  # a tied head without a norm has no weight of its own, and no optimizer
            self.log.write_states({part: {} for part in loaded.gradients})
            loaded.gradients.clear()
            return
        modules = loaded.parts.values()
        optimizer = make_optimizer([(part, p) for part, _, p in trained], self.settings, self.rising, modules=modules)
        for part, name, p in trained:
            if state := optimizer_state(loaded.states[part], name):
                optimizer.state[p] = {kind: value.to(p.device) for kind, value in state.items()}
            if (gradient := loaded.gradients[part].pop(name, None)) is not None:
                p.grad = gradient.to(p.device)
        commit = self.log.committed
        gradients = [p.grad for _, _, p in trained if p.grad is not None]
        if gradients and commit.clip is not None:
            torch._foreach_mul_(gradients, torch.tensor(commit.clip, dtype=gradients[0].dtype, device=self.device))
        set_rates(optimizer.param_groups, commit.rate, commit.last)
        means: list[Tensor] = []
        for part, name, p in trained if self.settings.ema else ():
            mean = loaded.states[part].get(f"{MEAN}{name}")  # none yet: it begins with the weight itself
            means.append(p.detach().clone() if mean is None else mean.to(p.device))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if means:
            decay = min(self.settings.ema, (1.0 + commit.last) / (10.0 + commit.last))
            torch._foreach_lerp_(means, [p.detach() for _, _, p in trained], 1.0 - decay)
        states: dict[str, dict[str, Tensor]] = {part: {} for part in loaded.gradients}
        for part, name, p in trained:
            states[part][f"{WEIGHT}{name}"] = p.detach().cpu().contiguous()
            for kind, value in state_tensors(optimizer, p).items():
                states[part][f"{OPTIMIZER}{kind}/{name}"] = value.detach().cpu().contiguous()
        for (part, name, _), mean in zip(trained, means, strict=False):
            states[part][f"{MEAN}{name}"] = mean.cpu().contiguous()
            loaded.means.setdefault(part, {})[name] = mean
        loaded.states.clear()
        loaded.gradients.clear()
        self.log.write_states(states)

    def write_gradients(self, loaded: Loaded, share: float | None, norms: dict[str, list[Tensor]]) -> None:
        """Scale a group's gradients by the true count, note their norms by part, and write them, behind."""
        trained = [(part, name, p.grad) for part, name, p in loaded.parameters() if p.grad is not None]
        gradients = [gradient for _, _, gradient in trained]
        if gradients and share is not None:
            torch._foreach_mul_(gradients, share)
        by_part: dict[str, dict[str, Tensor]] = {name: {} for name in loaded.group.names if name in self.log.at}
        all_norms = torch._foreach_norm(gradients) if trained else []
        for (part, name, gradient), norm in zip(trained, all_norms, strict=True):
            norms.setdefault(part, []).append(norm)
            by_part[part][name] = gradient.detach().cpu().contiguous()
        if by_part:
            self.log.write_gradients(by_part)

    def tied_head(self, loaded: Loaded) -> StageModel:
        """The head above the front's own parameter: its gradient is taken again where the front's is, in one sum."""
        front = loaded.parts[FRONT]
        embedding = front.get_parameter("embedding.weight")
        head = self.parts.make(HEAD, self.log.read(HEAD, WEIGHT), embedding)
        return self.parts.model({HEAD: head.requires_grad_(False).to(self.device)})


def grouped_outputs(
    parts: Parts, groups: int, row_bytes: int, memory: int, below: Sequence[StageModel] = ()
) -> MakeOutputs:
    """What makes a stage's outputs (see `forward.outputs`) with one group of its parts in memory, bit for bit the same.

    Batches are gathered until their activations fill the memory; then every group takes its turn.

    Args:
        memory: Bytes of activations held at once; a batch is held in any case.
        below: Frozen stages on the device that the rows go through before.
    """
    turns = make_groups(parts, groups)

    def load(group: PartGroup) -> dict[str, nn.Module]:
        return {name: parts.make(name, None) for name in group.names}

    def up(batches: list[Batch], device: torch.device) -> list[Tensor]:
        leaving: list[Tensor] = []
        for loaded in in_turn(load, turns):
            model = parts.model(loaded).to(device).eval()
            for number, cpu_batch in enumerate(batches):
                batch = cpu_batch.above(leaving[number]) if len(leaving) > number else cpu_batch
                with torch.no_grad(), model.numerics(device):
                    x_BSD = model.activations(batch.to(device)).cpu()
                leaving[number : number + 1] = [x_BSD]
        return leaving

    def outputs(batches: Iterator[Batch], codec: Codec, device: torch.device) -> Generator[Tensor]:
        gathered: list[Batch] = []
        held = 0
        for batch in batches:
            with torch.no_grad():
                x_BSD = codec.round_trip(pass_through(below, batch.to(device), codec)).cpu() if below else None
            gathered.append(batch if x_BSD is None else batch.above(x_BSD))
            held += row_bytes * len(batch.rows_B)
            if held >= memory:
                yield from up(gathered, device)
                gathered, held = [], 0
        if gathered:
            yield from up(gathered, device)

    return outputs
