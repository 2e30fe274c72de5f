"""Every `auto` becomes a number before anything is hashed: by trial, or as it was found under the same conditions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.pipeline.fit import in_bytes
from stackwise.pipeline.plan import check_data
from stackwise.pipeline.runner import size_trial
from stackwise.pipeline.runner.size_trial import SmallRun
from stackwise.pipeline.trial import TrialJob, conditions, make_job, settle, wanted

Tell = Callable[..., None]
Auto = dict[str, Any]
"""What was found by the keys of the configuration, each with the conditions of its trial."""


def settle_block_size(
    config: StackWiseConfig,
    data: PreparedData,
    before: Auto,
    *,
    device: str,
    memory: int,
    scratch: Path,
    small_run: SmallRun,
    tell: Tell,
) -> Auto:
    """Find `training.block_size: auto`; returns what is known by now.

    Args:
        config: The configuration; the number is put into it.
        data: The prepared data.
        before: What was found before.
        device: The kind of device.
        memory: Bytes of its memory.
        scratch: Where small runs may live; those that are finished there are not done again.
        small_run: Runs one.
        tell: Told what happens, as an event's name and its values.

    Raises:
        ConfigError: With the size that was found, the settings do not fit each other.
    """
    if not config.finds_block_size:
        return before
    found = size_trial.sizes(config, check_data(config, data).size, data.id, device, memory)
    known = before.get(size_trial.KEY)
    if known is None or known["conditions"] != found.conditions:
        result = size_trial.try_sizes(config, found, scratch, small_run, tell)
        known = {"conditions": found.conditions, **result}
        text = size_trial.said(config, found, known)
    else:
        text = f"{size_trial.KEY}: auto is {known['blocks']}, as found before"
    tell("note", text=text)
    config.training.block_size = known["blocks"]
    config.validate()
    tell("settled", key=size_trial.KEY, value=known["blocks"])
    return before | {size_trial.KEY: known}


def settle_batches(
    config: StackWiseConfig,
    data: PreparedData,
    before: Auto,
    *,
    device: str,
    work: Callable[[TrialJob], list[dict[str, Any]]],
    tell: Tell,
) -> Auto:
    """Find every `batch_size: auto`; returns what is known by now.

    Args:
        config: The configuration; the numbers are put into it.
        data: The prepared data.
        before: What was found before.
        device: The kind of device.
        work: Has a trial done by a worker; returns its events.
        tell: Told what happens, as an event's name and its values.
    """
    vocabulary = check_data(config, data)
    samples = data.train.n_samples(config.training.seq_len)
    for key, stage in wanted(config).items():
        job = make_job(config, stage, vocabulary.size, vocabulary.mask, samples)
        name = conditions(config, job, device)
        known = before.get(key)
        if known is not None and known["conditions"] == name:
            tell("note", text=f"{key}: auto is {known['rows']}, as found before")
        else:
            tell("preparing", phase=f"trying {key}", done=0, total=None)
            (found,) = (event for event in work(job) if event["event"] == "trial")
            known = {"conditions": name, "rows": found["rows"]}
            room = f"{in_bytes(found['peak'])} of {in_bytes(found['limit'])} of {found['what']}"
            tell("note", text=f"{key}: auto is {found['rows']}, found by trial ({room})")
        settle(config, key, known["rows"])
        before = before | {key: known}
    return before
