"""What to change where a run does not fit, each change with its figure; and other ways to train the same rack."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from stackwise import words
from stackwise.config import StackWiseConfig
from stackwise.config.adapters import layers
from stackwise.config.growth import Growth
from stackwise.config.precision import bits_per_weight
from stackwise.errors import StackWiseError
from stackwise.pipeline.estimate import SHARE, WIDE, Estimate, recompute_blocks
from stackwise.pipeline.planning.fit import set_blocks, set_mode, windows_that_fit, with_mode
from stackwise.pipeline.planning.forecast import Forecast, forecast
from stackwise.pipeline.runner.auto import largest_fitting
from stackwise.pipeline.schedule import schedule

CHINCHILLA = 20  # tokens a parameter (arXiv 2203.15556)
GROWS_AT = 0.8  # the share of the steps after which a rack that is proposed to grow is whole


@dataclass(frozen=True)
class Alternative:
    """Another way: its largest stage's memory, its disk, its time."""

    name: str
    memory: float
    live: float
    written: float
    seconds: float
    fits: bool

    def line(self) -> str:
        """In a line."""
        fit = "" if self.fits else ", does not fit"
        return (
            f"{self.name}: {words.size(self.memory)} of memory, {words.size(self.live)} live and "
            f"{words.size(self.written)} written on disk, {words.duration(self.seconds)}{fit}"
        )


def alternatives(planned: Forecast) -> Iterator[Alternative]:
    """Other ways to train the same rack on the same machine, from closed forms; sharding by arithmetic."""
    config, machine = planned.config, planned.machine
    most = largest_fitting(with_mode(config, "blockwise"), planned.vocab_size, int(machine.memory), machine.kind)
    if config.model.n_blocks > 1:
        yield from _tried(planned, "resident stages of 1 block", lambda c: set_mode(c, "layerwise"))
        if most > 1:
            yield from _tried(planned, f"resident stages of {most} blocks", lambda c: set_blocks(c, most))
        recomputed = with_mode(config, "blockwise")
        recompute_blocks(recomputed)
        more = largest_fitting(recomputed, planned.vocab_size, int(machine.memory), machine.kind)
        if more > most:

            def fatter(config: StackWiseConfig) -> None:
                set_blocks(config, more)
                recompute_blocks(config)

            name = f"resident stages of {more} recomputed blocks (training.activation_checkpointing)"
            yield from _tried(planned, name, fatter)
        yield from _tried(planned, "the whole rack end to end, swapped where it must be", _whole)
    whole = config.model_copy(deep=True)
    _whole(whole)
    whole.training.swap = "never"
    (stage,) = schedule(whole)[:1]
    estimate = Estimate(whole, planned.vocab_size, stage, machine.kind)
    yield from _sharded(planned, estimate)
    yield _adapted(planned, estimate)


def _sharded(planned: Forecast, estimate: Estimate) -> Iterator[Alternative]:
    """Parameters, gradients, moments and 16-bit copies divided (ZeRO-3, arXiv 1910.02054)."""
    config, machine = estimate.config, planned.machine
    state, block = estimate.state_bytes(gradients=True), config.model.block_parameters
    beside = _row_bytes(estimate) + 6.0 * block
    room = SHARE * machine.memory - beside
    if room > 0 and state > room:
        ranks = 2 ** math.ceil(math.log2(state / room))
        seconds = _seconds(planned, config) / ranks
        name = f"the whole rack sharded over {ranks} × {machine.name}, a row each, without the network's time"
        yield Alternative(name, state / ranks + beside, 3.0 * state, 3.0 * state, seconds, True)


def _row_bytes(estimate: Estimate) -> float:
    """What one row takes in the whole rack: what all blocks keep of it, and its loss."""
    config = estimate.config
    kept = config.row_positions * config.model.total(lambda block: round(estimate.kept_bytes(block)))
    return kept + estimate.loss_bytes(config.row_positions, config.precision not in WIDE)


RANK = 16  # of the adapters


def _adapted(planned: Forecast, estimate: Estimate) -> Alternative:
    """A pretrained rack in 4 bits under adapters that train (QLoRA, arXiv 2305.14314)."""
    config, model = estimate.config, estimate.config.model
    sides = sum(map(sum, layers(model).values()))
    adapters = 16.0 * RANK * sides * model.n_blocks
    blocks = model.total(lambda block: block.block_parameters)
    ends = estimate.trained_parameters - blocks
    weights = bits_per_weight("nf4") / 8 * blocks + 2 * ends
    memory = weights + adapters + _row_bytes(estimate) + 2 * model.block_parameters
    # The products that give the weights' gradients fall away.
    seconds = 2 / 3 * _seconds(planned, config)
    name = f"QLoRA end to end, a row at a time, adapters of rank {RANK}, from pretrained weights"
    return Alternative(name, memory, weights + adapters, adapters, seconds, memory <= SHARE * planned.machine.memory)


def _seconds(planned: Forecast, config: StackWiseConfig) -> float:
    """Of a configuration whose stages are held whole, whether they fit or not."""
    return forecast(config, planned.machine, planned.tokens).seconds


def advise(planned: Forecast, price: float | None) -> list[str]:
    """Lines: what does not fit, what to change, what time and money it takes, what else can be done."""
    lines = planned.misfits()
    if lines:
        lines += _changes(planned)
    lines += planned.notes
    lines += [f"stage {one.stage.depth} is estimated, not traced: {one.note}" for one in planned.stages if one.note]
    if planned.written:
        share = planned.written / planned.machine.disk.endurance
        drive = words.size(planned.machine.disk.size)
        lines.append(f"writing {words.size(planned.written)} takes {share:.1%} of what a drive of {drive} is rated for")
    whole = CHINCHILLA * planned.parameters
    times = whole / planned.tokens
    lines.append(
        f"Chinchilla's count for {words.count(planned.parameters)} parameters is {words.count(whole)} tokens: "
        f"{times:,.0f} times as many, {_long(times * planned.seconds)}"
    )
    if price is not None:
        cost = price * planned.seconds / 3600
        lines.append(f"at ${price:g} an hour this costs ${cost:,.0f}, and Chinchilla's count ${times * cost:,.0f}")
    return lines


def _long(seconds: float) -> str:
    years = seconds / 365.25 / 86400
    return f"{years:,.3g} years" if years >= 2 else words.duration(seconds)


def _changes(planned: Forecast) -> Iterator[str]:
    """Changes that help, with what they come to."""
    config, machine = planned.config, planned.machine
    memory = any(stage.memory["peak"] > machine.memory for stage in planned.stages)
    settings = config.training
    options: list[tuple[str, Callable[[StackWiseConfig], object]]] = []
    if memory:
        most = largest_fitting(with_mode(config, "blockwise"), planned.vocab_size, int(machine.memory), machine.kind)
        options.append((f"training.mode.block_size: {most}", lambda c: set_blocks(c, most)))
        rows = settings.batch_size
        while rows > 1:
            rows = max(1, rows // 2)
            options.append((f"training.batch_size: {rows}", lambda c, rows=rows: _rows(c, rows)))  # type: ignore[misc]
        options.append(("training.activation_checkpointing: true", recompute_blocks))
        options.append(("training.swap: auto", lambda c: setattr(c.training, "swap", "auto")))
    if planned.live > machine.disk.size:
        windows = windows_that_fit(planned)
        if windows is not None:
            yield (
                f"training.windows: {windows} leaves {words.size(planned.boundaries * planned.windows / windows)} of "
                "boundaries at once"
            )
        elif config.has_windows:
            in_two = replace(planned, windows=2)
            beside = words.size(in_two.live - in_two.boundaries)
            yield f"training.windows: in windows weights, moments and checkpoints alone take {beside} of the disk"
        options += [
            ("store.keep: none", lambda c: setattr(c.store, "keep", "none")),
            ("store.codec: int8", lambda c: setattr(c.store, "codec", "int8")),
            ("store.every: 2", lambda c: setattr(c.store, "every", 2)),
        ]
        if config.model.n_blocks > 1:
            shallow = max(1, config.model.n_blocks // 4)
            text = f"training.growth: [{{blocks: {shallow}, until: {GROWS_AT}}}]"
            options.append((text, lambda c: _grown(c, shallow)))
    now = next(_tried(planned, "as it is", lambda c: None))  # by closed forms, as the changes are: a trace differs
    for text, change in options:
        for other in _tried(planned, text, change):
            wears = planned.live > machine.disk.size and other.written < 0.98 * now.written
            if other.live < 0.98 * now.live or other.memory < 0.98 * now.memory or wears:
                yield other.line()
    if any(stage.host_memory > machine.ram for stage in planned.stages):
        need = max(stage.host_memory for stage in planned.stages)
        yield f"host memory of {words.size(need)}, or fewer blocks a stage (training.mode.block_size)"


def _tried(planned: Forecast, name: str, change: Callable[[StackWiseConfig], object]) -> Iterator[Alternative]:
    """The same with a change; nothing where the configuration does not allow it."""
    config = planned.config.model_copy(deep=True)
    try:
        change(config)
        config.validate()
        other = forecast(config, planned.machine, planned.tokens)
    except (StackWiseError, ValueError):
        return
    memory = max(stage.memory["peak"] for stage in other.stages)
    yield Alternative(name, memory, other.live, other.written, other.seconds, other.fits)


def _rows(config: StackWiseConfig, rows: int) -> None:
    config.training.accumulation *= max(1, config.training.batch_size // rows)
    config.training.batch_size = rows


def _grown(config: StackWiseConfig, blocks: int) -> None:
    _whole(config)
    config.training.growth = [Growth(blocks=blocks, until=GROWS_AT)]


def _whole(config: StackWiseConfig) -> None:
    set_mode(config, "end_to_end")
    config.training.swap = "auto"
