"""The runner: stage after stage, each in a worker process of its own, and nothing trained twice.

It imports no torch. While one worker trains, the next one's imports are done, so a handoff costs next to nothing.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.checks import notes
from stackwise.config.loading import dump
from stackwise.data import PreparedData, prepare
from stackwise.durable import is_locked, write_bytes
from stackwise.errors import DamageError, InterruptedRun, NotFound, StackWiseError, UsageError
from stackwise.identity import content_id
from stackwise.pipeline.events import Event, EventLog, Manifest, Observer, Observers, TensorBoard
from stackwise.pipeline.fit import check_fit
from stackwise.pipeline.job import FinishJob
from stackwise.pipeline.plan import Plan, Versions, add_versions
from stackwise.pipeline.process import Worker
from stackwise.pipeline.recipe import codec_name, recipe_id, stage_steps
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import Stage
from stackwise.store import ActivationStore, CommittedStage

LOCK_PATIENCE = 20.0
"""Seconds to wait for the worker of a runner that was killed: it saves and leaves by itself."""


class Runner:
    """Runs a configuration in a run directory.

    Args:
        config: The configuration.
        run: Where the run lives.
        observe: Told every event.
        resume_command: What an interruption tells the user to type.
    """

    def __init__(
        self, config: StackWiseConfig, run: RunDirectory, observe: Observer, *, resume_command: str = "stackwise run"
    ) -> None:
        self.config, self.run_directory = config.model_copy(deep=True), run
        self.resume_command = resume_command
        self._observe = Observers([observe])
        self._busy: Worker | None = None
        self._spare: Worker | None = None
        self._stopping = False

    def run(self, only: int | None = None) -> dict[str, Any]:
        """Every stage, then the held-out evaluation; or one stage alone.

        Args:
            only: A depth: that stage alone, above committed ones.

        Returns:
            The evaluation (empty for one stage alone).

        Raises:
            StackWiseError: With the exit code that the command line ends with.
        """
        with self._signals():
            self._tell("start", run=str(self.run_directory.path), name=self.config.name, stages=self.config.n_stages)
            for line in notes(self.config):
                self._tell("note", text=line)
            data = self._prepare()
            if only is not None and not 0 <= only < self.config.n_stages:
                raise NotFound(f"there is no stage {only}: the schedule has 0 to {self.config.n_stages - 1}")
            self.run_directory.create()
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.run_directory.lock())
                stack.callback(self._close_workers)
                return self._locked(data, only, stack)

    def _locked(self, data: PreparedData, only: int | None, stack: contextlib.ExitStack) -> dict[str, Any]:
        run = self.run_directory
        before = run.manifest() if run.manifest_file.exists() else {"stages": []}
        self._spare = self._worker()
        ready = self._spare.ready()
        if self.config.precision == "auto":
            self.config.precision = ready["precision"]
        self.config.device = ready["device"] if self.config.device == "auto" else self.config.device
        store_path = run.store_path(self.config)
        store = stack.enter_context(ActivationStore(store_path))
        known = {key: list(value) for key, value in before.get("rowsets", {}).items()}
        plan = Plan(self.config, data, store, device=ready["device"], known_rowsets=known)
        manifest = Manifest(run, plan, before)
        log = stack.enter_context(EventLog(run.events_file))
        board = stack.enter_context(TensorBoard(run.tensorboard))
        for observer in (log, board, manifest.observe):
            self._observe.add(observer)
        write_bytes(run.config_file, dump(self.config).encode())
        self._tell(
            "device", **{key: ready[key] for key in ("device", "name", "memory")}, precision=plan.config.precision
        )
        try:
            return self._stages(plan, manifest, only)
        finally:
            manifest.save()

    def _stages(self, plan: Plan, manifest: Manifest, only: int | None) -> dict[str, Any]:
        versions: Versions = {}
        todo = self._pending(plan)
        self._tell("fit", **check_fit(plan, todo, Path(self.run_directory.path)))
        begun = time.perf_counter()
        for stage in plan.stages:
            if only is not None and stage.depth > only:
                break
            committed = self._stage(plan, manifest, stage, versions, only)
            add_versions(versions, committed)
            manifest.committed(stage, committed)
            self._retain(plan, manifest, stage, versions)
        if only is not None:
            self._tell("done", seconds=time.perf_counter() - begun, evaluation=None)
            return {}
        evaluation = self._finish(plan, manifest)
        self._tell("done", seconds=time.perf_counter() - begun, evaluation=evaluation)
        return evaluation

    def _pending(self, plan: Plan) -> list[Stage]:
        """The stages that are not known to be committed, before any of them is trained."""
        versions: Versions = {}
        for stage in plan.stages:
            found = plan.store.stage(recipe_id(plan.recipe(stage, versions)), check=False)
            if found is None:
                return plan.stages[stage.depth :]
            add_versions(versions, found)
        return []

    def _stage(
        self, plan: Plan, manifest: Manifest, stage: Stage, versions: Versions, only: int | None
    ) -> CommittedStage:
        """Reuse a stage, or train it."""
        recipe = plan.recipe(stage, versions)
        key = recipe_id(recipe)
        try:
            found = plan.store.stage(key)
        except DamageError as error:
            self._tell("warning", stage=stage.depth, text=f"{error.message}: stage {stage.depth} is trained again")
            plan.store.drop_stage(key)
            found, reason = None, "its committed files were damaged"
        else:
            reason = manifest.reason(stage, recipe)
        if found is not None:
            shutil.rmtree(self.run_directory.checkpoints(key), ignore_errors=True)  # of a kill just after the commit
            self._tell("reused", stage=stage.depth, recipe=key, reason="committed: the recipe is the same")
            if only == stage.depth and stage.depth + 1 < len(plan.stages):
                add_versions(versions, found)
                self._boundary(plan, plan.stages[stage.depth + 1], versions)
            return found
        if only is not None and stage.depth != only:
            raise UsageError(
                f"stage {stage.depth}, which stage {only} stands on, is not committed",
                hint=f"stackwise stage run --depth {stage.depth} --run {self.run_directory.path}",
            )
        steps = stage_steps(plan.config, stage.depth, plan.rowset(stage.rowset)[1])
        self._tell(
            "training", stage=stage.depth, recipe=key, reason=reason, steps=steps, trunk=plan.trunk(stage, versions)
        )
        following = plan.stages[stage.depth + 1] if stage.depth + 1 < len(plan.stages) else None
        hands_on = following is not None and following.reads_boundary and following.rowset == stage.rowset
        checkpoints = self.run_directory.checkpoints(key)
        self._wait_for_orphan(Path(plan.store.path) / "locks" / f"work-{key}.lock")
        for attempt in (1, 2):
            reads = self._boundary(plan, stage, versions) if stage.reads_boundary else None
            job = plan.job(
                stage,
                versions,
                checkpoints=checkpoints,
                train=plan.store.stage(key, check=False) is None,
                reads=reads,
                writes=stage.rowset if hands_on else None,
            )
            try:
                self._work(job.plain())
                break
            except StackWiseError as error:
                committed = plan.store.stage(key, check=False)
                if error.exit_code != DamageError.exit_code or attempt == 2:
                    raise
                self._heal(plan, stage, reads, error)
                if committed is not None:  # what failed was the boundary above: it is written when it is needed
                    return committed
        committed = plan.store.stage(key)
        assert committed is not None, "a worker that ended well has committed its stage"
        return committed

    def _heal(self, plan: Plan, stage: Stage, reads: str | None, error: StackWiseError) -> None:
        """Drop a boundary that turned out damaged, so that it is recomputed from the trunk."""
        if reads is None:
            raise error
        self._tell("warning", stage=stage.depth, text=f"{error.message}: boundary {stage.depth} is made again")
        plan.store.drop(reads)

    def _boundary(self, plan: Plan, stage: Stage, versions: Versions, rowset: int | None = None) -> str:
        """The boundary that enters a stage; made by forward passes from the nearest one below where it is gone."""
        number = stage.rowset if rowset is None else rowset
        trunk = plan.trunk(stage, versions)
        assert trunk is not None
        codec = codec_name(plan.config.store)
        info = plan.store.find(trunk=trunk, rowset=plan.rowset(number)[0], codec=codec)
        if info is not None and info.state == "complete":
            return info.id
        below = plan.stages[stage.depth - 1]
        reads = self._boundary(plan, below, versions, number) if below.reads_boundary else None
        self._tell("recomputing", stage=below.depth, text=f"boundary {stage.depth} is not in the store: made again")
        self._work(
            plan.job(
                below,
                versions,
                checkpoints=self.run_directory.path / "checkpoints",
                train=False,
                reads=reads,
                writes=number,
            ).plain()
        )
        info = plan.store.find(trunk=trunk, rowset=plan.rowset(number)[0], codec=codec)
        assert info is not None, "a worker that ended well has written its boundary"
        return info.id

    def _retain(self, plan: Plan, manifest: Manifest, stage: Stage, versions: Versions) -> None:
        """Drop the boundaries that `store.keep` does not keep, once nothing in this run reads or writes them."""
        manifest.note_boundaries(plan.store.boundaries())
        plan.store.register_run(
            str(self.run_directory.path.resolve()), recipes=manifest.recipes(), boundaries=manifest.boundaries()
        )
        keep = plan.config.store.keep
        if keep == "all":
            return
        following = plan.stages[stage.depth + 1] if stage.depth + 1 < len(plan.stages) else None
        needed = plan.boundary(following, versions) if following is not None else None
        others = {
            boundary
            for key, refs in plan.store.runs().items()
            if key != str(self.run_directory.path.resolve())
            for boundary in refs["boundaries"]
        }
        mine = [
            info
            for info in plan.store.boundaries()
            if info.id in manifest.boundaries() and info.depth <= stage.depth + 1 and info.id not in others
        ]
        idle = sorted((i for i in mine if needed is None or i.id != needed.id), key=lambda i: (i.depth, i.created))
        for info in idle[: len(idle) - (0 if keep == "none" else int(keep)) or None]:
            with contextlib.suppress(StackWiseError):  # someone else reads it: it goes another time
                plan.store.drop(info.id)
                self._tell("dropped", stage=info.depth, boundary=info.id, bytes=info.disk_bytes)

    def _finish(self, plan: Plan, manifest: Manifest) -> dict[str, Any]:
        """Held-out evaluation, a passage filled in, the export if asked; once for the same weights."""
        run, config = self.run_directory, plan.config
        key = content_id(
            "evaluation",
            {
                "recipes": manifest.recipes(),
                "data": plan.data.id,
                "evaluation": config.evaluation.model_dump(),
                "export": config.training.save_fused_checkpoints,
            },
        )
        known = manifest.evaluation(key)
        if known is not None:
            self._tell("evaluation", reused=True, result=known)
            return known
        manifest.save()
        export = str(run.export) if config.training.save_fused_checkpoints else None
        result: dict[str, Any] = {}
        for event in self._work(FinishJob(str(run.path), plan.device, export).plain()):
            if event["event"] == "evaluation":
                result = event["result"]
        manifest.save_evaluation(key, result)
        return result

    def _prepare(self) -> PreparedData:
        begun = time.perf_counter()

        def progress(phase: str, done: int, total: int | None) -> None:
            self._tell("preparing", phase=phase, done=done, total=total)

        data, reused = prepare(self.config.data, model_vocab=self.config.model.vocab_size, progress=progress)
        self._tell("data", reused=reused, seconds=time.perf_counter() - begun, **data.summary())
        return data

    def _work(self, job: dict[str, Any]) -> list[Event]:
        """Give a job to a worker and pass on its events."""
        if self._stopping:
            raise self._interrupted("stopped before the next step began")
        worker = self._spare or self._worker()
        self._busy, self._spare = worker, None
        events = []
        try:
            for event in worker.run(job):
                if event["event"] in ("step", "boundary", "resumed"):
                    self._start_spare()
                self._observe(event)
                if event["event"] not in ("step", "boundary"):
                    events.append(event)
        except InterruptedRun as error:
            raise self._interrupted(error.message) from None
        except StackWiseError as error:
            self._tell("failed", stage=job.get("stage", {}).get("depth"), text=error.message)
            raise
        finally:
            worker.close()
            self._busy = None
        return events

    def _worker(self) -> Worker:
        return Worker(self.config.device, self.run_directory.logs / "workers.log")

    def _start_spare(self) -> None:
        """Start the next worker, whose imports are done while this one works."""
        if self._spare is None and not self._stopping:
            self._spare = self._worker()

    def _close_workers(self) -> None:
        for worker in (self._busy, self._spare):
            if worker is not None:
                worker.close()

    def _wait_for_orphan(self, lock: Path) -> None:
        """A runner that was killed leaves a worker that saves and ends; give it the time."""
        deadline = time.monotonic() + LOCK_PATIENCE
        while is_locked(lock) and time.monotonic() < deadline and not self._stopping:
            time.sleep(0.05)

    def _interrupted(self, message: str) -> InterruptedRun:
        self._tell("interrupted", text=message)
        return InterruptedRun(message, hint=f"go on with: {self.resume_command}")

    def _tell(self, event: str, **values: Any) -> None:
        self._observe({"event": event, **values})

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM: the worker saves and ends. A second one stops at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self._stopping:
                for worker in (self._busy, self._spare):
                    if worker is not None:
                        worker.kill()
                raise InterruptedRun("stopped at once", hint=f"go on with: {self.resume_command}")
            self._stopping = True
            if self._busy is None:
                raise InterruptedRun("stopped", hint=f"go on with: {self.resume_command}")
            self._tell("stopping", text="finishing the step in hand and saving (again to stop at once)")
            self._busy.stop()

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
