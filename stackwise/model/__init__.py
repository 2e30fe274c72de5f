"""The model: blocks, stacks, racks, their front and head. Plain `nn.Module`s, each usable by itself."""

from stackwise.model.attention import Attention, Cache, Caches
from stackwise.model.block import Block, Stack, evaluating
from stackwise.model.build import build_block, build_front, build_head, build_rack, part_digest
from stackwise.model.builder import PRECISIONS, ProgressiveRackBuilder, create_stack_from_config, stack_dtype
from stackwise.model.projections import AdaptedLinear, Adapter, add_adapters, merge_adapters
from stackwise.model.rack import Front, Head, Rack, StageModules, enter, stages_of

__all__ = [
    "PRECISIONS",
    "AdaptedLinear",
    "Adapter",
    "Attention",
    "Block",
    "Cache",
    "Caches",
    "Front",
    "Head",
    "ProgressiveRackBuilder",
    "Rack",
    "Stack",
    "StageModules",
    "add_adapters",
    "build_block",
    "build_front",
    "build_head",
    "build_rack",
    "create_stack_from_config",
    "enter",
    "evaluating",
    "merge_adapters",
    "part_digest",
    "stack_dtype",
    "stages_of",
]
