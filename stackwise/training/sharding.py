"""A stage whose weights, gradients and optimizer's state are divided over ranks: ZeRO (arXiv 1910.02054) by FSDP2.

Every rank has its own rows and of each parameter a slice along its first dimension; the whole of a block is together
while it computes. Checkpoints hold whole tensors, so any other number of ranks takes them up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from stackwise.batch import Batch
from stackwise.training.engine import ResidentEngine
from stackwise.training.ranks import Reducer
from stackwise.training.stage import MeanLoss, StageModel


class ShardedEngine(ResidentEngine):
    """As `ResidentEngine`, each rank with its slice.

    With the evaluation, and from `settle` on, every rank holds all weights; gradients and moments stay divided.

    Args:
        model: Whole, on the device; each block becomes a group of its own, all else (tied weights among it) one.
        shard: Ranks that a copy of the weights is divided over; it divides the number of ranks.
        zero: 3: weights are gathered for each pass of a block; 2: once a microbatch, for both passes; 1: as 2, and
            gradients are added up whole in each rank and divided once a step, which takes the least of the wire.
        options: Those of `ResidentEngine`.
    """

    gathers = True

    def __init__(self, model: StageModel, *args: Any, shard: int, zero: int, **options: Any) -> None:
        ranks, self._zero, self._whole_state = options["ranks"], zero, dict[str, Tensor]()
        sizes, names = (ranks.size // shard, shard), ("replicate", "shard")
        device = options["device"].type
        mesh = init_device_mesh(device, sizes[1:] if sizes[0] == 1 else sizes, mesh_dim_names=names[sizes[0] == 1 :])
        head: Any = model.head
        owner = _owner(model, head.weight) if head is not None and head.tied else None
        for block in (*model.blocks, *model.beyond):
            fully_shard(block, mesh=mesh, reshard_after_forward=zero == 3)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        if owner is not None:  # FSDP puts other tensors in a parameter's place; its own hook, which does, comes first
            where, name = owner
            model.register_forward_pre_hook(lambda *_: head.share(where._parameters[name]))
        # That of the whole stage first.
        self._groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for group in self._groups:
            group.set_gradient_divide_factor(1.0)  # sums: the loss is divided by what all ranks scored
            group.set_force_sum_reduction_for_comms(True)
        super().__init__(model, *args, **options)
        self._last = self.settings.accumulation // ranks.size - 1

    def evaluate(self, batches: Iterable[Batch]) -> MeanLoss:
        """See `Engine.evaluate`: with all weights here, as ranks may have other numbers of batches."""
        self._gather()
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
        """See `Engine.settle`: from then on every rank has all weights."""
        super().settle()
        self._gather()

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

    def _gather(self) -> None:
        """Let the modules hold all weights, and go on doing so after a pass."""
        for group in self._groups:
            group.set_reshard_after_forward(False, recurse=False)
            group.unshard()

    def _before_backward(self, number: int) -> None:
        if self._zero == 1:
            for group in self._groups:
                group.set_requires_gradient_sync(number == self._last, recurse=False)

    def _reducer_of(self, parameters: list[nn.Parameter]) -> Reducer:
        return _Divided()  # FSDP's backward passes do it

    def _whole(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        whole = tensor.full_tensor()
        return whole.cpu() if self.ranks.main else whole.new_empty(0)

    def _slice(self, whole: Tensor, p: Tensor) -> Tensor:
        assert isinstance(p, DTensor)
        if whole.shape != p.shape:  # a count of steps
            return whole.to(self.device)
        shape, begin = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        local = whole[tuple(slice(at, at + length) for at, length in zip(begin, shape, strict=True))]
        return DTensor.from_local(
            local.to(self.device).contiguous(), p.device_mesh, p.placements, run_check=False,
            shape=p.shape, stride=p.stride(),
        )  # fmt: skip

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        norm = super()._norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _owner(model: StageModel, weight: Tensor) -> tuple[nn.Module, str] | None:
    """The module that has a parameter, and its name there; None: none has."""
    places = ((module, name) for module in model.modules() for name in module._parameters)
    return next(((module, name) for module, name in places if module._parameters[name] is weight), None)


class _Divided:
    def add(self) -> None: ...

    def finish(self) -> None: ...
