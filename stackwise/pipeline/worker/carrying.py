"""What a stage takes from one window to the next beside its weights: its optimizer, its loss scale, its divergences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from stackwise.pipeline.build import load_part
from stackwise.pipeline.job import StageJob
from stackwise.pipeline.schedule import ADAPTER, STATE, Stage
from stackwise.training.engine import WEIGHT
from stackwise.training.lazily import Lazily
from stackwise.training.trainer import Carried, Trainer

State = Callable[[], Mapping[str, Tensor]]
"""Makes the tensors of a part, as they are committed."""


def take_up(job: StageJob, trainer: Trainer) -> None:
    """Let a trainer that has taken no step go on where its stage's window before ended.

    Raises:
        DamageError: A state's file is missing, broken or not what was committed.
    """
    if not job.stage.states_in:
        return
    names = {_part(job.stage, name): name for name in job.stage.states_in}

    def state(part: str) -> dict[str, Tensor]:
        source = job.initial[names[part]]
        tensors = load_part(source) or {}
        trained = [own for own in job.stage.trains if own.removeprefix(ADAPTER) == part]
        if any(job.initial[own].recipe != source.recipe for own in trained):
            # Another stage has trained it since: what lay under the mean that was committed is of the past.
            tensors = {key: value for key, value in tensors.items() if not key.startswith(WEIGHT)}
        return tensors

    own = state("")
    trainer.carried = Carried.from_state(own)
    trainer.engine.take_up(Lazily([part for part in names if part], state, own))


def left(stage: Stage, trainer: Trainer) -> dict[str, State]:
    """The states that a stage commits for its next window, by name, once its engine has settled."""
    if not stage.states_out:
        return {}
    carried = trainer.engine.carried()
    own = {**carried[""], **trainer.carry().state()}

    def state(part: str) -> Mapping[str, Tensor]:
        return carried[part] if part else own

    return {name: partial(state, _part(stage, name)) for name in stage.states_out}


def _part(stage: Stage, state: str) -> str:
    """The part that a state is of; an empty name: of the trainer."""
    return state.removeprefix(f"{STATE}{stage.depth}").removeprefix(".")
