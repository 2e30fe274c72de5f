"""Whole runs of other kinds of rack: latent, in blocks, with time as input; linear and causal; time as depth."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.config.unused import unused_settings
from stackwise.errors import ConfigError, UsageError
from stackwise.model import StageModules
from stackwise.pipeline.committed.generate import Sampling, generate
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.committed.use import evaluate_rack, export_rack, recomputer
from stackwise.pipeline.run import RunDirectory
from stackwise.pretrained import Checkpoint
from stackwise.pretrained import load_rack as load_export
from stackwise.store import ActivationStore
from tests.conftest import Micro, raises_naming, run


@pytest.fixture(scope="module")
def blocks(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Diffusion in blocks of 8, on mla, each document by itself, the masked share of a block as input."""
    directory = tmp_path_factory.mktemp("blocks") / "run"
    config = micro(
        model__attention="mla",
        training__progressive__enabled=True,
        training__progressive__time_interpretation="input",
        training__progressive__time_embedding_dim=16,
        training__diffusion_block=8,
        data__within_documents=True,
        store__codec="fp32",
    )
    run(config, directory)
    return RunDirectory(directory)


def test_diffusion_in_blocks_learns_from_pairs(blocks: RunDirectory) -> None:
    rack = load_rack(blocks, torch.device("cpu"))
    assert rack.config.model.time_embedding.name == "sinusoidal"
    result = evaluate_rack(rack, rack.data.held_out)
    assert result["likelihood"] == "bound"
    assert 0 < result["bits_per_byte"] < 8
    with ActivationStore(blocks.store_path(rack.config), create=False) as store:
        (info,) = store.boundaries()
        assert info.seq_len == 64
        with store.reader(info.id) as reader:
            stored = reader.read(range(8))  # type: ignore[arg-type]
        (_, made), *_ = recomputer(blocks, store, "cpu")(info, [0])
        assert torch.equal(made[:8].float(), stored.float()), "a boundary of pairs cannot be made again"


def test_time_reaches_the_rack(blocks: RunDirectory) -> None:
    rack = load_rack(blocks, torch.device("cpu"))
    front = rack.front()
    ids = torch.zeros(1, 8, dtype=torch.int64)
    assert not torch.equal(front(ids, torch.tensor([0.1])), front(ids, torch.tensor([0.9])))


def test_a_rack_of_another_kind_exports_in_its_own_layout(blocks: RunDirectory, tmp_path: Path) -> None:
    rack = load_rack(blocks, torch.device("cpu"))
    export_rack(rack, tmp_path / "out")
    assert Checkpoint(tmp_path / "out").family.native
    loaded = load_export(tmp_path / "out")
    ids, share = torch.arange(16).view(1, 16), torch.tensor([0.5])
    x = rack.front()(ids, share)
    for stage in rack.modules():
        x = stage.forward(x, direction=False)
        head = stage.head
    torch.testing.assert_close(loaded(ids, time=share), head(x))


def test_generation_in_blocks_resident_or_not(blocks: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    rack = load_rack(blocks, torch.device("cpu"))
    steps: list[str] = []
    made = generate(rack, "def f", Sampling(length=19, steps=9, temperature=1.0, block=3), on_step=steps.append)
    assert made["before"] == "def f" + 19 * "[MASK]"
    assert "[MASK]" not in made["after"]
    assert made["notes"] == ["--block is unused: the rack was trained in blocks of 8 tokens"]
    assert len(steps) == 9
    assert "[MASK]" * 8 in steps[1], "a block was begun before the one in front of it was done"
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    assert generate(rack, "def f", Sampling(length=19, steps=9, temperature=1.0))["after"] == made["after"]


def test_time_as_depth_leaves_early(micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(micro(training__mask_schedule_over="depth", training__rows=320), tmp_path / "run")
    rack = load_rack(RunDirectory(tmp_path / "run"), torch.device("cpu"))
    used: list[int] = []
    forward = StageModules.forward
    monkeypatch.setattr(
        StageModules, "forward", lambda self, *a, **k: used.append(self.depth) or forward(self, *a, **k)
    )
    text = "import [MASK*20]"
    assert not generate(rack, text, Sampling(exit="auto"))["notes"]
    assert len(used) < 2 * 20
    assert used[:2] == [0, 1], "much is masked: the last stage's fractions"
    assert used[-2:] == [0, 0], "little is masked: the first stage's"
    used.clear()
    generate(rack, text, Sampling(exit="last"))
    assert used == [0, 1] * 20


def test_linear_attention_learns_causally(micro: Micro, tmp_path: Path) -> None:
    config = micro(
        model__attention="linear", model__feature_map="performer", training__objective="clm", training__block_size=2
    )
    run(config, tmp_path / "run")
    rack = load_rack(RunDirectory(tmp_path / "run"), torch.device("cpu"))
    result = evaluate_rack(rack, rack.data.held_out)
    assert result["likelihood"] == "exact"
    assert 0 < result["bits_per_byte"] < 7
    grown = generate(rack, "def ", Sampling(length=12, order="random"))
    assert grown["after"].startswith("def ")
    assert grown["notes"] == ["--order is unused: a causal rack adds one token after another"]
    with raises_naming(UsageError, "training.objective"):
        generate(rack, "a [MASK]")


def test_contradictions_are_refused_and_idle_settings_told() -> None:
    def made(**settings: object) -> StackWiseConfig:
        return StackWiseConfig.from_preset("micro", {k.replace("__", "."): v for k, v in settings.items()})

    for wrong, said in (
        ({"model__attention": "mha", "model__n_kv_heads": 1}, "both are one setting"),
        ({"model__attention": "gqa"}, "needs kv_heads"),
        ({"model__attention": "mla", "model__rope_head_dim": 3}, "even width"),
        ({"training__diffusion_block": 5}, "does not divide training.seq_len 32"),
        ({"model__time_embedding": "learned", "training__objective": "clm"}, "clm masks nothing"),
    ):
        with pytest.raises(ConfigError, match=said):
            made(**wrong)
    lines = unused_settings(made(training__diffusion_block=8, training__objective="clm"))
    assert [line.split()[0] for line in lines] == ["training.diffusion_block"]
    lines = unused_settings(made(model__kv_rank=4, model__random_features=3, model__time_embedding_dim=9))
    assert lines == [
        "model.kv_rank is unused: model.attention is mha",
        "model.random_features is unused: model.attention is mha",
        "model.time_embedding_dim is unused: model.time_embedding is none",
    ]
