"""Linear layers that multiply in 8 bits: e4m3 times e4m3, a scale for each row of both.

The recipe is torchao's "rowwise" (Float8LinearConfig; formats: arXiv 2209.05433): each of the three products of a layer
(forward, gradient of the input, gradient of the weight) scales its two matrices along what it sums over, by powers of
two. What enters a row of the output is then that row of the input alone: no row depends on others in its batch. Sums
are float32. A GPU that multiplies e4m3 (compute capability 8.9 on) does it in one kernel, `torch._scaled_mm`; elsewhere
the codes are multiplied in a wider type, in which they and their products are exact. So only the order of sums differs.

Shapes in names: N rows, I inputs, O outputs, K what is summed over; `…` any leading dimensions.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stackwise.model.formats import E4M3, E4M3_MAX

TILE = 16  # what both sides of a matrix have to be multiples of, for the kernel
SMALLEST = 1e-12  # a row of zeros has a scale too


def rows_in_e4m3(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes e4m3 [N, K], and the float32 scales [N, 1] that they are to be multiplied by: powers of two."""
    largest_N1 = x_NK.abs().amax(1, keepdim=True).double()
    # Down to a power of two, as torchao has it: nothing saturates, and scaling rounds nothing.
    factors_N1 = (E4M3_MAX / largest_N1.clamp(min=SMALLEST)).float().log2().floor().exp2()
    codes_NK = (x_NK.float() * factors_N1).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return codes_NK, factors_N1.reciprocal()


def product(a_NK: Tensor, b_OK: Tensor, dtype: torch.dtype) -> Tensor:
    """a bᵀ in 8 bits: [N, O], rounded to `dtype` once."""
    if not a_NK.numel():  # an expert that no row reaches: a sum over no rows has no largest value to be scaled by
        return a_NK.new_zeros((len(a_NK), len(b_OK)), dtype=dtype)
    (a, a_scales_N1), (b, b_scales_O1) = rows_in_e4m3(a_NK), rows_in_e4m3(b_OK)
    if by_kernel(a_NK.device) and dtype is torch.bfloat16 and not any(side % TILE for side in (*a.shape, *b.shape)):
        result: Tensor = torch._scaled_mm(a, b.t(), a_scales_N1, b_scales_O1.t(), out_dtype=dtype)
        return result
    wide = torch.float32 if a.device.type == "cpu" or dtype is not torch.bfloat16 else torch.bfloat16
    sums_NO = a.to(wide) @ b.to(wide).t()  # codes are exact in bfloat16; powers of two change no rounding
    return (sums_NO * (a_scales_N1 * b_scales_O1.t()).to(wide)).to(dtype)


@functools.cache
def by_kernel(device: torch.device) -> bool:
    """Whether a device multiplies e4m3 by rows."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class _Linear(torch.autograd.Function):
    """x Wᵀ and its gradients, each product in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        """[N, I] to [N, O], in the input's dtype."""
        ctx.save_for_backward(x_NI, weight_OI)
        return product(x_NI, weight_OI, x_NI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of input and weight."""
        x_NI, weight_OI = ctx.saved_tensors
        (slope_NO,) = slopes
        of_input = product(slope_NO, weight_OI.t(), x_NI.dtype) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = product(slope_NO.t(), x_NI.t(), slope_NO.dtype).to(weight_OI.dtype)
        return of_input, of_weight


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """[…, I] to […, O], in autocast's dtype where that is on, else in the input's; the bias is added in that dtype."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        flat_NI = x.to(dtype).reshape(-1, x.shape[-1])
        y: Tensor = _Linear.apply(flat_NI, weight_OI)  # type: ignore[no-untyped-call]
        y = y.view(*x.shape[:-1], len(weight_OI))
        return y if bias_O is None else y + bias_O.to(dtype)
