"""What is known as tables: the schedule, a run's state, held-out figures; and a passage before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from stackwise import words
from stackwise.cli.output import plain, state, table
from stackwise.pipeline.events import PHASES

if TYPE_CHECKING:
    from rich.console import Console, Group, RenderableType
    from rich.table import Table

    from stackwise.config import StackWiseConfig
    from stackwise.pipeline.schedule import Stage

Row = dict[str, Any]


def listing(config: StackWiseConfig) -> list[Row]:
    """The schedule as plain data. `steps` is null where it follows from the amount of data.

    `fractions` are the masked fractions that a stage trains on, null where these are all; `own_rows` says that it
    trains on other rows than the stage below; `precisions` and `adapters` say how blocks are held where that is not
    as the run has it, adapters by their rank.
    """
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
                "steps": settings.steps if config.windows == 1 else None,
                "steps_of_all_windows": settings.steps,
                "causal_from": stage.causal_from,
                "learning_rate": settings.learning_rate,
            }
        )
    return rows


def schedule_table(config: StackWiseConfig, source: str, stages: list[Row], notes: Iterable[str] = ()) -> Group:
    """The schedule as a table, with a column for what some stage has of its own, and notes below it."""
    from rich.console import Group
    from rich.text import Text

    from stackwise.config import AUTO

    columns = ["blocks", "reads", "trains"]
    columns += [name for name, of in _EXTRA.items() if any(of(row) for row in stages)]
    header = ["stage", *columns, "steps", "rate", "state", "step", "loss"]
    shown = table(*header, right=tuple(header.index(name) for name in ("stage", "steps", "rate", "step", "loss")))
    for row in stages:
        loss = row.get("loss")
        cells = {
            "blocks": words.span(*row["blocks"]),
            "reads": row["reads"] + (", rows of its own" if row["own_rows"] else ""),
            "trains": _parts(row["trains"]) + ("" if row["causal_from"] is None else ", to be causal"),
        } | {name: of(row) for name, of in _EXTRA.items()}
        shown.add_row(
            stage_label(row, stages),
            *(cells[name] for name in columns),
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
    title = plain(f"{title} ({source})")
    below = [Text(f"note: {line}") for line in notes]
    return Group(Text.from_markup(f"[bold]{title}[/]"), shown, *below)


def stage_label(stage: Row, stages: list[Row]) -> str:
    """A stage's number, and its window's where there are several."""
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
        said = [row["precisions"].get(block, ""), ranks and f"rank {ranks}"]
        kinds.setdefault(", ".join(filter(None, said)), []).append(block)
    return "; ".join(f"{_blocks(blocks)} {kind}" for kind, blocks in kinds.items())


def _blocks(parts: list[str]) -> str:
    """Blocks by their numbers, in runs: 0–3, 6."""
    runs: list[list[int]] = []
    for index in sorted(int(part.rpartition(".")[2]) for part in parts):
        if runs and runs[-1][-1] + 1 == index:
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


def status_table(value: dict[str, Any]) -> Group:
    """A run's state as a table under a line."""
    from rich.console import Group
    from rich.text import Text

    stages = value["stages"]
    done = sum(stage["state"] == "done" for stage in stages)
    line = f"{plain(value['run'])}  {state(value['state'])}"
    if "preparing" in value:
        line += f"  {plain(_preparing(value['state'], **value['preparing']))}"
        if not stages:
            return Group(Text.from_markup(line))
    line += f"  {done} of {words.plural(len(stages), 'stage')} done"
    shown = table("stage", "blocks", "state", "step", "loss", "wait", "memory", "why", right=(0, 3, 4, 5, 6))
    for stage in stages:
        loss, wait, memory = stage["loss"], stage["wait_fraction"], stage["peak_memory_bytes"]
        shown.add_row(
            stage_label(stage, stages),
            words.span(*stage["blocks"]),
            state(stage["state"]),
            f"{stage['step'] or 0:,}/{stage['steps']:,}",
            f"{loss:.3f}" if loss is not None else "",
            words.percent(wait) if wait is not None else "",
            words.size(memory) if memory is not None else "",
            plain(stage["reason"] or ""),
        )
    jobs = value.get("jobs", [])
    if not jobs:
        return Group(Text.from_markup(line), shown)
    named = table("job", "of", "state")
    for job in jobs:
        of = "evaluation" if job["stage"] is None else f"stage {job['stage']}"
        of += f", window {job['window']}" if job.get("window") is not None else ""
        named.add_row(f"{job['engine']} {plain(job['job'])}", of, state(job["state"]))
    return Group(Text.from_markup(line), shown, Text(), named)


def _preparing(state: str, phase: str, done: int, total: int | None, failed: str = "") -> str:
    """What a run without a plan does, or did last."""
    what = PHASES.get(phase, phase) + (f", {words.percent(done / total)}" if total else "")
    return what if state == "running" else f"while {what}" + (f": {failed}" if failed else "")


MADE = {"filled": "bold cyan", "right": "bold green", "wrong": "underline yellow"}
"""How text that the rack made is shown: as such, as it stood in the original, otherwise than there."""


def held_out_table(result: Mapping[str, Any]) -> RenderableType:
    """Held-out figures by depth, and the baselines under them."""
    from rich.console import Group
    from rich.text import Text

    from stackwise.report.page import FIRST_STAGE, depth_name

    fractions = list(result["loss"])
    columns = ["held out", "bits/byte", *(f"loss {words.fraction(f)}" for f in fractions)]
    columns += [f"acc. {words.fraction(f)}" for f in fractions]
    shown = table(*columns, right=range(1, len(columns)))
    stages = result.get("stages") or [result]
    for depth, stage in enumerate(stages):
        last = depth == len(stages) - 1
        _figures(shown, depth_name(depth, len(stages)), stage, fractions, "bold" if last else "")
    for name, baseline in result.get("baselines", {}).items():
        if name != FIRST_STAGE:
            _figures(shown, f"baseline: {name.replace('_', ' ')}", baseline, fractions, "dim")
    return Group(shown, Text(_footnote(result), style="dim"))


def _figures(shown: Table, name: str, figures: Mapping[str, Any], fractions: list[str], style: str) -> None:
    bits = figures.get("bits_per_byte")
    loss, accuracy = figures.get("loss") or {}, figures.get("accuracy") or {}
    cells = [f"{bits:.3f}" if bits is not None else "–"]
    cells += [f"{loss[f]:.3f}" if loss.get(f) is not None else "–" for f in fractions]
    cells += [f"{100 * accuracy[f]:.1f}%" if accuracy.get(f) is not None else "–" for f in fractions]
    shown.add_row(plain(name), *cells, style=style)


def _footnote(result: Mapping[str, Any]) -> str:
    from stackwise.report.page import bounded

    text = f"{words.count(result['tokens'])} tokens"
    if result.get("bytes"):
        text += f", {words.size(result['bytes'])} of text"
    kind = "bits/byte is the likelihood" if result.get("likelihood") == "exact" else "bits/byte is an upper bound"
    if bounded(result):
        kind += " (before the rack was made causal, an upper bound)"
    error = result.get("bits_per_byte_error")
    causal = result.get("likelihood") == "exact" and not bounded(result)
    token = "token, at the positions that would be masked" if causal else "masked token"
    return f"{text}; loss in nats a {token}; {kind}" + (f" (± {error:.3f})" if error else "")


def show_passage(console: Console, fill: Mapping[str, Any]) -> None:
    """A passage with its holes, and as the rack filled them; what it made stands out."""
    from rich.rule import Rule
    from rich.text import Text

    before, after = Text(fill["before"]), Text()
    before.highlight_words(["[MASK]"], style="dim cyan")
    for text, kind in fill.get("spans") or [[fill["after"], "given"]]:
        after.append(text, style=MADE.get(kind, ""))
    for title, shown in (("before", before), ("after", after)):
        console.print(Rule(title, style="dim", align="left") if console.is_terminal else f"--- {title}")
        console.print(shown)
    console.print(Rule(style="dim") if console.is_terminal else "---")
