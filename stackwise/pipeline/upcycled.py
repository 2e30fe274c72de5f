"""A mixture of experts that begins as dense models: of one (sparse upcycling, arXiv 2212.05055), or of several.

Several, each trained on a cluster of the data, whose feed-forwards become the experts, are the way of MoE-DisCo (arXiv
2601.06857); everything else is their mean here. No torch is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stackwise.config.kinds import FeedForward
from stackwise.data.tokenizer import Tokenizer
from stackwise.errors import UsageError
from stackwise.identity import content_id
from stackwise.pipeline.job import Source
from stackwise.pipeline.schedule import block_number
from stackwise.pretrained.families import BLOCK

if TYPE_CHECKING:
    from stackwise.pipeline.initial import Weights


class Upcycled:
    """Dense models as one with experts.

    Args:
        models: The models, alike but for their values.
        ffn: The feed-forward that takes the place of theirs.
        seed: What is in no dense model, a router, is drawn from it.

    Raises:
        UsageError: They are not alike, or the feed-forward cannot begin as theirs.
    """

    def __init__(self, models: Sequence[Weights], ffn: FeedForward, seed: int) -> None:
        first = models[0]
        for number, other in enumerate(models[1:]):
            if other.model.specification() != first.model.specification():
                raise UsageError(f"init.experts: model {number} is not of the shape of init.weights: take runs alike")
            if _tokens(other) != _tokens(first):
                raise UsageError(
                    f"init.experts: model {number} has another tokenizer than init.weights: take runs alike"
                )
        dense = first.model
        self.model = dense.model_copy(update={"ffn": ffn, "d_ff": dense.ffn_width})
        for block in range(dense.n_blocks):
            mine = self.model.at(block)
            fault = next(mine.ffn.upcycling_faults(mine, dense.at(block), len(models)), None)
            if fault is not None:
                raise UsageError(f"init.experts: block {block}: {fault}")
        self._models, self._seed = models, seed
        self.tokenizer_json, self.objective, self.notes = first.tokenizer_json, first.objective, first.notes

    def source(self, part: str, *, hashed: bool = True) -> Source:
        """See `Weights.source`."""
        sources = tuple(model.source(part, hashed=hashed) for model in self._models)
        changed = part.startswith(BLOCK) and self.model.at(block_number(part)).ffn.upcycles
        if any(source.path is None for source in sources):
            return Source()
        if not changed and len(sources) == 1:
            return sources[0]
        digests = [source.digest for source in sources]
        digest = content_id("upcycled", [*([str(self._seed)] if changed else []), *digests]) if hashed else None
        return dataclasses.replace(sources[0], digest=digest, recipe="", names=None, upcycled=sources)


def _tokens(weights: Weights) -> str | None:
    path: Path | None = weights.tokenizer_json
    return None if path is None else Tokenizer.load(path).id
