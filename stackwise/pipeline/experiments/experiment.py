"""Experiments with a mixture of experts by name, and runs of them over one store, each beside a dense rack.

DIRECTORY/store/                  the store of all of them
DIRECTORY/NAME-SEED/              a run's directory each: `stackwise status`, `report`, `generate` work on it
DIRECTORY/dense_model/            the dense rack: safetensors, config.json, tokenizer.json
DIRECTORY/experiment_results.json what is there so far
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.durable import write_json
from stackwise.errors import UsageError
from stackwise.pipeline.events import Event
from stackwise.pipeline.experiments.criteria import evaluate_success_criteria
from stackwise.pipeline.experiments.trainer import Trainer
from stackwise.pipeline.run import RunDirectory
from stackwise.shapes import finite

DENSE = "dense"
BASE: dict[str, Any] = {
    "seq_len": 256,
    "hidden_dim": 256,
    "num_layers": 6,
    "num_heads": 8,
    "ffn_dim": 1024,
    "num_epochs": 20,
    "learning_rate": 3e-4,
    "vocab_size": 10_000,
    "num_experts": 8,
    "moe_layers": [2, 4],
    "seed": 0,
    "device": "auto",
}
"""What experiments share, by default; `moe_layers` are the blocks that have experts, none in a dense rack."""
KEYS = {
    "seq_len": "training.seq_len",
    "hidden_dim": "model.d_model",
    "num_layers": "model.architecture.n_stacks",
    "num_heads": "model.n_heads",
    "ffn_dim": "model.d_ff",
    "learning_rate": "training.learning_rate",
    "vocab_size": "data.vocab_size",
    "seed": "seed",
    "device": "device",
}
PLAIN = {"training.mode": "end_to_end", "training.checkpoint_minutes": 2.0}
RESULTS = "experiment_results.json"


@dataclass(frozen=True)
class ExperimentConfig:
    """What one experiment has of its own.

    Args:
        name: What it is called, and its runs' directories.
        expert_dim: Width inside an expert; None: that of the dense feed-forward, so that a token of top 1 goes through
            as many parameters as in a dense rack.
        shared: Share of the dense feed-forward's width that a shared expert has; with `expert_dim` None the routed
            ones of a token have the rest together.
        top_k: Experts that a token goes to.
        aux_weight: Weight of the loss that balances experts.
        capacity_factor: Tokens that an expert takes in training, as a multiple of its even share; None: all.
        dropout: After attention and feed-forward.
        weight_decay: On matrices.
        label_smoothing: Share of a target that training spreads evenly over all ids; what is held out is not.
        batch_size: Rows in a step.
        early_stopping_patience: See `Trainer`.
        gating_temp_schedule: See `Trainer`.
    """

    name: str
    expert_dim: int | None = None
    shared: float = 0.0
    top_k: int = 1
    aux_weight: float = 0.01
    capacity_factor: float | None = 1.25
    dropout: float = 0.1
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    batch_size: int = 16
    early_stopping_patience: int = 0
    gating_temp_schedule: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return dataclasses.asdict(self)

    def settings(self, base_config: Mapping[str, Any]) -> StackWiseConfig:
        """The configuration of its run.

        Args:
            base_config: See `run_single_experiment`.

        Raises:
            ConfigError: A setting is faulty.
            UsageError: There is no such key.
        """
        base = BASE | dict(base_config)
        for key in base:
            if "." not in key and key not in BASE:
                text = f"base_config: there is no {key}; there are {', '.join(BASE)}"
                raise UsageError(text, hint="settings of StackWise are written with their section: training.steps")
        values = PLAIN | {KEYS[key]: value for key, value in base.items() if key in KEYS}
        values |= {"name": self.name, "model.dropout": self.dropout, "training.weight_decay": self.weight_decay}
        values |= {"training.batch_size": self.batch_size}
        values["training.objective"] = {"name": "clm", "label_smoothing": self.label_smoothing}
        if base["moe_layers"]:
            values |= {"model.ffn": self._experts(base)}
        values |= {key: value for key, value in base.items() if "." in key}
        return build(StackWiseConfig, {}, values, source=f"experiment {self.name}")

    def _experts(self, base: Mapping[str, Any]) -> dict[str, Any]:
        settings = {"experts": base["num_experts"], "at": base["moe_layers"], "expert_dim": self.expert_dim}
        if self.shared:
            if not 0 < self.shared < 1:
                raise UsageError(f"shared is {self.shared:g}: give a share of the width, below 1")
            both = max(1, round(base["ffn_dim"] * self.shared))
            routed = max(1, (base["ffn_dim"] - both) // self.top_k)
            settings |= {"shared_experts": 1, "shared_dim": both, "expert_dim": self.expert_dim or routed}
        settings |= {"top_k": self.top_k, "aux_weight": self.aux_weight, "capacity_factor": self.capacity_factor}
        return {"kind": "moe"} | {key: value for key, value in settings.items() if value is not None}


def get_experiment_configs() -> dict[str, ExperimentConfig]:
    """The experiments by name: baseline, top2, strong_reg, throughput_opt; shared, with an expert of all tokens."""
    configs = (
        ExperimentConfig("baseline"),
        ExperimentConfig("top2", top_k=2, capacity_factor=2.5),
        ExperimentConfig("strong_reg", dropout=0.2, weight_decay=1e-3, label_smoothing=0.1),
        ExperimentConfig("throughput_opt", batch_size=32),
        ExperimentConfig("shared", shared=0.75, capacity_factor=None, dropout=0.0),
    )
    return {config.name: config for config in configs}


def run_single_experiment(
    config: ExperimentConfig,
    train_dataset: str | Path | Sequence[str | Path] | None = None,
    val_dataset: float | None = None,
    base_config: Mapping[str, Any] | None = None,
    device: Any = "auto",
    *,
    directory: str | Path = "experiments",
    observe: Callable[[Event], None] | None = None,
) -> dict[str, Any]:
    """Run an experiment, or go on with it, or take it as it is where it is done.

    Args:
        config: The experiment.
        train_dataset: Files and folders of text; None: as `base_config` says (data.paths).
        val_dataset: Share of its documents that is held out, by their content; None: as `base_config` says.
        base_config: What experiments share: keys of `BASE`, and settings of StackWise by their dotted names, which win.
        device: cpu, cuda, or a torch.device.
        directory: Where the runs and their store are.
        observe: Called with every event.

    Returns:
        `config`, `metrics`, `params`; `active_params`, `flops` of training, `loss` (held-out cross entropy of the
        weights committed, in nats), `vocab_size`, `seconds`, `seed`, `run`.

    Raises:
        InterruptedRun: It was stopped, and its state saved: the same call goes on.
        StackWiseError: As `stackwise run`.
    """
    base, place = dict(base_config or {}), Path(directory)
    if train_dataset is not None:
        paths = [train_dataset] if isinstance(train_dataset, str | Path) else list(train_dataset)
        if not all(isinstance(path, str | Path) for path in paths):
            raise UsageError("train_dataset: give files and folders of text")
        base["data.paths"] = [str(path) for path in paths]
    if val_dataset is not None:
        base["data.held_out"] = val_dataset
    base = BASE | {"store.path": str((place / "store").absolute())} | base | {"device": str(device)}
    trainer = Trainer(
        config.settings(base),
        place / f"{config.name}-{base['seed']}",
        model_name=config.name,
        early_stopping_patience=config.early_stopping_patience,
        gating_temp_schedule=config.gating_temp_schedule,
        observe=observe,
    )
    trainer.train(base["num_epochs"])
    return {
        "config": config.to_dict(),
        "metrics": trainer.get_metrics(),
        "params": trainer.parameters(),
        "active_params": trainer.parameters(active=True),
        "flops": trainer.flops(),
        "loss": trainer.evaluate()["ce_loss"],
        "vocab_size": trainer.vocab_size,
        "seconds": trainer.seconds,
        "seed": base["seed"],
        "run": str(trainer.run.path),
    }


def main(
    base_config: Mapping[str, Any] | None = None,
    *,
    experiments: Sequence[ExperimentConfig] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    directory: str | Path = "experiments",
    device: Any = "auto",
) -> dict[str, Any]:
    """Every experiment beside dense racks of equal training, seed by seed, judged, and kept as it goes.

    A dense rack trains for as many epochs as make its products equal. A call that was stopped goes on.

    Args:
        base_config: See `run_single_experiment`.
        experiments: None: those of `get_experiment_configs`.
        seeds: At least two, or nothing passes.
        directory: Where everything goes.
        device: See `run_single_experiment`.

    Returns:
        By experiment its results `runs` and those of the `dense` rack, by seed, and the `verdict`: what
        DIRECTORY/experiment_results.json has.
    """
    place, base = Path(directory), dict(base_config or {})
    results: dict[str, Any] = {}
    for experiment in experiments or get_experiment_configs().values():
        entry = results[experiment.name] = {"runs": [], "dense": [], "verdict": None}
        for seed in seeds:
            seeded = base | {"seed": seed}
            mine = run_single_experiment(experiment, base_config=seeded, device=device, directory=place)
            dense = run_dense(experiment, mine, seeded, device=device, directory=place)
            entry["runs"].append(mine)
            entry["dense"].append(dense)
            write_json(place / RESULTS, finite(results))
        losses = [run["loss"] for run in entry["dense"]]
        products = min(run["flops"] for run in entry["dense"])
        verdicts = evaluate_success_criteria({experiment.name: entry["runs"]}, losses, products)
        entry["verdict"] = dataclasses.asdict(verdicts[experiment.name])
        write_json(place / RESULTS, finite(results))
    first = next(iter(results.values()))["dense"][0]
    save_dense(Path(first["run"]), place / "dense_model")
    return results


def run_dense(
    experiment: ExperimentConfig,
    result: Mapping[str, Any],
    base_config: Mapping[str, Any],
    *,
    device: Any = "auto",
    directory: str | Path = "experiments",
    epochs: float | None = None,
) -> dict[str, Any]:
    """The dense rack beside a result: of its width and depth, on the same rows, trained alike.

    Args:
        epochs: How many it trains for; None: as many as make the products of training equal.
    """
    base = dict(base_config) | {"moe_layers": []}
    dense = dataclasses.replace(experiment, name=f"{DENSE}-{experiment.name}", gating_temp_schedule=None)
    base["num_epochs"] = epochs or result["flops"] / Trainer(dense.settings(base), directory).epoch_flops
    return run_single_experiment(dense, base_config=base, device=device, directory=directory)


def save_dense(run: Path, out: Path) -> None:
    """Write a run's rack as safetensors beside config.json and tokenizer.json, unless it is there."""
    from stackwise.pipeline.committed.load import load_rack
    from stackwise.pipeline.committed.use import export_rack
    from stackwise.pipeline.device import resolve_device

    if not out.exists():
        export_rack(load_rack(RunDirectory(run), resolve_device("cpu")), out)
