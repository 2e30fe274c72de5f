"""`stackwise capture`: hidden states of a pretrained model, into a store."""

from __future__ import annotations

import contextlib
import importlib.util
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from stackwise import words
from stackwise.cli.app import stopped_after_saving
from stackwise.cli.drawing import Table, phases
from stackwise.cli.options import COUNT, Bytes, as_json, device_option, naming_options
from stackwise.cli.output import note, print_json, say, say_all
from stackwise.errors import InterruptedRun, UsageError

if TYPE_CHECKING:
    from stackwise.pipeline.committed.capture import Spread
    from stackwise.pipeline.committed.partwise import Progress


class Depths(click.ParamType[list[int]]):
    """Depths with commas between: 3,7."""

    name = "K[,K...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Parse them; whether the model has them is seen when it is open."""
        if isinstance(value, list):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
            self.fail(f"{value!r} is not a list of depths, such as 3,7", param, ctx)
        return [int(part) for part in parts]


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--data", "paths", multiple=True, required=True, metavar="PATH", help="Text, rows, or a prepared set; repeatable."
)
@click.option("--at", type=Depths(), required=True, help="Depths: 0 the embedding, K what leaves block K-1.")
@click.option("--store", required=True, metavar="DIR", help="The store's directory; made where there is none.")
@click.option("--codec", default="bf16", show_default=True, help="How numbers are stored: fp32, bf16, int8, …")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="What is computed in; auto: fp32 on a CPU.",
)
@click.option("--seq-len", type=COUNT, metavar="N", help="Tokens of a row.  [default: 512, or the model's most]")
@click.option(
    "--batch-size", type=COUNT, metavar="N", help="Rows that go forward together.  [default: about 8,192 tokens]"
)
@click.option("--rows", type=COUNT, metavar="N", help="At most so many rows, drawn at random.  [default: all]")
@click.option("--memory", type=Bytes(), metavar="SIZE", help="Of weights at once.  [default: half of what is free]")
@device_option
@click.option(
    "--engine",
    type=click.Choice(["here", "ray"]),
    default="here",
    show_default=True,
    help="ray: each pass by --tasks tasks of a Ray cluster, on this node.",
)
@click.option("--tasks", type=click.IntRange(1, 1024), metavar="N", help="With --engine ray.  [default: 2]")
@as_json
def capture(
    model: str,
    paths: tuple[str, ...],
    at: list[int],
    store: str,
    engine: str,
    tasks: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write hidden states of a pretrained MODEL at chosen depths into a store, few parts in memory at a time.

    MODEL is a directory in Hugging Face's layout, or an export. What is in the store already is not computed again;
    a capture that was stopped or killed goes on where it was. Train on it with `ActivationStore.dataset`.
    """
    settings: Any = {name: value for name, value in options.items() if value is not None}
    if tasks is not None and engine != "ray":
        raise UsageError("--tasks is for --engine ray")
    with naming_options("data"), naming_options("training"), naming_options("store"), _stopping() as stop:
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(_progress())
            from stackwise.pipeline.committed.capture import capture as capture_states

            if engine == "ray":
                settings["spread"] = stack.enter_context(_tasks(tasks or 2, settings.get("device", "auto")))
            try:
                captured = capture_states(model, paths, at=at, store=store, progress=progress, stop=stop, **settings)
            except InterruptedRun:
                raise stopped_after_saving(shlex.join(["stackwise", *sys.argv[1:]])) from None
    result = captured.plain()
    if as_json:
        print_json(result)
        return
    about = Table("depth", "boundary", "rows", "codec", "on disk", right=(0, 2, 4))
    for boundary in result["boundaries"]:
        size = words.size(boundary["disk_bytes"])
        about.add_row(str(boundary["at"]), boundary["id"], f"{boundary['rows']:,}", boundary["codec"], size)
    say_all(about.lines())
    speed = f"{words.count(result['tokens_per_second'])} tokens/s" if captured.computed else "all there already"
    say(f"{captured.store}: {words.count(result['tokens'])} tokens, {speed}")


def _tasks(tasks: int, device: str) -> contextlib.AbstractContextManager[Spread]:
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray needs ray, not installed here", hint="pip install 'stackwise[ray]'")
    from stackwise.pipeline.batch.ray_captures import ray_tasks

    return ray_tasks(tasks, device)


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask to stop, which is what is yielded; a second one stops at once."""
    requests = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal requests
        requests += 1
        if requests > 1:
            raise KeyboardInterrupt
        note("finishing the chunk in hand (again to stop at once)")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requests > 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A bar a phase on standard error, where that is a terminal: rows, tokens a second, time left."""
    begun: dict[str, tuple[float, int]] = {}
    with phases() as bar:

        def update(step: Progress) -> None:
            now = time.monotonic()
            since, first = begun.setdefault(step.phase, (now, step.done))
            text = f"{words.count(step.done)} of {words.count(step.total)} rows" if step.tokens and step.total else ""
            if step.tokens and now > since:  # of this sitting alone: what was there before took no time
                text += f", {words.count((step.done - first) * step.tokens / (now - since))} tokens/s"
            bar(step.phase, step.done, step.total, text)

        yield update
