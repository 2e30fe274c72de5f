"""Tables: the schedule, a run's state, held-out figures; and a passage before and after."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from stackwise import words
from stackwise.cli.drawing import Table, state
from stackwise.cli.output import Line, Styled
from stackwise.text import printable

if TYPE_CHECKING:
    from stackwise.config import StackWiseConfig
    from stackwise.pipeline.schedule import Stage

Row = dict[str, Any]


def listing(config: StackWiseConfig) -> list[Row]:
    """The schedule as plain data. `steps` is null where it follows from the amount of data.

    `fractions` are the masked fractions that a stage trains on, null where these are all; `own_rows` says that it
    trains on other rows than the stage below; `precisions` and `adapters` say how blocks are held where that is not
    as the run has it, adapters by their rank.
    """
    from stackwise.pipeline.recipe import known_steps
    from stackwise.pipeline.rows import stage_fractions
    from stackwise.pipeline.schedule import drawn_and_window, schedule, stage_below

    stages, rows = schedule(config), []
    drawn = [drawn_and_window(config, stage.rowset)[0] for stage in stages]
    for stage in stages:
        settings = config.stage_training(stage.depth)
        rows.append(
            {
                "depth": stage.depth,
                "window": stage.window,
                "blocks": [stage.first, stage.last],
                "reads": f"boundary {stage_below(stages, stage).depth + 1}" if stage.reads_boundary else "tokens",
                "own_rows": stage.place > 0 and drawn[stage.place] != drawn[stage.place - 1],
                "fractions": stage_fractions(config, stage.depth),
                "trains": list(stage.trains),
                "precisions": stage.precisions(stage.holds),
                "adapters": _adapters(stage),
                "steps": known_steps(config, stage),
                "steps_of_all_windows": settings.steps,
                "causal": stage.causal,
                "learning_rate": settings.learning_rate,
            }
        )
    return rows


def schedule_table(config: StackWiseConfig, source: str, stages: list[Row], notes: Iterable[str] = ()) -> list[Line]:
    """The schedule as a table, with a column for what some stage has of its own, and notes below it."""
    from stackwise.config import AUTO

    # A column that is empty in every row is left out.
    extra = {name: of for name, of in _EXTRA.items() if any(of(row) for row in stages)}
    header = ["stage", "blocks", "reads", "trains", *extra, "steps", "rate", "state", "step", "loss"]
    table = Table(*header, right=map(header.index, ("stage", "steps", "rate", "step", "loss")))
    for row in stages:
        loss = row.get("loss")
        table.add_row(
            stage_label(row, stages),
            words.span(*row["blocks"]),
            row["reads"] + (", rows of its own" if row["own_rows"] else ""),
            _parts(row["trains"]) + (", to be causal" if row["causal"] else ""),
            *(of(row) for of in extra.values()),
            _steps(row),
            words.rate(row["learning_rate"]),
            state(row.get("state", "–")),
            f"{row['step']:,}" if row.get("step") else "",
            f"{loss:.3f}" if loss is not None else "",
        )
    title = f"{config.name}: {words.plural(config.n_stages, 'stage')}"
    if config.windows > 1:
        title += f" in {words.plural(config.windows, 'window')}"
    elif config.has_windows and config.training.windows == AUTO:
        title += ", each in as many windows as store.max_bytes asks for, once the data is prepared"
    return [[Styled(f"{title} ({source})", "bold")], *table.lines(), *([f"note: {line}"] for line in notes)]


def stage_label(stage: Row, stages: list[Row]) -> str:
    """A stage's number, and its window's where there are several."""
    # With one window there is nothing to tell apart.
    several = any(other["window"] for other in stages if other["depth"] == stage["depth"])
    return f"{stage['depth']}, window {stage['window']}" if several else str(stage["depth"])


def _adapters(stage: Stage) -> dict[str, list[int]]:
    """Ranks of the adapters on each block that it holds."""
    held = ((block, stage.format(block).adapters) for block in (*stage.blocks, *stage.lookahead))
    return {block: [size.rank for size in sizes] for block, sizes in held if sizes}


def _steps(row: Row) -> str:
    if row["steps"]:
        return f"{row['steps']:,}"
    # A window's share goes by its rows, and these are known once the data is prepared.
    return f"of {row['steps_of_all_windows']:,}" if row["steps_of_all_windows"] else "by data"


def _fractions(row: Row) -> str:
    return "{:.2f}–{:.2f}".format(*row["fractions"]) if row["fractions"] else ""


def _held(row: Row) -> str:
    """Precisions and ranks of adapters by runs of blocks: 0–1 nf4, rank 8; 2 fp8."""
    kinds: dict[str, list[str]] = {}
    for block in dict.fromkeys([*row["precisions"], *row["adapters"]]):
        ranks = " and ".join(map(str, row["adapters"].get(block, ())))
        parts = [row["precisions"].get(block, ""), ranks and f"rank {ranks}"]
        kinds.setdefault(", ".join(filter(None, parts)), []).append(block)
    return "; ".join(f"{_blocks(blocks)} {kind}" for kind, blocks in kinds.items())


def _blocks(parts: list[str]) -> str:
    """Blocks by their numbers, in runs: 0–3, 6."""
    runs: list[list[int]] = []
    for index in sorted(int(part.rpartition(".")[2]) for part in parts):
        if runs and runs[-1][-1] + 1 == index:  # it goes on where the run before ends
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(words.span(run[0], run[-1]) for run in runs)


_EXTRA = {"fractions": _fractions, "blocks held in": _held}


def _parts(trains: list[str]) -> str:
    """What trains, in few words: front, blocks 0–1, head."""
    adapters = [int(part.rpartition(".")[2]) for part in trains if part.startswith("adapter.")]
    trains = [part for part in trains if not part.startswith("adapter.")]
    runs: dict[str, list[int]] = {}
    begun = ""
    for part in trains:
        if not part.startswith("block."):
            continue
        index = int(part.partition(".")[2])
        if not begun or runs[begun][-1] + 1 != index:
            begun = part
        runs.setdefault(begun, []).append(index)
    names = {part: f"block{'s' if len(run) > 1 else ''} {words.span(run[0], run[-1])}" for part, run in runs.items()}
    shown = [names.get(part, part) for part in trains if part in names or not part.startswith("block.")]
    if adapters:
        shown.insert(-1, f"adapters {words.span(min(adapters), max(adapters))}")
    return ", ".join(shown)


def status_table(value: dict[str, Any]) -> list[Line]:
    """A run's state as a table under a line, and its jobs under that."""
    stages = value["stages"]
    line: list[Styled | str] = [printable(value["run"]), "  ", state(value["state"])]
    if "preparing" in value:
        line += ["  ", _preparing(value["state"], **value["preparing"])]
        if not stages:  # there is no plan yet
            return [line]
    done = sum(stage["state"] == "done" for stage in stages)
    table = Table("stage", "blocks", "state", "step", "loss", "wait", "memory", "why", right=(0, 3, 4, 5, 6))
    for stage in stages:
        loss, wait, memory = stage["loss"], stage["wait_fraction"], stage["peak_memory_bytes"]
        table.add_row(
            stage_label(stage, stages),
            words.span(*stage["blocks"]),
            state(stage["state"]),
            f"{stage['step'] or 0:,}/{stage['steps']:,}",
            f"{loss:.3f}" if loss is not None else "",
            words.percent(wait) if wait is not None else "",
            words.size(memory) if memory is not None else "",
            stage["reason"] or "",
        )
    lines = [[*line, f"  {done} of {words.plural(len(stages), 'stage')} done"], *table.lines()]
    if "group" in value:
        lines += [[], *ranks_table(value["group"])]
    if value.get("tasks"):
        lines += [[], *tasks_table(value["tasks"])]
    if value.get("jobs"):
        jobs = Table("job", "of", "state")
        for job in value["jobs"]:
            jobs.add_row(f"{job['engine']} {job['job']}", job_name(job), state(job["state"]))
        lines += [[], *jobs.lines()]
    return lines


def ranks_table(group: Mapping[str, Any], most: int | None = None) -> list[Line]:
    """How the ranks of a stage fare, by rank.

    Args:
        group: As `status` has it; the slowest is the one that waits least for the others.
        most: Rows; of more ranks the slowest and the first are shown.
    """
    table = Table("rank", "tokens/s", "waits for data", "for ranks", "memory", "", right=(0, 1, 2, 3, 4))
    ranks, slowest = group["ranks"], group["slowest"]
    if most is not None and len(ranks) > most:
        first = [rank for rank in ranks if rank["rank"] != slowest][: most - 1]
        ranks = [rank for rank in ranks if rank["rank"] == slowest or rank in first]
    for rank in ranks:
        speed, wait, sync, memory = (
            rank.get(key) for key in ("tokens_per_second", "wait_fraction", "sync_fraction", "memory")
        )
        table.add_row(
            str(rank["rank"]),
            words.count(speed) if speed is not None else "",
            words.percent(wait) if wait is not None else "",
            words.percent(sync) if sync is not None else "",
            words.size(memory) if memory is not None else "",
            "slowest" if rank["rank"] == slowest else "",
        )
    if rest := len(group["ranks"]) - len(ranks):
        table.add_row("…", "", "", "", "", f"{rest} more", style="dim")
    return table.lines()


def tasks_table(value: Mapping[str, Any]) -> list[Line]:
    """The held-out loss of each task, a line a task that was learned, and what they come to."""
    names, losses = value["tasks"], value["losses"]
    table = Table("held-out loss after", *map(printable, names), right=range(1, len(names) + 1))
    learned = names if len(losses) > 1 else ["all tasks"]
    for name, row in zip(learned, losses, strict=False):
        table.add_row(printable(name), *(f"{loss:.4f}" for loss in row))
    figures = [f"{key.replace('_', ' ')} {value[key]:.4f}" for key in TASK_FIGURES if value[key] is not None]
    return [*table.lines(), [Styled(", ".join(figures), "dim")]]


TASK_FIGURES = ("average_loss", "forgetting", "forward_transfer")


def job_name(job: dict[str, Any]) -> str:
    """What a job does."""
    stage = "evaluation, report" if job["stage"] is None else f"stage {job['stage']}"
    return stage if job.get("window") is None else f"{stage}, window {job['window']}"


def _preparing(state: str, phase: str, done: int, total: int | None, failed: str = "") -> str:
    """What a run without a plan does, or did last."""
    from stackwise.pipeline.events import PHASES

    what = PHASES.get(phase, phase) + (f", {words.percent(done / total)}" if total else "")
    return what if state == "running" else f"while {what}" + (f": {failed}" if failed else "")


MADE = {"filled": "bold cyan", "right": "bold green", "wrong": "underline yellow"}
"""How text that the rack made is shown: as such, as it stood in the original, otherwise than there."""


def held_out_table(result: Mapping[str, Any]) -> list[Line]:
    """Held-out figures by depth, and the baselines under them."""
    from stackwise.report.held_out import footnote, rows

    columns, depths = rows(result)
    table = Table("held out", *columns, right=range(1, len(columns) + 1))
    for name, cells, kind in depths:
        baseline = kind == "baseline"
        style = "dim" if baseline else "bold" if kind == "last" else ""  # what the run came to stands out
        table.add_row(f"baseline: {name}" if baseline else name, *cells, style=style)
    return [*table.lines(), [Styled(footnote(result), "dim")]]


def suite_tables(results: Mapping[str, Any]) -> list[Line]:
    """The figures of suites of tasks, a table each."""
    lines: list[Line] = []
    for suite, result in results.items():
        table = Table(suite, "figure", "value", right=(2,))
        for task, name, value in _suite_rows(suite, result):
            table.add_row(task, name, value)
        lines += [*([[]] if lines else []), *table.lines()]
    return lines


def _suite_rows(suite: str, result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    if suite == "lm":
        yield from (("", name, _figure(value)) for name, value in result.items() if not isinstance(value, list))
        return
    tasks = result["tasks"] if suite == "glue" else result
    for task, figures in tasks.items():
        for name, value in figures.get("metrics", figures).items():
            if isinstance(value, Mapping):  # over seeds
                yield task, name, f"{value['mean']:.3f} ± {value['std']:.3f}"
            elif not name.startswith("examples"):
                yield task, name, _figure(value)
    if suite == "glue":
        yield "mean of tasks", "", f"{result['score']:.3f}"


def _figure(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def passage(fill: Mapping[str, Any]) -> list[Line]:
    """A passage with its holes, and as the rack filled them; what it made stands out."""
    before = [Styled(text, "dim cyan" * (text == "[MASK]")) for text in re.split(r"(\[MASK\])", fill["before"])]
    after = [Styled(text, MADE.get(kind, "")) for text, kind in fill.get("spans") or [[fill["after"], "given"]]]
    return [[Styled("--- before", "dim")], before, [Styled("--- after", "dim")], after, [Styled("---", "dim")]]
