"""What a GPU must keep: the same weights whichever way they are trained. `make test-gpu` runs these first on a card.

Each body runs on the CPU too where that is quick, so that the tests themselves are known to work.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stackwise.batch import Batch
from stackwise.config.yaml_files import dump
from stackwise.model import Block, layers
from stackwise.objectives import MaskDiffusionObjective
from stackwise.pipeline.device import cannot_repeat, gpu_use, make_deterministic
from stackwise.pipeline.library import LoadedSamples
from stackwise.pipeline.run import RunDirectory
from stackwise.store import ActivationStore, RowOrder
from stackwise.training import checkpoint, pinned
from stackwise.training.engine import ResidentEngine
from stackwise.training.feed import Feed, ahead
from stackwise.training.forward import write_boundary
from stackwise.training.stage import MeanLoss, StageModel
from stackwise.training.swap import SwappedEngine
from stackwise.training.swap_parts import SwapSpace
from stackwise.training.trainer import Trainer
from tests.conftest import Micro, run
from tests.training.swapping import MASK, SEED, VOCAB, RackParts, S, microbatches, settings, state_dicts

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # it counts only if it is there before cuBLAS is

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
PRECISIONS = ["fp32", "bf16"]
EXPERTS: dict[str, object] = {"kind": "moe", "experts": 4, "top_k": 2}
ROWS, WIDTH, STEPS = 48, 16, 4


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each device, with kernels that repeat."""
    yield from on(torch.device(request.param))


@pytest.fixture
def card() -> Iterator[torch.device]:
    """The GPU, with kernels that repeat."""
    yield from on(torch.device("cuda"))


def on(device: torch.device) -> Iterator[torch.device]:
    """A device, with kernels that repeat until the test is over."""
    if device.type == "cuda":
        make_deterministic()
    yield device
    torch.use_deterministic_algorithms(False)


def rack(precision: str, **given: Any) -> RackParts:
    return RackParts(3, tied=False, dropout=0.1, width=WIDTH, precision=precision, **given)


def resident(parts: RackParts, device: torch.device, **values: object) -> Trainer:
    chosen = settings(**values)
    engine = ResidentEngine(parts.whole().to(device), chosen, seed=SEED, device=device)
    return Trainer(engine, chosen, steps=STEPS)


def taken(trainer: Trainer, device: torch.device, until: int = STEPS) -> Trainer:
    """Steps, up to one, on batches that come by way of the feed's thread."""
    settings = trainer.settings
    batches = itertools.chain.from_iterable(
        microbatches(step, settings.accumulation) for step in range(trainer.step, until)
    )
    with ahead(batches, device, warn=pytest.fail) as source:
        while trainer.step < until:
            trainer.train_step(list(itertools.islice(source, settings.accumulation)))
    return trainer


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_swapped_is_resident(device: torch.device, precision: str, tmp_path: Path) -> None:
    whole = taken(resident(rack(precision), device), device)
    model = whole.engine.model  # type: ignore[attr-defined]
    parts, space = rack(precision), SwapSpace(tmp_path / "swap", 2, 0, pytest.fail)
    with contextlib.closing(SwappedEngine(parts, settings(), space, seed=SEED, device=device)) as engine:
        taken(Trainer(engine, settings(), steps=STEPS), device)
        engine.settle()
        for name, state in state_dicts(model, parts.names).items():
            same({key: tensor.cpu() for key, tensor in state.items()}, dict(engine.weights(name)))


@pytest.mark.parametrize(("ffn", "precision"), [("swiglu", "fp32"), ("swiglu", "bf16"), (EXPERTS, "bf16")])
def test_blocks_computed_anew_change_no_number(
    device: torch.device, ffn: str | dict[str, object], precision: str
) -> None:
    def trained(every: bool | int) -> tuple[dict[str, Tensor], MeanLoss]:
        trainer = taken(resident(rack(precision, ffn=ffn), device, activation_checkpointing=every), device)
        model = trainer.engine.model  # type: ignore[attr-defined]
        assert not any(getattr(module, "terms", None) for module in model.modules())  # nor their graphs
        return dict(model.state_dict()), trainer.engine.evaluate(microbatches(9, 2))

    kept = trained(False)
    for every in (True, 2):
        assert settings(activation_checkpointing=every).specification(precision) == settings().specification(precision)
        again = trained(every)
        same(kept[0], again[0])
        assert kept[1] == again[1]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pins", [True, False])
def test_resumed_is_whole_with_memory_that_is_pinned_or_not(
    device: torch.device, precision: str, pins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    if not pins:
        monkeypatch.setattr(pinned, "pin_memory", lambda address, size: False)
    whole = taken(resident(rack(precision), device), device)
    first = taken(resident(rack(precision), device), device, 2)
    with checkpoint.Checkpoints(tmp_path, warn=warnings.append) as saves:
        saves.prepare(first)
        saves.finish()
        saves.save(first)
    assert bool(warnings) == (device.type == "cuda" and not pins)
    second = resident(rack(precision), device)
    assert checkpoint.restore_latest(tmp_path, second, pytest.fail)
    assert second.step == 2
    same(taken(second, device).engine.state(), whole.engine.state())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_from_the_store_is_from_memory(device: torch.device, precision: str, tmp_path: Path) -> None:
    parts, objective = rack(precision), MaskDiffusionObjective(MASK)
    below = StageModel(parts.make("front", None), [parts.make("block.0", None)], None, objective, precision)
    below.requires_grad_(False).to(device)
    draw = np.random.default_rng(0)
    data = LoadedSamples(draw.integers(0, VOCAB - 1, (ROWS, S)))
    order = RowOrder(ROWS, seed=(0,), chunk_rows=8, window_chunks=2)

    def trained(batches: Iterator[Batch]) -> dict[str, Tensor]:
        blocks, head = [parts.make(f"block.{i}", None) for i in (1, 2)], parts.make("head", None)
        model, chosen = StageModel(None, blocks, head, objective, precision).to(device), settings()
        engine = ResidentEngine(model, chosen, seed=SEED, device=device)
        for step in range(STEPS):
            engine.step(itertools.islice(batches, chosen.accumulation), step, 1e-2)
        return engine.state()

    with ActivationStore(tmp_path / "store") as store:
        rowset = store.put_rowset(data.sample_ids(S), store.put_masks(draw.random((ROWS, S)) < 0.4))
        tokens = Feed.stored(store, store.rowset(rowset), data, np.arange(ROWS), S)
        codec = "bf16" if precision == "bf16" else "fp32"
        about: dict[str, Any] = {"trunk": "11" * 16, "rowset": rowset, "depth": 1, "seq_len": S, "d_model": WIDTH}
        with store.writer(**about, codec=codec, chunk_rows=8) as writer:
            done = write_boundary([below], tokens, writer, device)
            assert done.finished
        with store.reader(writer.info.id) as reader:
            stored = Feed.stored(store, store.rowset(rowset), data, np.arange(ROWS), S, reader=reader)
            with ahead(stored.shuffled(order, 4, 0), device, warn=pytest.fail) as batches:
                from_store = trained(batches)
        with below.eval().numerics(device), torch.no_grad():  # in the pass's batches, which shape its arithmetic
            whole = tokens.batch(np.arange(ROWS))
            pieces = [below.activations(whole.part(at, at + 8).to(device)).cpu() for at in range(0, ROWS, 8)]
        x_RSD = torch.cat(pieces)

        def in_memory() -> Iterator[Batch]:
            for number in itertools.count():
                rows_B = order.batch(number, 4)
                yield tokens.batch(rows_B).above(x_RSD[torch.from_numpy(rows_B)])

        from_memory = trained(in_memory())
    same(from_store, from_memory)


def test_a_norm_under_autocast_is_the_wide_one_rounded(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "FUSED_NORMS", {device.type})
    norm = layers.RMSNorm(WIDTH, eps=1e-6).to(device)
    x = torch.randn(8, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
    wide = norm(x)
    with torch.autocast(device.type, torch.bfloat16):
        narrow = norm(x)
    assert torch.equal(narrow, wide.bfloat16())
    slope = torch.randn_like(narrow)
    made = torch.autograd.grad(narrow, (x, norm.weight), slope)
    wanted = torch.autograd.grad(wide, (x, norm.weight), slope.float())
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about torch
@pytest.mark.parametrize("precision", PRECISIONS)
def test_compiled_blocks_repeat_and_agree_with_plain_ones(card: torch.device, precision: str) -> None:
    def trained(*, compiles: bool) -> dict[str, Tensor]:
        one = resident(rack(precision), card)
        for block in one.engine.model.blocks if compiles else ():  # type: ignore[attr-defined]
            block.compile(dynamic=False)
        return taken(one, card).engine.state()

    once = trained(compiles=True)
    same(once, trained(compiles=True))
    for name, plain in trained(compiles=False).items():
        torch.testing.assert_close(once[name], plain, rtol=0.1, atol=0.1)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_is_that_of_the_cpu_but_for_rounding(card: torch.device, precision: str) -> None:
    states = [
        taken(
            resident(RackParts(2, tied=False, dropout=0.0, width=WIDTH, precision=precision), where), where
        ).engine.state()
        for where in (torch.device("cpu"), card)
    ]
    for name in (name for name in states[0] if name.startswith("weight/")):
        torch.testing.assert_close(states[0][name], states[1][name].cpu(), rtol=0.1, atol=0.05)


RUN = {"device": "cuda", "deterministic": True, "precision": "bf16", "training__checkpoint_steps": 2}


def committed(directory: Path) -> list[str]:
    return [stage["weights"] for stage in json.loads(RunDirectory(directory).manifest_file.read_text())["stages"]]


@pytest.mark.cuda
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"training__swap": "always"},
        {"training__compile": True},
        {"stages": {1: {"precision": "fp8"}}},
        {"training__products": "fp8"},
    ],
    ids=["resident", "swapped", "compiled", "fp8", "products"],
)
def test_a_run_that_was_killed_ends_as_one_that_was_not(micro: Micro, tmp_path: Path, more: dict[str, Any]) -> None:
    config = micro(**RUN, **more)
    run(config, tmp_path / "whole")
    killed = tmp_path / "killed"
    killed.mkdir()
    (file := tmp_path / "c.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "stackwise", "run", str(file), "--run", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline and not list(killed.glob("checkpoints/*/*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    assert committed(killed) == committed(tmp_path / "whole")


@pytest.mark.cuda
def test_what_cannot_repeat_is_refused_and_attention_repeats(card: torch.device) -> None:
    with pytest.raises(RuntimeError) as refusal:
        torch.zeros(4, device=card).put_(torch.tensor([0], device=card), torch.ones(1, device=card), accumulate=False)
    assert cannot_repeat(refusal.value)
    parts = RackParts(1, tied=False, width=256)
    block = parts.make("block.0", None)
    assert isinstance(block, Block)
    block.to(card)

    def gradient() -> Tensor:
        x = torch.ones(2, 512, 256, device=card, dtype=torch.bfloat16).cumsum(1).remainder(7).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            block(x, causal=True).float().square().sum().backward()
        made = x.grad
        assert made is not None
        return made

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(4))


def test_how_busy_a_gpu_is_said_where_its_driver_is_asked(device: torch.device) -> None:
    share = gpu_use(device)
    if device.type == "cpu":
        assert share is None
    else:
        assert share is None or 0 <= share <= 1
