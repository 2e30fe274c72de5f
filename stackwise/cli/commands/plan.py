"""`stackwise plan`: what a run will take, before it runs. Nothing is written but to the cache directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from stackwise import words
from stackwise.cli.drawing import Table, phases
from stackwise.cli.options import Finite, as_json, config_argument, load, preset_option, source_name
from stackwise.cli.output import Line, Styled, print_json, say_all

if TYPE_CHECKING:
    from stackwise.pipeline.planning.advice import Alternative
    from stackwise.pipeline.planning.forecast import Forecast, StageForecast


@click.command()
@config_argument
@preset_option
@click.option(
    "--gpu",
    "--machine",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="h200, rtx4090, …, a YAML file, or auto.",
)
@click.option("--disk", metavar="RATE,SIZE", help="Such as 7GB/s,15TB; with two rates the second is of writing.")
@click.option("--ram", metavar="SIZE", help="The host's memory, such as 128GB.")
@click.option("--tokens", metavar="N", help="Tokens that each stage trains on, such as 1B.")
@click.option("--fit", "fits", is_flag=True, help="Find the blocks of a stage and the rows of a microbatch that fit.")
@click.option("--price", type=Finite(min=0), metavar="$/h", help="What an hour of the machine costs.")
@click.option("-o", "overrides", metavar="KEY=VALUE", multiple=True, help="Set a key, such as training.batch_size=2.")
@as_json
def plan(
    config: str | None,
    preset: str | None,
    price: float | None,
    fits: bool,
    overrides: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Say what a run takes: memory by stage, disk, seconds and what bounds them; other ways, and what to change.

    No data is needed, and no such machine. Memory is traced: the stages' real modules and steps on tensors without
    values.
    """
    from stackwise.config.loading import parse_overrides
    from stackwise.pipeline.planning.advice import advise, alternatives
    from stackwise.pipeline.planning.fit import fit
    from stackwise.pipeline.planning.forecast import forecast
    from stackwise.pipeline.planning.machines import tokens
    from stackwise.pipeline.planning.trace import Tracer

    machine = _machine(**{key: options[key] for key in ("gpu", "disk", "ram")})
    number = tokens(options["tokens"]) if options["tokens"] is not None else None
    chosen, sizes = load(config, preset, parse_overrides(overrides)), None
    with phases(unit=lambda *_: "") as doing:

        def tracing(what: str) -> None:
            doing("tracing memory", 0, None, what)

        with Tracer(progress=tracing) as tracer:
            if fits:
                doing("finding sizes that fit", 0, None)
                sizes = fit(chosen, machine, number, tracer=tracer)
                chosen = load(config, preset, parse_overrides(overrides) | sizes)
            planned = forecast(chosen, machine, number, tracer=tracer)
        doing("comparing other ways", 0, None)
        lines, others = advise(planned, price), list(alternatives(planned))
    if as_json:
        print_json(
            {
                **({} if sizes is None else {"settings": sizes}),
                "parameters": planned.parameters,
                "fits": planned.fits,
                "stages": [stage.plain() for stage in planned.stages],
                "disk": {"live": planned.live, "written": round(planned.written)},
                "seconds": planned.seconds,
                "tokens": planned.tokens,
                "advice": [*lines, *(other.line() for other in others)],
            }
        )
        return
    if sizes is not None:
        as_options = " ".join(f"-o {key}={str(value).lower()}" for key, value in sizes.items())
        say_all([["fits with: ", Styled(as_options, "bold")]])
    say_all(_shown(planned, source_name(config, preset), lines, others))


def _machine(gpu: str, disk: str | None, ram: str | None) -> Any:
    """The machine that the options describe."""
    from dataclasses import replace

    from stackwise.errors import UsageError
    from stackwise.pipeline.planning import machines
    from stackwise.pipeline.planning.rates import this_machine

    machine = this_machine() if gpu == machines.AUTO else machines.find(gpu)
    if disk is not None:
        machine = replace(machine, disk=machines.disk(disk))
    if ram is not None:
        try:
            machine = replace(machine, ram=machines.amount(ram))
        except ValueError as error:
            raise UsageError(f"--ram {ram}: {error}", hint="such as 128GB") from None
        if machine.kind == "cpu":
            machine = replace(machine, memory=machine.ram)
    return machine


def _shown(planned: Forecast, source: str, lines: Iterable[str], others: Iterable[Alternative]) -> Iterator[Line]:
    machine, disk = planned.machine, planned.machine.disk
    fits = Styled("fits", "green") if planned.fits else Styled("does not fit", "red")
    count = words.plural(len(planned.stages), "stage")
    yield [
        Styled(f"{planned.config.name}: {words.count(planned.parameters)} parameters, {count} ({source})", "bold"),
        f" on {machine.name}: ",
        fits,
    ]
    yield [
        f"{words.size(machine.memory)} of memory, {words.size(machine.ram)} of host memory, a disk of "
        f"{words.size(disk.size)} that reads {words.size(disk.read)}/s and writes {words.size(disk.write)}/s, training "
        f"at {machine.rate / 1e12:.3g} TFLOP/s ({machine.source})"
    ]
    table = Table(
        "stage", "blocks", "trains", "memory", "state", "activations", "host", "time", "bound by", right=range(2, 8)
    )
    for stages in _alike(planned.stages):
        first, last = stages[0], stages[-1]
        state = first.memory["weights"] + first.memory["gradients"] + first.memory["optimizer"]
        table.add_row(
            words.span(first.stage.depth, last.stage.depth),
            words.span(first.stage.first, last.stage.last),
            words.count(first.parameters),
            words.size(first.memory["peak"]) + (" swapped" if first.swap else ""),
            words.size(state),
            words.size(first.memory["peak"] - state),
            words.size(first.host_memory),
            words.duration(first.seconds) + (" each" if len(stages) > 1 else ""),
            ", ".join(_phases(first)),
        )
    yield from table.lines()
    yield [
        f"in all {words.duration(planned.seconds)} for {words.count(planned.tokens)} tokens a stage; "
        f"on disk {words.size(planned.live)} at once, {words.size(planned.written)} written"
    ]
    for line in lines:
        yield [f"- {line}"]
    other_ways = Table("other ways", "memory", "on disk", "written", "time", "", right=range(1, 5))
    for other in others:
        sizes = words.size(other.memory), words.size(other.live), words.size(other.written)
        other_ways.add_row(other.name, *sizes, words.duration(other.seconds), "" if other.fits else "does not fit")
    yield []
    yield from other_ways.lines()


def _phases(stage: StageForecast) -> Iterator[str]:
    yield f"{stage.train.bound} ({words.duration(stage.train.seconds)} to train)"
    if stage.write is not None:
        yield f"{stage.write.bound} ({words.duration(stage.write.seconds)} to write the boundary)"


def _alike(stages: Iterable[StageForecast]) -> Iterator[list[StageForecast]]:
    """Neighbouring stages that take the same."""
    group: list[StageForecast] = []
    for stage in stages:
        facts = stage.plain() | {"depth": 0, "blocks": 0}
        if group and facts != group[-1].plain() | {"depth": 0, "blocks": 0}:
            yield group
            group = []
        group.append(stage)
    if group:
        yield group
