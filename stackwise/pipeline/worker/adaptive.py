"""Adaptive fusion, as a worker does it: probe each section, train on the one that gains most on held-out loss.

In each round every section is unfrozen alone for a few steps, from the same weights and on the same rows, and what
held-out loss falls by is its gain; its weights are thrown away. The section that gained most then trains for the rest
of the round's steps. Each of these phases is the stage itself with fewer parts that train (`Stage.unfreezing`), so it
is swapped, checkpointed and resumed like any stage; what it came to is a small file, so none is done twice.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stackwise import durable
from stackwise.config import StackWiseConfig
from stackwise.config.schema import StageOverrides
from stackwise.errors import DamageError
from stackwise.model import part_digest
from stackwise.pipeline.build import load_part, save_part
from stackwise.pipeline.job import Source, StageJob
from stackwise.pipeline.recipe import Span
from stackwise.pipeline.worker.boundary import Emit
from stackwise.training import checkpoint
from stackwise.training.engine import Engine
from stackwise.training.stage import MeanLoss
from stackwise.training.trainer import Record, Trainer

Weights = Callable[[str], Mapping[str, torch.Tensor]]
"""The state dict of a part, as it is committed."""

Section = tuple[int, int]
"""First and last block."""


@dataclass(frozen=True)
class Means:
    """What a phase needs of the worker.

    Args:
        engaged: A job's engine, and the weights it holds by part.
        fit: Takes an engine to its job's last step.
        loss: The mean loss of an engine's weights on the held-out rows, in nats.
        emit: Told the events.
    """

    engaged: Callable[[StageJob, StackWiseConfig], AbstractContextManager[tuple[Engine, Weights]]]
    fit: Callable[[StageJob, StackWiseConfig, Engine, Emit], Trainer]
    loss: Callable[[Engine], MeanLoss]
    emit: Emit


@dataclass
class Fused:
    """What adaptive fusion came to.

    Args:
        parts: The newest weights of each part that trained.
        steps: Steps taken, the probes' among them.
        record: Of all phases, one after the other.
        told: The loss before (`before`), and of each round its probes, the section `chosen`, the loss after it, and
            whether what it trained was `kept`.
    """

    parts: dict[str, Source] = field(default_factory=dict)
    steps: int = 0
    record: Record = field(default_factory=Record)
    told: dict[str, Any] = field(default_factory=dict)


def fuse_adaptively(job: StageJob, config: StackWiseConfig, steps: int, means: Means) -> Fused:
    """Do the rounds of a job's stage.

    What a round trained stays where held-out loss fell by it; otherwise the weights are as before the round.

    Args:
        job: The job.
        config: Its configuration.
        steps: The budget.
        means: What it is done with.

    Raises:
        InterruptedRun: Told to stop; the phase in hand is saved, those before are done.
    """
    return _Fusion(job, config, steps, means).run()


class _Fusion:
    def __init__(self, job: StageJob, config: StackWiseConfig, steps: int, means: Means) -> None:
        self._job, self._config, self._steps, self._means = job, config, steps, means
        self._directory = Path(job.checkpoints)
        self._done = Fused()
        self._trained: dict[str, Source] = {}

    def run(self) -> Fused:
        job, done = self._job, self._done
        sections = job.stage.candidates
        before = self._measured(sections[0])
        done.told = {"before": before, "rounds": []}
        rounds = self._config.training.fusion.allotment(self._steps, len(sections))
        for number, (probing, training) in enumerate(rounds):
            gains: dict[Section, float] = {}
            probes = []
            for section in sections:
                nats = self._phase(f"{number}-probe-{section[0]}", number, section, probing, keep=False)
                gains[section] = before - nats
                probes.append({"blocks": list(section), "nats": nats, "gain": gains[section]})
                self._tell("probe", number, section, gain=gains[section], nats=nats)
            chosen = max(gains, key=lambda section: gains[section])
            self._tell("unfrozen", number, chosen, gain=gains[chosen], nats=before)
            nats = self._phase(f"{number}-train", number, chosen, training, keep=True)
            done.record.held_out.append((done.steps, nats))
            told = {"probes": probes, "chosen": list(chosen), "nats": nats, "kept": nats < before}
            done.told["rounds"].append(told)
            self._tell("fused", number, chosen, gain=before - nats, nats=nats)
            if nats < before:
                done.parts, before = done.parts | self._trained, nats
        return done

    def _measured(self, section: Section) -> float:
        """The held-out loss of what it starts from."""
        known = self._known("before")
        if known is None:
            job, config = self._sub_job("before", 0, section, 1, probe=True)
            with self._means.engaged(job, config) as (engine, _):
                known = {"nats": self._means.loss(engine).total}
            self._finish("before", known)
        return float(known["nats"])

    def _phase(self, name: str, number: int, section: Section, steps: int, *, keep: bool) -> float:
        """Train with one section unfrozen, or take what that came to; the held-out loss after it.

        Args:
            name: What the phase's files are called.
            number: The round.
            section: What is unfrozen.
            steps: For how long.
            keep: Whether what it trained stays; otherwise it is a probe.
        """
        done, known = self._done, self._known(name)
        if known is not None:
            record = Record(**known["record"])
            at = {"step": done.steps + len(record.losses), "steps": self._steps}
            self._means.emit(
                {"event": "resumed", "stage": self._job.stage.place, **at, "losses": record.losses[-1000:]}
            )
        else:
            job, config = self._sub_job(name, number, section, steps, probe=not keep)
            with self._means.engaged(job, config) as (engine, weights):
                trainer = self._means.fit(job, config, engine, partial(self._emit_shifted, done.steps))
                engine.settle()
                known = {"nats": self._means.loss(engine).total, "record": asdict(trainer.record), "parts": {}}
                for part in job.stage.trains if keep else ():
                    durable.write_durably(self._path(name, part), partial(save_part, weights(part)))
                    known["parts"][part] = part_digest(weights(part))
            del engine, weights, trainer
            gc.collect()
            self._finish(name, known)
            record = Record(**known["record"])
        made, recipe = known["parts"].items(), self._job.recipe_id
        self._trained = {part: Source(str(self._path(name, part)), digest, recipe) for part, digest in made}
        self._add(record, steps)
        return float(known["nats"])

    def _sub_job(
        self, name: str, number: int, section: Section, steps: int, *, probe: bool
    ) -> tuple[StageJob, StackWiseConfig]:
        job = replace(
            self._job,
            stage=self._job.stage.unfreezing(*section),
            span=Span(0, steps, steps),
            initial=self._job.initial | self._done.parts,
            checkpoints=str(self._directory / name),
            round=number,
        )
        config = self._config.model_copy(deep=True)
        own = config.stages.setdefault(job.stage.depth, StageOverrides()).training
        own.steps = steps
        if probe:  # the same for every section, whatever happens on the way
            own.eval_every, own.patience, own.keep_best = None, None, False
        return job, config

    def _known(self, name: str) -> dict[str, Any] | None:
        """What a phase came to, where it is done and its files are sound."""
        try:
            known: dict[str, Any] = durable.read_json(self._directory / f"{name}.json")
            for part, digest in known.get("parts", {}).items():
                load_part(Source(str(self._path(name, part)), digest))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, DamageError) as error:
            text = f"{self._directory / name} is damaged ({error}); it is done again"
            self._means.emit({"event": "warning", "stage": self._job.stage.place, "text": text})
            return None
        return known

    def _finish(self, name: str, known: dict[str, Any]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(self._directory / f"{name}.json", json.dumps(known).encode())
        checkpoint.remove(self._directory / name)

    def _path(self, name: str, part: str) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        return self._directory / f"{name}-{part}.safetensors"

    def _add(self, record: Record, steps: int) -> None:
        """Append a phase's record; its steps follow those before."""
        done, whole = self._done, self._done.record
        whole.add([*record.losses, *[None] * (steps - len(record.losses))], record.terms)  # of one that ended early
        whole.seconds += record.seconds
        whole.waited += record.waited
        whole.tokens += record.tokens
        whole.held_out += [(done.steps + step, nats) for step, nats in record.held_out]
        whole.divergences += [one | {"step": done.steps + one["step"]} for one in record.divergences]
        done.steps += steps

    def _emit_shifted(self, offset: int, event: dict[str, Any]) -> None:
        """An event of a phase as one of the stage: its steps follow those of the phases before."""
        moved = {key: event[key] + offset for key in ("step", "to") if isinstance(event.get(key), int)}
        self._means.emit(event | moved | ({"steps": self._steps} if "steps" in event else {}))

    def _tell(self, event: str, number: int, section: Section | None, *, gain: float, nats: float) -> None:
        place, step = self._job.stage.place, self._done.steps
        blocks = None if section is None else list(section)
        told = {"stage": place, "step": step, "round": number, "blocks": blocks, "gain": gain, "nats": nats}
        self._means.emit({"event": event, **told})
