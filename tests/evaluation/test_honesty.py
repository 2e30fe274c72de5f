"""What a system of this kind must not fake, on runs of the real thing: feed, store, workers, trainer and evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from stackwise.config import StackWiseConfig
from stackwise.evaluation import HeldOut, StageModules, evaluate
from stackwise.model import build_block, build_front, build_head
from stackwise.pipeline.committed.load import CommittedRack, load_rack
from stackwise.pipeline.committed.use import held_out_samples
from stackwise.pipeline.rows import stage_rows
from stackwise.pipeline.run import RunDirectory, status
from stackwise.store import ActivationStore
from stackwise.training.forward import forward_rows
from tests.conftest import run

LETTERS = "abcdefghijklmnop"
FLOOR = math.log(len(LETTERS))
L = 32


def counting(n: int, seed: int) -> np.ndarray:
    """Counting in steps of 1, 3 or 5 modulo 16, from anywhere: a masked letter follows from any two others."""
    rng = np.random.default_rng(seed)
    start, step = rng.integers(0, 16, (n, 1)), rng.choice([1, 3, 5], (n, 1))
    return (start + step * np.arange(L)) % 16


def noise(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 16, (n, L))


Draw = Callable[[int, int], np.ndarray]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run on drawn letters, made once for each draw and settings."""
    text: dict[Draw, Path] = {}

    @cache
    def make(draw: Draw, **settings: Any) -> Path:
        if draw not in text:
            text[draw] = tmp_path_factory.mktemp("letters")
            for number in range(4):
                letters = np.array(list(LETTERS))[draw(1000, number)]
                (text[draw] / f"{number}.txt").write_text("".join(letters.ravel()))
        values = {"data.paths": [str(text[draw])], "training.batch_size": 64, "model.tie_embeddings": False}
        values |= {key.replace("__", "."): value for key, value in settings.items()}
        directory = tmp_path_factory.mktemp("honesty") / "run"
        run(StackWiseConfig.from_preset("micro", values), directory)
        return directory

    return make


def evaluation(directory: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((directory / "evaluation.json").read_text())
    return result


def rack_of(directory: Path) -> CommittedRack:
    return load_rack(RunDirectory(directory), torch.device("cpu"))


LEARNT = {"training__steps": 150, "model__architecture__n_stacks": 3}
NEXT = {"training__steps": 100, "model__architecture__n_stacks": 1}
"""The next letter is learnt sooner, and by one block: it follows from the two before."""


@pytest.mark.parametrize("objective", ["mask_diffusion", pytest.param("mlm", marks=pytest.mark.stress), "clm"])
def test_learnable_data_is_learnt_and_beats_the_unigram_clearly(ran: Any, objective: str) -> None:
    result = evaluation(ran(counting, training__objective=objective, **(NEXT if objective == "clm" else LEARNT)))
    base = result["baselines"]["unigram"]
    assert result["loss"]["0.5"] < 0.5 * base["loss"]["0.5"]
    assert result["bits_per_byte"] < 0.75 * base["bits_per_byte"]
    assert result["accuracy"]["0.5"] > 0.7


def test_depth_pays(ran: Any) -> None:
    result = evaluation(ran(counting, training__objective="mask_diffusion", **LEARNT))
    losses = [stage["loss"]["0.5"] for stage in result["stages"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]


def test_swapping_two_stages_makes_it_worse(ran: Any) -> None:
    rack = rack_of(ran(counting, training__objective="mask_diffusion", **LEARNT))
    split, indices = rack.data.held_out, held_out_samples(rack, rack.data.held_out)
    samples = HeldOut(split.samples(indices, L), split.sample_bytes(indices, L))
    first, second, third = rack.modules()

    def loss(*order: StageModules) -> float:
        stages = [replace(stage, depth=depth) for depth, stage in enumerate(order)]
        return float(evaluate(rack.front(), stages, samples, rack.objective)["loss"]["0.5"])

    right = loss(first, second, third)
    assert loss(second, first, third) > 1.5 * right
    assert loss(first, third, second) > 1.5 * right


MODES: dict[str, dict[str, Any]] = {
    "layerwise": {},
    "blockwise": {"training__block_size": 2},
    "fused-frozen": {"training__mode": "fused", "training__fusion_mode": "frozen"},
    "fused-trainable": {"training__mode": "fused", "training__fusion_mode": "trainable"},
    "progressive": {"training__progressive__enabled": True},
    "progressive-qlora": {"training__progressive__enabled": True, "training__progressive__trunk_strategy": "qlora"},
    "independent": {"training__mode": "independent", "training__loss_weight": "inverse_time"},
    "end-to-end": {"training__mode": "end_to_end"},
    "tail": {"training__lookahead": "tail"},
    "in-blocks": {"training__diffusion_block": 8},
    "mlm": {"training__objective": "mlm"},
    "clm": {"training__objective": "clm"},
}


SELDOM = ("blockwise",)
"""What differs from others here by what it holds alone."""


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.stress if mode in SELDOM else ()) for mode in MODES]
)
def test_nothing_is_learnt_from_noise(ran: Any, mode: str) -> None:
    result = evaluation(ran(noise, training__steps=30, training__learning_rate=0.01, **MODES[mode]))
    for stage in result["stages"]:
        for loss in stage["loss"].values():
            assert loss > FLOOR - 0.03, "held-out noise was predicted: the answer leaks"
        assert stage["loss"]["0.5"] < FLOOR + 0.3, "not even the letters were learnt"
        assert stage["accuracy"]["0.5"] < 1 / len(LETTERS) + 0.06
        if stage["bits_per_byte"] is not None:
            assert stage["bits_per_byte"] > FLOOR / math.log(2) - 0.05


def rows_of(rack: CommittedRack, store: ActivationStore, rowset: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and masks of a rowset: its samples found in the data by their ids, its masks in the store."""
    stored, split = store.rowset(rowset), rack.data.train
    places = {bytes(sample): place for place, sample in enumerate(split.sample_ids(L))}
    samples_R = np.array([places[bytes(sample)] for sample in stored.sample_ids])
    return torch.from_numpy(split.samples(samples_R, L)), torch.from_numpy(store.masks(stored.mask_ids, L))


CACHED = {"training__steps": 6, "model__architecture__n_stacks": 3, "store__codec": "fp32", "store__keep": "all"}


@pytest.mark.parametrize("mode", ["layerwise", "fused-frozen", "progressive"])
def test_a_cached_activation_is_the_trunks_own_bit_for_bit(ran: Any, mode: str) -> None:
    directory = ran(noise, **CACHED, **MODES[mode])
    rack = rack_of(directory)
    blocks = [block for section in rack.modules() for block in section.blocks]
    with ActivationStore(directory / "store", create=False) as store, torch.no_grad():
        boundaries = store.boundaries()
        assert {info.depth for info in boundaries} >= {1, 2}
        for info in boundaries:
            tokens_RS, masks_RS = rows_of(rack, store, info.rowset)
            shown_RS = torch.where(masks_RS, rack.mask_token, tokens_RS)
            with store.reader(info.id) as reader:
                for first in range(0, info.rows, forward_rows(L)):
                    rows_B = np.arange(first, min(first + forward_rows(L), info.rows))
                    x_BSD = rack.front()(shown_RS[rows_B])
                    for block in blocks[: info.depth]:
                        x_BSD = block(x_BSD)
                    assert torch.equal(reader.read(rows_B), x_BSD)


def masks_by_stage(directory: Path) -> list[np.ndarray]:
    """The masks of the rows that each stage trained on."""
    rack = rack_of(directory)
    with ActivationStore(directory / "store", create=False) as store:
        masks = []
        for entry, stage in zip(status(RunDirectory(directory))["stages"], rack.stages, strict=True):
            committed = store.stage(entry["recipe"])
            assert committed is not None
            stored = store.rowset(committed.record["recipe"]["rowset"])
            rows = stage_rows(rack.config, stored.sample_ids, stage.depth, stage.rowset)
            masks_RS = store.masks(stored.mask_ids, L)
            masks.append(masks_RS if rows is None else masks_RS[rows])
    return masks


@pytest.mark.parametrize("mode", ["layerwise", "fused-frozen", "progressive", "end-to-end"])
def test_every_stage_sees_the_whole_schedule(ran: Any, mode: str) -> None:
    for masks_RS in masks_by_stage(ran(noise, **CACHED, **MODES[mode])):
        shares = masks_RS.mean(1)
        assert np.quantile(shares, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx(
            [0.15, 0.3375, 0.525, 0.7125, 0.9], abs=0.03
        )
        assert len(np.unique(masks_RS, axis=0)) > 0.97 * len(masks_RS)


@pytest.mark.parametrize(
    "settings", [MODES["independent"], {"training__mask_schedule_over": "depth"}], ids=["independent", "over-depth"]
)
def test_where_time_is_depth_each_stage_sees_its_own_part_of_it(ran: Any, settings: dict[str, Any]) -> None:
    edges = [0.15, 0.4, 0.65, 0.9]
    by_stage = masks_by_stage(ran(noise, **CACHED, **settings))
    assert len(by_stage) == 3
    for masks_RS, low, high in zip(by_stage, edges, edges[1:], strict=False):
        shares = masks_RS.mean(1)
        assert low - 1 / L <= shares.min()
        assert shares.max() <= high + 1 / L
        assert shares.mean() == pytest.approx((low + high) / 2, abs=0.03)
        assert len(np.unique(masks_RS, axis=0)) > 0.97 * len(masks_RS)


def test_a_stages_gradient_is_that_of_its_objective_written_by_hand(ran: Any) -> None:
    """One step on all rows at once: its loss, the norm of its gradient, and the sign of every weight's update."""
    whole = {"training__rows": 48, "training__batch_size": 48, "training__steps": 1, "store__codec": "fp32"}
    directory = ran(counting, store__keep="all", **whole)
    rack = rack_of(directory)
    config = rack.config
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    steps = {event["stage"]: event for event in events if event["event"] == "step"}
    with ActivationStore(directory / "store", create=False) as store:
        (info,) = store.boundaries()
        tokens_RS, masks_RS = rows_of(rack, store, info.rowset)
        with store.reader(info.id) as reader:
            entering_RSD = reader.read(np.arange(info.rows))
    shown_RS = torch.where(masks_RS, rack.mask_token, tokens_RS)
    front = build_front(config.model, rack.vocab_size, config.seed, L)
    head = build_head(config.model, rack.vocab_size, config.seed)
    for depth in (0, 1):
        block = build_block(config.model, depth, config.seed)
        parts = {f"block.{depth}": block, "head": head} | ({"front": front} if depth == 0 else {})
        weights = {(part, name): w for part, module in parts.items() for name, w in module.named_parameters()}
        leaving_RSD = block(front(shown_RS) if depth == 0 else entering_RSD)
        loss = F.cross_entropy(head(leaving_RSD)[masks_RS], tokens_RS[masks_RS].long())
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        assert steps[depth]["losses"] == [pytest.approx(loss.item(), rel=1e-5)]
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        assert steps[depth]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
        committed = {part: load_file(str(rack.versions[depth][part].path)) for part in parts}
        for (part, name), gradient in gradients.items():
            update = committed[part][name] - weights[part, name].detach()
            clear = gradient.abs() > max(1e-7, 1e-5 * gradient.abs().max().item())  # above rounding
            assert (update * gradient < 0)[clear].all(), (part, name)
        head.load_state_dict(committed["head"])  # what the stage above starts from
