"""The kinds of rope scaling: their settings and facts. Torch is imported where frequencies are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stackwise.config.fields import NonNegative, Positive, Size
from stackwise.config.kinds import Fault, RopeScaling

if TYPE_CHECKING:
    from torch import Tensor

    from stackwise.config.model import ModelConfig


class Unscaled(RopeScaling):
    """Wavelengths from 2 pi to 2 pi theta (RoFormer, arXiv 2104.09864)."""

    def frequencies(self, width: int, theta: float, length: int) -> tuple[Tensor, float]:
        return _frequencies(width, theta), 1.0

    def specification(self) -> dict[str, Any]:
        return {}


class Scaled(RopeScaling):
    """A scaling of rotary positions, by the formulas of Hugging Face's `modeling_rope_utils`."""

    factor: Annotated[float, Field(ge=1.0, le=1e6)] = Field(description="how many times longer rows may be")

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        if model.positions != "rope":
            yield "kind", f"{self.name}: model.positions is {model.positions}: there is nothing to scale"


class LinearScaling(Scaled):
    """Positions are divided by the factor (position interpolation, arXiv 2306.15595)."""

    def frequencies(self, width: int, theta: float, length: int) -> tuple[Tensor, float]:
        return _frequencies(width, theta) / self.factor, 1.0


class DynamicScaling(Scaled):
    """NTK-aware scaling, by the length of the row: up to the original length nothing is scaled.

    A row's frequencies depend on its length (padding and all documents in it included), so earlier positions cannot be
    kept while a row grows: generation goes over all of them.
    """

    original_max_position_embeddings: Size = Field(description="longest row of the model's first training")

    def frequencies(self, width: int, theta: float, length: int) -> tuple[Tensor, float]:
        import torch

        # in float32 as transformers has it, so that the tables are the same to the last bit
        reach = torch.tensor(self.reach(length), device="cpu")
        stretch = self.factor * reach / self.original_max_position_embeddings - (self.factor - 1)
        return _frequencies(width, theta * stretch ** (width / (width - 2))), 1.0

    def reach(self, length: int) -> int:
        return max(length, self.original_max_position_embeddings)

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        yield from super().faults(model)
        if model.attention.rotary_width(model) == 2:
            yield "kind", "dynamic: a rotary part of width 2 has a single wavelength, which it cannot stretch"


class Llama3Scaling(Scaled):
    """LLaMA 3.1's: long wavelengths are stretched, short ones stay, and those between go from one to the other."""

    original_max_position_embeddings: Size = Field(description="longest row of the model's first training")
    low_freq_factor: Positive = Field(1.0, description="wavelengths above original / this are stretched whole")
    high_freq_factor: Positive = Field(4.0, description="wavelengths below original / this are not stretched")

    def frequencies(self, width: int, theta: float, length: int) -> tuple[Tensor, float]:
        import torch

        plain, original = _frequencies(width, theta), self.original_max_position_embeddings
        low, high = self.low_freq_factor, self.high_freq_factor
        wavelength = 2 * math.pi / plain
        share = (original / wavelength - low) / (high - low)
        between = (1 - share) * plain / self.factor + share * plain
        scaled = torch.where(wavelength > original / low, plain / self.factor, plain)
        medium = (wavelength >= original / high) & (wavelength <= original / low)
        return torch.where(medium, between, scaled), 1.0

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        yield from super().faults(model)
        if self.high_freq_factor <= self.low_freq_factor:
            yield "high_freq_factor", f"{self.high_freq_factor:g} is not above low_freq_factor {self.low_freq_factor:g}"


class YarnScaling(Scaled):
    """YaRN (arXiv 2309.00071): as llama3's by the number of turns in the original length, with a factor on scores."""

    original_max_position_embeddings: Size = Field(description="longest row of the model's first training")
    beta_fast: Positive = Field(32.0, description="dimensions with more turns than this are not stretched")
    beta_slow: Positive = Field(1.0, description="dimensions with fewer turns than this are stretched whole")
    attention_factor: Positive | None = Field(
        None, description="factor on queries and keys; null: from factor, mscale and mscale_all_dim"
    )
    mscale: NonNegative | None = Field(None, description="weight of log(factor) above the attention factor's line")
    mscale_all_dim: NonNegative | None = Field(None, description="weight of log(factor) below it")
    truncate: bool = Field(True, description="round the bounds of the dimensions between to whole ones")

    @property
    def scores(self) -> float:
        """The factor on queries and keys, resolved."""
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)

    def frequencies(self, width: int, theta: float, length: int) -> tuple[Tensor, float]:
        import torch

        def dimension(turns: float) -> float:
            """The dimension that turns so often over the original length."""
            lengths = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return width * math.log(lengths) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = (torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / ((high - low) or 0.001)
        stays, wavelengths = 1 - ramp.clamp(0, 1), _wavelengths(width, theta)
        return 1.0 / (self.factor * wavelengths) * (1 - stays) + 1.0 / wavelengths * stays, self.scores

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        yield from super().faults(model)
        if self.beta_fast <= self.beta_slow:
            yield "beta_fast", f"{self.beta_fast:g} is not above beta_slow {self.beta_slow:g}"
        if model.rope_theta <= 1.0:
            yield "kind", f"yarn: model.rope_theta is {model.rope_theta:g}, and it needs wavelengths that grow"
        if self.scores != 1.0 and not model.attention.scales_scores:
            text = f"{model.attention.name} attention has no place for a factor on all scores ({self.scores:g})"
            yield "attention_factor", f"{text}: set it to 1, or choose another kind"


def _wavelengths(width: int, theta: float | Tensor) -> Tensor:
    """Positions in which each pair of dimensions turns by a radian."""
    import torch

    # Always computed on the CPU in float32: the same on every device, and LLaMA's to the last bit.
    powers: Tensor = theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    return powers


def _frequencies(width: int, theta: float | Tensor) -> Tensor:
    return 1.0 / _wavelengths(width, theta)
