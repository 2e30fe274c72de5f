"""Suites of tasks that a rack is judged by, beside its held-out figures: language modelling, reasoning, GLUE."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.errors import UsageError
from stackwise.files import expanded
from stackwise.pipeline.device import resolve_device
from stackwise.pipeline.run import RunDirectory

if TYPE_CHECKING:
    from stackwise.pipeline.committed.load import CommittedRack

SUITES = ("lm", "reasoning", "glue")


@dataclass(frozen=True)
class SuiteOptions:
    """What of suites is run.

    Args:
        suites: Of `SUITES`.
        data: Text of the suite lm; empty: the run's held-out text.
        tasks: Tasks of reasoning or glue; empty: all that there are.
        task_path: Tasks' YAML files of reasoning; the folder of GLUE's folders.
        stride: Of lm: tokens between windows; None: half a row.
        limit: Documents, or rows of a task, at most; None: all.
        seeds: Of glue: runs of each task.
        settings: Of glue's runs, by dotted key.
        out: Where glue's runs and files go; None: `suites/glue` in the run, or beside the model's name under runs/.
        device: Where it runs.
    """

    suites: tuple[str, ...]
    data: Sequence[str] = ()
    tasks: tuple[str, ...] = ()
    task_path: Path | None = None
    stride: int | None = None
    limit: int | None = None
    seeds: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    out: Path | None = None
    device: str = "auto"


def run_suites(
    run: RunDirectory | None, model: str | None, options: SuiteOptions, say: Callable[[str], None]
) -> dict[str, Any]:
    """The figures of a run or a pretrained model on some suites, by suite.

    Args:
        run: A finished run; None: `model`.
        model: A directory of Hugging Face's layout, or an export.
        say: Called with a line for each thing done, or that the model lacks.

    Raises:
        NotFound: A run, model, folder or task that is not there.
        UsageError: A suite needs something that is not given, or that the rack cannot do.
    """
    from stackwise.pipeline.committed.load import load_model, load_rack  # torch comes with it

    device = resolve_device(options.device)
    rack = load_rack(run, device) if run is not None else load_model(str(model), device, say)
    results: dict[str, Any] = {}
    for suite in options.suites:
        match suite:
            case "lm":
                results[suite] = _language_modelling(rack, options, say)
            case "reasoning":
                from stackwise.pipeline.suites.harness import REASONING, run_tasks
                from stackwise.pipeline.suites.scoring import Scorer

                tasks = options.tasks or REASONING
                results[suite] = run_tasks(Scorer(rack), tasks, folder=options.task_path, limit=options.limit)
            case "glue":
                results[suite] = _glue(rack, run, model, options, say)
    return results


def _language_modelling(rack: CommittedRack, options: SuiteOptions, say: Callable[[str], None]) -> dict[str, Any]:
    from stackwise.pipeline.committed.use import prepared
    from stackwise.pipeline.suites.harness import language_modelling
    from stackwise.pipeline.suites.scoring import Scorer

    scorer = Scorer(rack)

    def report(done: int, documents: int) -> None:
        say(f"lm: {done:,} of {documents:,} documents")

    how: dict[str, Any] = {"stride": options.stride, "limit": options.limit, "progress": report}
    if not options.data:
        return language_modelling(scorer, rack.data.held_out, **how)
    with prepared(rack, list(options.data)) as text:
        return language_modelling(scorer, text.held_out, **how)


def _glue(
    rack: CommittedRack, run: RunDirectory | None, model: str | None, options: SuiteOptions, say: Callable[[str], None]
) -> dict[str, Any]:
    from stackwise.pipeline.suites.glue import GlueOptions, glue

    if options.task_path is None:
        raise UsageError("suite glue: its data is not said", hint="--task-path names the folder of GLUE's folders")
    weights = str(run.path.absolute() if run is not None else expanded(str(model)).absolute())
    out = options.out or (
        run.path / "suites" / "glue" if run is not None else Path("runs") / f"{Path(weights).name}-glue"
    )
    glue_options = GlueOptions(options.task_path, out, options.tasks, tuple(range(options.seeds)), options.settings)
    return glue(rack, weights, dataclasses.replace(glue_options, device=options.device), say)
