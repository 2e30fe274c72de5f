"""Learning rates, and optimizers as they are made for parameters; the kinds of them are in `kinds.py`."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stackwise.config import StageTraining
from stackwise.errors import UsageError

BLOCK = "block."  # what the name of a block's part begins with; its number in the rack follows
CODED = 256  # numbers that share a scale, in 8 bits
SMALL = 4096  # a tensor of fewer numbers keeps float32 moments: biases and norms cost nothing and are sensitive
EVEN = 1e-6  # share of the mean by which a load may differ from it, and still be even
SLICE = 1 << 22
"""Numbers that are worked on at once, so that float32 copies stay small beside the weights. A multiple of CODED."""


def learning_rate(settings: StageTraining, step: int, steps: int) -> float:
    """The learning rate of step `step` of `steps` (both count from 0).

    Linear warm-up over the share `warmup` of the steps, then the shape that `lr_schedule` names, down to
    `min_learning_rate` times the peak. wsd (warm-up, stable, decay: arXiv 2404.06395) holds the peak until the
    last fifth of the steps, or as `decay` says.
    """
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    match settings.lr_schedule:
        case "constant":
            left = 1.0
        case "linear":
            left = 1.0 - done
        case "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * done))
        case "wsd":
            left = min(1.0, (1.0 - done) * 5.0 if settings.decay is None else (1.0 - done) / settings.decay)
    floor = settings.min_learning_rate
    return settings.learning_rate * (floor + (1.0 - floor) * left)


@dataclass(frozen=True)
class Rising:
    """Parts whose learning rate rises beside others', as they are newer."""

    parts: frozenset[str]
    first: int  # the step at which they begin
    steps: int  # over how many it rises

    def share(self, step: int) -> float:
        """Their share of the rate at a step."""
        return min(1.0, (step - self.first + 1) / self.steps)


def set_rates(groups: Iterable[dict[str, Any]], rate: float, step: int) -> None:
    """Give each group its share of a step's learning rate."""
    for group in groups:
        rising: Rising | None = group["rising"]
        group["lr"] = rate * group["scale"] * (1.0 if rising is None else rising.share(step))


class Stepper(Protocol):
    """What an engine needs of an optimizer; each group's `scale` is its share of the stage's learning rate."""

    param_groups: list[dict[str, Any]]
    state: Any

    def step(self) -> Any:
        """Take a step by the gradients that are there."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""


def make_optimizer(
    trained: Iterable[tuple[str, nn.Parameter]],
    settings: StageTraining,
    rising: Rising | None = None,
    *,
    modules: Iterable[nn.Module] = (),
) -> Stepper:
    """The optimizer of `training.optimizer`. Its state is plain tensors by parameter, whichever it is.

    Weight decay is on matrices alone.

    Args:
        trained: Parameters, each with its part: front, block.N, head, or the name of a block beyond.
        modules: What they are in: a module inside may say that a rule moves some of them (`steered`).
    """
    kind, rates, ruled = settings.optimizer, steered_in(modules), list[tuple[nn.Parameter, float]]()
    groups: dict[tuple[str, bool, float, bool, str], list[nn.Parameter]] = {}
    for part, p in trained:
        if p.requires_grad and id(p) in rates:
            ruled.append((p, rates[id(p)]))
        elif p.requires_grad:
            family, matrix = kind.family(part, p.dim()), p.dim() >= 2
            rises = rising is not None and part in rising.parts
            key = (family, not matrix, rate_scale(settings, part), rises, over_ranks(p))
            groups.setdefault(key, []).append(p)
    optimizer: Stepper = kind.build(
        [
            {
                "params": parameters,
                "lr": settings.learning_rate,
                "weight_decay": 0.0 if plain else settings.weight_decay,
                "scale": scale,
                "family": family,
                "rising": rising if rises else None,
            }
            for (family, plain, scale, rises, _), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]
    )
    return Steered(optimizer, ruled) if ruled else optimizer


def over_ranks(tensor: Tensor) -> str:
    """Which ranks a tensor is divided over: kernels take many tensors at once where these are the same."""
    return str(getattr(tensor, "device_mesh", ""))


def steered_in(modules: Iterable[nn.Module]) -> dict[int, float]:
    """By the ids of parameters that a rule moves, how far in a step (see `config.kinds.BlockPart`)."""
    return {
        id(child.get_parameter(name)): rate
        for module in modules
        for child in module.modules()
        for name, rate in (getattr(child, "steered", None) or {}).items()
    }


def state_tensors(optimizer: Stepper, p: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's state of a parameter, by kind. Raises UsageError: some of it is no tensor."""
    state: Mapping[str, Tensor] = optimizer.state.get(p, {})
    for kind, value in state.items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"the optimizer keeps {kind} as {type(value).__name__}, which no checkpoint can hold",
                hint="let its state be tensors alone: a count is torch.zeros(())",
            )
    return dict(state)


def rate_scale(settings: StageTraining, part: str) -> float:
    """A part's share of the stage's learning rate, by `training.block_learning_rates`."""
    number = part.removeprefix(BLOCK)
    rate = settings.block_learning_rates.get(int(number)) if number.isdigit() else None
    return 1.0 if rate is None else rate / settings.learning_rate


@functools.cache
def eager(kind: type[torch.optim.Optimizer]) -> type[Any]:
    """An optimizer whose methods do not ask torch's compiler, whatever is compiled around them.

    The first to ask imports it: a third of what a worker takes to begin. Its numbers are the same.
    """
    plain = {name: inspect.unwrap(getattr(kind, name)) for name in ("add_param_group", "zero_grad")}
    return type(kind.__name__, (kind,), {**plain, "step": torch.no_grad()(inspect.unwrap(kind.step))})


class Steered:
    """An optimizer beside which a rule moves some parameters: no rate, no clipping and no state has a part in it.

    Each goes up by its step where its gradient is below the mean of all, down where it is above (arXiv 2408.15664,
    algorithm 1, whose loads are the gradient here).
    """

    def __init__(self, others: Stepper, ruled: Iterable[tuple[nn.Parameter, float]]) -> None:
        self._others, self._ruled = others, list(ruled)
        self.param_groups, self.state = others.param_groups, others.state

    @torch.no_grad()
    def step(self) -> None:
        """Take a step with the optimizer and by the rule."""
        self._others.step()
        for p, step in self._ruled:
            if p.grad is not None:
                load = p.grad.double()
                below = 1.0 - load / load.mean().clamp(min=torch.finfo(load.dtype).tiny)
                # An even load is one to the rounding of sums over microbatches: it does not move.
                p.add_((below.sign() * (below.abs() > EVEN)).to(p.dtype), alpha=step)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        self._others.zero_grad(set_to_none)
        for p, _ in self._ruled:
            p.grad = None


class Both:
    """Two optimizers with parameters of their own, as one."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self._both = (first, second)
        self.param_groups = [*first.param_groups, *second.param_groups]
        self.state = second.state = first.state  # one table for both: a parameter is in one of them

    def step(self) -> None:
        """Take a step with each."""
        for optimizer in self._both:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for optimizer in self._both:
            optimizer.zero_grad(set_to_none)


@functools.cache
def codebook(signed: bool, device: torch.device) -> Tensor:
    """The 256 values that a code can mean, ascending, float32 in [-1, 1] or [0, 1].

    Dynamic quantization (arXiv 2110.02861, section 2.2): seven decades below 1, each of twice as many evenly spaced
    values as the one below it; beside them 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade + (0 if signed else 1))
        for i in range(count):
            value = 10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / count)
            values += [value, -value] if signed else [value]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantize(numbers: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 numbers, a flat tensor; each to the nearest value, and only 0 to 0 if unsigned.

    Returns:
        uint8 of the same length, float32 [blocks].
    """
    book = codebook(signed, numbers.device)
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % CODED)).view(-1, CODED)
    scales = blocks.abs().amax(1)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares, (book[1:] + book[:-1]) / 2)
    if not signed:  # a root of 0 would make the next update boundless
        codes = torch.where((codes == 0) & (shares > 0), 1, codes)
    return codes.to(torch.uint8).view(-1)[: len(numbers)].clone(), scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The float32 numbers that codes and scales stand for."""
    values = codebook(signed, codes.device)[codes.long()]
    return values.mul_(scales.repeat_interleave(CODED)[: len(values)])


class QuantizedAdamW(torch.optim.Optimizer):
    """AdamW whose state is stored in 8 bits: two bytes and a little of it a number instead of eight.

    `lr`, `betas`, `eps` and `weight_decay` are as in `torch.optim.AdamW`.

    Block-wise quantization after Dettmers et al. (arXiv 2110.02861): every block of 256 numbers has its own scale, and
    a code stands for a place on a scale that is finest near zero. Everything is computed in float32. The root of the
    second moment is stored in place of the moment itself: the same codes then reach twice as many decades.

    State of a parameter: `step`, and either `mean`, `root` (uint8) with `mean_scale`, `root_scale` (float32), or for
    a small one `mean` and `root` in float32. All are plain tensors: saved and restored bit for bit.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            self._begin(p, state)
        if state["step"].device.type != "cpu":  # as it comes from a checkpoint; elsewhere it would be waited for
            state["step"] = state["step"].cpu()
        state["step"] += 1
        count = int(state["step"])
        beta1, beta2 = group["betas"]
        p.mul_(1.0 - group["lr"] * group["weight_decay"])
        size, root_correction = group["lr"] / (1.0 - beta1**count), math.sqrt(1.0 - beta2**count)
        numbers, slopes = p.view(-1), gradient.reshape(-1)
        for first in range(0, len(numbers), SLICE):
            part = slice(first, first + SLICE)
            slope = slopes[part].float()
            mean, root = self._read(state, part)
            mean.lerp_(slope, 1.0 - beta1)
            root.square_().mul_(beta2).addcmul_(slope, slope, value=1.0 - beta2).sqrt_()
            self._write(state, part, mean, root)
            numbers[part].sub_((mean / (root / root_correction).add_(group["eps"])).mul_(size).to(p.dtype))

    def _begin(self, p: Tensor, state: dict[str, Tensor]) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        if p.numel() < SMALL:
            state["mean"], state["root"] = (torch.zeros_like(p.view(-1), dtype=torch.float32) for _ in range(2))
            return
        for name, signed in (("mean", True), ("root", False)):
            zero = int((codebook(signed, p.device) == 0).nonzero())
            state[name] = torch.full((p.numel(),), zero, dtype=torch.uint8, device=p.device)
            state[f"{name}_scale"] = torch.zeros(-(-p.numel() // CODED), device=p.device)

    def _read(self, state: dict[str, Tensor], part: slice) -> tuple[Tensor, Tensor]:
        if "mean_scale" not in state:
            return state["mean"], state["root"]
        mean, root = (
            dequantize(state[name][part], state[f"{name}_scale"][_blocks(part)], signed)
            for name, signed in (("mean", True), ("root", False))
        )
        return mean, root

    def _write(self, state: dict[str, Tensor], part: slice, mean: Tensor, root: Tensor) -> None:
        if "mean_scale" not in state:
            return  # worked on in place
        for name, numbers, signed in (("mean", mean, True), ("root", root, False)):
            codes, scales = quantize(numbers, signed)
            state[name][part] = codes
            state[f"{name}_scale"][_blocks(part)] = scales


def _blocks(part: slice) -> slice:
    return slice(part.start // CODED, -(-part.stop // CODED))
