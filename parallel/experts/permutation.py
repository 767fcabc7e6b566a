"""Rows in another order, and back again in backward: gathers only, so that no sum depends on the order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`, int64 `[rows]`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def spread(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """`x` `[tokens, width]` for each choice of each token, in `order` of the experts; `back` is its inverse."""
    return _Spread.apply(x, order, back)


def permuted(x: Tensor, to: Tensor, back: Tensor) -> Tensor:
    """`x[to]` for a permutation `to`, whose inverse is `back`."""
    return _Permuted.apply(x, to, back)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.shape = (x.shape[0], order.numel() // max(1, x.shape[0]), x.shape[1])
        return x[order // max(1, ctx.shape[1])]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        # by the order of the token's choices, not of the experts: a sum that another layout repeats
        return gradients[0][back].view(ctx.shape).sum(1), None, None


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, to: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[to]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.saved_tensors[0]], None, None
