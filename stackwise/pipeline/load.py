"""A run's committed weights, part by part and stage by stage: what evaluation, generation and export start from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.errors import UsageError
from stackwise.evaluation import StageModules
from stackwise.model import Front, Head
from stackwise.objectives import Objective
from stackwise.pipeline.build import load_part, make_block, make_front, make_head, objective_of
from stackwise.pipeline.job import Source
from stackwise.pipeline.plan import Versions, add_versions
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import FRONT, HEAD, Stage, block_part, schedule
from stackwise.store import ActivationStore
from stackwise.training.stage import NARROW


@dataclass(frozen=True)
class CommittedRack:
    """The weights of the stages that a run has committed, from the bottom up without a gap.

    Args:
        config: The run's configuration.
        data: Its prepared data.
        vocab_size: Ids that the model knows.
        mask_token: The id shown at masked positions.
        stages: The committed stages.
        parts: The newest weights of each part.
        heads: Each stage's own head.
        device: Where modules are put.
    """

    config: StackWiseConfig
    data: PreparedData
    vocab_size: int
    mask_token: int
    stages: list[Stage]
    parts: Versions
    heads: list[Source]
    device: torch.device

    @property
    def objective(self) -> Objective:
        """The objective that the stages were trained with."""
        return objective_of(self.config, self.mask_token, self.vocab_size)

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype that matrices are multiplied in; None: float32."""
        return NARROW.get(self.config.precision)

    def front(self) -> Front:
        """The front."""
        return make_front(self.config, self.vocab_size, self.parts[FRONT]).to(self.device).eval()

    def head(self, depth: int) -> Head:
        """The head that stage `depth` trained with."""
        embedding = None
        if self.config.model.tie_embeddings:
            tensors = load_part(self.parts[FRONT])
            embedding = None if tensors is None else tensors["embedding.weight"]
        head = make_head(self.config, self.vocab_size, self.heads[depth], embedding, own=False)
        return head.to(self.device).eval()

    def modules(self) -> Iterator[StageModules]:
        """Each stage's new blocks with its head, loaded when asked for: one stage is resident at a time."""
        for stage, (first, last) in zip(self.stages, self.config.partition, strict=False):
            blocks = [
                make_block(self.config, index, self.parts[block_part(index)]).to(self.device).eval()
                for index in range(first, last + 1)
            ]
            yield StageModules(stage.depth, blocks, self.head(stage.depth), self.objective.causal)


def load_rack(run: RunDirectory, device: torch.device, *, whole: bool = True) -> CommittedRack:
    """What a run has committed.

    Args:
        run: The run.
        device: Where modules are put.
        whole: Refuse a run whose last stage is not committed.

    Raises:
        NotFound: There is no run here.
        UsageError: No stage, or (with `whole`) not every stage is committed.
        DamageError: A committed file is not what it was.
    """
    config, manifest = run.config(), run.manifest()
    config.device = device.type
    stages = schedule(config)
    again = f"stackwise run --run {run.path} finishes it"
    done: list[dict[str, Any]] = []
    for entry in manifest["stages"]:
        if entry["state"] != "done":
            break
        done.append(entry)
    if not done or (whole and len(done) < len(stages)):
        raise UsageError(f"{run.path}: {len(done)} of {len(stages)} stages are committed", hint=again)
    parts: Versions = {}
    heads = []
    with ActivationStore(run.store_path(config), create=False) as store:
        for entry in done:
            committed = store.stage(entry["recipe"])
            if committed is None:
                raise UsageError(f"{run.path}: stage {entry['depth']} is no longer in the store", hint=again)
            add_versions(parts, committed)
            heads.append(parts[HEAD])
    vocabulary = manifest["vocabulary"]
    return CommittedRack(
        config,
        PreparedData.open(Path(manifest["data"]["directory"])),
        vocabulary["size"],
        vocabulary["mask"],
        stages[: len(done)],
        parts,
        heads,
        device,
    )
