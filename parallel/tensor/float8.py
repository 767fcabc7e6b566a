"""Products of linear layers in float8, as a property of a layer: nothing is swapped, weights are stored as before.

A row of each operand has a scale of its own, taken from the row as it is (dynamic scaling), so that no token and no
output feature depends on another: rows of a batch, and ranks that share them, change nothing. The gradient of the
weight is a sum over tokens and stays in the compute dtype (torchao's recipe `rowwise_with_gw_hp`; for the format:
Micikevicius et al. 2022, FP8 formats for deep learning; e4m3 everywhere, as in DeepSeek-V3, section 3.3). Scales are
powers of two: rounding is that of three bits of mantissa whatever the scale is, but for values 2^-14 of the largest of
their row, so that a layout which cuts rows changes only these.

CPUs have no such product: there the operands are rounded in the same way and multiplied in the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNIT = 16  # features that the kernels take at a time
SLOT = "float8"  # the attribute of a linear layer that computes in float8: a `Float8`
DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
CAPABILITY = (8, 9)  # the least of a GPU whose tensor cores take float8


@dataclass(frozen=True)
class Float8:
    """How a layer computes: `floor` is the least value that a row's scale is taken from."""

    floor: float


def check_share(layer: nn.Linear, features: int) -> None:
    """Raises ValueError if a rank's share of so many `features` is none that a layer in float8 can compute with."""
    if float8_of(layer) is not None and features % UNIT:
        raise ValueError(
            f"precision=fp8 with {features} features a rank, which is no multiple of {UNIT}: fp8.filter_fqns can leave "
            "this layer in bf16, or fewer tensor-parallel ranks work"
        )


def refuse_device(device: torch.device) -> None:
    """Raises ValueError for a GPU without float8."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"precision=fp8: {name} has no float8 (Ada, Hopper and later have): precision=bf16 works")


def float8_of(layer: nn.Module) -> Float8 | None:
    return getattr(layer, SLOT, None)


def linear(layer: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` for `x` `[..., in]`, in float8 if the layer is to and computes in bf16: `[..., out]`."""
    settings = float8_of(layer)
    if settings is None or x.dtype != torch.bfloat16:  # a module in fp32 stays so
        return F.linear(x, layer.weight, bias)
    result = _Float8Linear.apply(x.flatten(0, -2), layer.weight, settings.floor).unflatten(0, x.shape[:-1])
    return result if bias is None else result + bias


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, floor: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.floor = floor
        return _product(x, weight, floor, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        grad_x = _product(gradient, weight.t(), ctx.floor, fast=False) if ctx.needs_input_grad[0] else None
        grad_weight = gradient.t() @ x if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def _product(left: Tensor, right: Tensor, floor: float, fast: bool) -> Tensor:
    """`left @ right.T` in bf16, for `[rows, common]` and `[columns, common]`, both rounded to float8 by rows.

    `fast`: sums of GPUs lose some bits, which activations bear and gradients do not.
    """
    (left, by_row), (right, by_column) = rounded(left, floor), rounded(right, floor)
    if left.device.type == "cuda":
        return torch._scaled_mm(left, right.t(), by_row, by_column.t(), out_dtype=torch.bfloat16, use_fast_accum=fast)
    return F.linear(left.to(torch.bfloat16) * by_row.bfloat16(), right.to(torch.bfloat16) * by_column.bfloat16())


def rounded(matrix: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """`matrix` `[rows, columns]` in float8, and the fp32 scales `[rows, 1]` that give it back as factors."""
    largest = matrix.abs().amax(-1, keepdim=True).float().clamp_min(floor)
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest / LARGEST).exponent)
    scale = scale.where(largest.isfinite(), largest)  # float8 has no infinity: a row with one would become finite
    return (matrix.float() / scale).to(DTYPE).contiguous(), scale
