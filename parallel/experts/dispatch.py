"""Tokens to the ranks that hold their experts, and the results back. No token is dropped, whatever experts they choose.

Both forms give the rows of an expert to it in the order of (source rank, token), which is the order of one process's
tokens, and sum the results of a token in the order of its choices.

    alltoall   a rank sends each row to the owner of its expert. What it receives depends on the routing, so the host
               reads the counts: on CUDA it waits for the device once in each layer, and once more where the layer is
               computed again for backward.
    allgather  every rank receives all tokens of the group, computes those of its own experts, and the results are
               summed on the way back. Sizes are known, and nothing waits; the messages are `ep / choices` as long, and
               the rows of all tokens of the group take memory on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stoker.parallel.apart import apart
from stoker.parallel.experts.axis import ExpertAxis
from stoker.parallel.experts.permutation import inverse, permuted, spread
from stoker.parallel.tensor.regions import all_gather, reduce_scatter

Compute = Callable[[Tensor, Tensor], Tensor]
"""This rank's experts: the results for rows, `[rows, width]`, of which so many, int64 `[experts]`, are each one's."""


def tokens_per_expert(chosen: Tensor, num: int) -> Tensor:
    """How many of `chosen` each of `num` experts is: int64 `[num]`, on the device, without a look at it."""
    flat = chosen.flatten()
    return torch.zeros(num, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def at_home(x: Tensor, chosen: Tensor, weights: Tensor, num: int, compute: Compute) -> Tensor:
    """The weighted sums of the results of `num` experts, `[tokens, width]`, all of them on this rank."""
    order = chosen.flatten().argsort(stable=True)
    back = inverse(order)
    results = compute(spread(x, order, back), tokens_per_expert(chosen, num))
    return _combined(permuted(results, back, order), weights)


def by_all_to_all(x: Tensor, chosen: Tensor, weights: Tensor, num: int, compute: Compute, axis: ExpertAxis) -> Tensor:
    """As `at_home`, of `num` experts of which this rank's `compute` has its part."""
    # Its sizes change in every step, and what is compiled for sizes would be compiled anew.
    return apart(_by_all_to_all)(x, chosen, weights, num, compute, axis)


def _by_all_to_all(x: Tensor, chosen: Tensor, weights: Tensor, num: int, compute: Compute, axis: ExpertAxis) -> Tensor:
    order = chosen.flatten().argsort(stable=True)
    back = inverse(order)
    counts = tokens_per_expert(chosen, num)
    received = _all_to_all(counts, [num // axis.size] * axis.size, [num // axis.size] * axis.size, axis)
    to_each, from_each = _splits(counts, received, axis, order.numel())
    rows = _Exchange.apply(spread(x, order, back), from_each, to_each, axis)

    # from (source, expert, token) to (expert, source, token)
    runs = torch.searchsorted(received.cumsum(0), torch.arange(rows.shape[0], device=x.device), right=True)
    to = (runs % (num // axis.size)).argsort(stable=True)
    there = inverse(to)
    results = compute(permuted(rows, to, there), received.view(axis.size, -1).sum(0))
    results = _Exchange.apply(permuted(results, there, to), to_each, from_each, axis)
    return _combined(permuted(results, back, order), weights)


def by_all_gather(x: Tensor, chosen: Tensor, weights: Tensor, num: int, compute: Compute, axis: ExpertAxis) -> Tensor:
    """As `by_all_to_all`."""
    own = num // axis.size
    x, weights = _Gather.apply(x, axis), _Gather.apply(weights, axis)
    chosen = all_gather(chosen, axis.group_name, axis.size) - axis.rank * own
    chosen = torch.where((chosen >= 0) & (chosen < own), chosen, own)  # another rank's come last
    order = chosen.flatten().argsort(stable=True)
    back = inverse(order)
    counts = tokens_per_expert(chosen, own + 1)[:own]
    mine = (torch.arange(order.numel(), device=x.device) < counts.sum())[:, None]
    # The products leave the rows behind their last expert's as the memory was, in backward too: it may hold nan.
    rows = torch.where(mine, spread(x, order, back), 0)
    results = torch.where(mine, compute(rows, counts), 0)
    return _Scatter.apply(_combined(permuted(results, back, order), weights), axis)


def _combined(results: Tensor, weights: Tensor) -> Tensor:
    """The sums over each token's choices: `results` `[tokens x choices, width]`, `weights` `[tokens, choices]`."""
    return (results.view(*weights.shape, results.shape[1]) * weights[..., None].to(results.dtype)).sum(1)


def _splits(counts: Tensor, received: Tensor, axis: ExpertAxis, rows: int) -> tuple[list[int], list[int]]:
    """How many of `rows` go to each rank of the group, and how many come from each. The host waits for the device."""
    if axis.rehearsed:
        evenly = [rows * (n + 1) // axis.size - rows * n // axis.size for n in range(axis.size)]
        return evenly, evenly
    to_each, from_each = torch.stack([counts, received]).view(2, axis.size, -1).sum(2).tolist()
    return to_each, from_each


def _all_to_all(x: Tensor, from_each: list[int], to_each: list[int], axis: ExpertAxis) -> Tensor:
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), from_each, to_each, axis.group_name))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, from_each: list[int], to_each: list[int], axis: ExpertAxis) -> Tensor:
        ctx.splits, ctx.axis = (to_each, from_each), axis
        return _all_to_all(x, from_each, to_each, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from_each, to_each = ctx.splits
        return _all_to_all(gradients[0], from_each, to_each, ctx.axis), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: ExpertAxis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis.group_name, axis.size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter(gradients[0], ctx.axis.group_name, ctx.axis.size), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: ExpertAxis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis.group_name, axis.size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather(gradients[0], ctx.axis.group_name, ctx.axis.size), None
