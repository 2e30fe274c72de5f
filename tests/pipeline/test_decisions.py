"""One walk of decisions: what a run, its dry run and a sweep agree on; and weights from outside the schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stackwise.config import StackWiseConfig
from stackwise.data import prepare
from stackwise.errors import StackWiseError
from stackwise.pipeline.decisions import decide, preview, traffic_of
from stackwise.pipeline.job import Source
from stackwise.pipeline.plan import Entry, Plan
from stackwise.pipeline.reasons import History
from stackwise.pipeline.recipe import recipe_id
from stackwise.pipeline.runner.workers import Worker
from stackwise.pretrained.families import TensorRef
from stackwise.store import ActivationStore
from tests.conftest import Micro, run


@pytest.fixture(scope="module")
def finished(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "run"
    run(micro(training__steps=5), directory)
    return directory


@pytest.fixture
def plan(micro: Micro, tmp_path: Path) -> Iterator[Plan]:
    with ActivationStore(tmp_path / "store") as store:
        yield planned(micro(training__steps=5, seed=7), store)


def planned(config: StackWiseConfig, store: ActivationStore, **values: Any) -> Plan:
    config.precision = "fp32"
    data, _ = prepare(config.data, model_vocab=config.model.vocab_size)
    return Plan(config, data, store, device="cpu", **values)


def trained(plan: Plan, log: Path) -> dict[str, str]:
    """The digests that the lowest stage commits, trained by a worker of its own."""
    decision = next(decide(plan))
    job = plan.job(
        decision.stage, decision.versions, checkpoints=log.parent / "c", train=True, entry=Entry(), writes=False
    )
    assert job.recipe_id == decision.id
    worker = Worker("cpu", log)
    try:
        list(worker.run(asdict(job)))
    finally:
        worker.close()
    committed = plan.committed(decision.id)
    assert committed is not None
    return dict(committed.record["parts"])


def test_the_same_walk_before_and_after(micro: Micro, finished: Path) -> None:
    with ActivationStore(finished / "store", create=False) as store:
        same = preview(planned(micro(training__steps=5), store))
        assert [decision.action for decision in same.decisions] == ["reuse", "reuse"]
        assert traffic_of(same.training).plain() == {"read": 0, "written": 0, "flops": 0}
        other = planned(micro(training__steps=6), store)
        decisions = preview(other).decisions
        assert [(decision.action, decision.settled) for decision in decisions] == [("train", True), ("train", False)]
        assert [recipe_id(decision.recipe) for decision in decisions] == [decision.id for decision in decisions]
        assert decisions == list(decide(other)), "nothing was carried out between"
        # Above what is to be trained, recipes are known by what will make the weights.
        again = preview(planned(micro(training__steps=6), store)).decisions
        assert [decision.id for decision in again] == [decision.id for decision in decisions]


def test_a_stage_begins_from_a_file_with_other_names(plan: Plan, finished: Path, tmp_path: Path) -> None:
    (committed,) = (finished / "store" / "stages").glob("*/block.0.safetensors")
    record_parts = {path.stem: path for path in committed.parent.glob("*.safetensors")}
    with ActivationStore(finished / "store", create=False) as store:
        stage = store.stage(committed.parent.name)
        assert stage is not None
        digests = stage.record["parts"]
    model: dict[str, Any] = {}
    names: dict[str, dict[str, TensorRef]] = {}
    for part in ("front", "block.0"):
        tensors = load_file(record_parts[part])
        names[part] = {name: TensorRef("model.safetensors", f"model.{part}/{name}") for name in tensors}
        model |= {names[part][name].name: tensor for name, tensor in tensors.items()}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save_file(model, elsewhere / "model.safetensors")
    with safe_open(elsewhere / "model.safetensors", "pt") as file:
        assert not {*file.keys()} & {*names["block.0"]}

    fresh = next(decide(plan))
    renamed = {part: Source(str(elsewhere), digests[part], names=names[part]) for part in names}
    plan.sources = renamed
    decision = next(decide(plan))
    assert {part: decision.recipe["initial"][part] for part in names} == {part: digests[part] for part in names}
    assert decision.recipe["initial"]["head"] is None
    assert decision.id != fresh.id
    by_names = trained(plan, tmp_path / "log")
    # The same weights from the files of their own: the same recipe, and it is committed by now.
    plan.sources = {part: Source(str(record_parts[part]), digests[part]) for part in names}
    again = next(decide(plan))
    assert (again.id, again.action) == (decision.id, "reuse")
    with ActivationStore(tmp_path / "other") as store:
        other = planned(plan.config, store, sources=plan.sources)
        assert trained(other, tmp_path / "log") == by_names


def test_settings_that_fit_only_together_are_causes_each(micro: Micro, plan: Plan) -> None:
    rising = {"training__mode": "independent", "training__steps": 5}
    earlier = micro(**rising, training__max_mask_fraction=0.5)
    stage = {"depth": 0, "window": 0, "recipe": "0" * 32, "state": "done"}
    now = planned(micro(**rising, training__min_mask_fraction=0.6, training__max_mask_fraction=0.9), plan.store)
    reason = History([stage], earlier).reason(now, now.stages[0], now.recipe(now.stages[0], {}))
    assert "training.min_mask_fraction: 0.15 → 0.6" in reason
    assert "training.max_mask_fraction: 0.5 → 0.9" in reason


def test_a_source_that_is_not_what_it_was_is_refused(plan: Plan, finished: Path, tmp_path: Path) -> None:
    (path,) = (finished / "store" / "stages").glob("*/block.0.safetensors")
    plan.sources = {"block.0": Source(str(path), "0" * 32)}
    with pytest.raises(StackWiseError, match=r"block\.0"):
        trained(plan, tmp_path / "log")
