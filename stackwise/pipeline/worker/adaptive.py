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
from dataclasses import asdict, dataclass, field, replace
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
from stackwise.pipeline.build import load_part, save_part
from stackwise.pipeline.job import Source, StageJob
from stackwise.pipeline.recipe import Span
from stackwise.pipeline.schedule import HEAD
from stackwise.pipeline.worker.training import (
    StageContext,
    commit_stage,
    engine_of,
    held_out_loss,
    part_weights,
    trained,
)
from stackwise.training import checkpoint
from stackwise.training.checkpoint import reason
from stackwise.training.engine import State
from stackwise.training.trainer import Record

Section = tuple[int, int]  # first and last block


@dataclass
class Fused:
    """What adaptive fusion came to.

    Args:
        rounds: The loss before (`before`), and of each round its probes, the section `chosen`, the loss after it, and
            whether what it trained was `kept`.
    """

    parts: dict[str, Source] = field(default_factory=dict)  # the newest weights of each part that trained
    steps: int = 0  # steps taken, the probes' among them
    record: Record = field(default_factory=Record)
    rounds: dict[str, Any] = field(default_factory=dict)


def fuse_stage(context: StageContext) -> None:
    """Train a stage that unfreezes one section at a time, and commit what of it trained.

    What a round trained stays where held-out loss fell by it; otherwise the weights are as before the round.

    Raises:
        InterruptedRun: Told to stop; the phase in hand is saved, those before are done.
    """
    job = context.job
    fused = _Fusion(context).run()
    files = {HEAD: job.initial[HEAD]} | fused.parts
    parts: dict[str, State] = {part: partial(_loaded, files[part]) for part in job.stage.holds if part in files}
    commit_stage(context, parts, fused.steps, fused.record, fusion=fused.rounds)
    checkpoint.remove(Path(job.checkpoints))


class _Fusion:
    def __init__(self, context: StageContext) -> None:
        assert context.held_out is not None, "what it unfreezes is chosen by held-out loss"
        self._context, self._held_out = context, context.held_out
        self._job, self._config, self._steps = context.job, context.config, context.job.span.steps
        self._directory = Path(context.job.checkpoints)
        self._done = Fused()
        self._trained: dict[str, Source] = {}

    def run(self) -> Fused:
        job, done = self._job, self._done
        sections = job.stage.candidates
        before = self._measured(sections[0])
        done.rounds = {"before": before, "rounds": []}
        fusion = self._config.training.fusion
        assert isinstance(fusion, AdaptiveFusion)
        rounds = fusion.allotment(self._steps, len(sections))
        for number, (probing, training) in enumerate(rounds):
            gains: dict[Section, float] = {}
            probes = []
            for section in sections:
                nats = self._phase(f"{number}-probe-{section[0]}", number, section, probing, keep=False)
                gains[section] = before - nats
                probes.append({"blocks": list(section), "nats": nats, "gain": gains[section]})
                self._emit_round("probe", number, section, gain=gains[section], nats=nats)
            chosen = max(gains, key=lambda section: gains[section])
            self._emit_round("unfrozen", number, chosen, gain=gains[chosen], nats=before)
            nats = self._phase(f"{number}-train", number, chosen, training, keep=True)
            done.record.held_out.append((done.steps, nats))
            outcome = {"probes": probes, "chosen": list(chosen), "nats": nats, "kept": nats < before}
            done.rounds["rounds"].append(outcome)
            self._emit_round("fused", number, chosen, gain=before - nats, nats=nats)
            if nats < before:
                done.parts, before = done.parts | self._trained, nats
        return done

    def _measured(self, section: Section) -> float:
        """The held-out loss of what it starts from."""
        known = self._known("before")
        if known is None:
            job, config = self._sub_job("before", 0, section, 1, probe=True)
            with engine_of(replace(self._context, job=job, config=config)) as engine:
                known = {"nats": held_out_loss(engine, self._held_out).total}
            self._finish("before", known)
        return float(known["nats"])

    def _phase(self, name: str, number: int, section: Section, steps: int, *, keep: bool) -> float:
        """Train with one section unfrozen, or take what that came to; the held-out loss after it.

        Args:
            keep: Whether what it trained stays; otherwise it is a probe.
        """
        done, known = self._done, self._known(name)
        if known is not None:
            record = Record(**known["record"])
            at = {"step": done.steps + len(record.losses), "steps": self._steps}
            self._context.emit(
                {"event": "resumed", "stage": self._job.stage.place, **at, "losses": record.losses[-1000:]}
            )
        else:
            job, config = self._sub_job(name, number, section, steps, probe=not keep)
            phase = replace(self._context, job=job, config=config, emit=partial(self._emit_shifted, done.steps))
            with engine_of(replace(phase, emit=self._context.emit)) as engine:
                trainer = trained(phase, engine)
                engine.settle()
                nats = held_out_loss(engine, self._held_out).total
                known = {"nats": nats, "record": asdict(trainer.record), "parts": {}}
                for part in job.stage.trains if keep else ():
                    weights = part_weights(engine, part)
                    durable.write_durably(self._path(name, part), partial(save_part, weights))
                    known["parts"][part] = part_digest(weights)
            del engine, trainer
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
        overrides = config.stages.setdefault(job.stage.depth, StageOverrides()).training
        overrides.steps = steps
        if probe:  # the same for every section, whatever happens on the way
            overrides.eval_every, overrides.patience, overrides.keep_best = None, None, False
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
            text = f"{self._directory / name} is damaged ({reason(error)}); it is done again"
            self._context.emit({"event": "warning", "stage": self._job.stage.place, "text": text})
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
        self._context.emit(event | moved | ({"steps": self._steps} if "steps" in event else {}))

    def _emit_round(self, event: str, number: int, section: Section | None, *, gain: float, nats: float) -> None:
        place, step = self._job.stage.place, self._done.steps
        blocks = None if section is None else list(section)
        where = {"stage": place, "step": step, "round": number, "blocks": blocks}
        self._context.emit({"event": event, **where, "gain": gain, "nats": nats})


def _loaded(source: Source) -> Mapping[str, Tensor]:
    tensors = load_part(source)
    assert tensors is not None, "what is fused was trained before"
    return tensors
