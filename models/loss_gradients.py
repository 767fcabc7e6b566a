"""Gradients of a head's inputs, summed in fp32 over chunks of tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


class Gradients:
    """Of the inputs of a head, collected over chunks of tokens; None where there is none."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> None:
        self._rows, self._matrix = hidden, weight
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None

    def add(self, span: slice, grad_logits: Tensor) -> None:
        """`grad_logits`: `[chunk, vocab]`, fp32 or in the dtype of activations, of the tokens in `span`."""
        if self.bias is not None:
            self.bias += grad_logits.sum(0)
        grad_logits = grad_logits.to(self._rows.dtype)
        if self.hidden is not None:
            torch.mm(grad_logits, self._matrix, out=self.hidden[span])
        if self.weight is not None:
            add_product(self.weight, grad_logits.T, self._rows[span])


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total` (fp32) += `a @ b`: on CUDA in one kernel, which rounds no partial sum to the dtype of `a` and `b`.

    On CPUs, which have no product of bf16 into fp32, it is a product and a sum.
    """
    if total.is_cuda and a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and multiplies_into_fp32(total.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@functools.cache
def multiplies_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product in `dtype` to an fp32 sum: tried once, as early versions refuse such a sum."""
    small = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, small, small, out_dtype=total.dtype, out=total)
    except (TypeError, RuntimeError):
        return False
    return True
