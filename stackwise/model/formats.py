"""Narrow formats for the weights of linear layers: bf16, fp8, nvfp4, nf4, integers. Plain tensor arithmetic.

A format packs a matrix into a few named tensors and unpacks them. Packing is a pure function of the matrix: it uses
exact operations alone (maxima, divisions, roundings, one exactly rounded sum), so neither threads nor devices change a
bit of it. Unpacking multiplies in float32 and then rounds to the dtype asked for.

Shapes in names: O outputs, I inputs, N elements.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise.config.training import Quantization
from stackwise.errors import UsageError

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9
"""Largest and smallest positive values of e4m3."""

Packed = dict[str, Tensor]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Format(Protocol):
    """How a matrix is packed."""

    def layout(self, outputs: int, inputs: int) -> Layout:
        """Shape and dtype of each packed tensor, by name."""

    def pack(self, weight_OI: Tensor) -> Packed:
        """The packed form of a matrix [O, I] of any floating dtype."""

    def unpack(self, packed: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I] that a packed form stands for."""


class FP8:
    """e4m3 (OCP 8-bit floating point, revision 1.0) with a float32 scale for each output row: 8 + 32/I bits a weight.

    A row's largest magnitude becomes 448, so that nothing saturates.
    """

    def layout(self, outputs: int, inputs: int) -> Layout:
        """`codes` e4m3 [O, I], `scales` float32 [O, 1]."""
        return {"codes": ((outputs, inputs), E4M3), "scales": ((outputs, 1), torch.float32)}

    def pack(self, weight_OI: Tensor) -> Packed:
        """Round to the nearest multiple of the row's scale that e4m3 has, ties to even."""
        wide_OI = weight_OI.float()
        scales_O1 = _scale(wide_OI.abs().amax(1, keepdim=True), E4M3_MAX)
        return {"codes": _e4m3(wide_OI / scales_O1), "scales": scales_O1}

    def unpack(self, packed: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
        """Codes times scales."""
        return (packed["codes"].float() * packed["scales"]).to(dtype)


class BF16:
    """bfloat16: 16 bits a weight, for frozen weights; a checkpoint's of that dtype are kept exactly."""

    def layout(self, outputs: int, inputs: int) -> Layout:
        """`codes` bfloat16 [O, I]."""
        return {"codes": ((outputs, inputs), torch.bfloat16)}

    def pack(self, weight_OI: Tensor) -> Packed:
        """Round to the nearest, ties to even."""
        return {"codes": weight_OI.to(torch.bfloat16)}

    def unpack(self, packed: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
        """The same numbers."""
        return packed["codes"].to(dtype)


class NVFP4:
    """NVIDIA's FP4: e2m1 in blocks of 16 inputs, an e4m3 scale a block, a float32 scale a matrix: 4.5 bits a weight.

    The layout is that of the OCP and NVIDIA kernels: two codes a byte, the earlier in the low half; the matrix's scale
    is its largest magnitude over 448 · 6, so block scales use all of e4m3. (Pretraining with NVFP4, arXiv 2509.25149.)
    """

    BLOCK = 16
    VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """What e2m1's codes 0 to 7 stand for; 8 to 15 are the same, negative."""

    def layout(self, outputs: int, inputs: int) -> Layout:
        """`codes` uint8 [O, I/2], `scales` e4m3 [O, I/16], `scale` float32 []; I rounded up to a multiple of 16."""
        blocks = -(-inputs // self.BLOCK)
        return {
            "codes": ((outputs, blocks * self.BLOCK // 2), torch.uint8),
            "scales": ((outputs, blocks), E4M3),
            "scale": ((), torch.float32),
        }

    def pack(self, weight_OI: Tensor) -> Packed:
        """Scale, then round to the nearest e2m1, ties to even."""
        padded_OI = F.pad(weight_OI.float(), (0, -weight_OI.shape[1] % self.BLOCK))
        blocks = padded_OI.view(len(padded_OI), -1, self.BLOCK)
        largest = blocks.abs().amax(-1)
        scale = _scale(largest.amax(), E4M3_MAX * self.VALUES[-1])
        scales = _e4m3((largest / self.VALUES[-1] / scale).clamp(min=E4M3_MIN))
        codes = _e2m1((blocks / (scales.float() * scale)[..., None]).flatten(1))
        return {"codes": codes[:, ::2] | (codes[:, 1::2] << 4), "scales": scales, "scale": scale}

    def unpack(self, packed: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
        """Codes times both scales."""
        signed = [*self.VALUES, *(-value for value in self.VALUES)]
        values = _pairs(packed["codes"], signed, low_first=True).view(outputs, -1, self.BLOCK)
        scales = packed["scales"].float() * packed["scale"]
        return (values * scales[..., None]).to(dtype).flatten(1)[:, :inputs]


class NF4:
    """4-bit NormalFloat with double quantization (QLoRA, arXiv 2305.14314, section 3): 4.127 bits a weight.

    Blocks of 64 in row-major order, each scaled by its largest magnitude; these scales, less their mean, are e4m3 in
    blocks of 256. Codes are as bitsandbytes packs them: two a byte, the earlier in the high half.
    """

    BLOCK, SCALE_BLOCK = 64, 256
    SLICE = 1 << 18
    """Blocks that are rounded together, which bounds the memory that packing takes."""

    VALUES = (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )  # fmt: skip
    """The quantiles of appendix E."""

    def layout(self, outputs: int, inputs: int) -> Layout:
        """`codes` uint8 [N/2], `scales` e4m3 [N/64], `scale_scales` float32 [N/64/256, 1], `mean` float32 []."""
        blocks = -(-outputs * inputs // self.BLOCK)
        return {
            "codes": ((blocks * self.BLOCK // 2,), torch.uint8),
            "scales": ((blocks,), E4M3),
            "scale_scales": ((-(-blocks // self.SCALE_BLOCK), 1), torch.float32),
            "mean": ((), torch.float32),
        }

    def pack(self, weight_OI: Tensor) -> Packed:
        """Scale each block to ±1 and round to the nearest quantile, a tie to the lower."""
        flat_N = weight_OI.float().flatten()
        blocks = F.pad(flat_N, (0, -len(flat_N) % self.BLOCK)).view(-1, self.BLOCK)
        levels = torch.tensor(self.VALUES, device=blocks.device)
        bounds = (levels[1:] + levels[:-1]) / 2
        parts, largest = [], []
        for slice_ in torch.split(blocks, self.SLICE):
            largest.append(slice_.abs().amax(1))
            scaled = slice_ * (1.0 / largest[-1].clamp(min=1e-38))[:, None]
            codes = torch.bucketize(scaled.flatten(), bounds, out_int32=True).to(torch.uint8)
            parts.append((codes[::2] << 4) | codes[1::2])
        scales = torch.cat(largest)
        # An exactly rounded sum: one over threads would depend on how many there are.
        mean = scales.new_tensor(math.fsum(scales.tolist()) / len(scales))
        centred = F.pad(scales - mean, (0, -len(scales) % self.SCALE_BLOCK)).view(-1, self.SCALE_BLOCK)
        inner = FP8().pack(centred)
        # The rounded scales are what unpacking uses, the codes were chosen by the exact ones: as in the paper.
        return {
            "codes": torch.cat(parts),
            "scales": inner["codes"].flatten()[: len(scales)],
            "scale_scales": inner["scales"],
            "mean": mean,
        }

    def unpack(self, packed: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
        """Quantiles times scales."""
        scales = self.scales(packed)
        codes, size = packed["codes"], outputs * inputs
        if codes.is_cuda and dtype != torch.float64 and (kernel := nf4_kernel()) is not None:
            return kernel(codes, scales, (outputs, inputs), dtype)
        values = _pairs(codes, self.VALUES, low_first=False).view(-1, self.BLOCK)
        return (values * scales[:, None]).to(dtype).flatten()[:size].view(outputs, inputs)

    def scales(self, packed: Mapping[str, Tensor]) -> Tensor:
        """Each block's scale, float32 [N/64]."""
        inner = packed["scales"]
        padded = F.pad(inner.float(), (0, -len(inner) % self.SCALE_BLOCK)).view(-1, self.SCALE_BLOCK)
        return (padded * packed["scale_scales"]).flatten()[: len(inner)] + packed["mean"]


class Integers:
    """Signed integers of 2 to 8 bits, an affine grid a group of weights (arXiv 1712.05877, section 2.1).

    They take b bits a weight, and 32 a group (40 with zero points). A weight w is seen as s (q - z) with
    q = clamp(round(w / s) + z). Without learned scales the grid spans a group's extremes, zero among them:
    s = (largest - smallest) / (2^b - 1), or 2 |w| / (2^b - 1) where zero is the middle, as in compressed-tensors.
    Codes lie densely, eight weights in b bytes, the first in the lowest bits.

    Args:
        settings: Bits, groups, symmetry.
    """

    def __init__(self, settings: Quantization) -> None:
        self.settings = settings
        self.low, self.high = -(1 << settings.bits - 1), (1 << settings.bits - 1) - 1

    def grid(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Rows and columns of the matrix of groups."""
        group = self.settings.group
        if isinstance(group, int):
            return outputs, -(-inputs // group)
        return (outputs, 1) if group == "channel" else (1, 1)

    def scales(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points that span the extremes of each group, float32 [G] each, groups in row-major order."""
        groups = self.grouped(weight_OI.float())
        return self.spanning(groups.amin(-1), groups.amax(-1))

    def spanning(self, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of grids that span ranges, zero among them, float32 [G] each."""
        lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
        steps = self.high - self.low
        if self.settings.symmetric:
            scales = _scale(torch.maximum(-lowest, highest) * 2, steps)
            return scales, torch.zeros_like(scales)
        scales = _scale(highest - lowest, steps)
        return scales, (self.low - (lowest / scales).round()).clamp(self.low, self.high)

    def layout(self, outputs: int, inputs: int) -> Layout:
        """`codes` uint8 [N b / 8] over whole groups, N rounded up to 8; `scales` float32 [G]; `zeros` int8 [G]."""
        rows, columns = self.grid(outputs, inputs)
        numbers = outputs * self._padded(inputs)
        layout: Layout = {
            "codes": ((-(-numbers // 8) * self.settings.bits,), torch.uint8),
            "scales": ((rows * columns,), torch.float32),
        }
        return layout if self.settings.symmetric else layout | {"zeros": ((rows * columns,), torch.int8)}

    def pack(self, weight_OI: Tensor) -> Packed:
        """On the grid that spans the extremes of each group."""
        return self.pack_on(weight_OI, *self.scales(weight_OI))

    def pack_on(self, weight_OI: Tensor, scales: Tensor, zeros: Tensor) -> Packed:
        """On a given grid: scales and whole zero points, float32 [G] each."""
        groups = self.grouped(weight_OI.float())
        codes = (groups / scales[:, None]).round_().add_(zeros[:, None]).clamp_(self.low, self.high)
        numbers = (codes - self.low).to(torch.int64).flatten()
        eights = F.pad(numbers, (0, -len(numbers) % 8)).view(-1, 8)
        bits = self.settings.bits
        words = sum(eights[:, i] << bits * i for i in range(8))  # of 8 b bits: int64 wraps as it must
        assert isinstance(words, Tensor)
        packed = {
            "codes": torch.stack([(words >> 8 * i) & 255 for i in range(bits)], 1).to(torch.uint8).flatten(),
            "scales": scales,
        }
        return packed if self.settings.symmetric else packed | {"zeros": zeros.to(torch.int8)}

    def unpack(self, packed: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
        """Codes less zero points, times scales."""
        scales = packed["scales"]
        codes = self._numbers(packed["codes"], outputs * self._padded(inputs)).view(len(scales), -1).float() + self.low
        if "zeros" in packed:
            codes -= packed["zeros"].float()[:, None]
        return (codes * scales[:, None]).to(dtype).view(outputs, -1)[:, :inputs]

    def numbers(self, codes: Tensor, outputs: int, inputs: int) -> Tensor:
        """Codes from 0 on, int64 [O, I]."""
        return self._numbers(codes, outputs * self._padded(inputs)).view(outputs, -1)[:, :inputs]

    def _numbers(self, codes: Tensor, count: int) -> Tensor:
        bits = self.settings.bits
        slices = codes.view(-1, bits).to(torch.int64)
        words = sum(slices[:, i] << 8 * i for i in range(bits))
        assert isinstance(words, Tensor)
        return torch.stack([(words >> bits * i) & (1 << bits) - 1 for i in range(8)], 1).flatten()[:count]

    def _padded(self, inputs: int) -> int:
        """Columns of a matrix whose rows are whole groups."""
        group = self.settings.group
        return -(-inputs // group) * group if isinstance(group, int) else inputs

    def grouped(self, weight_OI: Tensor) -> Tensor:
        """The matrix as [G, weights of a group], padded with zeros where a row is no whole number of groups."""
        outputs, inputs = weight_OI.shape
        rows, columns = self.grid(outputs, inputs)
        return F.pad(weight_OI, (0, self._padded(inputs) - inputs)).reshape(rows * columns, -1)


@functools.cache
def nf4_kernel() -> Callable[[Tensor, Tensor, tuple[int, int], torch.dtype], Tensor] | None:
    """bitsandbytes' kernel from codes and scales to a matrix, where it is installed (`pip install stackwise[gpu]`).

    One pass over the weights on a GPU, with the values of plain tensor arithmetic. On a CPU it is not used: version
    0.50 gives wrong values there where the inputs are no multiple of 64.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    importlib.import_module("bitsandbytes")
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default

    def kernel(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        flat: Tensor = dequantize(codes[:, None], scales, NF4.BLOCK, "nf4", list(shape), dtype)
        return flat

    return kernel


FORMATS: dict[str, Format] = {"bf16": BF16(), "fp8": FP8(), "nvfp4": NVFP4(), "nf4": NF4()}
"""The formats by name, but for integers: these are named by their settings (`Quantization.name`)."""


@functools.cache
def format_named(name: str) -> Format:
    """The format of a name.

    Raises:
        UsageError: There is none.
    """
    if name in FORMATS:
        return FORMATS[name]
    if (settings := Quantization.named(name)) is None:
        raise UsageError(
            f"weight format {name!r} is unknown; choose one of {', '.join(FORMATS)}, or int4-g64 and alike"
        )
    return Integers(settings)


def bits_per_weight(name: str, outputs: int, inputs: int) -> float:
    """Bits that a format takes for a weight of a matrix [O, I], scales included."""
    layout = format_named(name).layout(outputs, inputs)
    return sum(8.0 * math.prod(shape) * dtype.itemsize for shape, dtype in layout.values()) / (outputs * inputs)


def _scale(largest: Tensor, full: float) -> Tensor:
    # Never zero: a row of zeros then has codes of zeros, without a special case.
    return (largest / full).clamp(min=torch.finfo(torch.float32).tiny)


def _e4m3(x: Tensor) -> Tensor:
    # Clamped first: PyTorch versions differ in whether a cast saturates or gives NaN.
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def _e2m1(x: Tensor) -> Tensor:
    """Codes 0 to 15 of the nearest e2m1 values, ties to even, uint8."""
    # The values lie 1/2 apart below 2, 1 apart below 4, 2 apart above; `round` gives ties to the even code.
    size = x.abs()
    code = torch.where(size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    return code.to(torch.uint8) | ((x < 0).to(torch.uint8) << 3)


def _pairs(codes: Tensor, values: tuple[float, ...] | list[float], *, low_first: bool) -> Tensor:
    """What packed 4-bit codes stand for, float32 [2 n] of codes [n]: one look-up a byte."""
    byte = torch.arange(256, device=codes.device)
    low, high = byte & 15, byte >> 4
    order = torch.stack((low, high) if low_first else (high, low), 1)
    table = torch.tensor(values, dtype=torch.float32, device=codes.device)[order]
    # Both floats move as one 8-byte word, several times faster than as a row of two.
    words = table.view(torch.int64).flatten().index_select(0, codes.flatten().int())
    return words.view(torch.float32)
