"""Messages between the ranks that share sequences: pairs of collectives, each of which is the other one's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stoker.parallel.sequence.axis import SequenceAxis
from stoker.parallel.tensor.regions import all_gather, reduce_scatter


def gathered(x: Tensor, axis: SequenceAxis) -> Tensor:
    """`[rows, tokens, ...]` of every rank, rank after rank: `[ranks, rows, tokens, ...]`, without a gradient."""
    return all_gather(x.detach()[None], axis.group_name, axis.size)


def gather_tokens(x: Tensor, source: Tensor, axis: SequenceAxis) -> Tensor:
    """Of this rank's `x` `[rows, tokens, ...]` those of all ranks in the order of `source`.

    `source` (int64 `[rows, all tokens]`) numbers the tokens of `gathered(x)`, each once.
    """
    return _Gather.apply(x, source, axis)


def summed_share(parts: Sequence[Tensor], source: Tensor, axis: SequenceAxis) -> Tensor:
    """The gradient of `gather_tokens`, summed over the ranks: of `[rows, all tokens, ...]` this rank's tokens.

    `parts` lie beside each other along the last dim of the result.
    """
    rows, tokens, shape = source.shape[0], source.shape[1] // axis.size, parts[0].shape
    width = sum(part.shape[-1] for part in parts)
    spread = parts[0].new_empty(source.numel(), *shape[2:-1], width)
    start = 0
    for part in parts:
        spread.narrow(-1, start, part.shape[-1]).index_copy_(0, source.flatten(), part.flatten(0, 1))
        start += part.shape[-1]
    return reduce_scatter(spread.view(axis.size, rows, tokens, *shape[2:-1], width), axis.group_name, axis.size)[0]


def tokens_to_heads(x: Tensor, axis: SequenceAxis) -> Tensor:
    """All tokens of this rank's share of the heads, from all heads of its tokens.

    `[rows, tokens, heads, channels]` to `[rows, ranks x tokens, heads / ranks, channels]`, rank after rank.
    """
    return _ToHeads.apply(x, axis)


def heads_to_tokens(x: Tensor, axis: SequenceAxis) -> Tensor:
    """The inverse of `tokens_to_heads`."""
    return _ToTokens.apply(x, axis)


def all_to_all(x: Tensor, axis: SequenceAxis) -> Tensor:
    """Part r along dim 0 of this rank's `x` to rank r: `[ranks, ...]` in the same shape."""
    collectives = torch.ops._c10d_functional
    ones = [1] * axis.size
    return collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), ones, ones, axis.group_name))


def _to_heads(x: Tensor, axis: SequenceAxis) -> Tensor:
    parts = x.unflatten(2, (axis.size, -1)).movedim(2, 0)
    return all_to_all(parts, axis).movedim(0, 1).flatten(1, 2)


def _to_tokens(x: Tensor, axis: SequenceAxis) -> Tensor:
    parts = x.unflatten(1, (axis.size, -1)).movedim(1, 0)
    return all_to_all(parts, axis).movedim(0, 2).flatten(2, 3)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, axis: SequenceAxis) -> Tensor:
        ctx.save_for_backward(source)
        ctx.axis = axis
        return gathered(x, axis).flatten(0, 2)[source]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (source,) = ctx.saved_tensors
        return summed_share([gradient], source, ctx.axis), None, None


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: SequenceAxis) -> Tensor:
        ctx.axis = axis
        return _to_heads(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _to_tokens(gradient, ctx.axis), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: SequenceAxis) -> Tensor:
        ctx.axis = axis
        return _to_tokens(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _to_heads(gradient, ctx.axis), None
