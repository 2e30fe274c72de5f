"""Adaptive fusion, as a worker does it: probe each section, train on the one that gains most on held-out loss.

In each round every section is unfrozen alone for a few steps, from the same weights and on the same rows, and what
held-out loss falls by is its gain; its weights are thrown away. The section that gained most then trains for the rest
of the round's steps. Each of these phases is the stage itself with fewer parts that train (`Stage.unfreezing`), so it
is swapped, checkpointed and resumed like any stage; what it came to is a small file, so none is done twice.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from stackwise import durable
from stackwise.config import StackWiseConfig
from stackwise.config.choices import AdaptiveFusion
from stackwise.config.schema import StageOverrides
from stackwise.errors import DamageError
from stackwise.model import part_digest
from stackwise.pipeline.job import Source, StageJob
from stackwise.pipeline.parts import load_part, save_part
from stackwise.pipeline.recipe import Span
from stackwise.pipeline.schedule import HEAD
from stackwise.pipeline.worker.engines import engine_of
from stackwise.pipeline.worker.held_out import held_out_loss
from stackwise.pipeline.worker.training import (
    REPORTED_AGAIN,
    StageContext,
    commit_stage,
    part_weights,
    trained,
)
from stackwise.training import checkpoint
from stackwise.training.checkpoint import reason
from stackwise.training.engine import State
from stackwise.training.trainer import Record

Section = tuple[int, int]  # first and last block


def fuse_adaptively(context: StageContext) -> None:
    """Train a stage that unfreezes one section at a time, and commit what of it trained.

    What a round trained stays where held-out loss fell by it; otherwise the weights are as before the round.

    Raises:
        InterruptedRun: Told to stop; the phase in hand is saved, those before are done.
    """
    job, fusion = context.job, _AdaptiveFusion(context)
    rounds = fusion.run()
    files = {HEAD: job.initial[HEAD]} | fusion.parts
    parts: dict[str, State] = {part: partial(_loaded, files[part]) for part in job.stage.holds if part in files}
    commit_stage(context, parts, fusion.steps, fusion.record, fusion=rounds)
    if context.ranks.main:
        checkpoint.remove(Path(job.checkpoints))


class _AdaptiveFusion:
    def __init__(self, context: StageContext) -> None:
        assert context.held_out is not None, "what it unfreezes is chosen by held-out loss"
        self._context, self._held_out = context, context.held_out
        self._job, self._config, self._budget = context.job, context.config, context.job.span.steps
        self._directory = Path(context.job.checkpoints)
        self._trained: dict[str, Source] = {}  # by the last phase
        self.parts: dict[str, Source] = {}  # the newest weights of each part that trained
        self.steps = 0  # taken so far, the probes' among them
        self.record = Record()  # of all phases, one after the other

    def run(self) -> dict[str, Any]:
        """Every round.

        Returns:
            `before`, the loss before; `rounds`, each with its probes, the section `chosen`, the loss after it, and
            whether what it trained was `kept`.
        """
        sections, fusion = self._job.stage.candidates, self._config.training.fusion
        assert isinstance(fusion, AdaptiveFusion)
        best = before = self._measured(sections[0])
        outcomes = []
        for number, (probing, training) in enumerate(fusion.allotment(self._budget, len(sections))):
            gains: dict[Section, float] = {}
            probes = []
            for section in sections:
                nats = self._phase(f"{number}-probe-{section[0]}", number, section, probing, keep=False)
                gains[section] = best - nats
                probes.append({"blocks": list(section), "nats": nats, "gain": gains[section]})
                self._emit_round("probe", number, section, gain=gains[section], nats=nats)
            chosen = max(gains, key=lambda section: gains[section])
            self._emit_round("unfrozen", number, chosen, gain=gains[chosen], nats=best)
            nats = self._phase(f"{number}-train", number, chosen, training, keep=True)
            self.record.held_out.append((self.steps, nats))
            outcomes.append({"probes": probes, "chosen": list(chosen), "nats": nats, "kept": nats < best})
            self._emit_round("fused", number, chosen, gain=best - nats, nats=nats)
            if nats < best:  # else the next round starts from the same weights as this one
                self.parts, best = self.parts | self._trained, nats
        return {"before": before, "rounds": outcomes}

    def _measured(self, section: Section) -> float:
        """The held-out loss of what it starts from."""
        result = self._finished("before")
        if result is None:
            job, config = self._phase_job("before", 0, section, 1, probe=True)
            with engine_of(replace(self._context, job=job, config=config)) as engine:
                result = {"nats": held_out_loss(engine, self._held_out).total}
            self._finish("before", result)
        return float(result["nats"])

    def _phase(self, name: str, number: int, section: Section, steps: int, *, keep: bool) -> float:
        """Train with one section unfrozen, or take what that came to (`keep`: no probe); the held-out loss after it."""
        result = self._finished(name)
        if result is not None:
            record = Record(**result["record"])
            at = {"step": self.steps + len(record.losses), "steps": self._budget}
            self._context.event("resumed", **at, losses=record.losses[-REPORTED_AGAIN:])
        else:
            job, config = self._phase_job(name, number, section, steps, probe=not keep)
            phase = replace(self._context, job=job, config=config, emit=partial(self._emit_shifted, self.steps))
            with engine_of(replace(phase, emit=self._context.emit)) as engine:
                trainer = trained(phase, engine)
                engine.settle()
                nats = held_out_loss(engine, self._held_out).total
                result = {"nats": nats, "record": asdict(trainer.record), "parts": {}}
                for part in job.stage.trains if keep else ():
                    if not self._context.ranks.main:
                        break
                    weights = part_weights(engine, part)
                    durable.write_durably(self._path(name, part), partial(save_part, weights))
                    result["parts"][part] = part_digest(weights)
            del engine, trainer  # before the next phase builds its own
            gc.collect()
            result = self._finish(name, result)
            record = Record(**result["record"])
        parts, recipe = result["parts"].items(), self._job.recipe_id
        self._trained = {part: Source(str(self._path(name, part)), digest, recipe) for part, digest in parts}
        self._add(record, steps)
        return float(result["nats"])

    def _phase_job(
        self, name: str, number: int, section: Section, steps: int, *, probe: bool
    ) -> tuple[StageJob, StackWiseConfig]:
        job = replace(
            self._job,
            stage=self._job.stage.unfreezing(*section),
            span=Span(0, steps, steps),
            initial=self._job.initial | self.parts,
            checkpoints=str(self._directory / name),
            round=number,
        )
        config = self._config.model_copy(deep=True)
        overrides = config.stages.setdefault(job.stage.depth, StageOverrides()).training
        overrides.steps = steps
        if probe:  # the same for every section, whatever happens on the way
            overrides.eval_every, overrides.patience, overrides.keep_best = None, None, False
        return job, config

    def _finished(self, name: str) -> dict[str, Any] | None:
        """What a phase came to, where it is done and its files are sound."""
        ranks = self._context.ranks
        shared: dict[str, Any] | None = ranks.shared(self._on_disk(name) if ranks.main else None)
        return shared

    def _on_disk(self, name: str) -> dict[str, Any] | None:
        try:
            result: dict[str, Any] = durable.read_json(self._directory / f"{name}.json")
            for part, digest in result.get("parts", {}).items():
                load_part(Source(str(self._path(name, part)), digest))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, DamageError) as error:
            self._context.warn(f"{self._directory / name} is damaged ({reason(error)}); it is done again")
            return None
        return result

    def _finish(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        """Note what a phase came to; what the main rank notes is what all go on with."""
        ranks = self._context.ranks
        if ranks.main:
            self._directory.mkdir(parents=True, exist_ok=True)
            durable.write_bytes(self._directory / f"{name}.json", json.dumps(result).encode())
            checkpoint.remove(self._directory / name)
        shared: dict[str, Any] = ranks.shared(result)
        return shared

    def _path(self, name: str, part: str) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        return self._directory / f"{name}-{part}.safetensors"

    def _add(self, record: Record, steps: int) -> None:
        """Append a phase's record; its steps follow those before."""
        whole = self.record
        whole.add([*record.losses, *[None] * (steps - len(record.losses))], record.terms)  # of one that ended early
        whole.seconds += record.seconds
        whole.waited += record.waited
        whole.tokens += record.tokens
        whole.held_out += [(self.steps + step, nats) for step, nats in record.held_out]
        for name, means in record.held_out_terms.items():
            whole.held_out_terms.setdefault(name, []).extend((self.steps + step, mean) for step, mean in means)
        whole.divergences += [entry | {"step": self.steps + entry["step"]} for entry in record.divergences]
        self.steps += steps

    def _emit_shifted(self, offset: int, event: dict[str, Any]) -> None:
        """An event of a phase as one of the stage: its steps follow those of the phases before."""
        moved = {key: event[key] + offset for key in ("step", "to") if isinstance(event.get(key), int)}
        self._context.emit(event | moved | ({"steps": self._budget} if "steps" in event else {}))

    def _emit_round(self, event: str, number: int, section: Section, *, gain: float, nats: float) -> None:
        self._context.event(event, step=self.steps, round=number, blocks=list(section), gain=gain, nats=nats)


def _loaded(source: Source) -> Mapping[str, Tensor]:
    tensors = load_part(source)
    assert tensors is not None, "what is fused was trained before"
    return tensors
