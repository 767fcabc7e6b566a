"""Stand-ins for kernels in a rehearsal: they keep the memory that the real ones keep, in few operations.

On CPUs attention in bf16 is a loop of hundreds of small operations (`stoker.models.cpu_attention`); its stand-in makes
the buffers of the largest block once. As on CUDA, two kernels keep other tensors for backward than the operations that
run on CPUs: a norm keeps one number a row instead of an fp32 copy of its input, and attention is fused, whatever its
mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stoker.models import attention, cpu_attention, gathered_attention
from stoker.parallel import native
from stoker.parallel.batch import Batch
from stoker.parallel.sequence import SequenceAxis

Counted = Callable[[int], None]  # takes floating-point operations that torch's counter does not see


@contextlib.contextmanager
def stand_ins(kind: str, selective: bool, sharded: bool, counted: Counted) -> Iterator[None]:
    """Kernels as on a device of this `kind`, cpu or cuda, in models that are rehearsed inside.

    `sharded` parameters are cut into one shard, that of this rank, and not into those of all ranks. With `selective`
    recomputation the loop of CPUs stays as it is, because its single products are kept or not.
    """
    with contextlib.ExitStack() as stack:

        def replace(module: Any, name: str, function: Any) -> None:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)

        if sharded:
            from torch.distributed.fsdp._fully_shard import _fsdp_param  # half a second that others do not need

            replace(_fsdp_param, "_chunk_with_empty", _Chunks)
        if kind == "cuda":
            replace(attention, "attend_in_blocks", lambda q, k, v, mask, scale=None: _by_heads(q, k, v))
            replace(F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: _fused(q, k, v))
            replace(attention, "document_mask", lambda documents, dtype, window=None: documents)
            replace(attention, "attend_gathered", _gathered)
            replace(F, "rms_norm", lambda x, shape, weight=None, eps=None: _Norm.apply(x, weight))
        elif not selective:
            replace(
                attention, "attend_in_blocks", lambda q, k, v, mask, scale=None: _Blocked.apply(q, k, v, mask, counted)
            )
        replace(native, "own_tokens", _first_tokens)
        replace(gathered_attention.KeySpans, "blocks", property(_even_blocks))
        yield


def _first_tokens(rows: Batch, axis: SequenceAxis, document_mask: bool) -> Batch:
    """A context-parallel rank's tokens: as many as any other has."""
    return rows.map(lambda field: field[:, : field.shape[1] // axis.size].contiguous())


def _even_blocks(spans: gathered_attention.KeySpans) -> list[list[tuple[int, int, int, int]]]:
    """Blocks of queries that all see every key."""
    (rows, queries), keys, size = spans.last.shape, spans.source.shape[1], gathered_attention.BLOCK
    return [[(start, min(start + size, queries), 0, keys) for start in range(0, queries, size)]] * rows


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, spans: gathered_attention.KeySpans, scale: float, axis: SequenceAxis, kernel: Any
) -> Tensor:
    return gathered_attention.attend_to_all(q, k, v, spans.source, axis, _by_heads)


class _Chunks:
    """The `count` chunks of a tensor, as `torch.chunk` cuts it, of which only those are made that are asked for."""

    def __init__(self, tensor: Tensor, count: int, dim: int) -> None:
        self._tensor, self._dim, self._each = tensor, dim, -(-tensor.size(dim) // count)

    def __getitem__(self, number: int) -> Tensor:
        start = number * self._each
        length = min(self._each, self._tensor.size(self._dim) - start)
        return self._tensor.narrow(self._dim, start, length) if length > 0 else self._tensor.new_empty(0)


def _by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`_fused` of `[rows, tokens, heads, head_dim]`."""
    return _fused(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernels of CUDA for `[rows, heads, tokens, head_dim]`."""
    if q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # as `stoker.models.attention`
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)[0]


class _Norm(torch.autograd.Function):
    """RMSNorm in one kernel: its input as it is, and one fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return x.clone()  # it reads and writes as much

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return x + gradient, None if weight is None else torch.empty_like(weight)


class _Blocked(torch.autograd.Function):
    """`stoker.models.cpu_attention`: queries in blocks, the probabilities computed again in backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, counted: Counted) -> Tensor:
        ctx.counted = counted
        ctx.save_for_backward(q, k, v, mask)
        counted(_flops(q, k))
        out = torch.empty_like(q)
        _ = [torch.empty_like(k[0]), torch.empty_like(v[0]), _scores(q), _scores(q)]  # before and after the softmax
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _ = ctx.saved_tensors
        ctx.counted(2 * _flops(q, k))  # the scores that are computed again are left out
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _ = [torch.empty_like(k[0]), torch.empty_like(v[0]), _scores(q), _scores(q), _scores(q)]
        _ = [*_, *(torch.empty_like(k[0], dtype=torch.float32) for _ in range(3))]  # two sums, and a product
        return *grads, None, None


def _flops(q: Tensor, k: Tensor) -> int:
    """Of the products of scores and of values, as if attention were not causal."""
    rows, queries, heads, head_dim = q.shape
    return 4 * rows * heads * queries * k.shape[1] * head_dim


def _scores(q: Tensor) -> Tensor:
    """Of one row's last block, which is the largest."""
    _, seq_len, heads, _ = q.shape
    return q.new_empty(heads, min(cpu_attention.BLOCK, seq_len), seq_len)
