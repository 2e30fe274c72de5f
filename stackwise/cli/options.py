"""Options that several commands share, and what they come to: a configuration, a run, a store."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stackwise.cli.output import note
from stackwise.errors import ConfigError, NotFound, StackWiseError, UsageError
from stackwise.presets import DEFAULT_PRESET, FINETUNE, PRESETS
from stackwise.text import check_plain

if TYPE_CHECKING:
    from stackwise.config import StackWiseConfig
    from stackwise.pipeline.run import RunDirectory

F = TypeVar("F", bound=Callable[..., Any])
RUNS = Path("runs")
"""Where runs are by default."""

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on standard output.")
run_option = click.option("--run", "run", metavar="DIR", help="The run's directory. Default: the latest under runs/.")
watch_option = click.option("--watch", is_flag=True, help="Look again every second, until the run has ended.")
config_argument = click.argument("config", required=False, metavar="[CONFIG]")
preset_option = click.option("--preset", metavar="NAME", help=f"{', '.join(PRESETS)}.  [default: {DEFAULT_PRESET}]")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, mps, cuda or cuda:N.")
model_option = click.option(
    "--model", metavar="DIR", help="Instead of a run: a pretrained model or an export, as it stands."
)


COUNT = click.IntRange(1, 2**31 - 1)
"""How many of something, within what tensors can count."""
INDEX = click.IntRange(0, 2**31 - 1)
SEED = click.IntRange(-(2**63), 2**63 - 1)


class Finite(click.FloatRange):
    """A number that is one: `nan` is within no range, and would pass any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse it; infinity and nan are a wrong usage."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):  # a comparison with nan is false, so bounds let it pass
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Duration(click.ParamType[float]):
    """A length of time, in seconds: 90, 90s, 90m, 3h, 1d, 1h30m, 1:30:00 (hours), 90:00 (minutes)."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse it; what is no length of time is a wrong usage."""
        if isinstance(value, int | float):
            return float(value)
        text = str(value).strip().lower()
        clock = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d\d)", text)
        units = re.fullmatch(r"(?:([\d.]+)d)?(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text)
        match = clock or units  # 1:30:00 first: it has no unit
        try:
            parts = [float(part or 0) for part in match.groups()] if match else []
        except ValueError:
            parts = []
        seconds = sum(part * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=False))
        if not 0 < seconds < 1e10:  # three hundred years
            self.fail(f"{value!r} is no length of time: 3h, 90m, 1:30:00, or seconds", param, ctx)
        return seconds


class Bytes(click.ParamType[int]):
    """A size of files: 5GB, 500MB, 20kB, or bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse it; what is no size is a wrong usage."""
        match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?|\d{1,15}) ?([kmgt]?)b?", str(value).strip().lower())
        size = int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " ")) if match else 0
        if not size:
            self.fail(f"{value!r} is no size of files: 5GB, 500MB, or bytes", param, ctx)
        return size


max_time_option = click.option(
    "--max-time",
    type=Duration(),
    metavar="TIME",
    help="Save and end with 75 before this is over: 3h, 90m, 1:30:00, or seconds.",
)


def configuration(command: F) -> F:
    """The options that name a configuration: CONFIG, --preset, --run, -o."""
    overrides = click.option(
        "-o", "overrides", metavar="KEY=VALUE", multiple=True, help="Set a key, such as training.steps=50."
    )
    run = click.option("--run", "run", metavar="DIR", help="The run's directory. Default: runs/NAME.")
    init = click.option(
        "--init", metavar="DIR", help="Begin from a pretrained model, an export, or a finished run (init.weights)."
    )
    return config_argument(preset_option(run(init(overrides(command)))))


@dataclass(frozen=True)
class Choice:
    """A configuration, and the run it is for.

    Args:
        config: The configuration.
        run: The run's directory, which may not exist yet.
        source: Where the configuration came from, in words.
        arguments: The words of the command line that make the same choice again.
    """

    config: StackWiseConfig
    run: RunDirectory
    source: str
    arguments: tuple[str, ...]


def choose(
    config: str | None, preset: str | None, run: str | None, overrides: tuple[str, ...], init: str | None = None
) -> Choice:
    """The configuration that the options name, with what follows from a pretrained model.

    CONFIG or a preset where one is given; else the own configuration of the run that `--run` names, where there is
    one; else the preset demo, or finetune where a model is named by --init.

    Raises:
        UsageError: CONFIG and a preset at once, or a faulty configuration; every fault is named.
    """
    from stackwise.config.loading import parse_overrides
    from stackwise.pipeline.run import RunDirectory

    values = parse_overrides(overrides)
    arguments = [config] if config is not None else ["--preset", preset] if preset is not None else []
    if init is not None:
        values["init.weights"] = init
        arguments += ["--init", init]
    if config is None and preset is None:
        if run is not None and is_run(Path(run)):  # a run that is there brings its configuration along
            config = str(RunDirectory(Path(run)).config_file)
        elif values.get("init.weights") is not None:
            preset = FINETUNE
    source = source_name(config, preset)
    chosen = load(config, preset, values)
    if run is not None:
        arguments += ["--run", check_plain(run, "--run")]  # it names jobs, tracker runs and files beside it
    for item in overrides:
        arguments += ["-o", item]  # the command that goes on must make the same choice
    return Choice(chosen, RunDirectory(Path(run) if run is not None else RUNS / chosen.name), source, tuple(arguments))


def load(config: str | None, preset: str | None, values: dict[str, Any]) -> StackWiseConfig:
    """CONFIG, or a preset, with overrides.

    Raises:
        UsageError: CONFIG and a preset at once, or a faulty configuration; every fault is named.
    """
    from stackwise.config import StackWiseConfig

    if config is not None and preset is not None:
        raise UsageError(f"a configuration file ({config}) and --preset {preset} are two configurations; give one")
    if config is not None and Path(config).is_dir():
        hint = f"to train on the text in it: stackwise run -o 'data.paths=[{config}]'"
        raise UsageError(f"{config}: a folder is no configuration", hint=hint)

    def made(values: dict[str, Any]) -> StackWiseConfig:
        if config is not None:
            return StackWiseConfig.from_yaml(config, values)
        return StackWiseConfig.from_preset(preset or DEFAULT_PRESET, values)

    try:
        chosen = made(values)
    except ConfigError as error:
        try:
            made({})
        except ConfigError:  # it is faulty without them as well: all faults together
            raise error from None
        options = ", ".join(f"-o {key}" for key in values)
        raise ConfigError(error.faults, source=f"{options} (over {source_name(config, preset)})") from None
    if chosen.init.weights is None:
        return chosen
    from stackwise.pipeline.initial import with_checkpoint

    return with_checkpoint(chosen)


def source_name(config: str | None, preset: str | None) -> str:
    """Where a configuration comes from, in words."""
    return config or f"preset {preset or DEFAULT_PRESET}"


def is_run(path: Path) -> bool:
    """Whether a directory is a run's: it has a manifest."""
    return (path / "run.json").is_file()


@contextlib.contextmanager
def naming_options(section: str, **names: str) -> Iterator[None]:
    """Let errors that name keys of a section name the options of the running command, which has no configuration.

    Args:
        section: The section of the keys.
        names: What stands for a key, where no option of the command is called so.
    """
    try:
        yield
    except StackWiseError as error:
        options = {param.name: param.opts[-1] for param in click.get_current_context().command.params} | names

        def renamed(text: str) -> str:
            return re.sub(rf"\b{section}\.(\w+)", lambda match: options.get(match[1], match[0]), text)

        error.message, error.hint = renamed(error.message), error.hint and renamed(error.hint)
        raise


def check_one(run: str | None, model: str | None) -> None:
    """Refuse a run and a model at once.

    Raises:
        UsageError: Both are given.
    """
    if run is not None and model is not None:
        raise UsageError("--run and --model are two models; give one")


def find_run(run: str | None) -> RunDirectory:
    """The run that `--run` names; without it the only one under runs/, else the latest, which is said.

    Raises:
        NotFound: There is none.
    """
    from stackwise.pipeline.run import RunDirectory

    if run is not None:
        named = RunDirectory(Path(run))
        try:
            there = named.path.is_dir()
        except OSError as error:
            raise NotFound(f"{run}: {error.strerror}", hint="--run names the directory of a run") from None
        if not there:
            raise NotFound(f"{run}: there is no run here", hint=f"`stackwise run --run {run}` makes one")
        named.manifest()  # refuses what is no run's directory
        return named
    runs = [path for path in RUNS.iterdir() if is_run(path)] if RUNS.is_dir() else []
    if not runs:
        raise NotFound("there is no run under runs/", hint="`stackwise run` makes one; --run DIR names one elsewhere")
    # A run writes its manifest whenever something changes.
    latest = max(runs, key=lambda path: (path / "run.json").stat().st_mtime)
    if len(runs) > 1:
        note(f"{latest}: the latest of {len(runs)} runs (--run names another)")
    return RunDirectory(latest)
