"""Stages drawn to a teacher: what they are given is the teacher's; swapped, killed, run again; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stackwise.data.tokenizer import bytes_tokenizer
from stackwise.errors import NotFound, UsageError
from stackwise.store import ActivationStore
from tests.conftest import Micro, run
from tests.pipeline.storm import killed
from tests.pipeline.test_initial import configuration
from tests.pipeline.test_run import weights
from tests.pretrained.models import make

TOP_K = 8


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of another width and depth, which knows more ids than the student."""
    directory = tmp_path_factory.mktemp("teacher")
    make("llama", directory, vocab_size=300, hidden_size=48, num_hidden_layers=4)
    (directory / "tokenizer.json").write_text(bytes_tokenizer().json)
    return directory


def settings(teacher: Path, **more: Any) -> dict[str, Any]:
    distillation = {"distillation__teacher": str(teacher), "distillation__top_k": TOP_K}
    return distillation | {"training__objective": "clm", "training__fusion": "trainable"} | more


def test_a_stage_is_given_what_transformers_computes(teacher: Path, micro: Micro, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = micro(**settings(teacher, store__codec="fp32", store__keep="all"))
    done = run(config, tmp_path / "run")[-1]
    # What a teacher draws is scored as what its objective asks for: a causal rack by its exact likelihood.
    assert done["evaluation"]["likelihood"] == "exact"
    assert done["evaluation"]["bits_per_byte"] > 0
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    with ActivationStore(tmp_path / "run" / "store", create=False) as store:
        infos = {(info.depth, info.shape[-1]): info for info in store.boundaries()}
        tokens = _read(store, infos[0, 1].id)[..., 0].long()
        with torch.no_grad():
            outputs = model(tokens, output_hidden_states=True)
        torch.testing.assert_close(_read(store, infos[2, 48].id), outputs.hidden_states[2], rtol=1e-4, atol=1e-5)
        kept = _read(store, infos[5, 2 * TOP_K].id)
        expected = outputs.logits[..., :258].topk(TOP_K)
        torch.testing.assert_close(kept[..., :TOP_K], expected.values, rtol=1e-4, atol=1e-5)
        assert (kept[..., TOP_K:].long() == expected.indices).float().mean() > 0.999, "but for ties"


def _read(store: ActivationStore, boundary: str) -> torch.Tensor:
    with store.reader(boundary) as reader:
        return reader.read(np.arange(64)).float()


def test_swapped_and_resident_are_the_same_and_nothing_is_trained_twice(
    teacher: Path, micro: Micro, tmp_path: Path
) -> None:
    for swap in ("never", "always"):
        config = micro(
            **settings(teacher, training__swap=swap, training__steps=8, store__path=str(tmp_path / swap / "store"))
        )
        run(config, tmp_path / swap)
    assert weights(tmp_path / "never") == weights(tmp_path / "always")
    config = micro(**settings(teacher, training__steps=8, store__path=str(tmp_path / "never" / "store")))
    events = run(config, tmp_path / "again")
    assert [event["stage"] for event in events if event["event"] == "reused"] == [0, 1, 2]
    other = micro(
        **settings(
            teacher, training__steps=8, store__path=str(tmp_path / "never" / "store"), distillation__match="cosine"
        )
    )
    assert not [event for event in run(other, tmp_path / "other") if event["event"] == "reused"]


def test_a_killed_run_ends_with_the_same_weights(teacher: Path, micro: Micro, tmp_path: Path) -> None:
    config = micro(**settings(teacher, training__steps=40, training__checkpoint_steps=4))
    run(config, tmp_path / "undisturbed")
    killed(config, tmp_path / "run", 0, 2)
    assert weights(tmp_path / "run") == weights(tmp_path / "undisturbed")


def test_teachers_that_cannot_teach_are_refused(
    teacher: Path, checkpoints: Any, text: Path, micro: Micro, tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match=r"distillation\.teacher: .*nothing"):
        run(micro(**settings(tmp_path / "nothing")), tmp_path / "run")
    for wrong in (
        {"training__objective": "mask_diffusion"},
        {"distillation__at": [9]},
        {"training__seq_len": 128, "distillation__at": None},
    ):
        with pytest.raises(UsageError):
            run(micro(**settings(teacher, **wrong)), tmp_path / "run")
    make("bert", tmp_path / "bert", vocab_size=300).bert.save_pretrained(tmp_path / "headless")
    masked = {"training__objective": "mlm", "training__mode": "end_to_end"}
    with pytest.raises(UsageError, match="has no head"):
        run(micro(distillation__teacher=str(tmp_path / "headless"), **masked), tmp_path / "run")
    # Beside adapters no head trains: a layer towards another width would stay as it was drawn.
    wide = checkpoints("llama", hidden_size=64)
    beside = {"training.adapters": {}, "training.mode": "layerwise", "distillation.teacher": str(wide)}
    with pytest.raises(UsageError, match="width 64"):
        run(configuration(checkpoints("llama"), text, **beside), tmp_path / "run")
    assert not (tmp_path / "run").exists()
