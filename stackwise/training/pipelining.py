"""A stage whose blocks are divided over ranks, which microbatches go through one by one (GPipe, arXiv 1811.06965).

In the orders of torch.distributed.pipelining. Ranks with other blocks share their rows: each has all microbatches of
its share, and what crosses the wire between them is what leaves their blocks, and its gradient.
Shapes: B rows, S positions, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from stackwise.batch import Batch, Term
from stackwise.errors import UsageError
from stackwise.training.phases import BACKWARD
from stackwise.training.ranks import Gathering
from stackwise.training.sharding import ShardedEngine
from stackwise.training.stage import Microbatches, StageModel, StepLoss
from stackwise.training.swap_parts import FRONT, HEAD

PARTS = {"gpipe": 1, "1f1b": 1, "interleaved": 2}
"""How many parts of a stage each rank has, which do not follow each other, by `parallel.schedule`."""


@dataclass
class _Step:
    """The microbatches of a step, and what the last part makes of them."""

    batches: Sequence[Batch]
    pulled: Microbatches  # the same, each held until the last part takes its turn
    losses: StepLoss
    terms: dict[int, Mapping[str, Term]]


class _Part(nn.Module):
    """Some blocks that follow each other, with the front before the first and the head behind the last.

    Args:
        chunk: The modules.
        lent: An embedding that the head is tied to, which belongs to the first part.
    """

    def __init__(self, chunk: StageModel, lent: nn.Module | None) -> None:
        super().__init__()
        self.chunk, self.lent = chunk, lent

    def forward(self, batch: Batch) -> Tensor | dict[str, Term]:
        """What leaves the last block [B, S, D]; of the last part the terms of the loss.

        Raises:
            UsageError: A block below the last part has a loss of its own.
        """
        if self.chunk.head is not None:
            return self.chunk(batch)  # type: ignore[no-any-return]
        x_BSD, terms = self.chunk.run(batch)
        if terms:
            raise UsageError(
                f"the loss {next(iter(terms))} of a block does not reach the last part of the stage",
                hint="set parallel.pipeline: 1, and parallel.shard in its place",
            )
        return x_BSD


class _Scheduled(nn.Module):
    """A part as a schedule calls it: by the number of a microbatch."""

    def __init__(self, engine: PipelinedEngine, part: _Part, number: int) -> None:
        super().__init__()
        self._engine, self._run, self._number = (engine,), (part,), number  # in tuples: no submodules of this one
        self._gone_back = 0

    def forward(self, x: Tensor, *, number: Tensor) -> Tensor:
        """What leaves the part, [B, S, D]; of the last the loss whose gradient is taken, [1]."""
        (engine,), (part,), at = self._engine, self._run, int(number)
        step = engine.current
        batch = step.batches[at] if self._number == 0 else step.batches[at].above(x)
        with engine.model.numerics(engine.device):
            y: Any = part(batch)
        if isinstance(y, dict):
            step.terms[at] = y
            next(step.pulled)
            y = step.losses.root(y, batch).reshape(1)
        y.register_hook(self._backward)
        loss_or_activations: Tensor = y
        return loss_or_activations

    def _backward(self, gradient: Tensor) -> None:
        engine, last = self._engine[0], len(self._engine[0].current.batches) - 1
        engine.phases.done += 1
        engine.synchronise(self._run[0], self._gone_back == last)
        self._gone_back = 0 if self._gone_back == last else self._gone_back + 1


class PipelinedEngine(ShardedEngine):
    """As `ShardedEngine`, each rank with some of the blocks; the first also has the front, the last the head.

    A tied embedding is with both; each adds up both gradients, and so takes the same steps.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for part in self._parts.values():
            part.chunk.recomputed_every = self.model.recomputed_every

    def _place_blocks(self) -> None:
        division, line = self._division, self._mesh["pipeline"]
        self._line, self._place = line.get_group(), line.get_local_rank()
        self._count = count = division.pipeline * PARTS[division.schedule]
        self._bounds = [round(len(self._blocks) * at / count) for at in range(count + 1)]
        self._schedule: Any = None
        self._current: _Step | None = None
        places = [at % division.pipeline for at in range(count) for _ in range(self._bounds[at], self._bounds[at + 1])]
        self._owners = dict(zip(self._blocks, places, strict=True)) | {FRONT: 0, HEAD: division.pipeline - 1}

    def _has(self, name: str) -> bool:
        """See `ShardedEngine._has`: the last rank has a tied embedding too."""
        return self._owners[name] == self._place or (name == FRONT and self._tied is not None and self._last_place)

    @property
    def _last_place(self) -> bool:
        return self._place == self._division.pipeline - 1

    def _held(self, here: Mapping[str, nn.Module], bare: StageModel) -> StageModel:
        count, blocks = self._count, [here.get(name) for name in self._blocks]
        lent = here[FRONT].get_submodule("embedding") if self._tied is not None and self._last_place else None
        self._parts: dict[int, _Part] = {}
        for at in range(self._place, count, self._division.pipeline):
            some: list[Any] = blocks[self._bounds[at] : self._bounds[at + 1]]
            ends = here.get(FRONT) if at == 0 else None, here.get(HEAD) if at == count - 1 else None
            chunk = StageModel(ends[0], some, ends[1], bare.objective, bare.precision)
            self._parts[at] = _Part(chunk, lent if at == count - 1 else None)
        held: dict[str, nn.Module | None] = {name: here.get(name, nn.Identity()) for name in self._blocks}
        held[FRONT], held[HEAD] = here.get(FRONT), here.get(HEAD)
        if self._place and lent is not None:
            front = held[FRONT] = nn.Module()
            front.embedding = lent
        return self._assembled(held, bare)

    def _divide(self, held: StageModel) -> None:
        """See `ShardedEngine._divide`: each part by itself."""
        for part in self._parts.values():
            self._divide_ends(part, [*part.chunk.blocks], part.lent)

    @property
    def current(self) -> _Step:
        """The step that is being taken."""
        assert self._current is not None, "a part is called within a step"
        return self._current

    def synchronise(self, part: nn.Module, last: bool) -> None:
        """Called before each backward pass of a part: whether it is the last of the step."""
        if self._division.zero == 1:
            for group in part.modules():
                if isinstance(group, FSDPModule):
                    group.set_requires_gradient_sync(last, recurse=False)

    def _passes(self, pulled: Microbatches, step: int, losses: StepLoss) -> None:
        """See `ResidentEngine._passes`: both passes of all microbatches, in the order of the schedule."""
        batches = [batch.to(self.device) for batch in pulled.following()]
        if self._schedule is None:
            self._schedule = self._scheduled(batches[0], len(batches))
        self.phases.begin_step(len(batches) * len(self._parts))
        losses.sum_ahead = self._sum_counts
        self._current = _Step(batches, pulled, losses, {})
        numbers = torch.arange(len(batches), device=self.device)
        first, last = self._place == 0, self._place == self._division.pipeline - 1
        with self.phases(BACKWARD):  # forward passes are in between
            self._schedule.step(
                *([numbers] if first else []),
                target=numbers if last else None,
                number=numbers,
                return_outputs=False,
            )
        self._tell(losses, self.current.terms)
        self._current = None
        if self._tied is not None and (first or last):
            self._add_tied()

    def _judged(self, batch: Batch) -> Mapping[str, Term]:
        """See `ResidentEngine._judged`: on ranks with the last part; none elsewhere."""
        x_BSD: Tensor | None = None
        for at in range(self._count):
            here, above = at % self._division.pipeline, (at + 1) % self._division.pipeline
            if here != self._place:
                continue
            if at:
                x_BSD = self._received(here - 1 if here else self._division.pipeline - 1)
                batch = batch.above(x_BSD)
            y: Any = self._parts[at](batch)
            if isinstance(y, dict):
                return y
            self._send(y, above)
        return {}

    def _send(self, x: Tensor, place: int) -> None:
        dist.send(torch.tensor([*x.shape], device=x.device), group=self._line, group_dst=place)
        dist.send(x.contiguous(), group=self._line, group_dst=place)

    def _received(self, place: int) -> Tensor:
        shape = torch.empty(3, dtype=torch.int64, device=self.device)
        dist.recv(shape, group=self._line, group_src=place)
        x_BSD = torch.empty(shape.tolist(), dtype=self.model.stream_dtype, device=self.device)
        dist.recv(x_BSD, group=self._line, group_src=place)
        return x_BSD

    def _scheduled(self, batch: Batch, count: int) -> Any:
        """The schedule of steps of so many microbatches that are like this one."""
        shape: list[int] | None = None
        if self._place == 0:  # whose parts alone a batch says it all to
            with torch.no_grad(), self.model.numerics(self.device):
                shape = [*self._parts[0](batch).shape]
        shape = self.ranks.shared(shape)
        stages: list[Any] = []
        for at, part in self._parts.items():
            between = torch.empty(shape, dtype=self.model.stream_dtype, device="meta", requires_grad=True)
            inputs = torch.empty(1, dtype=torch.int64, device="meta") if at == 0 else between
            outputs = torch.empty(1, device="meta", requires_grad=True) if at == self._count - 1 else between
            stages.append(
                PipelineStage(
                    _Scheduled(self, part, at), at, self._count, self.device, inputs, outputs, group=self._line
                )
            )
        options: dict[str, Any] = {"loss_fn": lambda loss, _: loss.sum(), "scale_grads": False}
        if self._division.schedule == "interleaved":
            return ScheduleInterleaved1F1B(stages, count, **options)
        kind = ScheduleGPipe if self._division.schedule == "gpipe" else Schedule1F1B
        return kind(stages[0], count, **options)

    def _tell(self, losses: StepLoss, terms: Mapping[int, Mapping[str, Term]]) -> None:
        """Let all ranks have the terms that those with the last part made."""
        mine = [
            [[name, t.sum.detach().tolist(), str(t.sum.dtype), t.count, t.weight] for name, t in terms[at].items()]
            for at in sorted(terms)
        ]
        losses.ahead, scored = self.ranks.of_shares([losses.ahead, mine])[self.ranks.share]
        for batch, microbatch in zip(self.current.batches, scored, strict=True):
            shared_terms = {
                name: Term(_tensor(value, dtype, self.device), count, weight)
                for name, value, dtype, count, weight in microbatch
            }
            losses.add(shared_terms)
            losses.tokens = batch.tokens_BS.numel()

    def _sum_counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The sums over the ranks that have the same blocks: those with the last part alone count ahead."""
        numbers = torch.tensor([*counts.values()], dtype=torch.int64)
        for name in ("replicate", "shard"):
            dist.all_reduce(numbers, group=self._mesh[name].get_group())
        return dict(zip(counts, numbers.tolist(), strict=True))

    def _add_tied(self) -> None:
        """Add up the gradients of a tied embedding: of its look-ups, and of the projection."""
        assert self._tied is not None
        gradient: Any = self.parameters[self._tied].grad
        mine = gradient.to_local()
        other, last = torch.empty_like(mine), self._division.pipeline - 1
        if self._place == 0:
            dist.send(mine, group=self._line, group_dst=last)
            dist.recv(other, group=self._line, group_src=last)
        else:
            dist.recv(other, group=self._line, group_src=0)
            dist.send(mine, group=self._line, group_dst=0)
        mine.add_(other)

    def _counted(self, gradients: list[Tensor]) -> list[Tensor]:
        """See `ShardedEngine._counted`: that of a tied embedding where the front is."""
        if self._tied is None or self._place == 0 or self._tied not in self.parameters:
            return gradients
        return [gradient for gradient in gradients if gradient is not self.parameters[self._tied].grad]

    def _over_blocks(self, total: Tensor) -> Tensor:
        dist.all_reduce(total, group=self._line)
        return total

    def _gathering(self, tensors: Mapping[str, Tensor]) -> Gathering:
        """See `ShardedEngine._gathering`: each from the ranks that have it."""
        mine = {name: t for name, t in tensors.items() if not (self._place and self._lent(name))}
        about = {name: [[*t.shape], str(t.dtype)] for name, t in mine.items()} if self._saves else {}
        outline, owners = dict[str, Tensor](), dict[str, int]()
        for rank, theirs in enumerate(self.ranks.gathered(about)):
            for name, (shape, dtype) in theirs.items():
                outline[name], owners[name] = torch.empty(shape, dtype=_dtype(dtype), device="meta"), rank

        def whole(name: str) -> Tensor:
            t = self._gathered(mine[name]) if name in mine else torch.empty(0)
            if owners[name] and self.ranks.main:
                t = torch.empty(outline[name].shape, dtype=outline[name].dtype)
                dist.recv(t, owners[name])
            elif owners[name] and owners[name] == self.ranks.rank:
                dist.send(t.contiguous(), 0)
            return t

        return Gathering(outline, whole)

    def _lent(self, name: str) -> bool:
        """Whether a tensor of the model or its state is that of a tied embedding, which the first place has too."""
        return self._tied is not None and name.rpartition("/")[2] == self._tied


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return dtype


def _tensor(value: Any, dtype: str, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=_dtype(dtype), device=device)
