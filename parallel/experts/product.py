"""The product of rows with the matrices of their experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from stoker.parallel.apart import apart


def grouped_product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`rows` `[rows, in]` times the `weights` `[num, out, in]` of their experts: `[rows, out]`.

    The rows of an expert stand together; `ends` (int32 `[num]`) is where those of each end. What is given for rows
    behind the last end is whatever the memory held.
    """
    if rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    # torch has shapes of this product in bf16 only: for tensors without values, and for what it compiles
    if not torch.compiler.is_compiling() and (rows.is_meta or isinstance(rows, FakeTensor)):
        return rows @ weights[0].T
    return apart(_grouped)(rows, weights, ends)


def _grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
