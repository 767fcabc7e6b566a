"""Attention of a rank's queries to the keys and values of all ranks that share its sequences.

Keys are gathered layer by layer and put in the order of their documents, where the keys that a query sees lie together:
from the first of its document, or of its window, to its own. They are never kept for backward, which gathers them
again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stoker.models.cpu_attention import Block, attend_block, attend_block_backward, by_head
from stoker.parallel.apart import apart
from stoker.parallel.sequence import SequenceAxis
from stoker.parallel.sequence.regions import gather_tokens, gathered, summed_share

BLOCK = 128  # queries of a run that are taken together on CPUs

Kernel = Callable[..., Tensor]  # (q, all keys, all values) -> outputs, differentiable


@dataclass(frozen=True)
class KeySpans:
    """Which keys each query of this rank sees, by their places in the order of documents."""

    source: Tensor  # int64 [rows, keys]: the number of each key among those of all ranks, rank after rank
    first: Tensor  # int64 [rows, queries]
    last: Tensor  # int64 [rows, queries]: the query's own

    @functools.cached_property
    def blocks(self) -> list[list[tuple[int, int, int, int]]]:
        """Per row: queries from, to, and the keys from, to that they see, of queries whose keys follow each other."""
        return [query_blocks(*row) for row in zip(self.first.tolist(), self.last.tolist(), strict=True)]

    def allowed(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """FlexAttention's mask function: (row, head, query, key) -> whether the query may attend to the key."""
        first, last = self.first, self.last

        def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= first[row, query]) & (key <= last[row, query])

        return allowed


@dataclass(frozen=True)
class Places:
    """Places of tokens in the order of documents, in which those of a document lie together: int64."""

    every: Tensor  # [rows, keys], of the tokens of all ranks, rank after rank
    order: Tensor  # [rows, keys], the inverse
    own: Tensor  # [rows, queries], of this rank's tokens
    first: Tensor  # [rows, queries], of the first tokens of their documents


def places_of(positions: Tensor, documents: Tensor | None, axis: SequenceAxis) -> Places:
    """Of this rank's tokens at `positions` and of `documents`, `[rows, tokens]` each, as a model gets them.

    A message between the ranks.
    """
    tokens = positions.shape[1]
    numbers = torch.zeros_like(positions) if documents is None else documents.long()
    keys = gathered((numbers << 32) + positions, axis).transpose(0, 1).flatten(1)
    ordered, order = keys.sort(dim=1, stable=True)
    places = torch.arange(keys.shape[1], device=keys.device).expand_as(keys)
    every = torch.empty_like(order).scatter_(1, order, places)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = (ordered[:, 1:] >> 32) != (ordered[:, :-1] >> 32)
    begin = places.where(begins, 0).cummax(1).values
    own = every[:, axis.rank * tokens : (axis.rank + 1) * tokens].contiguous()
    return Places(every, order, own, begin.gather(1, own))


def key_spans(positions: Tensor, documents: Tensor | None, axis: SequenceAxis, window: int | None = None) -> KeySpans:
    """As `places_of`, from the same, of the last `window` keys up to a query's own."""
    places = places_of(positions, documents, axis)
    first = places.first if window is None else places.first.maximum(places.own - (window - 1))
    return KeySpans(_numbered(places.order, positions.shape[1]), first, places.own)


def rank_order(rows: int, tokens: int, axis: SequenceAxis, device: torch.device) -> Tensor:
    """The source of `attend_to_all` for keys rank after rank, where each of them has `[rows, tokens]`."""
    return _numbered(torch.arange(axis.size * tokens, device=device).expand(rows, -1), tokens)


def _numbered(order: Tensor, tokens: int) -> Tensor:
    """Of tokens by their numbers in the rows of all ranks, rank after rank, those in `KeySpans.source`."""
    row = torch.arange(len(order), device=order.device)[:, None]
    return order // tokens * (len(order) * tokens) + row * tokens + order % tokens


def query_blocks(first: list[int], last: list[int]) -> list[tuple[int, int, int, int]]:
    """See `KeySpans.blocks`: BLOCK queries at most."""
    found, start = [], 0
    for query in range(1, len(last) + 1):
        if query == len(last) or last[query] != last[query - 1] + 1 or query - start == BLOCK:
            found.append((start, query, first[start], last[query - 1] + 1))
            start = query
    return found


def attend_gathered(
    q: Tensor, k: Tensor, v: Tensor, spans: KeySpans, scale: float, axis: SequenceAxis, kernel: Kernel
) -> Tensor:
    """Attention of this rank's `q`, `k` and `v`, `[rows, tokens, heads, head_dim]`, over the tokens of all ranks.

    On CPUs in blocks of queries; elsewhere by `kernel`, which is given all keys in the order of `spans`.
    """
    if q.device.type == "cpu":
        return apart(_attend_in_blocks)(q, k, v, spans, scale, axis)
    return attend_to_all(q, k, v, spans.source, axis, kernel)


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, spans: KeySpans, scale: float, axis: SequenceAxis) -> Tensor:
    return _InBlocks.apply(q, k, v, spans, scale, axis)


def attend_to_all(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, axis: SequenceAxis, kernel: Kernel, *others: Tensor
) -> Tensor:
    """`kernel(q, keys, values, *others)` with keys and values of all ranks in the order of `source`."""
    return apart(_attend_to_all)(q, k, v, source, axis, kernel, *others)


def _attend_to_all(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, axis: SequenceAxis, kernel: Kernel, *others: Tensor
) -> Tensor:
    if axis.recomputed or not torch.is_grad_enabled():
        found = gather_tokens(torch.cat([k, v], -1), source, axis)
        return kernel(q, *found.split([k.shape[-1], v.shape[-1]], -1), *others)
    return _Regathered.apply(kernel, source, axis, q, k, v, *others)


def _all(k: Tensor, v: Tensor, source: Tensor, axis: SequenceAxis) -> tuple[Tensor, Tensor]:
    """Keys and values of all ranks, in one message."""
    found = gathered(torch.cat([k, v], -1), axis).flatten(0, 2)[source]
    keys, values = found.split([k.shape[-1], v.shape[-1]], -1)
    return keys, values


def _shares(keys: Tensor, values: Tensor, source: Tensor, axis: SequenceAxis) -> tuple[Tensor, Tensor]:
    """Gradients of this rank's keys and values."""
    grad_k, grad_v = summed_share([keys, values], source, axis).split([keys.shape[-1], values.shape[-1]], -1)
    return grad_k, grad_v


class _Regathered(torch.autograd.Function):
    """`attend_to_all`, computed again in backward from what this rank holds."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, source: Tensor, axis: SequenceAxis, q: Tensor, k: Tensor, v: Tensor, *others: Tensor
    ) -> Tensor:
        ctx.save_for_backward(source, q, k, v, *others)
        ctx.kernel, ctx.axis = kernel, axis
        return kernel(q, *_all(k, v, source, axis), *others)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, q, k, v, *others = ctx.saved_tensors
        inputs = [x.detach().requires_grad_() for x in (q, *_all(k, v, source, ctx.axis), *others)]
        with torch.enable_grad():
            out = ctx.kernel(*inputs)
        grad_q, grad_keys, grad_values, *more = torch.autograd.grad(out, inputs, gradient)
        del out, inputs
        return None, None, None, grad_q, *_shares(grad_keys, grad_values, source, ctx.axis), *more


class _InBlocks(torch.autograd.Function):
    """`stoker.models.cpu_attention` for keys of all ranks; backward computes the probabilities again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: KeySpans, scale: float, axis: SequenceAxis) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.spans, ctx.scale, ctx.axis = spans, scale, axis
        keys, values = _all(k, v, spans.source, axis)
        out = torch.empty_like(q)
        for row, blocks in enumerate(spans.blocks):
            row_keys, row_values = by_head(keys[row]), by_head(values[row])
            for block in blocks:
                start, stop, first, end = block
                part = Block(q[row, start:stop], row_keys[:, first:end], row_values[:, first:end], scale)
                out[row, start:stop] = attend_block(part, _mask(spans, row, block, q.dtype))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        spans, scale, axis = ctx.spans, ctx.scale, ctx.axis
        keys, values = _all(k, v, spans.source, axis)
        grad_q, grad_keys, grad_values = torch.empty_like(q), torch.empty_like(keys), torch.empty_like(values)
        for row, blocks in enumerate(spans.blocks):
            row_keys, row_values = by_head(keys[row]), by_head(values[row])
            sum_keys, sum_values = (torch.zeros_like(x, dtype=torch.float32) for x in (row_keys, row_values))
            for block in blocks:
                start, stop, first, end = block
                part = Block(q[row, start:stop], row_keys[:, first:end], row_values[:, first:end], scale)
                found = attend_block_backward(part, _mask(spans, row, block, q.dtype), gradient[row, start:stop])
                grad_q[row, start:stop] = found[0]
                sum_keys[:, first:end] += found[1]
                sum_values[:, first:end] += found[2]
            grad_keys[row] = sum_keys.mul_(scale).transpose(0, 1)
            grad_values[row] = sum_values.transpose(0, 1)
        del keys, values
        return grad_q, *_shares(grad_keys, grad_values, spans.source, axis), None, None, None


def _mask(spans: KeySpans, row: int, block: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """What is added to the scores of one block, `[queries, keys]`."""
    start, stop, first, end = block
    keys = torch.arange(first, end)
    seen = (keys >= spans.first[row, start:stop, None]) & (keys <= spans.last[row, start:stop, None])
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
