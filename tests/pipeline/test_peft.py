"""Adapters in peft's layout, in and out: peft itself is the oracle."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stackwise.errors import ConfigError, NotFound, UsageError
from stackwise.inference.forward import LoadedModel
from stackwise.pipeline.committed.load import CommittedRack, load_model, load_rack
from stackwise.pipeline.committed.use import export_model, export_rack, export_run_adapters
from stackwise.pipeline.run import RunDirectory
from stackwise.pretrained.writing import ExportOptions
from tests.conftest import raises_naming, run
from tests.pipeline.test_initial import configuration, loop_of_transformers, losses_of, wide_norm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning"),
]

CASES: dict[str, dict[str, Any]] = {
    "llama": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.mlp.up_proj": 3},
        "lora_dropout": 0.1,
        "task_type": "CAUSAL_LM",
    },
    "gpt2": {
        "target_modules": ["c_attn", "mlp.c_proj"],
        "use_rslora": True,
        "fan_in_fan_out": True,
        "layers_to_transform": [1, 2],
    },
    "bert": {"target_modules": ["query", "output.dense"]},
}
IDS = torch.randint(0, 298, (2, 20), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def base_of(name: str, checkpoints: Any) -> Path:
    """The directory of a checkpoint; of one that masks tokens with an id for them."""
    found: Path = checkpoints(name, **({"vocab_size": 310} if name == "bert" else {}))
    return found


def model_of(name: str) -> Any:
    """The class of transformers that a checkpoint's head is of."""
    return AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM


@pytest.fixture(scope="module")
def adapters(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Adapters that peft made over a checkpoint, of random weights, by the checkpoint's name."""
    from peft import LoraConfig, get_peft_model

    made: dict[str, Path] = {}

    def adapter(name: str, seed: int = 0, **settings: Any) -> Path:
        key = json.dumps([name, seed, settings])
        if key not in made:
            base, directory = base_of(name, checkpoints), tmp_path_factory.mktemp("adapter")
            config = LoraConfig(r=4, lora_alpha=8, **(CASES[name] | settings))
            model = get_peft_model(model_of(name).from_pretrained(base), config)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for key_of, parameter in model.named_parameters():
                    if "lora_" in key_of:
                        parameter.normal_(0, 0.05, generator=generator)
            model.save_pretrained(directory)
            made[key] = directory
        return made[key]

    return adapter


def ours(rack: CommittedRack) -> torch.Tensor:
    """Logits of a rack at all positions."""
    model = LoadedModel(rack.front(), list(rack.modules()), rack.objective.causal)
    with torch.no_grad():
        return model.logits_at(IDS, torch.arange(IDS.numel())).view(*IDS.shape, -1)


def peft_model(name: str, base: Path, *directories: Path) -> Any:
    """A model of transformers with adapters, the first ones merged."""
    from peft import PeftModel

    model = model_of(name).from_pretrained(base)
    for directory in directories[:-1]:
        model = PeftModel.from_pretrained(model, directory).merge_and_unload()
    return PeftModel.from_pretrained(model, directories[-1]).eval()


def logits(model: Any) -> torch.Tensor:
    """Logits of a model of transformers."""
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("name", CASES)
def test_in_and_out_again_they_compute_what_peft_does(
    name: str, checkpoints: Any, adapters: Any, text: Path, tmp_path: Path
) -> None:
    base, given = base_of(name, checkpoints), adapters(name)
    theirs, plain = logits(peft_model(name, base, given)), logits(model_of(name).from_pretrained(base))
    torch.testing.assert_close(ours(load_model(str(given), CPU, str)), theirs, rtol=0, atol=1e-5)
    assert (theirs - plain).abs().max() > 0.05
    # They train on, and what they came to is peft's again.
    more = {"training.steps": 3, "training.adapters": {}}
    run(configuration(given, text, **more), tmp_path / "run")
    rack = load_rack(RunDirectory(tmp_path / "run"), CPU)
    export_run_adapters(rack, tmp_path / "adapters", ExportOptions())
    trained = peft_model(name, base, tmp_path / "adapters")
    torch.testing.assert_close(ours(rack), logits(trained), rtol=0, atol=1e-5)
    assert (ours(rack) - theirs).abs().max() > 1e-3
    # Merged, they are what peft merges.
    export_rack(rack, tmp_path / "merged")
    merged = trained.merge_and_unload().state_dict()
    for key, tensor in model_of(name).from_pretrained(tmp_path / "merged").state_dict().items():
        torch.testing.assert_close(tensor, merged[key], rtol=0, atol=1e-6)


def test_several_over_one_model_are_added_up(checkpoints: Any, adapters: Any, text: Path, tmp_path: Path) -> None:
    base, first = checkpoints("llama"), adapters("llama")
    second = adapters("llama", 1, target_modules=["v_proj"], rank_pattern={}, alpha_pattern={})
    more = {"training.steps": 1, "training.mode": "layerwise", "training.learning_rate": 1e-12}
    run(configuration(first, text, **more, **{"init.adapters": [str(second)]}), tmp_path / "run")
    both = logits(peft_model("llama", base, first, second))
    torch.testing.assert_close(ours(load_rack(RunDirectory(tmp_path / "run"), CPU)), both, rtol=0, atol=1e-5)
    export_model(str(first), tmp_path / "out", ExportOptions(), str)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(exported), logits(peft_model("llama", base, first)), rtol=0, atol=1e-5)


def test_they_train_as_a_loop_of_peft_does(
    checkpoints: Any, adapters: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    monkeypatch.setattr(LlamaRMSNorm, "forward", wide_norm)
    base, given = checkpoints("llama"), adapters("llama", lora_dropout=0.0)
    config = configuration(given, text, precision="fp64", **{"training.adapters": {}})
    run(config, tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model = PeftModel.from_pretrained(model, given, is_trainable=True, autocast_adapter_dtype=False).double()
    losses = loop_of_transformers(model, directory, directory.config())
    np.testing.assert_allclose(losses_of(directory), losses, rtol=1e-6)
    export_run_adapters(load_rack(directory, CPU), tmp_path / "out", ExportOptions())
    model.save_pretrained(tmp_path / "theirs")
    trained, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "theirs"))
    assert trained.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(trained[key], tensor, rtol=1e-7, atol=1e-9)


def settings(**more: Any) -> Callable[[Path], None]:
    """Spoils adapter_config.json."""

    def spoil(directory: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | more))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """Spoils adapter_model.safetensors."""

    def spoil(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return spoil


def to_pickle(directory: Path) -> None:
    """Leaves adapters as peft saved them before safetensors."""
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps({}))


def cut_off(directory: Path) -> None:
    """Leaves half of the weights."""
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def renamed(old: str, new: str) -> Callable[[Path], None]:
    """Gives tensors other names."""
    return tensors(lambda held: {name.replace(old, new): tensor for name, tensor in held.items()})


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda directory: (directory / "adapter_model.safetensors").unlink(), "is missing"),
    "cut off": (cut_off, "is cut off"),
    "pickle": (to_pickle, "is a pickle"),
    "no json": (lambda directory: (directory / "adapter_config.json").write_text("{"), "cannot be read"),
    "a list": (lambda directory: (directory / "adapter_config.json").write_text("[]"), "is no mapping"),
    "dora": (settings(use_dora=True), "use_dora is True"),
    "bias": (settings(bias="all"), "bias is 'all'"),
    "modules": (settings(modules_to_save=["lm_head"]), "modules_to_save is ['lm_head']"),
    "another kind": (settings(peft_type="IA3"), "peft_type is 'IA3'"),
    "unknown": (settings(use_newest=True), "use_newest is True"),
    "changed weights": (settings(init_lora_weights="pissa"), "changes the weights beside"),
    "rank": (settings(r="many"), "r is 'many'"),
    "alpha": (settings(lora_alpha=float("nan")), "lora_alpha is nan"),
    "pattern": (settings(alpha_pattern={"(a+)+": 3}), "alpha_pattern"),
    "base": (settings(base_model_name_or_path="nobody/nothing"), "there is no such directory"),
    "no base": (settings(base_model_name_or_path=None), "names no model"),
    "layer": (renamed("layers.0", "layers.7"), "layers.7.mlp.down_proj is no layer of a block"),
    "name": (renamed("lora_A.weight", "lora_A.bias"), "is no low-rank pair"),
    "half": (tensors(lambda t: {n: x for n, x in t.items() if "lora_A" not in n}), "has lora_B alone"),
    "shape": (tensors(lambda t: {n: x.T.contiguous() for n, x in t.items()}), "cannot have"),
    "dtype": (tensors(lambda t: {n: x.to(torch.int8) for n, x in t.items()}), "is I8"),
    "empty": (tensors(lambda t: {}), "has no tensors"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_cannot_be_taken_up_is_refused(case: str, adapters: Any, text: Path, tmp_path: Path) -> None:
    spoil, said = SPOILED[case]
    shutil.copytree(adapters("llama"), tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    with pytest.raises((UsageError, NotFound)) as refused:
        configuration(tmp_path / "adapter", text)
    assert said in refused.value.message
    assert refused.value.exit_code == 2


def test_settings_beside_them_that_contradict_are_refused(checkpoints: Any, adapters: Any, text: Path) -> None:
    with raises_naming(ConfigError, "training.adapters.rank", 3, 4):
        configuration(adapters("llama"), text, **{"training.adapters": {"rank": 3}})
    with raises_naming(UsageError, adapters("llama")):  # those of another model
        configuration(checkpoints("gpt2"), text, **{"init.adapters": [str(adapters("llama"))]})
    with raises_naming(NotFound, "init.adapters", text):
        configuration(checkpoints("gpt2"), text, **{"init.adapters": [str(text)]})


def test_what_peft_cannot_hold_is_not_written(checkpoints: Any, adapters: Any, text: Path, tmp_path: Path) -> None:
    more = {"training.steps": 1, "training.adapters": {"rank": 2}, "init.adapters": [str(adapters("llama"))]}
    run(configuration(checkpoints("llama"), text, **more), tmp_path / "run")
    merged = load_rack(RunDirectory(tmp_path / "run"), CPU)
    plain = load_model(str(checkpoints("llama")), CPU, str)
    for rack, said in ((merged, "with other adapters in them"), (plain, "trained no adapters")):
        with pytest.raises(UsageError, match=said):
            export_run_adapters(rack, tmp_path / "out", ExportOptions())
        assert not (tmp_path / "out").exists()
