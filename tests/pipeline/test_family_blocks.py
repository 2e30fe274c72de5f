"""Blocks as pretrained families have them, trained in stages: swapped and killed they end where resident ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Micro, run
from tests.pipeline.storm import kill_worker
from tests.pipeline.test_run import named, weights

BLOCKS: dict[str, dict[str, Any]] = {
    "post-norm": {
        "model__norm_place": "post",
        "model__norm": "layernorm",
        "model__positions": "learned",
        "model__position_offset": 2,
        "model__embedding_norm": True,
        "model__token_types": 2,
        "model__bias": True,
        "model__ffn": {"kind": "gelu", "activation": "gelu_tanh"},
        "model__head": "transform",
        "training__mode": "end_to_end",
    },
    "qk-norm": {
        "model__attention": {"kind": "gqa", "kv_heads": 1, "qk_norm": True, "bias": "qkv"},
        "model__head_size": 12,
        "model__rope_scaling": {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
        "model__tie_embeddings": False,
        "training__mode": "blockwise",
        "training__tied_head": "frozen",
    },
    "window": {
        "model__attention": {"kind": "mha", "window": 6, "window_blocks": [1]},
        "model__rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
        "model__head": {"kind": "linear", "norm": False},
        "training__objective": "clm",
        "data__within_documents": True,
    },
}


@pytest.mark.parametrize("name", BLOCKS)
def test_swapped_killed_and_resumed_the_weights_are_the_same(micro: Micro, tmp_path: Path, name: str) -> None:
    values = BLOCKS[name] | {"training__steps": 8, "training__accumulation": 2, "training__grad_clip": 0.3}
    resident = run(micro(**values, training__swap="never"), tmp_path / "resident")
    swapped = micro(**values, training__swap="always", training__swap_parts=2)
    last = len(named(resident, "committed")) - 1
    kill_worker(swapped, tmp_path / "swapped", last, 4)
    events = run(swapped, tmp_path / "swapped")
    assert any("is swapped" in event["text"] for event in named(events, "note"))
    assert named(events, "resumed"), "the stage went on from its checkpoint"
    assert weights(tmp_path / "swapped") == weights(tmp_path / "resident")
    assert named(events, "evaluation")[0]["result"] == named(resident, "evaluation")[0]["result"]
