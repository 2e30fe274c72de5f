"""A stage whose weights, gradients and optimizer's state are divided over ranks.

By ZeRO (arXiv 1910.02054, FSDP2): each rank has its own rows and of each parameter a slice along its first dimension;
the whole of a block is together while it computes. By tensor parallelism (Megatron, arXiv 1909.08053): ranks that
share their rows each compute a part of every block, whose matrices are split by DTensor as their kinds say. A pair of
matrices, the first by its outputs and the second by its inputs, is one sum over ranks in each direction. The residual
stream is the same on all of them, or, with `sequence`, each has some of its positions (arXiv 2205.05198; shapes:
B rows, S positions, D model width). Checkpoints hold whole tensors, so any other number of ranks takes them up.

No rank ever has the whole stage: parts are made one at a time and divided at once, and leave for checkpoints and
commits a tensor at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from stackwise.batch import Batch
from stackwise.model.layers import LayerNorm, RMSNorm
from stackwise.training.engine import OPTIMIZER, WEIGHT, ResidentEngine, State
from stackwise.training.optim import state_tensors
from stackwise.training.ranks import Gathering, Reducer
from stackwise.training.scaling import FIGURES
from stackwise.training.stage import NARROW, StageModel
from stackwise.training.swap_parts import FRONT, HEAD, DividedParts

POSITIONS, HEADS = 1, 2  # dimensions of [B, S, D] and of [B, S, H, E]

Plan = Mapping[str, Mapping[str, str]]
"""Of a block: by the module that a part of it is in, how each of its layers is split (`TensorPlan.layers`)."""


def split(block: nn.Module, plan: Plan, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Split a block's matrices over the ranks of a mesh of one dimension; in place."""
    stream = Shard(POSITIONS) if sequence else Replicate()
    styles: dict[str, ParallelStyle] = {}
    for part, layers in plan.items():
        # What enters is gathered once for all layers that read it, and so are its gradients.
        styles[part] = PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),))
        for layer, way in layers.items():
            styles[f"{part}.{layer}"] = _style(way, stream)
        if sequence:
            styles[f"{part}_norm"] = SequenceParallel(sequence_dim=POSITIONS, use_local_output=True)
    parallelize_module(block, mesh, styles)


def divide_positions(blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Let blocks that follow each other work on some positions each: they are divided before the first, and gathered
    after the last."""

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_laid(arguments[0], Replicate(), Shard(POSITIONS), mesh), *arguments[1:])

    def leave(module: nn.Module, arguments: tuple[Any, ...], x_BSD: Tensor) -> Tensor:
        return _laid(x_BSD, Shard(POSITIONS), Replicate(), mesh)

    blocks[0].register_forward_pre_hook(enter)
    blocks[-1].register_forward_hook(leave)


def _style(way: str, stream: Replicate | Shard) -> ParallelStyle:
    if way == "column":
        return ColwiseParallel()
    if way == "row":
        return RowwiseParallel(output_layouts=stream)
    return SequenceParallel(sequence_dim=HEADS, use_local_output=True)


def _laid(x_BSD: Tensor, before: Replicate | Shard, after: Replicate | Shard, mesh: DeviceMesh) -> Tensor:
    return DTensor.from_local(x_BSD, mesh, [before], run_check=False).redistribute(placements=[after]).to_local()


EMBEDDING = "front.embedding.weight"
"""The parameter of a stage that a tied head projects with."""


@dataclass(frozen=True)
class Division:
    """How a stage is divided over ranks.

    Args:
        shard: Ranks that a copy of the weights is divided over.
        zero: 3: weights are gathered for each pass of a block; 2: once a microbatch, for both passes; 1: as 2, and
            gradients are added up whole in each rank and divided once a step, which takes the least of the wire.
        offload: On a GPU, whether what is divided waits in the host's memory.
        tensor: Ranks that the matrices of a block are split over; they follow each other, and share their rows.
        plans: How, for each block and then each beyond the stage.
        sequence: Whether the positions between matrices are divided over the same ranks.
        pipeline: Ranks that the blocks of the stage are divided over; they share their rows, too.
        schedule: In which order those take microbatches.
    """

    shard: int = 1
    zero: int = 3
    offload: bool = False
    tensor: int = 1
    plans: Sequence[Plan] = field(default_factory=tuple)
    sequence: bool = False
    pipeline: int = 1
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"

    def mesh(self, device: str, ranks: int) -> DeviceMesh:
        """All ranks by blocks, copy of the weights, slice, and part of a matrix."""
        copies = ranks // self.pipeline // self.shard // self.tensor
        names = ("pipeline", "replicate", "shard", "tensor")
        return init_device_mesh(device, (self.pipeline, copies, self.shard, self.tensor), mesh_dim_names=names)


class ShardedEngine(ResidentEngine):
    """As `ResidentEngine`, each rank with its part. Weights that are asked for become whole on the main rank alone.

    Args:
        source: Makes the parts of the stage.
        options: Those of `ResidentEngine`.
    """

    gathers = True

    def __init__(self, source: DividedParts, *args: Any, division: Division, **options: Any) -> None:
        ranks, self._device = options["ranks"], options["device"]
        self._division, self._precision = division, source.precision
        self._mesh = division.mesh(self._device.type, ranks.size)
        self._saves: bool = ranks.share == 0 and self._mesh.get_local_rank("tensor") == 0
        self._groups: list[FSDPModule] = []
        self._settled: Gathering | None = None
        self._tied = EMBEDDING if source.tied else None
        self._blocks = [name for name in source.order if name not in (FRONT, HEAD)]
        self._place_blocks()
        outline, here = self._made(source)
        if self._tied is not None and not getattr(outline[HEAD], "tied", False):  # it has a projection of its own
            self._tied = None
        bare, names = source.model({}), [*source.order]
        self._beyond = len(names) - 1 - names.index(HEAD) if HEAD in names else 0
        self._stage = self._assembled(outline, bare)
        held = self._held(here, bare)
        self._head = held.head
        self._dtype = next(p.dtype for p in self._stage.parameters() if p.requires_grad)
        self._divide(held)
        super().__init__(held, *args, parts={name: here.get(name, outline[name]) for name in names}, **options)
        self.parts = outline
        self._last = self.settings.accumulation // ranks.shares - 1

    def state(self) -> Mapping[str, Tensor]:
        """See `ResidentEngine.state`: each tensor becomes whole when it is asked for."""
        return self._gathering(super().state())

    def outline(self) -> dict[str, Tensor]:
        """See `Engine.outline`: of the whole stage."""
        return {f"{WEIGHT}{name}": p.detach() for name, p in self._stage.named_parameters() if p.requires_grad}

    def keeps(self, name: str, whole: Tensor) -> Tensor | None:
        """See `Engine.keeps`: its slice, of what is here."""
        if name in FIGURES:
            return whole
        p = self.parameters.get(name.rpartition("/")[2])
        return None if p is None else self._slice(whole, p)

    def settle(self) -> None:
        """See `Engine.settle`: from now on all ranks ask together for `weights`."""
        super().settle()
        self._settled = self._gathering(self.model.state_dict())

    def weights(self, part: str) -> dict[str, Tensor]:
        """See `Engine.weights`: whole on the main rank; the others take part in making them, one after another."""
        assert self._settled is not None, "weights are asked for once the engine has settled"
        begin = self._prefix(part)
        return {name: self._settled[f"{begin}{name}"] for name in self.parts[part].state_dict()}

    def carried(self) -> dict[str, State]:
        """See `Engine.carried`: whole on the main rank; all ranks ask for the same, in one order."""
        return {part: partial(self._carried, part) for part in ("", *self.parts)}

    def _carried(self, part: str) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for name in (name for name, (of, _) in self._places.items() if of == part):
            state = state_tensors(self.optimizer, self.parameters[name])
            kept |= {f"{OPTIMIZER}{kind}/{name}": value for kind, value in state.items()}
        begin = self._prefix(part) if part else ""
        return {name.replace(f"/{begin}", "/", 1): t for name, t in self._gathering(kept).items()}

    def _prefix(self, part: str) -> str:
        """What the names of a part's tensors begin with in the stage."""
        module = self.parts[part]
        return next(f"{name}." for name, other in self._stage.named_modules() if other is module)

    def _gathering(self, tensors: Mapping[str, Tensor]) -> Gathering:
        """Those of all ranks, each whole on the main rank when it is asked for; every rank calls it."""
        return Gathering({name: _outline(t) for name, t in tensors.items()}, lambda name: self._gathered(tensors[name]))

    def _place_blocks(self) -> None:
        """Say which ranks have which blocks: here all have their slices of all."""

    def _has(self, name: str) -> bool:
        """Whether this rank has something of a part."""
        return True

    def _made(self, source: DividedParts) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """All parts without values, and those of this rank: one block after another is whole, then divided."""
        outline, here = dict[str, nn.Module](), dict[str, nn.Module]()
        for name in source.order:
            if not self._has(name):
                outline[name] = source.outline(name)
                continue
            embedding: Tensor | None = None
            if name == HEAD and self._tied is not None:
                embedding = here[FRONT].get_parameter("embedding.weight")
            part = source.make(name, None, embedding)
            outline[name] = without_values(part, embedding)
            here[name] = part.to(self._device)
            if name in self._blocks:
                self._divide_block(part, self._blocks.index(name))
        return outline, here

    def _assembled(self, parts: Mapping[str, nn.Module | None], bare: StageModel) -> StageModel:
        """The model of a stage of some parts; `bare`: without any."""
        blocks: list[Any] = [parts[name] for name in self._blocks]
        within = len(blocks) - self._beyond
        ends = parts.get(FRONT), parts.get(HEAD)
        return StageModel(ends[0], blocks[:within], ends[1], bare.objective, bare.precision, blocks[within:])

    def _held(self, here: Mapping[str, nn.Module], bare: StageModel) -> StageModel:
        """What this rank trains, under the names that it has in the stage."""
        return self._assembled(here, bare)

    def _divide(self, held: StageModel) -> None:
        """Divide what else this rank holds over those that hold the same."""
        tied = None if self._tied is None else held.get_submodule(self._tied.rpartition(".")[0])
        self._divide_ends(held, [*held.blocks, *held.beyond], tied)

    @property
    def _slices(self) -> dict[str, Any]:
        """Over which ranks FSDP divides, and where it keeps its slices."""
        away, mesh = self._division.offload and self._device.type == "cuda", self._mesh  # elsewhere they are there
        # A dimension of one rank would only be another sum.
        copies = mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]
        return {"mesh": copies, "offload_policy": CPUOffloadPolicy() if away else OffloadPolicy()}

    def _divide_block(self, block: nn.Module, number: int) -> None:
        """Split a block, and make it a group of its own."""
        division = self._division
        if division.tensor > 1:
            split(block, division.plans[number], self._mesh["tensor"], sequence=division.sequence)
        _shard(block, NARROW.get(self._precision), self._slices | {"reshard_after_forward": division.zero == 3})

    def _divide_ends(self, root: nn.Module, blocks: Sequence[nn.Module], tied: Any) -> None:
        """Divide all below a root but its blocks, tied weights too, as one group.

        Args:
            root: What is called for a pass.
            blocks: Within it, divided before.
            tied: The embedding within that a head's projection is tied to; None: none is.
        """
        division = self._division
        fully_shard(root, reshard_after_forward=False, **self._slices)
        if division.sequence and division.tensor > 1:
            divide_positions(blocks, self._mesh["tensor"])
        if tied is not None:  # FSDP puts other tensors in a parameter's place; its own hook, which does, comes first
            head: Any = self._head
            root.register_forward_pre_hook(lambda *_: head.share(tied._parameters["weight"]))
        for group in root.modules():
            if isinstance(group, FSDPModule):
                group.set_gradient_divide_factor(1.0)  # sums: the loss is divided by what all ranks scored
                group.set_force_sum_reduction_for_comms(True)
                self._groups.append(group)

    def _judging(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
        """See `ResidentEngine._judging`: a rank that has fewer goes on with its last, as others gather weights."""
        mine, last = iter(batches), None
        while True:
            batch = next(mine, None)
            if self.ranks.every(batch is None):
                break
            if last is None and not self.ranks.every(batch is not None):
                last = self._shared(batch)
            last = batch or last
            assert last is not None, "the main rank has as many batches as any"
            yield last, batch is not None
        for group in self._groups:
            group.reshard()

    def _shared(self, batch: Batch | None) -> Batch:
        """The main rank's batch."""
        tensors = self.ranks.shared_tensors(None if batch is None else batch.tensors)
        return Batch(np.zeros(len(next(iter(tensors.values()))), np.int64), None, tensors)

    def _before_backward(self, number: int) -> None:
        if self._division.zero == 1:
            for group in self._groups:
                group.set_requires_gradient_sync(number == self._last, recurse=False)

    def _reducer_of(self, parameters: list[nn.Parameter]) -> Reducer:
        return Reducer()  # FSDP's backward passes do it

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor  # as it lies: `_gathering` makes it whole

    def _gathered(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor on the CPU of the ranks that save; the others take part."""
        whole = _gathered(tensor)
        return whole.to("cpu", copy=whole is tensor) if self._saves else whole.new_empty(0)

    def _slice(self, whole: Tensor, p: Tensor) -> Tensor:
        assert isinstance(p, DTensor)
        if isinstance(whole, DTensor):  # it is one
            return whole
        there = p.to_local().device
        if whole.shape != p.shape:  # a count of steps
            return whole.to(there)
        here, mesh = p.device_mesh.get_coordinate(), p.device_mesh
        assert here is not None
        local = whole
        for at in reversed(range(mesh.ndim)):  # matrices were split first, then sliced
            if (dimension := _divides(p.placements[at])) is not None:
                pieces = local.chunk(mesh.size(at), dimension)
                local = pieces[here[at]] if here[at] < len(pieces) else local.narrow(dimension, 0, 0)
        local = local.to(there, copy=True).contiguous()  # not a view: the whole goes
        return DTensor.from_local(local, mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        squares: dict[tuple[DeviceMesh, tuple[Placement, ...]], Tensor] = {}
        for gradient in self._counted(gradients):
            assert isinstance(gradient, DTensor)
            lies = gradient.device_mesh, gradient.placements
            squares[lies] = squares.get(lies, 0.0) + torch.linalg.vector_norm(gradient.to_local()).square()
        total = torch.zeros((), dtype=self._dtype, device=self.device)
        for (mesh, placements), square in squares.items():
            parts = [Replicate() if _divides(placement) is None else Partial() for placement in placements]
            total += _gathered(DTensor.from_local(square, mesh, parts, run_check=False))
        return self._over_blocks(total).sqrt()

    def _counted(self, gradients: list[Tensor]) -> list[Tensor]:
        """Those that no rank with other blocks has too."""
        return gradients

    def _over_blocks(self, total: Tensor) -> Tensor:
        """The sum of what ranks with other blocks have."""
        return total


def _divides(placement: Placement) -> int | None:
    """The dimension that a tensor is divided along, once or within what was split before; None: it is not."""
    dimension: int | None = getattr(placement, "dim", None)
    return dimension


def _gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is divided, else itself; every rank calls it."""
    if not isinstance(tensor, DTensor):
        return tensor
    for at in range(tensor.device_mesh.ndim):  # slices of what was split first
        there = [Replicate() if number == at else placement for number, placement in enumerate(tensor.placements)]
        tensor = tensor.redistribute(placements=there)
    return tensor.to_local()


def _shard(block: nn.Module, narrow: torch.dtype | None, options: dict[str, Any]) -> None:
    """Divide a block's weights over ranks.

    Args:
        narrow: What matrices are gathered in, where autocast would narrow them to it anyway: half of the wire, and the
            same numbers. Norms stay wide, as autocast leaves them, and gradients are added up wide.
    """
    if narrow is not None:
        norms: list[nn.Module] = [module for module in block.modules() if isinstance(module, RMSNorm | LayerNorm)]
        fully_shard(norms, **options)
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
        options = options | {"mp_policy": policy}
    fully_shard(block, **options)


def without_values(part: nn.Module, embedding: Tensor | None = None) -> nn.Module:
    """A copy of a part, its tensors and an embedding that its head projects with on the meta device."""
    memo: dict[int, Any] = {} if embedding is None else {id(embedding): nn.Parameter(_outline(embedding))}
    memo |= {id(p): nn.Parameter(_outline(p), requires_grad=p.requires_grad) for p in part.parameters()}
    memo |= {id(buffer): _outline(buffer) for buffer in part.buffers()}
    return copy.deepcopy(part, memo)


def _outline(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
