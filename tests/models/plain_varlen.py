"""A plain kernel in the place of torch's variable-length attention, and under torch's own operation on CPUs."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    starts_of_keys: Tensor,
    longest: int,
    longest_of_keys: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """As `torch.nn.attention.varlen.varlen_attn`, one document after the other. It ignores what is beyond `longest`."""
    assert window_size == (-1, 0) and starts is starts_of_keys and longest == longest_of_keys
    out = torch.zeros_like(q)
    for start, stop in zip(starts.tolist(), starts[1:].tolist(), strict=False):
        stop = min(stop, start + longest)
        if stop > start:
            one = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
            found = F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=enable_gqa)
            out = torch.cat([out[:start], found[0].transpose(0, 1), out[stop:]])
    return out


@functools.cache
def on_cpus() -> list[str]:
    """Let torch's operation compute on CPUs, and note "forward" and "backward" for each of its calls."""
    from torch.nn.attention import varlen

    calls: list[str] = []

    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        calls.append("forward")
        q, k, v, starts, _, longest, _, _, scale = arguments[:9]
        with torch.no_grad():
            out = _plain(q, k, v, starts, longest, scale)
        lse = torch.zeros(q.shape[1], q.shape[0])
        return out, lse, torch.zeros(2, dtype=torch.uint64)

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        calls.append("backward")
        gradient, q, k, v, _, _, starts, _, _, _, _, _, scale = arguments[:13]
        return _gradients(gradient, q, k, v, starts, scale)

    varlen._varlen_attn.register_kernel("cpu")(forward)  # type: ignore[attr-defined]
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)  # type: ignore[attr-defined]
    return calls


def _plain(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float | None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return plain_kernel(q, k, v, starts, starts, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=grouped)


def _gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float | None
) -> tuple[Tensor, ...]:
    """By hand: there is no autograd inside an operation."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found, group = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)], q.shape[1] // k.shape[1]
    for start, stop in zip(starts.tolist(), starts[1:].tolist(), strict=False):
        if stop == start:
            continue
        own, by_key, by_value, out = (x[start:stop].float().transpose(0, 1) for x in (q, k, v, gradient))
        by_key, by_value = (x.repeat_interleave(group, 0) for x in (by_key, by_value))
        later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        weights = (own @ by_key.mT * scale).masked_fill(later, float("-inf")).softmax(-1)
        slopes = out @ by_value.mT
        slopes = weights * (slopes - (slopes * weights).sum(-1, keepdim=True)) * scale
        parts = slopes @ by_key, slopes.mT @ own, weights.mT @ out
        for total, part in zip(found, parts, strict=True):
            one = part if len(part) == total.shape[1] else part.unflatten(0, (-1, group)).sum(1)
            total[start:stop] = one.transpose(0, 1)
    return tuple(total.to(x.dtype) for total, x in zip(found, (q, k, v), strict=True))
