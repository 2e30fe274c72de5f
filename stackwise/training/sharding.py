"""A stage whose weights, gradients and optimizer's state are divided over ranks.

By ZeRO (arXiv 1910.02054, FSDP2): each rank has its own rows and of each parameter a slice along its first dimension;
the whole of a block is together while it computes. By tensor parallelism (`tensor.py`): ranks that share their rows
each compute a part of every block. Checkpoints hold whole tensors, so any other number of ranks takes them up.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from stackwise.batch import Batch
from stackwise.model.layers import LayerNorm, RMSNorm
from stackwise.training.engine import ResidentEngine
from stackwise.training.ranks import Reducer
from stackwise.training.stage import NARROW, MeanLoss, StageModel
from stackwise.training.tensor import Plan, divide_positions, split


@dataclass(frozen=True)
class Division:
    """How a stage is divided over ranks.

    Args:
        shard: Ranks that a copy of the weights is divided over; `shard * tensor` divides the number of ranks.
        zero: 3: weights are gathered for each pass of a block; 2: once a microbatch, for both passes; 1: as 2, and
            gradients are added up whole in each rank and divided once a step, which takes the least of the wire.
        offload: On a GPU, whether what is divided waits in the host's memory.
        tensor: Ranks that the matrices of a block are split over; they follow each other, and share their rows.
        plans: How, for each block and then each beyond the stage.
        sequence: Whether the positions between matrices are divided over the same ranks.
    """

    shard: int = 1
    zero: int = 3
    offload: bool = False
    tensor: int = 1
    plans: Sequence[Plan] = field(default_factory=tuple)
    sequence: bool = False

    def mesh(self, device: str, ranks: int) -> DeviceMesh:
        """All ranks by copy of the weights, slice, and part of a matrix."""
        sizes = (ranks // self.shard // self.tensor, self.shard, self.tensor)
        return init_device_mesh(device, sizes, mesh_dim_names=("replicate", "shard", "tensor"))


class ShardedEngine(ResidentEngine):
    """As `ResidentEngine`, each rank with its part.

    With the evaluation, and from `settle` on, every rank holds all weights; gradients and moments stay divided.

    Args:
        model: Whole, on the device; each block becomes a group of its own, all else (tied weights among it) one.
        options: Those of `ResidentEngine`.
    """

    gathers = True

    def __init__(self, model: StageModel, *args: Any, division: Division, **options: Any) -> None:
        ranks, self._zero, self._whole_state = options["ranks"], division.zero, dict[str, Tensor]()
        self._blocks = [*model.blocks, *model.beyond]
        self._bare = [_without_weights(block) for block in self._blocks]
        mesh = division.mesh(options["device"].type, ranks.size)
        if division.tensor > 1:
            for block, plan in zip(self._blocks, division.plans, strict=True):
                split(block, plan, mesh["tensor"], sequence=division.sequence)
        head: Any = model.head
        owner = _owner(model, head.weight) if head is not None and head.tied else None
        # A dimension of one rank would only be another sum.
        copies = mesh["replicate", "shard"] if mesh.size(0) > 1 else mesh["shard"]
        away = division.offload and options["device"].type == "cuda"  # elsewhere it is there already
        common: dict[str, Any] = {"mesh": copies, "offload_policy": CPUOffloadPolicy() if away else OffloadPolicy()}
        for block in self._blocks:
            _divide(block, NARROW.get(model.precision), common | {"reshard_after_forward": division.zero == 3})
        fully_shard(model, reshard_after_forward=False, **common)
        if division.sequence and division.tensor > 1:
            divide_positions(self._blocks, mesh["tensor"])
        if owner is not None:  # FSDP puts other tensors in a parameter's place; its own hook, which does, comes first
            where, name = owner
            model.register_forward_pre_hook(lambda *_: head.share(where._parameters[name]))
        # That of the whole stage first.
        self._groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for group in self._groups:
            group.set_gradient_divide_factor(1.0)  # sums: the loss is divided by what all ranks scored
            group.set_force_sum_reduction_for_comms(True)
        super().__init__(model, *args, **options)
        self._last = self.settings.accumulation // ranks.shares - 1

    def evaluate(self, batches: Iterable[Batch]) -> MeanLoss:
        """See `Engine.evaluate`: with all weights here, as ranks may have other numbers of batches."""
        self._gather(self._groups)
        try:
            return super().evaluate(batches)
        finally:
            for group in self._groups:
                group.reshard()
                group.set_reshard_after_forward(self._zero == 3 and group is not self._groups[0], recurse=False)

    def state(self) -> dict[str, Tensor]:
        """See `ResidentEngine.state`: whole tensors, on the main rank; the others take part in making them."""
        whole, self._whole_state = self._whole_state, {}
        return whole or super().state()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine.restore`: of whole tensors. The main rank gives them to the others, by `state`, right after."""
        whole = {name: tensors[name] for name in tensors}
        super().restore(whole)
        if self.ranks.main:
            self._whole_state = whole

    def settle(self) -> None:
        """See `Engine.settle`: from then on every rank has all weights, and computes without the others."""
        super().settle()
        self._gather(self._groups[:1])
        for block, bare in zip(self._blocks, self._bare, strict=True):
            bare.load_state_dict({name: _gathered(tensor) for name, tensor in block.state_dict().items()}, assign=True)
            bare.train(block.training)
            for modules in (self.model.blocks, self.model.beyond):
                for at, module in enumerate(modules):
                    if module is block:
                        modules[at] = bare
            self.parts |= {part: bare for part, module in self.parts.items() if module is block}

    def weights(self, part: str) -> dict[str, Tensor]:
        """See `Engine.weights`: of what is gathered (a module's `state_dict` would divide it again)."""
        kept: dict[str, Tensor] = {}
        for prefix, module in self.parts[part].named_modules():
            passing = module._non_persistent_buffers_set
            buffers = {name: tensor for name, tensor in module._buffers.items() if name not in passing}
            for name, tensor in (*module._parameters.items(), *buffers.items()):
                if tensor is not None:
                    kept[f"{prefix}.{name}" if prefix else name] = tensor.detach()
        return kept

    def _gather(self, groups: Iterable[FSDPModule]) -> None:
        """Let modules hold all weights (of split matrices what is this rank's), and go on doing so after a pass."""
        for group in groups:
            group.set_reshard_after_forward(False, recurse=False)
            group.unshard()

    def _before_backward(self, number: int) -> None:
        if self._zero == 1:
            for group in self._groups:
                group.set_requires_gradient_sync(number == self._last, recurse=False)

    def _reducer_of(self, parameters: list[nn.Parameter]) -> Reducer:
        return Reducer()  # FSDP's backward passes do it

    def _whole(self, tensor: Tensor) -> Tensor:
        whole = _gathered(tensor)
        if whole is tensor:
            return tensor
        return whole.cpu() if self.ranks.main else whole.new_empty(0)

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
        return DTensor.from_local(
            local.to(p.to_local().device).contiguous(),
            mesh,
            p.placements,
            run_check=False,
            shape=p.shape,
            stride=p.stride(),
        )

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        squares: dict[tuple[DeviceMesh, tuple[Placement, ...]], Tensor] = {}
        for gradient in gradients:
            assert isinstance(gradient, DTensor)
            lies = gradient.device_mesh, gradient.placements
            squares[lies] = squares.get(lies, 0.0) + torch.linalg.vector_norm(gradient.to_local()).square()
        total = torch.zeros((), dtype=gradients[0].dtype, device=self.device)
        for (mesh, placements), square in squares.items():
            parts = [Replicate() if _divides(placement) is None else Partial() for placement in placements]
            total += _gathered(DTensor.from_local(square, mesh, parts, run_check=False))
        return total.sqrt()


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


def _divide(block: nn.Module, narrow: torch.dtype | None, options: dict[str, Any]) -> None:
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


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy whose parameters take no memory."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, empty)


def _owner(model: StageModel, weight: Tensor) -> tuple[nn.Module, str] | None:
    """The module that has a parameter, and its name there; None: none has."""
    places = ((module, name) for module in model.modules() for name in module._parameters)
    return next(((module, name) for module, name in places if module._parameters[name] is weight), None)
