"""End-to-end training in plain PyTorch: no engine, no store, a loop on a page. What every row stands beside."""

from __future__ import annotations

import math
import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, ParamSpec, TypeVar

import torch

from stackwise.config import StackWiseConfig
from stackwise.data import prepare
from stackwise.evaluation import HeldOut, Measure, evaluate
from stackwise.identity import derive_seed, generator
from stackwise.model import build_rack
from stackwise.model.rack import stages_of
from stackwise.objectives import MaskDiffusionObjective
from stackwise.pipeline.device import warm_up
from stackwise.pipeline.rows import assigner, choose_samples
from stackwise.training.kinds import AdamW

P = ParamSpec("P")
T = TypeVar("T")


def apart(task: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """Do a task in a process of its own, whose peak memory is the task's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *given, **named).result()


def resting() -> int:
    """Bytes that a process holds once torch is there, before it has anything to do."""
    warm_up()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train_plainly(config: StackWiseConfig) -> dict[str, Any]:
    """Train the whole rack on the rows that a run of this configuration sees, in an order of its own.

    Returns:
        `evaluation`, in the shape of `stackwise eval --json`; `seconds` of training; `peak_memory_bytes` of it, less
        what the process held before; `rows`.
    """
    before = resting()
    data, _ = prepare(config.data, model_vocab=config.model.vocab_size)
    training, seq_len = config.training, config.training.seq_len
    vocab = config.model.vocab_size or data.tokenizer.vocab_size
    mask = data.tokenizer.mask_id
    rack = build_rack(config.model, vocab, config.seed, seq_len)
    matrices = [p for p in rack.parameters() if p.ndim >= 2]
    others = [p for p in rack.parameters() if p.ndim < 2]
    adamw = training.optimizer
    assert isinstance(adamw, AdamW)
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=training.learning_rate,
        betas=(adamw.beta1, adamw.beta2),
        eps=adamw.eps,
        fused=True,
    )
    samples_R = choose_samples(config, data.train, 0)
    plan = assigner(config, 0)
    ids = data.train.sample_ids(seq_len)
    steps, batch = training.steps or 1, training.batch_size * training.accumulation
    begun = time.perf_counter()
    rack.train()
    seen = 0
    while seen < steps:
        order = generator(config.seed, "plain", seen).permutation(len(samples_R))
        for first in range(0, len(order) - batch + 1, batch):
            if seen == steps:
                break
            chosen = samples_R[order[first : first + batch]]
            tokens = torch.from_numpy(data.train.samples(chosen, seq_len))
            masks = torch.from_numpy(plan.masks(ids[chosen], order[first : first + batch] % training.masks_per_sample))
            logits = rack(tokens.masked_fill(masks, mask))[masks]
            loss = torch.nn.functional.cross_entropy(logits, tokens[masks])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(rack.parameters(), training.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = _rate(training.learning_rate, training.warmup, training.min_learning_rate, seen, steps)
            optimizer.step()
            seen += 1
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    held_out = data.held_out
    count = generator(config.seed, "held-out").permutation(held_out.n_samples(seq_len))
    indices = sorted(count[: config.evaluation.samples].tolist())
    rows = torch.tensor(indices).numpy()
    how = Measure(
        fractions=config.evaluation.fractions,
        batch_size=config.evaluation.batch_size,
        seed=derive_seed(config.seed, "evaluation"),
        unigram_counts=data.train.counts,
        vocab_size=vocab,
    )
    samples = HeldOut(held_out.samples(rows, seq_len), held_out.sample_bytes(rows, seq_len))
    result = evaluate(rack.front, stages_of(rack), samples, MaskDiffusionObjective(mask), how)
    return {"evaluation": result, "seconds": seconds, "peak_memory_bytes": peak, "rows": len(samples_R)}


def _rate(peak: float, warmup: float, end: float, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to `end` of the peak."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    gone = (step - rising) / max(1, steps - rising)
    return peak * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * gone)))
