"""Held-out losses, early ends, and steps that diverge: decided by what repeats, so a run that was cut ends the same."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.batch import Batch
from stackwise.config.choices import Skip
from stackwise.errors import StackWiseError
from stackwise.training import checkpoint
from stackwise.training.scaling import LossScale, judged
from stackwise.training.trainer import LEAST, Rollback, Trainer, Watch, anchor
from tests.conftest import raises_naming
from tests.training.test_trainer import Hooks, batch, fit, resident, save, trainer


def few(start: int = 0) -> Iterator[Batch]:
    """Four batches over and over, so that there is something to learn."""
    return itertools.islice(itertools.cycle([batch(number) for number in range(4)]), start, None)


class Saving(Hooks):
    """Keeps checkpoints of every step asked for; says what was evaluated, and what was saved by then."""

    def __init__(self, directory: Path, stop_at: int | None = None) -> None:
        super().__init__(stop_at)
        self.directory = directory
        self.evaluated: list[tuple[int, bool]] = []

    def save(self, *, wait: bool) -> None:
        assert self.trainer is not None
        assert self.directory is not None
        save(self.directory, self.trainer, keep=100)

    def evaluate(self) -> float:
        assert self.trainer is not None
        assert self.directory is not None
        step = self.trainer.step
        self.evaluated.append((step, (self.directory / f"step-{step:08d}").exists()))
        return super().evaluate()


def weights(one: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in resident(one).parameters.items()}


def same(a: Trainer, b: Trainer) -> bool:
    return all(torch.equal(p, weights(b)[name]) for name, p in weights(a).items())


def test_an_evaluation_never_comes_before_the_checkpoint_of_its_step(tmp_path: Path) -> None:
    one, hooks = trainer(steps=10, eval_every=4), Saving(tmp_path)
    assert fit(one, hooks, few())
    assert hooks.evaluated == [(4, True), (8, True), (10, True)]
    assert [step for step, _ in one.record.held_out] == [4, 8, 10]
    plain = trainer(steps=10)
    assert fit(plain, Hooks(), few())
    assert same(one, plain), "evaluating changes nothing"
    assert one.record.losses == plain.record.losses


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(tmp_path: Path) -> None:
    one = trainer(steps=10, eval_every=4)
    assert not fit(one, Saving(tmp_path, stop_at=4), few())
    assert one.record.held_out == []
    again, hooks = trainer(steps=10, eval_every=4), Saving(tmp_path)
    assert checkpoint.restore_latest(tmp_path, again, pytest.fail)
    assert fit(again, hooks, few(4))
    assert [step for step, _ in hooks.evaluated] == [4, 8, 10]


def test_patience_ends_a_stage_where_held_out_loss_stops_falling(tmp_path: Path) -> None:
    # What is held out (one batch of random tokens) cannot be learnt from the others.
    one, hooks = trainer(steps=400, eval_every=2, patience=3, learning_rate=0.03), Saving(tmp_path)
    assert fit(one, hooks, few())
    assert one.step < 400
    best = one.record.best
    assert best is not None
    assert [step for step, _ in one.record.held_out if step > best[0]] == [best[0] + 2, best[0] + 4, best[0] + 6]
    # Cut just before the end, it ends at the same step.
    again = trainer(steps=400, eval_every=2, patience=3, learning_rate=0.03)
    checkpoint.restore_step(tmp_path, again, one.step)
    assert fit(again, Saving(tmp_path), few(one.step))
    assert again.step == one.step
    assert [tuple(told) for told in again.record.held_out] == one.record.held_out


def spoilt(at: int, start: int = 0) -> Iterator[Batch]:
    """Batches above a front, one of which makes no finite loss."""
    for number in itertools.count(start):
        one = batch(number, tokens=False)
        if number == at and "activations" in one:
            one["activations"][0, 0, 0] = math.nan
        yield one


def test_a_step_that_is_skipped_leaves_no_trace_in_the_weights(tmp_path: Path) -> None:
    one, hooks = trainer(tokens=False, divergence="skip"), Hooks()
    assert fit(one, hooks, spoilt(5))
    assert one.record.losses[5] is None
    assert [loss for loss in one.record.losses if loss is None] == [None]
    (told,) = hooks.refused
    assert told == one.record.divergences[0]
    assert told["step"] == 6
    # By hand: the same steps without the sixth.
    other = trainer(tokens=False)
    for number, good in zip(range(12), spoilt(-1), strict=False):
        if number == 5:
            other.step += 1
        else:
            other.train_step([good])
    assert same(one, other)


def test_skips_that_are_too_many_end_the_stage() -> None:
    one = trainer(tokens=False, divergence={"policy": "skip", "limit": 2})
    bad = itertools.chain.from_iterable(itertools.repeat(next(spoilt(0)), 1) for _ in range(9))
    with raises_naming(StackWiseError, "step 3", 2, "training.divergence.limit"):
        fit(one, Hooks(), bad)


WILD: dict[str, Any] = {
    "learning_rate": 3.0, "grad_clip": 0.0, "lr_schedule": "constant", "warmup": 0.6,
    "divergence": {"policy": "rollback", "factor": 1.4, "rate_factor": 0.3},
}  # fmt: skip


def wild(directory: Path, stop_at: int | None = None) -> Trainer:
    """A stage whose learning rate is far too high, trained as a worker does; cut after a step where asked."""
    one = trainer(steps=40, **WILD)
    one.anchor = 5
    checkpoint.restore_latest(directory, one, pytest.fail)
    while True:
        try:
            fit(one, Saving(directory, stop_at), few(one.step))
            return one
        except Rollback as back:
            told = back.divergence
            known = one.record.divergences
            checkpoint.restore_step(directory, one, int(str(told["to"])))
            one.record.divergences = [*known, told]
            checkpoint.remove(directory, after=one.step)


def test_a_stage_that_explodes_goes_back_with_a_lower_rate_and_a_cut_one_ends_the_same(tmp_path: Path) -> None:
    whole = wild(tmp_path / "whole")
    assert whole.step == 40
    assert len(whole.record.losses) == 40
    assert 1 <= whole.record.rollbacks <= 5
    assert all(told["to"] % 5 == 0 and told["to"] < told["step"] for told in whole.record.divergences)
    assert whole.rate(39) == pytest.approx(3.0 * 0.3**whole.record.rollbacks)
    first = whole.record.divergences[0]
    for stop_at in (first["to"] + 1, first["step"] - 1, first["step"] + 2, 33):
        directory = tmp_path / str(stop_at)
        cut = wild(directory, stop_at)
        assert cut.step < 40
        again = wild(directory)
        assert again.record.divergences == whole.record.divergences
        assert again.record.losses == whole.record.losses
        assert same(again, whole)


def test_an_exploding_loss_is_told_by_the_median_of_those_before() -> None:
    settings = Skip(factor=2.0)
    early = Watch(settings, [1.0] * (LEAST - 1))
    assert early.accept(50.0, 1.0), "there is nothing to go by yet"
    watch = Watch(settings, [1.0, None] * LEAST)
    assert not watch.accept(2.1, 1.0)
    assert re.findall(r"[\d.]+", watch.verdict) == ["2.1", "2", "1"], "the loss, the limit, the median"
    assert watch.accept(1.9, 1.0)
    assert watch.verdict is None
    assert not watch.accept(1.0, math.inf)
    assert not watch.accept(math.nan, 1.0)


def test_where_a_rollback_goes_follows_from_the_settings() -> None:
    rollback, stop = (trainer(divergence=policy).settings for policy in ("rollback", "stop"))
    assert anchor(rollback, 1000, 30) == 30
    assert anchor(rollback, 1000, None) == 50
    assert anchor(rollback, 3, None) == 1
    assert anchor(stop, 1000, 30) is None


def test_a_step_whose_gradients_overflow_is_judged_by_its_loss_alone() -> None:
    asked: list[tuple[float, float]] = []

    def accept(loss: float, norm: float) -> bool:
        asked.append((loss, norm))
        return loss < 2.0

    scale, infinite = LossScale("dynamic"), torch.tensor(math.inf)
    before = scale.scale
    assert judged(torch.tensor(1.0), infinite, scale, accept) == (False, False)
    assert judged(torch.tensor(3.0), infinite, scale, accept) == (False, True)
    assert judged(torch.tensor(1.0), torch.tensor(5.0), scale, accept) == (True, False)
    assert asked == [(1.0, 0.0), (3.0, 0.0), (1.0, 5.0)]
    assert scale.scale == before / 4
    assert judged(torch.tensor(1.0), infinite, None, accept) == (True, False), "which `accept` decides"
