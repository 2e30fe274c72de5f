"""The runner: stage after stage, each in a worker process of its own, and nothing trained twice.

It imports no torch. While one worker trains, the next one's imports are done, so a handoff costs next to nothing.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.loading import dump
from stackwise.config.notes import notes
from stackwise.data import PreparedData
from stackwise.durable import write_bytes
from stackwise.errors import NoSpaceError, NotFound
from stackwise.identity import content_id
from stackwise.pipeline.costs import check_fit, planned_notes, settle_windows
from stackwise.pipeline.decisions import RunPreview, moved_store, preview
from stackwise.pipeline.fit import in_bytes
from stackwise.pipeline.job import FinishJob
from stackwise.pipeline.plan import Plan, check_data
from stackwise.pipeline.reasons import History
from stackwise.pipeline.run import RunDirectory, with_absolute_paths
from stackwise.pipeline.runner.beginning import Beginning
from stackwise.pipeline.runner.crew import Crew
from stackwise.pipeline.runner.events import EventLog, Manifest, Observer, Observers
from stackwise.pipeline.runner.execution import Boundaries, Execution
from stackwise.pipeline.runner.opening import check_store, open_store
from stackwise.pipeline.runner.preparing import prepare_data
from stackwise.pipeline.runner.settling import settle_batches, settle_block_size
from stackwise.pipeline.runner.time_limit import TimeLimit
from stackwise.pipeline.tracking.track import Trackers
from stackwise.pipeline.tracking.trackers import check_installed

BEGINNINGS = ("training", "writing", "filling")
"""Events after which the store has something new that is this run's."""
TRIAL = "trial"
"""Among the logs, while sizes are tried: the small runs."""


class Runner:
    """Runs a configuration in a run directory.

    Args:
        config: The configuration.
        run: Where the run lives.
        observe: Told every event.
        resume_command: What an interruption tells the user to type.
        max_time: Seconds after which the run has to be over: before that, the step in hand is finished and saved,
            and `InterruptedRun` is raised; None: no limit.
    """

    def __init__(
        self,
        config: StackWiseConfig,
        run: RunDirectory,
        observe: Observer,
        *,
        resume_command: str = "stackwise run",
        max_time: float | None = None,
    ) -> None:
        self.config, self.run_directory = with_absolute_paths(config), run
        self._observe, self._resume_command = Observers([observe]), resume_command
        self._ends = None if max_time is None else time.monotonic() + max_time
        self._crew = Crew(self._observe, resume_command, None if max_time is None else TimeLimit(max_time))

    def run(self, only: int | None = None, *, window: int | None = None, dry: bool = False) -> dict[str, Any]:
        """Every stage, then the held-out evaluation; or one stage alone.

        Args:
            only: A depth: that stage alone, above committed ones.
            window: Its window; None: the first that is not committed.
            dry: Say which stages will be reused and which trained, why, and what room that takes, and stop. What is
                left behind is the prepared data, which a run reuses.

        Returns:
            The evaluation (empty for one stage alone, and for a dry run).

        Raises:
            StackWiseError: With the exit code that the command line ends with.
        """
        with self._crew.signals(), contextlib.ExitStack() as stack:
            self._tell("start", run=str(self.run_directory.path), name=self.config.name, stages=self.config.n_stages)
            for line in notes(self.config):
                self._tell("note", text=line)
            self._check_stage(only)
            check_installed(self.config)
            self.run_directory.check()
            check_store(self.run_directory.store_path(self.config))
            if dry:
                plan, _, history = self._look(stack)
                self._preview(plan, history)
                return {}
            plan, manifest, boundaries, history = self._open(stack, only)
            try:
                execution = Execution(self.run_directory, plan, history, manifest, boundaries, self._crew, self._tell)
                chosen = execution.chosen(only, window)
                decided = self._preview(plan, history)
                execution.begin(decided)
                manifest.save()
                # What was tried stands in the manifest by now.
                shutil.rmtree(self.run_directory.logs / TRIAL, ignore_errors=True)
                boundaries.register()
                begun = time.perf_counter()
                execution.go(decided, chosen)
                evaluation = self._finish(plan, manifest) if chosen is None else None
                self._tell("done", seconds=time.perf_counter() - begun, evaluation=evaluation)
            except BaseException:
                with contextlib.suppress(NoSpaceError):  # what ended the run says it already
                    manifest.save()
                raise
            manifest.save()
            return evaluation or {}

    def _check_stage(self, only: int | None) -> None:
        if only is not None and not 0 <= only < self.config.n_stages:
            raise NotFound(f"there is no stage {only}: the schedule has 0 to {self.config.n_stages - 1}")

    def _open(self, stack: contextlib.ExitStack, only: int | None) -> tuple[Plan, Manifest, Boundaries, History]:
        """Take the run directory and the store, and plan."""
        run = self.run_directory
        with Beginning(run, self.config, stack) as beginning:
            self._observe.add(beginning.observe)
            stack.callback(self._crew.close)
            data = self._data()
            plan, manifest, history = self._plan(data, stack, run.logs, run.store_path(self.config))
            self._check_stage(only)
        boundaries = Boundaries(run, plan, manifest, self._crew, self._tell)
        for observer in (
            stack.enter_context(EventLog(run.events_file)),
            stack.enter_context(Trackers(run, self.config, self._observe)),
            manifest.observe,
            # A stage is this run's from its first step on, a boundary from its first chunk: no `cache gc` takes them.
            lambda event: boundaries.register() if event["event"] in BEGINNINGS else None,
        ):
            self._observe.add(observer)
        write_bytes(run.config_file, dump(self.config).encode())
        return plan, manifest, boundaries, history

    def _data(self) -> PreparedData:
        data = prepare_data(self.config, self._tell, self._crew.check)
        check_data(self.config, data)
        return data

    def _look(self, stack: contextlib.ExitStack) -> tuple[Plan, Manifest, History]:
        """Plan without taking or making anything: where there is no store yet, one that is gone afterwards serves."""
        run, data = self.run_directory, self._data()
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stackwise-dry-run-")))
        stack.callback(self._crew.close)
        store = run.store_path(self.config)
        return self._plan(data, stack, scratch, store if store.exists() else scratch / "store")

    def _plan(
        self, data: PreparedData, stack: contextlib.ExitStack, logs: Path, store: Path
    ) -> tuple[Plan, Manifest, History]:
        """The plan on this machine, and what is known of the run from before."""
        run = self.run_directory
        before = run.manifest() if run.manifest_file.exists() else {"stages": []}
        history = History(before["stages"], run.earlier_config(), before.get("store"))
        ready = self._crew.start(self.config.device, logs / "workers.log")
        if self.config.precision == "auto":
            self.config.precision = ready["precision"]
        opened = stack.enter_context(open_store(store))
        known = {key: list(value) for key, value in before.get("rowsets", {}).items()}
        about = {key: ready[key] for key in ("device", "name", "memory")}
        self._tell("device", **about, precision=self.config.precision)
        device, memory = ready["device"], ready["memory"]
        settling: dict[str, Any] = {"device": device, "tell": self._tell}
        tried = before.get("auto", {})
        tried = settle_block_size(
            self.config, data, tried, memory=memory, scratch=logs / TRIAL, small_run=self._small_run, **settling
        )
        tried = settle_batches(self.config, data, tried, work=self._crew.work, **settling)
        for line in settle_windows(self.config, data, tried):
            self._tell("note", text=line)
        plan = Plan(self.config, data, opened, device=device, memory=memory, known_rowsets=known)
        return plan, Manifest(run, plan, before, tried), history

    def _small_run(self, config: StackWiseConfig, directory: Path, observe: Observer) -> dict[str, Any]:
        left = None if self._ends is None else max(0.0, self._ends - time.monotonic())
        run = RunDirectory(directory)
        return Runner(config, run, observe, resume_command=self._resume_command, max_time=left).run()

    def _preview(self, plan: Plan, history: History) -> RunPreview:
        """Say what becomes of each stage, and whether there is room for it."""
        decided = preview(plan, history)
        store = self.run_directory.store_path(plan.config)
        if warning := moved_store(history, store, decided.decisions):
            self._tell("warning", stage=None, text=warning)
        self._tell("plan", stages=[decision.plain() for decision in decided.decisions])
        todo = decided.training
        fit = check_fit(plan, todo, store)
        self._tell("fit", **fit)
        for depth, groups in fit["swapped"].items():
            turns = f"its blocks take turns in {groups} groups" if groups > 1 else "its blocks are one group"
            tight = fit["tight"].get(depth)
            more = "" if tight is None else f"; it takes about {in_bytes(tight)} all the same, more than it may"
            self._tell("note", text=f"stage {depth} is swapped: {turns} (training.swap){more}")
        for line in planned_notes(plan, fit["swapped"] if todo else None):
            self._tell("note", text=line)
        return decided

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
            self._tell("evaluation", reused=True, result=known["result"])
            if known.get("fill") is not None:
                self._tell("fill", **known["fill"])
            return dict(known["result"])
        manifest.save()
        export = str(run.export) if config.training.save_fused_checkpoints else None
        events = {e["event"]: e for e in self._crew.work(FinishJob(str(run.path), plan.device, export))}
        result = dict(events["evaluation"]["result"])
        fill = {key: events["fill"][key] for key in ("before", "after", "spans")} if "fill" in events else None
        manifest.save_evaluation(key, result, fill)
        return result

    def _tell(self, event: str, **values: Any) -> None:
        self._observe({"event": event, **values})
