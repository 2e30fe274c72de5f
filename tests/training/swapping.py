"""A small rack whose parts can be had one by one, and the plain training of the whole that swapping is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stackwise.batch import Batch
from stackwise.config import ModelConfig, StageTraining
from stackwise.config.model import ArchitectureConfig
from stackwise.identity import derive_seed
from stackwise.model import Front, build_block, build_front, build_head
from stackwise.objectives import MaskDiffusionObjective
from stackwise.training.optim import learning_rate, make_optimizer
from stackwise.training.ranks import Ranks, SingleProcess
from stackwise.training.sharding import without_values
from stackwise.training.stage import StageModel
from stackwise.training.swap import SwappedEngine
from stackwise.training.swap_parts import SwapSpace

VOCAB, S, MASK = 24, 12, 23
CPU = torch.device("cpu")
SEED = (7, 0)


class RackParts:
    """The parts of a rack with fresh weights.

    Args:
        depth: Blocks.
        tied: Whether the head projects with the front's embedding.
        trains: Those that train; None: all.
        tokens: Whether there is a front; otherwise a boundary enters.
        fixed_head: A head above a boundary that projects with a fixed embedding.
    """

    def __init__(
        self,
        depth: int,
        *,
        tied: bool = True,
        dropout: float = 0.1,
        width: int = 16,
        precision: str = "fp32",
        dtype: torch.dtype = torch.float32,
        trains: Sequence[str] | None = None,
        tokens: bool = True,
        fixed_head: bool = False,
        vocab: int = VOCAB,
        ffn: Mapping[str, object] | str = "swiglu",
    ) -> None:
        self.config = ModelConfig(
            ffn=ffn,  # type: ignore[arg-type]
            vocab_size=vocab,
            d_model=width,
            n_heads=2,
            dropout=dropout,
            tie_embeddings=tied,
            architecture=ArchitectureConfig(n_stacks=depth, blocks_per_stack=1),
        )
        self.names = [*(["front"] if tokens else []), *(f"block.{i}" for i in range(depth)), "head"]
        self.order = self.names
        self.trains = list(self.names) if trains is None else list(trains)
        self.tied, self.fixed_head, self.precision, self.dtype, self.vocab = (
            tied and tokens,
            fixed_head,
            precision,
            dtype,
            vocab,
        )

    def pieces(self, name: str) -> Sequence[str]:
        model = self.config.at(int(name.partition(".")[2])) if name.startswith("block.") else None
        return [] if model is None else [f"ffn.{path}" for path in model.ffn.pieces(model)]

    def piece(self, name: str, path: str) -> Mapping[str, Tensor]:
        module = self.make(name, None).get_submodule(path)
        return {f"{path}.{key}": p.detach() for key, p in module.named_parameters()}

    def make(
        self,
        name: str,
        trained: Mapping[str, Tensor] | None,
        embedding_VD: Tensor | None = None,
        *,
        whole: bool = True,
    ) -> nn.Module:
        made: nn.Module
        if name == "front":
            made = build_front(self.config, self.vocab, 0, S)
        elif name == "head":
            if embedding_VD is None and self.fixed_head:
                embedding_VD = build_front(self.config, self.vocab, 0, S).embedding.weight.detach().to(self.dtype)
            made = build_head(self.config, self.vocab, 0, embedding_VD)
        else:
            made = build_block(self.config, int(name.partition(".")[2]), 0)
        made.to(self.dtype)
        with torch.no_grad():
            for key, value in (trained or {}).items():
                made.get_parameter(key).copy_(value)
        for path in () if whole else self.pieces(name):
            made.get_submodule(path).to("meta")
        return made.requires_grad_(name in self.trains)

    def outline(self, name: str) -> nn.Module:
        """See `DividedParts`."""
        with torch.device("meta"):
            embedding = torch.empty(self.vocab, self.config.d_model) if name == "head" and self.tied else None
        return without_values(self.make(name, None, embedding))

    def model(self, parts: Mapping[str, nn.Module]) -> StageModel:
        blocks = [module for name, module in parts.items() if name.startswith("block.")]
        made = StageModel(parts.get("front"), blocks, parts.get("head"), MaskDiffusionObjective(MASK), self.precision)
        if self.dtype == torch.float64:
            made.stream_dtype = torch.float64
        return made.train()

    def whole(self) -> StageModel:
        """All of them at once."""
        parts = {name: self.make(name, None) for name in self.names if name != "head" or not self.tied}
        if self.tied:
            front = parts["front"]
            assert isinstance(front, Front)
            parts["head"] = self.make("head", None, front.embedding.weight)
            front.requires_grad_("front" in self.trains)
        return self.model(parts)


def batch(number: int, rows: int = 4, *, width: int | None = None, seq_len: int = S, vocab: int = VOCAB) -> Batch:
    """Some rows that follow from a number; with `width`, above a boundary."""
    draw = np.random.default_rng(number)
    x = None if width is None else torch.from_numpy(draw.normal(size=(rows, seq_len, width)).astype(np.float32))
    masks = draw.random((rows, seq_len)) < draw.uniform(0.2, 0.8)
    masks[:, 0] = True
    tokens = torch.from_numpy(draw.integers(0, vocab - 1, (rows, seq_len)))
    tensors = {"tokens": tokens, "masks": torch.from_numpy(masks)} | ({} if x is None else {"activations": x})
    return Batch(np.arange(rows), np.zeros((rows, 16), np.uint8), tensors)


def microbatches(step: int, accumulation: int, width: int | None = None) -> list[Batch]:
    """Those of a step."""
    return [batch(step * accumulation + number, width=width) for number in range(accumulation)]


def settings(**values: object) -> StageTraining:
    """How the tests train."""
    return StageTraining.model_validate({"learning_rate": 1e-2, "accumulation": 3, "grad_clip": 0.5, **values})


def engine(
    parts: RackParts,
    directory: Path,
    *,
    groups: int = 99,
    memory: int = 0,
    pieces: int | None = None,
    passes: int = 0,
    ahead: bool = True,
    kept: int = 0,
    direct: bool = False,
    ranks: Ranks | None = None,
    **values: object,
) -> SwappedEngine:
    """A swapped engine that complains of nothing."""

    def warn(text: str) -> None:
        raise AssertionError(text)

    space = SwapSpace(
        directory, groups, memory, warn, pieces, passes, ahead, kept, ranks or SingleProcess(), direct=direct
    )
    return SwappedEngine(parts, settings(**values), space, seed=SEED, device=CPU)


def part_of(name: str) -> str:
    """The part that a parameter of a whole model is in."""
    part, _, rest = name.partition(".")
    return f"block.{rest.partition('.')[0]}" if part == "blocks" else part


class Plain:
    """Plain PyTorch training of a whole rack, by hand: accumulate over microbatches, clip by the global norm, AdamW."""

    def __init__(self, parts: RackParts, **values: object) -> None:
        self.model, self.settings = parts.whole(), settings(**values)
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.optimizer = make_optimizer([(part_of(name), p) for name, p in named.items()], self.settings)

    def gradients(self, batches: Sequence[Batch], step: int) -> float:
        """Leave the gradient of the mean loss over a step's microbatches on the parameters; the loss."""
        total, scored = torch.zeros(()), 0
        for number, one in enumerate(batches):
            torch.manual_seed(derive_seed(*SEED, step, number, "dropout"))
            with self.model.numerics(CPU):
                (term,) = self.model(one).values()
            (term.sum / one.tokens_BS.numel()).backward()
            total, scored = total + term.sum.detach(), scored + term.count
        for p in self.parameters:
            if p.grad is not None:
                p.grad.mul_(batches[-1].tokens_BS.numel() / scored)
        return float(total / scored)

    def step(self, batches: Sequence[Batch], step: int, steps: int) -> float:
        """One optimizer step; the loss."""
        loss = self.gradients(batches, step)
        if self.settings.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step, steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def weights(self, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """State dicts by part."""
        return state_dicts(self.model, names)


def state_dicts(model: StageModel, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Copies of the state dicts of a whole model's parts, by part."""
    blocks = iter(model.blocks)
    found = {}
    for name in names:
        module = {"front": model.front, "head": model.head}.get(name) or next(blocks)
        found[name] = {key: value.clone() for key, value in module.state_dict().items()}
    return found
