"""Held-out figures: against definitions written out, known models, and whole racks."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score

from stackwise.batch import Batch
from stackwise.config.model import ArchitectureConfig, ModelConfig
from stackwise.errors import UsageError
from stackwise.evaluation import StageModules, bits_per_byte, bound_masks, fraction_masks
from stackwise.evaluation.passes import bleu, macro_f1
from stackwise.model import Rack, build_block, build_head, build_rack
from stackwise.objectives import CLMObjective, CustomObjective, MaskDiffusionObjective, MLMObjective, RuntimeObjective
from stackwise.objectives.objective import Outputs
from tests.conftest import raises_naming
from tests.evaluation.by_keyword import evaluate

V, N, L, MASK, SEPARATOR = 41, 12, 20, 40, 39
CONFIG = ModelConfig(d_model=32, n_heads=4, architecture=ArchitectureConfig(n_stacks=3, blocks_per_stack=1))


def tokens(n: int = N) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SEPARATOR, (n, L))


def sizes(n: int = N) -> np.ndarray:
    return np.random.default_rng(1).integers(30, 60, n)


def rack() -> Rack:
    return build_rack(CONFIG, V, 0, L)


def staged(model: Rack, causal: bool = False) -> Iterator[StageModules]:
    for depth, block in enumerate(model.blocks):
        yield StageModules(depth, [block], model.head, causal)


def uniform(model: Rack) -> Rack:
    """A model that gives every token the same probability."""
    with torch.no_grad():
        model.head.norm.weight.zero_()
    return model


@pytest.mark.parametrize("objective", [MaskDiffusionObjective(MASK), MLMObjective(MASK, V), CLMObjective()])
def test_a_uniform_guess_gives_the_logarithm_of_the_vocabulary(objective: RuntimeObjective) -> None:
    model = uniform(rack())
    result = evaluate(
        model.front, staged(model, objective.causal), tokens(), sizes(), objective=objective, separator_id=SEPARATOR
    )
    for figures in (result, *result["stages"]):
        assert figures["loss"] == pytest.approx(dict.fromkeys(("0.15", "0.5", "0.9"), math.log(V)), abs=1e-5)
        assert figures["bits_per_byte"] == pytest.approx(math.log2(V) * N * L / sizes().sum(), rel=1e-6)
        assert figures["tokens"] == N * L
        assert figures["bytes"] == sizes().sum()
    assert [stage["depth"] for stage in result["stages"]] == [0, 1, 2]
    assert result["likelihood"] == ("exact" if objective.causal else "bound")
    json.dumps(result, allow_nan=False)


def test_loss_and_accuracy_are_those_written_out() -> None:
    model = rack()
    result = evaluate(
        model.front, staged(model), tokens(), sizes(), objective=MaskDiffusionObjective(MASK), fractions=[0.5], seed=3
    )
    mask = torch.from_numpy(fraction_masks(N, L, 0.5, 3))
    ids = torch.from_numpy(tokens())
    logits = model(ids.masked_fill(mask, MASK))
    assert result["loss"]["0.5"] == pytest.approx(F.cross_entropy(logits[mask], ids[mask]).item(), rel=1e-5)
    hits = (logits.argmax(-1) == ids)[mask].float().mean().item()
    assert result["accuracy"]["0.5"] == pytest.approx(hits)
    assert list(result["loss"]) == ["0.5"]
    said = logits.argmax(-1)
    f1 = f1_score(ids[mask], said[mask], average="macro", zero_division=0)
    assert result["f1"]["0.5"] == pytest.approx(f1)


def test_bleu_and_f1_are_those_of_sacrebleu_and_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    right_NS = rng.integers(0, 5, (4, 30))
    said_NS = np.where(rng.random((4, 30)) < 0.3, rng.integers(0, 5, (4, 30)), right_NS)
    said, right = ([" ".join(map(str, row_S)) for row_S in rows_NS] for rows_NS in (said_NS, right_NS))
    expected = sacrebleu.corpus_bleu(said, [right], tokenize="none", smooth_method="none").score
    assert 0 < expected < 100
    assert bleu(right_NS, said_NS) == pytest.approx(expected)
    assert bleu(right_NS, right_NS) == pytest.approx(100)
    assert bleu(right_NS, right_NS + 9) == 0
    expected = f1_score(right_NS.ravel(), said_NS.ravel(), average="macro")
    assert macro_f1(right_NS.ravel(), said_NS.ravel()) == pytest.approx(expected)


def test_the_bound_is_the_one_written_out_and_draws_average() -> None:
    model = rack()
    ids = torch.from_numpy(tokens())
    values = []
    for draw in range(3):
        mask = torch.from_numpy(bound_masks(N, L, 7, draw))
        logits = model(ids.masked_fill(mask, MASK))
        nats = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").double() * mask
        values.append((nats.sum(1) * L / mask.sum(1)).sum().item() / math.log(2) / sizes().sum())
    for draws in (1, 3):
        result = evaluate(
            model.front,
            staged(model),
            tokens(),
            sizes(),
            objective=MaskDiffusionObjective(MASK),
            fractions=[],
            seed=7,
            draws=draws,
        )
        assert result["bits_per_byte"] == pytest.approx(np.mean(values[:draws]), rel=1e-5)


def test_bound_masks_are_stratified_over_k() -> None:
    counts = bound_masks(100, 50, 0).sum(1)
    assert np.array_equal(np.sort((counts - 1) // 5), np.repeat(np.arange(10), 10))
    assert counts.min() >= 1
    assert bound_masks(3, 1, 0).all()
    assert not np.array_equal(bound_masks(100, 50, 0), bound_masks(100, 50, 1))
    assert fraction_masks(5, 40, 0.15, 0).sum(1).tolist() == [6] * 5
    assert fraction_masks(5, 40, 0.001, 0).sum(1).tolist() == [1] * 5
    assert len(np.unique(fraction_masks(50, 40, 0.5, 0), axis=0)) == 50


def test_bound_is_above_the_likelihood_of_a_known_source() -> None:
    """Independent tokens: the unigram model is the truth, so its bits are the entropy and no bound is below."""
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.ones(V - 2))
    held = rng.choice(V - 2, (200, L), p=p)
    counts = np.bincount(rng.choice(V - 2, 10**6, p=p), minlength=V)
    model = uniform(rack())
    result = evaluate(
        model.front,
        staged(model),
        held,
        np.full(200, L),
        objective=MaskDiffusionObjective(MASK),
        unigram_counts=counts,
    )
    base = result["baselines"]["unigram"]
    entropy = -(p * np.log2(p)).sum()
    assert abs(base["bits_per_byte"] - entropy) < 4 * base["bits_per_byte_error"]
    assert base["bits_per_byte"] < result["bits_per_byte"]
    assert base["loss"]["0.5"] == pytest.approx(entropy * math.log(2), abs=0.1)
    assert base["accuracy"]["0.5"] == pytest.approx(p.max(), abs=0.03)
    assert set(base) == {key for key in result["stages"][0] if key != "depth"}


def test_unigram_smoothing_is_add_one() -> None:
    model = rack()
    held = np.zeros((2, L), dtype=np.int64)
    held[1] = 5
    counts = np.zeros(10, dtype=np.int64)
    counts[0] = 9
    result = evaluate(
        model.front,
        staged(model),
        held,
        [L, L],
        objective=MaskDiffusionObjective(MASK),
        unigram_counts=counts,
        vocab_size=V,
    )
    base = result["baselines"]["unigram"]
    want = (math.log((9 + V) / 10) + math.log(9 + V)) / 2
    assert base["loss"]["0.9"] == pytest.approx(want)
    assert base["bits_per_byte"] == pytest.approx(want / math.log(2))


def test_causal_likelihood_is_the_chain_rule() -> None:
    model = rack()
    segments = np.repeat([[0, 1]], L // 2, axis=1).repeat(N, axis=0)
    result = evaluate(
        model.front,
        staged(model, causal=True),
        tokens(),
        sizes(),
        objective=CLMObjective(),
        separator_id=SEPARATOR,
        segments_NS=segments,
    )
    total = 0.0
    for row in tokens():
        ids = torch.tensor([[SEPARATOR, *row[:-1]]])
        seen = torch.tensor([[0, *segments[0][:-1]]])
        logits = model(ids, causal=True, segments_BS=seen)[0]
        total += F.cross_entropy(logits.double(), torch.from_numpy(row), reduction="sum").item()
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / sizes().sum(), rel=1e-5)
    assert set(result["loss"]) == {"0.15", "0.5", "0.9"}


def test_custom_targets() -> None:
    model = rack()
    targets = np.random.default_rng(2).integers(-1, V, (N, L))
    result = evaluate(
        model.front, staged(model), tokens(), sizes(), objective=CustomObjective(), targets_NS=targets, fractions=[1.0]
    )
    known = torch.from_numpy(targets >= 0)
    logits = model(torch.from_numpy(tokens()))
    want = F.cross_entropy(logits[known], torch.from_numpy(targets)[known]).item()
    assert result["loss"]["1"] == pytest.approx(want, rel=1e-5)
    assert result["bits_per_byte"] is None
    assert result["likelihood"] is None


def test_partition_and_batches_do_not_matter() -> None:
    model = rack()

    def run(stages: list[StageModules], batch: int) -> float:
        result = evaluate(
            model.front, stages, tokens(), sizes(), objective=MaskDiffusionObjective(MASK), batch_size=batch
        )
        return float(result["bits_per_byte"])

    whole = run([StageModules(0, model.blocks, model.head)], 5)
    assert run(list(staged(model)), 12) == pytest.approx(whole, rel=1e-6)


def test_one_stage_is_resident_at_a_time() -> None:
    model = rack()
    alive: list[weakref.ref[torch.nn.Module]] = []

    def lazily() -> Iterator[StageModules]:
        for depth in range(3):
            assert all(ref() is None for ref in alive), "an earlier stage is still in memory"
            block = build_block(CONFIG, depth, 0)
            head = build_head(CONFIG, V, depth)
            alive.append(weakref.ref(block))
            alive.append(weakref.ref(head))
            stage = StageModules(depth, [block], head)
            del block, head
            yield stage
            del stage

    result = evaluate(model.front, lazily(), tokens(), sizes(), objective=MaskDiffusionObjective(MASK))
    assert len(result["stages"]) == 3


def test_modes_come_back_and_dropout_is_off() -> None:
    config = CONFIG.model_copy(update={"dropout": 0.5})
    model = build_rack(config, V, 0, L)
    model.blocks[0].eval()
    results = [
        evaluate(model.front, staged(model), tokens(), sizes(), objective=MaskDiffusionObjective(MASK))
        for _ in range(2)
    ]
    assert results[0] == results[1]
    assert model.front.training
    assert model.blocks[1].training
    assert not model.blocks[0].training


def test_narrow_compute_is_close_and_is_what_training_computes() -> None:
    model, objective = rack(), MaskDiffusionObjective(MASK)

    def run(autocast: torch.dtype | None) -> dict[str, object]:
        return evaluate(
            model.front, staged(model), tokens(), sizes(), objective=objective, fractions=[0.5], autocast=autocast
        )

    narrow = run(torch.bfloat16)
    assert narrow["bits_per_byte"] == pytest.approx(run(None)["bits_per_byte"], rel=0.02)
    ids, masks = torch.from_numpy(tokens()), torch.from_numpy(fraction_masks(N, L, 0.5, 0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        given = Batch(np.arange(N), None, {"tokens": ids, "masks": masks})
        x = model.front(objective.shown(given)).to(torch.bfloat16)
        for block in model.blocks:
            x = block(x)
        (term,) = objective.loss(Outputs(x, model.head), given).values()
    assert narrow["loss"] == {"0.5": pytest.approx(term.sum.item() / term.count, rel=1e-4)}


def test_error_of_a_ratio() -> None:
    rng = np.random.default_rng(0)
    estimates, errors = [], []
    for _ in range(400):
        sizes_ = rng.integers(50, 150, 60)
        nats = sizes_ * rng.normal(1.5, 0.3, 60)
        bits, error = bits_per_byte(nats, sizes_)
        assert bits is not None
        assert error is not None
        estimates.append(bits)
        errors.append(error)
    assert np.std(estimates) == pytest.approx(np.mean(errors), rel=0.15)
    assert bits_per_byte(np.ones(3), np.zeros(3)) == (None, None)
    assert bits_per_byte(np.array([math.log(2)]), [1]) == (pytest.approx(1.0), None)


def test_refusals() -> None:
    model = rack()
    with raises_naming(UsageError, "held-out"):
        evaluate(model.front, staged(model), np.zeros((0, L)), [], objective=MaskDiffusionObjective(MASK))
    with pytest.raises(UsageError, match="separator"):
        evaluate(model.front, staged(model, True), tokens(), sizes(), objective=CLMObjective())
    with pytest.raises(UsageError, match="targets"):
        evaluate(model.front, staged(model), tokens(), sizes(), objective=CustomObjective())
