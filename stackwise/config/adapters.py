"""Adapters that train beside frozen weights: their settings, and how large they are on a block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stackwise.config.fields import Count, Positive, Probability, Section, Size, Text

if TYPE_CHECKING:
    from stackwise.config.model import ModelConfig
    from stackwise.config.schema import Settings

Fault = tuple[str, str]
"""A dotted key, and what is wrong with it."""

LORA = "lora"
"""The name of the adapters of `training.adapters` on a layer."""

HELD = {"full": "full", "bf16": "held-bf16", "fp8": "fp8", "nvfp4": "nvfp4", "nf4": "qlora"}
"""What frozen weights are held in (`training.adapters.precision`), as precisions of blocks are called."""


@dataclass(frozen=True)
class AdapterSize:
    """Some adapters on the layers of a block.

    Args:
        name: Their name; a layer may have several.
        rank: Their rank.
        alpha: What their scale is made of: see `scale`.
        targets: The layers that have them; empty: every one that can. "q" and "attention.q" are that layer, "attention"
            all layers of that part of the block.
        rslora: Scaled by alpha / sqrt(rank) (arXiv 2312.03732), not alpha / rank (arXiv 2106.09685).
        dropout: Share of what enters them that is dropped in training.
    """

    name: str
    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """What the product of both matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def covers(self, layer: str) -> bool:
        """Whether a layer, by its path in the block, has them."""
        return not self.targets or any(is_target(target, layer) for target in self.targets)

    def plain(self) -> dict[str, Any]:
        """As JSON-ready data; what is at its default is left out."""
        values = dataclasses.asdict(self)
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING}
        return {key: value for key, value in values.items() if key not in defaults or value != defaults[key]}


def is_target(target: str, layer: str) -> bool:
    """Whether a layer, by its path in the block, is one that a target names."""
    return layer == target or layer.endswith(f".{target}") or layer.startswith(f"{target}.")


class AdaptersConfig(Section):
    """Low-rank adapters that train beside the frozen weights of a pretrained model (LoRA, arXiv 2106.09685)."""

    rank: Size = Field(16, description="rank of each adapter")
    alpha: Positive = Field(32.0, description="what an adapter adds is scaled by alpha / rank")
    targets: Annotated[list[Text], Field(max_length=256)] = Field(
        default_factory=list,
        description="layers of a block that have one, by our names or those of the checkpoint ([q, v], [attention], "
        "[q_proj]); empty: every one",
    )
    above: Count = Field(
        0,
        description="blocks below the lowest that has adapters: what leaves them is computed once, stored, and read in "
        "every epoch",
    )
    dropout: Probability = Field(0.0, description="share of what enters an adapter that is dropped in training")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    precision: Literal["full", "bf16", "fp8", "nvfp4", "nf4"] = Field(
        "full", description="what the blocks' frozen weights are held in: full, bf16, fp8, nvfp4, nf4 (QLoRA)"
    )

    @property
    def size(self) -> AdapterSize:
        """What each block gets."""
        return AdapterSize(LORA, self.rank, self.alpha, tuple(self.targets), self.rslora, self.dropout)


def layers(model: ModelConfig, block: int = 0) -> dict[str, tuple[int, int]]:
    """The layers of a block that can have adapters, by path: how many numbers leave and enter each."""
    settings = model.at(block)
    return {
        f"{place}.{name}": (matrix.outputs, matrix.inputs)
        for place, kind in (("attention", settings.attention), ("ffn", settings.ffn))
        for name, matrix in kind.matrices(settings).items()
        if matrix.narrow
    }


def adapter_faults(config: Settings) -> Iterator[Fault]:
    """What `training.adapters` cannot have beside other settings, whatever the model is."""
    adapters, training = config.training.adapters, config.training
    if adapters is None:
        return
    key = "training.adapters"
    if config.init.weights is None:
        yield key, "adapters train beside the weights of a pretrained model: set init.weights"
    if training.progressive.enabled:
        text = "progressive training has adapters of its own (training.progressive.qlora_*): choose one of the two"
        yield key, text
    elif training.mode.apart:
        yield key, f"the frozen blocks of a model stand on each other, and {training.mode.name} takes them apart"
    if training.growth:
        yield "training.growth", "blocks that are new with an expansion would stay frozen: leave it out"
    if training.plan.finds_size:
        yield "training.mode.block_size", "auto tries out fresh racks, and adapters are for a model: give a number"
    if training.fusion.head_alone:
        yield "training.fusion", f"{training.fusion.name} trains the head alone, which is frozen: nothing trains"
    if training.lookahead.name == "auxiliary":
        yield "training.lookahead", "auxiliary has fresh blocks, and nothing but adapters trains: choose another"
    for depth in range(config.n_stages):
        if config.stage_training(depth).quantization is not None:
            text = "frozen weights are not trained for integers: training.adapters.precision packs them"
            yield f"stages.{depth}.training.quantization" if depth in config.stages else "training.quantization", text
            break
    for depth in range(config.n_stages):
        if config.stage_training(depth).products != "full":
            text = "frozen weights are held by training.adapters.precision: leave products out"
            yield f"stages.{depth}.training.products" if depth in config.stages else "training.products", text
            break
    for depth, overrides in config.stages.items():
        if overrides.precision is not None:
            text = "the blocks are frozen beside adapters: training.adapters.precision says how all of them are held"
            yield f"stages.{depth}.precision", text
            break


def size_faults(config: Settings) -> Iterator[Fault]:
    """What adapters the model cannot have; asked where the model is known."""
    adapters, model = config.training.adapters, config.model
    if adapters is None:
        return
    key, last = "training.adapters", model.n_blocks - 1
    if adapters.above > last:
        text = f"{adapters.above}, and the highest of {model.n_blocks} blocks is block {last}: nothing would train"
        yield f"{key}.above", text
        return
    known = layers(model, last)
    for target in adapters.targets:
        if not any(is_target(target, layer) for layer in known):
            yield f"{key}.targets", f"{target} is no layer of a block that can have adapters: {', '.join(known)} are"
            return
    low = {layer: min(sides) for layer, sides in known.items() if adapters.size.covers(layer)}
    narrowest = min(low, key=low.__getitem__, default=None)
    if narrowest is not None and adapters.rank > low[narrowest]:
        yield f"{key}.rank", f"{adapters.rank} is above the rank of {narrowest}: at most {low[narrowest]}"
