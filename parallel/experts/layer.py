"""The experts of one layer: SwiGLU networks (Shazeer 2020) whose matrices are stacked, computed together, none dropped.

Tokens are sorted by expert, stably, so that the rows of an expert stand in the order of one process's tokens, and
the results of a token are summed in the order of its choices: nothing depends on how many tokens an expert got.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stoker.parallel.experts.product import grouped_product


class Experts(nn.Module):
    """`num` experts of `width` features and `hidden` channels, stacked as Hugging Face's files of today hold them."""

    def __init__(self, num: int, width: int, hidden: int) -> None:
        super().__init__()
        self.num = num
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * hidden, width))  # gate, then up
        self.down_proj = nn.Parameter(torch.empty(num, width, hidden))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' results, `[tokens, width]`, in the dtype of `x`.

        `x` is `[tokens, width]`; `chosen` int64 `[tokens, k]`, numbers of experts; `weights` `[tokens, k]`.
        """
        order = chosen.flatten().argsort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        rows = _Spread.apply(x, order, back)
        results = _Permuted.apply(self.compute(rows, tokens_per_expert(chosen, self.num)), back, order)
        return (results.view(*chosen.shape, x.shape[1]) * weights[..., None].to(x.dtype)).sum(1)

    def compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """The experts' results for `rows`, `[rows, width]`: `counts` of them for each expert, in order (int64)."""
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = grouped_product(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
        return grouped_product(F.silu(gate) * up, self.down_proj, ends)


def tokens_per_expert(chosen: Tensor, num: int) -> Tensor:
    """How many of `chosen` each of `num` experts is: int64 `[num]`, on the device, without a look at it."""
    flat = chosen.flatten()
    return torch.zeros(num, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


class _Spread(torch.autograd.Function):
    """`x` for each choice of each token, in `order` of the experts; `back` is the inverse permutation."""

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
    """`x[to]` for a permutation `to`, whose inverse is `back`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[to]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.saved_tensors[0]], None, None
