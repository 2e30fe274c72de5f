"""Generation called in one line: a model of a front and stages, and how, by keyword."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stackwise import inference
from stackwise.inference import Continuing, Filling, LoadedModel, Stages


def fill(front: nn.Module, stages: Stages, ids: Tensor, holes: Tensor, **settings: Any) -> Tensor:
    of_model = {name: settings.pop(name) for name in ("direction", "autocast") if name in settings}
    of_call = {name: settings.pop(name) for name in ("segments", "callback") if name in settings}
    return inference.fill(LoadedModel(front, stages, **of_model), ids, holes, Filling(**settings), **of_call)


def sample_causal(front: nn.Module, stages: Stages, prompt: Tensor, count: int, **settings: Any) -> Tensor:
    of_call = {"callback": settings.pop("callback")} if "callback" in settings else {}
    autocast = settings.pop("autocast", None)
    model = LoadedModel(front, stages, True, autocast)
    return inference.sample_causal(model, prompt, count, Continuing(**settings), **of_call)


def logits_at(front: nn.Module, stages: Stages, ids: Tensor, index: Tensor, *, causal: Any, **settings: Any) -> Tensor:
    return LoadedModel(front, stages, causal, settings.pop("autocast", None)).logits_at(ids, index, **settings)
