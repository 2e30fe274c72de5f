"""The runner: stage after stage, each in a worker process of its own, and nothing trained twice.

It imports no torch. While one worker trains, the next one's imports are done, so a handoff costs next to nothing.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.config import StackWiseConfig
from stackwise.config.unused import unused_settings
from stackwise.config.yaml_files import dump
from stackwise.data import PreparedData
from stackwise.durable import write_bytes
from stackwise.errors import NotFound, StackWiseError
from stackwise.identity import content_id
from stackwise.pipeline.costs import check_fit, planned_notes, settle_windows
from stackwise.pipeline.decisions import RunPreview, moved_store, preview
from stackwise.pipeline.division import divide
from stackwise.pipeline.events import Observer, event
from stackwise.pipeline.initial import initial_sources, with_checkpoint
from stackwise.pipeline.job import FinishJob
from stackwise.pipeline.plan import Plan
from stackwise.pipeline.reasons import History
from stackwise.pipeline.rows import limit_passes
from stackwise.pipeline.run import RunDirectory, with_absolute_paths
from stackwise.pipeline.runner.auto import settle_batches, settle_block_size, settle_compile
from stackwise.pipeline.runner.execution import Boundaries, Execution
from stackwise.pipeline.runner.manifest import EventLog, Manifest, Observers, RunContext
from stackwise.pipeline.runner.preparation import Preparation, check_store, open_store, prepare_data
from stackwise.pipeline.runner.workers import TimeLimit, WorkerPool
from stackwise.pipeline.tracking.following import Trackers
from stackwise.pipeline.tracking.trackers import check_installed
from stackwise.words import size as in_bytes

if TYPE_CHECKING:
    from stackwise.pipeline.runner.hosts import Hosts

TAKEN_UP = ("training", "writing", "filling")  # events after which the store has something new that is this run's
TRIAL = "trial"  # among the logs, while sizes are tried: the small runs


class Runner:
    """Runs a configuration in a run directory.

    Args:
        max_time: Seconds after which the run has to be over: before that, the step in hand is finished and saved,
            and `InterruptedRun` is raised; None: no limit.
        waits: Wait for a stage that another run over the same store is training, and take what it comes to; else such
            a stage is refused.
        hosts: The other processes of the launcher that started this one; None: it was started alone.
    """

    def __init__(
        self,
        config: StackWiseConfig,
        run: RunDirectory,
        observe: Observer,
        *,
        resume_command: str = "stackwise run",
        max_time: float | None = None,
        waits: bool = False,
        hosts: Hosts | None = None,
    ) -> None:
        self._waits = waits
        self.config, self.run_directory = with_absolute_paths(with_checkpoint(config)), run
        self._observe, self._resume_command = Observers([observe]), resume_command
        self._limit = None if max_time is None else TimeLimit(max_time)
        self._hosts = hosts
        self._pool = WorkerPool(self.config, self._observe, resume_command, self._limit, hosts)

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
        with self._pool.signals(), contextlib.ExitStack() as stack:
            self._emit("start", run=str(self.run_directory.path), name=self.config.name, stages=self.config.n_stages)
            for line in unused_settings(self.config):
                self._emit("note", text=line)
            self._check_stage(only)
            check_installed(self.config)
            divide(self.config.model_copy(deep=True), None)  # before data is prepared
            self.run_directory.check()
            check_store(self.run_directory.store_path(self.config))
            if dry:
                plan, _, history = self._plan_apart(stack)
                self._show(plan, *self._preview(plan, history))
                return {}
            context, decided, fit = self._begin(stack, only)
            manifest, boundaries = context.manifest, Boundaries(context)
            # A stage is this run's from its first step on, a boundary from its first chunk: no `cache gc` takes them.
            self._observe.add(lambda new: boundaries.register() if new["event"] in TAKEN_UP else None)
            try:
                execution = Execution(context, boundaries, waits=self._waits)
                chosen = execution.chosen(only, window)
                self._show(context.plan, decided, fit)
                execution.begin(decided)
                manifest.save()
                # What was tried stands in the manifest by now.
                shutil.rmtree(self.run_directory.logs / TRIAL, ignore_errors=True)
                boundaries.register()
                begun = time.perf_counter()
                execution.go(decided, chosen)
                evaluation = self._finish(context) if chosen is None else None
                self._emit("done", seconds=time.perf_counter() - begun, evaluation=evaluation)
            except BaseException:
                with contextlib.suppress(OSError):  # a full disk, say: what ended the run says it already
                    manifest.save()
                raise
            manifest.save()
            return evaluation or {}

    def stop(self, text: str, *, at_once: bool = False) -> None:
        """From another thread: have the run save and end, by `InterruptedRun`; `at_once`, it ends without saving."""
        self._pool.stop(text)
        if at_once:
            self._pool.kill()

    def _check_stage(self, only: int | None) -> None:
        if only is not None and not 0 <= only < self.config.n_stages:
            raise NotFound(f"there is no stage {only}: the schedule has 0 to {self.config.n_stages - 1}")

    def _begin(self, stack: contextlib.ExitStack, only: int | None) -> tuple[RunContext, RunPreview, dict[str, Any]]:
        """Take the run directory and the store, plan, and look whether there is room: refused, it leaves nothing."""
        run = self.run_directory
        with Preparation(run, self.config, stack) as preparation:
            self._observe.add(preparation.observe)
            stack.callback(self._pool.close)
            data = prepare_data(self.config, self._emit, self._pool.check)
            if self._hosts is not None:
                self._hosts.check_data(data)
            plan, manifest, history = self._plan(data, stack, run.logs, run.store_path(self.config))
            self._check_stage(only)
            decided, fit = self._preview(plan, history)
        for observer in (
            stack.enter_context(EventLog(run)),
            stack.enter_context(Trackers(run, self.config, self._observe)),
            manifest.observe,
        ):
            self._observe.add(observer)
        write_bytes(run.config_file, dump(self.config).encode())
        return RunContext(run, plan, history, manifest, self._pool, self._emit), decided, fit

    def _plan_apart(self, stack: contextlib.ExitStack) -> tuple[Plan, Manifest, History]:
        """Plan without taking or making anything: where there is no store yet, one that is gone afterwards serves."""
        run, data = self.run_directory, prepare_data(self.config, self._emit, self._pool.check)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stackwise-dry-run-")))
        stack.callback(self._pool.close)
        store = run.store_path(self.config)
        return self._plan(data, stack, scratch, store if store.exists() else scratch / "store")

    def _plan(
        self, data: PreparedData, stack: contextlib.ExitStack, logs: Path, store: Path
    ) -> tuple[Plan, Manifest, History]:
        """The plan on this machine, and what is known of the run from before."""
        run, config = self.run_directory, self.config
        before = run.manifest() if run.manifest_file.exists() else {"stages": []}
        earlier = run.earlier_config()
        # A run that was moved or copied took its own store along: then the manifest's path is of no use.
        store_before = before.get("store") if earlier is None else str(run.store_path(earlier))
        history = History(before["stages"], earlier, store_before)
        machine = self._pool.start(logs / "workers.log")
        if config.precision == "auto":
            config.precision = machine["precision"]
        opened = stack.enter_context(open_store(store))
        rowsets = {key: list(value) for key, value in before.get("rowsets", {}).items()}
        device, memory = machine["device"], machine["memory"]
        self._emit("device", device=device, name=machine["name"], memory=memory, precision=config.precision)

        def small_run(trial: StackWiseConfig, name: str, observe: Observer) -> dict[str, Any]:
            left = None if self._limit is None else self._limit.seconds
            directory = RunDirectory(logs / TRIAL / name)
            return Runner(trial, directory, observe, resume_command=self._resume_command, max_time=left).run()

        auto = settle_block_size(config, data, before.get("auto", {}), machine, small_run, self._emit)
        auto = settle_batches(config, data, auto, device, self._pool.work, self._emit)
        auto = settle_compile(config, data, auto, machine, self._pool.work, self._emit)
        if line := limit_passes(config, data.train):
            self._emit("note", text=line)
        for line in divide(config, earlier):
            self._emit("note", text=line)
        for line in settle_windows(config, data, auto):
            self._emit("note", text=line)

        def hashed(done: int, parts: int) -> None:
            self._pool.check()
            self._emit("preparing", phase="reading init.weights", done=done, total=parts)

        sources = initial_sources(config, hashed)
        plan = Plan(config, data, opened, device=device, memory=memory, known_rowsets=rowsets, sources=sources)
        return plan, Manifest(run, plan, before, auto), history

    def _preview(self, plan: Plan, history: History) -> tuple[RunPreview, dict[str, Any]]:
        """What becomes of each stage, and the room that training takes. Raises StackWiseError: there is less."""
        decided = preview(plan, history)
        store = self.run_directory.store_path(plan.config)
        if warning := moved_store(history, store, decided.decisions):
            self._emit("warning", stage=None, text=warning)
        try:
            return decided, check_fit(plan, decided.training, store)
        except StackWiseError:
            self._show_stages(decided)  # what was asked for stands above the line that says why it cannot be
            raise

    def _show_stages(self, decided: RunPreview) -> None:
        self._emit("plan", stages=[decision.plain() for decision in decided.decisions])

    def _show(self, plan: Plan, decided: RunPreview, fit: dict[str, Any]) -> None:
        """Emit what `_preview` came to."""
        self._show_stages(decided)
        self._emit("fit", **fit)
        for depth, groups in fit["swapped"].items():
            turns = f"its blocks take turns in {groups} groups" if groups > 1 else "its blocks are one group"
            tight = fit["tight"].get(depth)
            more = "" if tight is None else f"; it takes about {in_bytes(tight)} all the same, more than it may"
            if (past := fit["past_cache"].get(depth)) is not None:
                more += f"; its files, {in_bytes(past)}, go past the page cache, which cannot keep them"
            self._emit("note", text=f"stage {depth} is swapped: {turns} (training.swap){more}")
        for line in planned_notes(plan, fit["swapped"] if decided.training else None):
            self._emit("note", text=line)

    def _finish(self, context: RunContext) -> dict[str, Any]:
        """Held-out evaluation, a passage filled in, the export if asked; once for the same weights."""
        run, plan, manifest = context.run, context.plan, context.manifest
        exports = plan.config.training.save_fused_checkpoints
        key = content_id(
            "evaluation",
            {
                "recipes": manifest.recipes(),
                "data": plan.data.id,
                "evaluation": plan.config.evaluation.model_dump(),
                "export": exports,
            },
        )
        before = manifest.evaluation(key)
        if before is not None:
            self._emit("evaluation", reused=True, result=before["result"])
            if before.get("fill") is not None:
                self._emit("fill", **before["fill"])
            return dict(before["result"])
        manifest.save()
        job = FinishJob(str(run.path), plan.device, str(run.export) if exports else None)
        events = {ended["event"]: ended for ended in self._pool.work(job)}
        result = dict(events["evaluation"]["result"])
        fill = {key: events["fill"][key] for key in ("before", "after", "spans")} if "fill" in events else None
        manifest.save_evaluation(key, result, fill)
        return result

    def _emit(self, kind: str, /, **values: Any) -> None:
        self._observe(event(kind, **values))
