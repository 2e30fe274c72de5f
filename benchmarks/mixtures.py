"""Other ways to train a mixture of experts for the same products, and what a step of a rack costs.

Dense racks first, then the mixture that they make (`init.experts`): one rack (sparse upcycling, arXiv 2212.05055), or
one an expert, each on a cluster of the data (as MoE-DisCo, arXiv 2601.06857).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Result
from stackwise.config.yaml_files import dump
from stackwise.data import PreparedData
from stackwise.data.prepared import TOKENIZER
from stackwise.durable import write_durably
from stackwise.pipeline.experiments import ExperimentConfig, Trainer, run_single_experiment
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import schedule

JOINT = 0.5
"""Share of the products that the mixture is trained with, once its experts are there."""
CHUNK, SKETCH = 256, 64
"""Tokens that are put into a cluster together, and numbers that they are described by."""


def run_stagewise(
    config: ExperimentConfig, products: float, base: Mapping[str, Any], directory: Path, *, blocks: int = 2
) -> Result:
    """The mixture in stages of some blocks, one after the other, each with a head of its own."""
    stages = dict(base) | {"training.mode": {"name": "blockwise", "block_size": blocks}}
    return _run(config, products, stages, directory)


def run_begun(
    config: ExperimentConfig, products: float, base: Mapping[str, Any], directory: Path, data: Path, *, models: int
) -> Result:
    """Dense racks, then the mixture that begins as they are; all together with so many products.

    Args:
        config: The mixture.
        products: Those of training, of all.
        base: What the experiments share.
        directory: Where the runs go.
        data: The prepared data of the mixture.
        models: Dense racks; more than one: each of its own cluster of the data.
    """
    dense = dataclasses.replace(config, name=f"dense-of-{config.name}", gating_temp_schedule=None)
    files = clusters(data, directory / "clusters", models, base["seed"]) if models > 1 else [None]
    done = []
    for number, file in enumerate(files):
        of_one = dict(base) | {"moe_layers": []}
        if file is not None:
            of_one |= {"data.paths": [str(file)], "data.tokenizer": str(data / TOKENIZER), "data.max_bytes": None}
        share = (1 - JOINT) / len(files)
        done.append(_run(dense, share * products, of_one, directory / f"model-{number}"))
    first, *others = [run["run"] for run in done]
    begun = {"init.weights": first, "init.experts": others, "data.tokenizer": str(data / TOKENIZER)}
    mixture = _run(config, JOINT * products, dict(base) | begun, directory)
    together = {key: sum(run[key] for run in (*done, mixture)) for key in ("flops", "seconds")}
    return mixture | together


def _run(config: ExperimentConfig, products: float, base: Mapping[str, Any], directory: Path) -> Result:
    epochs = products / Trainer(config.settings(base), directory).epoch_flops
    return run_single_experiment(config, base_config=dict(base) | {"num_epochs": epochs}, directory=directory)


def clusters(data: Path, directory: Path, number: int, seed: int) -> list[Path]:
    """The training data by what it is like: k-means over the mean embedding of a chunk's tokens.

    The embedding is a random one: distances are then those of the chunks' counts of tokens, nearly.
    """
    from scipy.cluster.vq import kmeans2

    paths = [directory / f"{cluster}.jsonl" for cluster in range(number)]
    if all(path.exists() for path in paths):
        return paths
    prepared = PreparedData.open(data)
    generator = np.random.default_rng(seed)
    embedding_VK = generator.standard_normal((prepared.tokenizer.vocab_size, SKETCH)).astype(np.float32)
    chunks = prepared.train.n_samples(CHUNK)
    tokens_NS = prepared.train.samples(np.arange(chunks), CHUNK)
    sketch_NK = np.stack([embedding_VK[tokens_S].mean(0) for tokens_S in tokens_NS])
    sketch_NK /= np.linalg.norm(sketch_NK, axis=1, keepdims=True)
    _, cluster_N = kmeans2(sketch_NK, number, iter=20, minit="++", rng=generator)
    directory.mkdir(parents=True, exist_ok=True)
    for cluster, path in enumerate(paths):
        lines = [json.dumps({"input_ids": tokens_S.tolist()}) for tokens_S in tokens_NS[cluster_N == cluster]]
        text = "\n".join(lines) + "\n"
        write_durably(path, partial(Path.write_text, data=text, encoding="utf-8"))
    return paths


def relative_cost(one: Path, other: Path, repeats: int = 7) -> float:
    """Processor time of a training step of a run's rack, as a multiple of that of another run's.

    In turn, in one process: so that what else the machine does counts for neither.
    """
    steps = [_stepper(RunDirectory(path)) for path in (one, other)]
    for step in steps:
        step()
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for step, taken in zip(steps, seconds, strict=True):
            begun = time.process_time()
            step()
            taken.append(time.process_time() - begun)
    return min(seconds[0]) / min(seconds[1])  # what the machine does besides only adds


def _stepper(run: RunDirectory) -> Callable[[], None]:
    """A step of a run's first stage, from fresh weights, on random tokens."""
    import torch

    from stackwise.batch import TOKENS
    from stackwise.pipeline.trial import TrialJob, make_batch, make_engine, make_model

    config, manifest = run.config(), run.manifest()
    vocab, device = manifest["vocabulary"], torch.device("cpu")
    job = TrialJob(dump(config), schedule(config)[0], vocab["size"], vocab["mask"] or 0, 0)
    engine = make_engine(job, config, make_model(job, config), device)
    rows = int(config.training.batch_size)
    batch = make_batch(engine, job, config, rows)
    tokens_BS = torch.randint(0, vocab["size"], batch.tensors[TOKENS].shape, generator=torch.Generator().manual_seed(0))
    inputs = dict(batch.tensors) | {
        name: tokens_BS for name in batch.tensors if batch.tensors[name].dtype == torch.int64
    }
    batch = dataclasses.replace(batch, tensors=inputs)

    def step() -> None:
        engine.step(iter([batch]), 0, 1e-3)

    return step
