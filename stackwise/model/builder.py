"""A rack grown stack by stack: appended above or prepended below, each stack in a precision of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypedDict, Unpack

import torch
from torch import nn

from stackwise.config import ModelConfig, StackWiseConfig
from stackwise.config.model import ArchitectureConfig
from stackwise.config.precision import adapter_sizes, trunk_adapters, weight_format
from stackwise.config.training import Quantization
from stackwise.errors import NotFound, UsageError
from stackwise.model.block import Stack
from stackwise.model.build import build_block, build_front, build_head
from stackwise.model.projections import adapter_parameters, add_adapters, merge_adapters, quantize
from stackwise.model.rack import Rack

PRECISIONS = {
    "full": torch.float32,
    "fp32": torch.float32,
    "half": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "fp8": torch.float32,
    "nvfp4": torch.float32,
    "fp4": torch.float32,
    "qlora": torch.float32,
}
"""Names of a stack's precision and the dtype that its weights train in.

fp8 and nvfp4 (fp4) train float32 weights that the forward pass sees in that format; a qlora stack's weights are packed
as nf4, and its adapters train.
"""


def stack_dtype(precision: str) -> torch.dtype:
    """The dtype that a stack of this precision trains in.

    Raises:
        UsageError: There is no such precision.
    """
    if Quantization.named(precision):
        return torch.float32
    if precision not in PRECISIONS:
        raise UsageError(f"stack precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def create_stack_from_config(
    stack_id: int,
    n_blocks: int | None,
    config: StackWiseConfig,
    *,
    precision: str = "full",
    first_block: int | None = None,
    device: torch.device | str | None = None,
) -> Stack:
    """A stack with fresh seeded weights; with adapters where `training.progressive.qlora_enabled`, and in qlora.

    Args:
        stack_id: Its name among the stacks, and its place in the order of making.
        n_blocks: Blocks in it; None: `model.architecture.blocks_per_stack`.
        config: The whole configuration.
        precision: A key of `PRECISIONS`.
        first_block: Index of its first block, which its fresh weights follow from; None: stack_id times n_blocks.
        device: Where it lives.

    Raises:
        UsageError: A precision that cannot be, no blocks, an adapter rank above a matrix's.
    """
    n_blocks = config.model.architecture.blocks_per_stack if n_blocks is None else n_blocks
    if n_blocks < 1:
        raise UsageError(f"a stack of {n_blocks} blocks: it takes at least one")
    first = stack_id * n_blocks if first_block is None else first_block
    dtype = stack_dtype(precision)
    blocks = [build_block(config.model, i, config.seed, device, dtype) for i in range(first, first + n_blocks)]
    stack = Stack(blocks, stack_id)
    progressive, frozen = config.training.progressive, precision == "qlora"
    if form := weight_format(precision):
        quantize(stack, form, pack=frozen)
    if frozen:
        stack.requires_grad_(False)
    if progressive.qlora_enabled or frozen:
        limit = progressive.max_stacks or config.model.architecture.n_stacks or stack_id + 1
        rank, alpha = adapter_sizes(progressive, stack_id, limit)
        add_adapters(stack, rank, alpha, config.seed, f"stack.{stack_id}")
    return stack


class PlainSizes(TypedDict, total=False):
    """What a rack is built from without a configuration, or in place of what that says; all None where not given."""

    vocab_size: int | None
    """Token ids."""
    d_model: int | None
    d_ff: int | None
    """Width inside the feed-forward."""
    n_heads: int | None
    seed: int | None
    """Of the fresh weights."""
    max_stacks: int | None
    """Most stacks: any number, if the configuration says nothing either."""


class ProgressiveRackBuilder:
    """Builds a rack by adding stacks, below or above those that are there.

    Either a whole configuration, or the sizes alone as keywords.

    Args:
        config: Everything follows from it: the model, the seed, adapters, `training.progressive.max_stacks`.
        building_mode: What `add_stack` does: "append" puts the new stack above, "prepend" below. None: the
            configuration's.
        default_precision: Precision of a stack where none is given.
        device: Where the parts live.
        sizes: See `PlainSizes`.

    Raises:
        UsageError: No vocabulary size, or a precision or mode that cannot be.
    """

    def __init__(
        self,
        config: StackWiseConfig | None = None,
        building_mode: Literal["append", "prepend"] | None = None,
        default_precision: str = "full",
        *,
        device: torch.device | str | None = None,
        **sizes: Unpack[PlainSizes],
    ) -> None:
        if unknown := sizes.keys() - PlainSizes.__annotations__.keys():  # a typing error would otherwise change nothing
            raise TypeError(f"unexpected keywords: {', '.join(sorted(unknown))}")
        seed, max_stacks = sizes.get("seed"), sizes.get("max_stacks")
        widths = {name: value for name in ("d_model", "d_ff", "n_heads") if (value := sizes.get(name)) is not None}
        if config is None:
            model = ModelConfig(architecture=ArchitectureConfig(n_stacks=max_stacks or 12), **widths)  # type: ignore[arg-type]
            config = StackWiseConfig(model=model, seed=seed or 0)
        else:
            config = config.model_copy(deep=True)
            for name, value in widths.items():
                setattr(config.model, name, value)
            if seed is not None:
                config.seed = seed
        self.config = config
        self.max_stacks = max_stacks or config.training.progressive.max_stacks
        if config.model.architecture.n_stacks is None:  # residual weights are scaled by the depth of the grown rack
            config.model.architecture.n_stacks = self.max_stacks
        size = sizes.get("vocab_size") or config.model.vocab_size
        if size is None:
            raise UsageError("the vocabulary's size is not known", hint="pass vocab_size, or set model.vocab_size")
        self.vocab_size: int = size
        self.building_mode = building_mode or config.training.progressive.building_mode
        if self.building_mode not in ("append", "prepend"):
            raise UsageError(f"building_mode {self.building_mode!r} is neither append nor prepend")
        stack_dtype(default_precision)
        self.default_precision, self.device = default_precision, device
        self.stacks: list[Stack] = []
        self._made = self._blocks_made = 0

    def append_stack(self, n_blocks: int | None = None, precision: str | None = None) -> Stack:
        """Add a stack above those that are there; None takes the configured number of blocks, the default precision.

        Raises:
            UsageError: More stacks than `max_stacks`, a precision that cannot be.
        """
        stack = self._make(n_blocks, precision)
        self.stacks.append(stack)
        return stack

    def prepend_stack(self, n_blocks: int | None = None, precision: str | None = None) -> Stack:
        """Add a stack below those that are there; otherwise as `append_stack`.

        Raises:
            UsageError: As `append_stack`; or settings of single blocks, whose places each stack below would move.
        """
        model = self.config.model
        if any(model.at(block) is not model for block in (0, 1)):
            key = "first_norm" if model.first_norm != model.at(1).first_norm else "attention.window_blocks"
            raise UsageError(
                f"model.{key} counts from the lowest block, which prepending moves",
                hint="leave it out, or append stacks",
            )
        stack = self._make(n_blocks, precision)
        self.stacks.insert(0, stack)
        return stack

    def add_stack(self, n_blocks: int | None = None, precision: str | None = None) -> Stack:
        """Add a stack where `building_mode` says."""
        add = self.append_stack if self.building_mode == "append" else self.prepend_stack
        return add(n_blocks, precision)

    def _make(self, n_blocks: int | None, precision: str | None) -> Stack:
        if self.max_stacks is not None and len(self.stacks) >= self.max_stacks:
            raise UsageError(f"the rack has its {self.max_stacks} stacks", hint="raise training.progressive.max_stacks")
        progressive, seed = self.config.training.progressive, self.config.seed
        if progressive.progressive_qlora:
            rank, alpha = progressive.progressive_qlora_rank, progressive.progressive_qlora_alpha
            for below in self.stacks:
                part = f"stack.{below.stack_id}"
                add_adapters(below, rank, alpha, seed, part, trunk_adapters(self._made))
        stack = create_stack_from_config(
            self._made,
            n_blocks,
            self.config,
            precision=precision or self.default_precision,
            first_block=self._blocks_made,
            device=self.device,
        )
        self._made += 1
        self._blocks_made += len(stack)
        return stack

    def build_rack(self, seq_len: int | None = None) -> Rack:
        """Front, the stacks so far, and head. The rack shares the stacks; front and head are fresh.

        Args:
            seq_len: Longest sample; None: `training.seq_len`.

        Raises:
            UsageError: No stacks yet.
        """
        if not self.stacks:
            raise UsageError("a rack needs a stack", hint="call append_stack or prepend_stack first")
        model, seed = self.config.model, self.config.seed
        length = seq_len or self.config.training.seq_len
        front = build_front(model, self.vocab_size, seed, length, self.device)
        shared = front.embedding.weight if model.tie_embeddings else None
        return Rack(front, self.stacks, build_head(model, self.vocab_size, seed, shared, self.device))

    def freeze_trunk(self, trunk_indices: Iterable[int], precision: str | None = None) -> None:
        """Freeze stacks, adapters included; weights that are in a narrow format are packed, for good.

        Args:
            trunk_indices: Places of the stacks in the rack, 0 the lowest.
            precision: Pack plain weights too: fp8, nvfp4 (fp4) or qlora (nf4).

        Raises:
            NotFound: There is no such stack.
            UsageError: A precision that is no narrow format, or another than a stack's own.
        """
        for stack in self._chosen(trunk_indices):
            self._pack(stack, precision)
            stack.requires_grad_(False)

    def freeze_all_but_qlora(self, trunk_indices: Iterable[int], precision: str | None = None) -> None:
        """Freeze stacks as `freeze_trunk` does, but for their adapters, which train.

        Raises:
            NotFound: There is no such stack.
            UsageError: A stack without adapters, or a precision as for `freeze_trunk`.
        """
        stacks = self._chosen(trunk_indices)
        for stack in stacks:
            if not adapter_parameters(stack):
                raise UsageError(
                    f"stack {self.stacks.index(stack)} has no adapters to train",
                    hint="set training.progressive.qlora_enabled before the stack is made",
                )
        for stack in stacks:
            self._pack(stack, precision)
            stack.requires_grad_(False)
            for parameter in adapter_parameters(stack):
                parameter.requires_grad_(True)

    def _pack(self, stack: Stack, precision: str | None) -> None:
        form = None if precision is None else weight_format(precision)
        if precision is not None and form is None:
            raise UsageError(f"a trunk cannot be packed as {precision}", hint="choose fp8, nvfp4 or qlora")
        quantize(stack, form, pack=True)

    def merge(self) -> None:
        """Fold the adapters of every stack into its weights."""
        for stack in self.stacks:
            merge_adapters(stack)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters of the stacks that are not frozen."""
        return [p for stack in self.stacks for p in stack.parameters() if p.requires_grad]

    def _chosen(self, indices: Iterable[int]) -> list[Stack]:
        indices = list(indices)
        for index in indices:
            if not 0 <= index < len(self.stacks):
                raise NotFound(f"there is no stack {index}: the rack has {len(self.stacks)}")
        return [self.stacks[index] for index in indices]
