"""A stage whose weights, gradients and optimizer's state are divided over ranks.

By ZeRO (arXiv 1910.02054, FSDP2): each rank has its own rows and of each parameter a slice along its first dimension;
the whole of a block is together while it computes. By tensor parallelism (`tensor.py`): ranks that share their rows
each compute a part of every block. Checkpoints hold whole tensors, so any other number of ranks takes them up.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from stackwise.batch import Batch
from stackwise.model.layers import LayerNorm, RMSNorm
from stackwise.training.engine import WEIGHT, ResidentEngine
from stackwise.training.ranks import Reducer
from stackwise.training.stage import NARROW, MeanLoss, StageModel
from stackwise.training.tensor import Plan, divide_positions, split


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
    """As `ResidentEngine`, each rank with its part.

    For evaluations, and from `settle` on, every rank holds all weights; gradients and moments stay divided.

    Args:
        model: Whole, on the device. Until `settle` its weights are elsewhere.
        options: Those of `ResidentEngine`.
    """

    gathers = True

    def __init__(self, model: StageModel, *args: Any, division: Division, **options: Any) -> None:
        ranks, self._device = options["ranks"], options["device"]
        self._division, self._whole_state = division, dict[str, Tensor]()
        self._mesh = division.mesh(self._device.type, ranks.size)
        self._saves: bool = ranks.share == 0 and self._mesh.get_local_rank("tensor") == 0
        self._groups: list[tuple[FSDPModule, bool]] = []  # each with whether its weights go after a pass
        self._stage, self._tied, self._head = model, _tied(model), model.head
        self._dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
        held = self._held(model)
        plain = _emptied(model)
        self._divide(held)
        super().__init__(held, *args, **options)
        self.parts = {part: plain[id(module)] for part, module in self.parts.items()}
        self._last = self.settings.accumulation // ranks.shares - 1

    def evaluate(self, batches: Iterable[Batch]) -> MeanLoss:
        """See `Engine.evaluate`: with all weights here, as ranks may have other numbers of batches."""
        for group, _ in self._groups:
            group.set_reshard_after_forward(False, recurse=False)
            group.unshard()
        try:
            return super().evaluate(batches)
        finally:
            for group, goes in self._groups:
                group.reshard()
                group.set_reshard_after_forward(goes, recurse=False)

    def state(self) -> dict[str, Tensor]:
        """See `ResidentEngine.state`: whole tensors, on the main rank; the others take part in making them."""
        whole, self._whole_state = self._whole_state, {}
        return whole or self._to_main(super().state())

    def outline(self) -> dict[str, Tensor]:
        """See `Engine.outline`: of the whole stage."""
        return {f"{WEIGHT}{name}": p.detach() for name, p in self._stage.named_parameters() if p.requires_grad}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine.restore`: of whole tensors. The main rank gives them to the others, by `state`, right after."""
        whole = {name: tensors[name] for name in tensors}
        super().restore(whole)
        if self.ranks.main:
            self._whole_state = whole

    def settle(self) -> None:
        """See `Engine.settle`: the model that was given is whole on every rank, which computes without the others."""
        super().settle()
        self._stage.load_state_dict(self._all_weights(), assign=True)
        self._stage.train(self.model.training)
        head: Any = self._stage.head
        if self._tied is not None:
            head.share(self._stage.get_parameter(self._tied))

    def _held(self, model: StageModel) -> StageModel:
        """What this rank trains of a model, under the same names."""
        return StageModel(model.front, [*model.blocks], model.head, model.objective, model.precision, [*model.beyond])

    def _divide(self, held: StageModel) -> None:
        """Divide what this rank holds over those that hold the same."""
        tied = None if self._tied is None else held.get_submodule(self._tied.rpartition(".")[0])
        self._divide_over(held, [*held.blocks, *held.beyond], self._division.plans, tied)

    def _divide_over(self, root: nn.Module, blocks: Sequence[nn.Module], plans: Sequence[Plan], tied: Any) -> None:
        """Split blocks, and divide them and all else below a root.

        Args:
            root: What is called for a pass; each block becomes a group of its own, all else (tied weights too) one.
            tied: The embedding within that a head's projection is tied to; None: none is.
        """
        division, mesh = self._division, self._mesh
        if division.tensor > 1:
            for block, plan in zip(blocks, plans, strict=True):
                split(block, plan, mesh["tensor"], sequence=division.sequence)
        away = division.offload and self._device.type == "cuda"  # elsewhere it is there already
        # A dimension of one rank would only be another sum.
        copies = mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]
        common: dict[str, Any] = {"mesh": copies, "offload_policy": CPUOffloadPolicy() if away else OffloadPolicy()}
        for block in blocks:
            _shard(block, NARROW.get(self._stage.precision), common | {"reshard_after_forward": division.zero == 3})
        fully_shard(root, reshard_after_forward=False, **common)
        if division.sequence and division.tensor > 1:
            divide_positions(blocks, mesh["tensor"])
        if tied is not None:  # FSDP puts other tensors in a parameter's place; its own hook, which does, comes first
            head: Any = self._head
            root.register_forward_pre_hook(lambda *_: head.share(tied._parameters["weight"]))
        for group in root.modules():
            if isinstance(group, FSDPModule):
                group.set_gradient_divide_factor(1.0)  # sums: the loss is divided by what all ranks scored
                group.set_force_sum_reduction_for_comms(True)
                self._groups.append((group, division.zero == 3 and group is not root))

    def _all_weights(self) -> dict[str, Tensor]:
        """The whole stage's, by name; on every rank."""
        return {name: _gathered(tensor).to(self.device) for name, tensor in self.model.state_dict().items()}

    def _before_backward(self, number: int) -> None:
        if self._division.zero == 1:
            for group, _ in self._groups:
                group.set_requires_gradient_sync(number == self._last, recurse=False)

    def _reducer_of(self, parameters: list[nn.Parameter]) -> Reducer:
        return Reducer()  # FSDP's backward passes do it

    def _whole(self, tensor: Tensor) -> Tensor:
        whole = _gathered(tensor)
        if whole is tensor:
            return tensor
        return whole.cpu() if self._saves else whole.new_empty(0)

    def _slice(self, whole: Tensor, p: Tensor) -> Tensor:
        assert isinstance(p, DTensor)
        if whole.shape != p.shape:  # a count of steps
            return whole.to(p.to_local().device)
        here, mesh = p.device_mesh.get_coordinate(), p.device_mesh
        assert here is not None
        local = whole
        for at in reversed(range(mesh.ndim)):  # matrices were split first, then sliced
            if (dimension := _divides(p.placements[at])) is not None:
                pieces = local.chunk(mesh.size(at), dimension)
                local = pieces[here[at]] if here[at] < len(pieces) else local.narrow(dimension, 0, 0)
        local = local.to(p.to_local().device).contiguous()
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

    def _to_main(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the main rank those of all ranks."""
        return tensors

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


def _tied(model: StageModel) -> str | None:
    """The name of the parameter that the head's projection is; None: it has its own, or one that stands still."""
    head: Any = model.head
    if head is None or not head.tied:
        return None
    return next((name for name, p in model.named_parameters() if p is head.weight), None)


def _emptied(model: StageModel) -> dict[int, nn.Module]:
    """Put copies whose parameters take no memory in the place of a model's modules.

    Returns:
        The copies, by the ids of what they stand for.
    """
    memo: dict[int, Any] = {id(kept): kept for kept in (model.objective, *model.buffers())}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    bare: StageModel = copy.deepcopy(model, memo)
    was = (model.front, *model.blocks, *model.beyond, model.head)
    pairs = zip(was, (bare.front, *bare.blocks, *bare.beyond, bare.head), strict=True)
    plain = {id(old): new for old, new in pairs if old is not None and new is not None}
    model.front, model.blocks, model.beyond, model.head = bare.front, bare.blocks, bare.beyond, bare.head
    return plain
