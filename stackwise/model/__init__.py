"""The model: blocks, stacks, racks, their front and head. Plain `nn.Module`s, each usable by itself."""

from stackwise.model.attention import Attention
from stackwise.model.block import Block, Stack
from stackwise.model.build import build_block, build_front, build_head, build_rack
from stackwise.model.builder import PRECISIONS, ProgressiveRackBuilder, create_stack_from_config, stack_dtype
from stackwise.model.cache import Cache, Caches
from stackwise.model.digest import part_digest
from stackwise.model.ends import Front, Head
from stackwise.model.lora import AdaptedLinear, Adapter, add_adapters, merge_adapters
from stackwise.model.mode import evaluating
from stackwise.model.rack import Rack, StageModules, enter, stages_of

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
