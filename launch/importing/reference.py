"""The decoder of the Llama kind as other programs compute it: from their own tensors, by their own layouts.

It shares no code with the conversion it is compared with. Weights are read when they are used, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stoker.models.hugging_face_config import rope_of
from stoker.models.rope import frequencies


class Layer(Protocol):
    """A layer's tensors in a source. `qkv(x)` gives heads as `[tokens, heads, head_dim]`."""

    def weight(self, role: str) -> Tensor:
        """Of `attention_norm`, `mlp_norm`, `o`, `gate`, `up` or `down`."""
        ...

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def head_norm(self, kind: str) -> Tensor | None:
        """The weight of the norm of queries (`q`) or keys (`k`), where the model has one."""
        ...


def logits(
    parsed: Any,
    tokens: Tensor,
    outer: Callable[[str], Tensor],
    layer: Callable[[int], Layer],
    rotate: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Logits `[tokens, vocab]` of `tokens` `[1, tokens]`, in float32.

    `outer` gives the weight of `embedding`, `norm` or `head`; `rotate(x, angles)` turns heads `[tokens, heads, dim]`
    by `angles` `[tokens, dim / 2]`.
    """
    head_dim = getattr(parsed, "head_dim", None) or parsed.hidden_size // parsed.num_attention_heads
    positions = torch.arange(tokens.shape[1], dtype=torch.float32)
    angles = positions[:, None] * frequencies(head_dim, rope_of(parsed))
    x = outer("embedding").float()[tokens[0]]

    def normed(value: Tensor, weight: Tensor) -> Tensor:
        return value * torch.rsqrt(value.square().mean(-1, keepdim=True) + parsed.rms_norm_eps) * weight.float()

    for number in range(parsed.num_hidden_layers):
        own = layer(number)
        q, k, v = own.qkv(normed(x, own.weight("attention_norm")))
        q, k = (
            value if (weight := own.head_norm(kind)) is None else normed(value, weight)
            for kind, value in (("q", q), ("k", k))
        )
        q, k = rotate(q, angles), rotate(k, angles)
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(head_dim)
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        x = x + F.linear(mixed, own.weight("o").float())
        inner = normed(x, own.weight("mlp_norm"))
        gate, up = (F.linear(inner, own.weight(role).float()) for role in ("gate", "up"))
        x = x + F.linear(F.silu(gate) * up, own.weight("down").float())
    return F.linear(normed(x, outer("norm")), outer("head").float())


def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Channel i is paired with channel i + dim / 2."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotate_neighbours(x: Tensor, angles: Tensor) -> Tensor:
    """Channel 2i is paired with channel 2i + 1: complex numbers, as in Llama's original code."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)
