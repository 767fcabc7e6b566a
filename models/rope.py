"""Rotary position embedding (Su et al. 2021, RoFormer, section 3.2) in the layout of Hugging Face's models.

Channel i of a head is paired with channel i + head_dim / 2, so published weights fit without a permutation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stoker.conf.schema import RopeParameters


def frequencies(head_dim: int, rope: RopeParameters, device: torch.device | None = None) -> Tensor:
    """Radians per position of each channel pair: fp32 `[head_dim / 2]`.

    With rope_type llama3 waves longer than the original context are slowed down by the factor, waves that fit into it
    often are unchanged, and those between are blended (Llama 3.1's reference code, `apply_scaling`).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    radians = 1.0 / rope.rope_theta**exponents
    if rope.rope_type == "default":
        return radians
    assert rope.rope_type == "llama3", rope.rope_type  # the other types and missing values are refused at a start
    factor, low, high = rope.factor, rope.low_freq_factor, rope.high_freq_factor
    assert factor is not None and low is not None and high is not None
    assert rope.original_max_position_embeddings is not None
    turns = rope.original_max_position_embeddings * radians / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return radians * (kept + (1.0 - kept) / factor)


def rotary_tables(positions: Tensor, radians: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of positions `[rows, seq_len]` for `rotate`: fp32 `[rows, seq_len, 1, head_dim]`."""
    angles = (positions.to(torch.float32)[..., None] * radians)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def in_halves(x: Tensor) -> Tensor:
    """Channels that are paired with their neighbour, `[..., head_dim]`, in the order that `rotate` pairs."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """`x` `[rows, seq_len, heads, head_dim]` turned by the tables' angles, in fp32 inside."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, swapped, signed_sin).to(x.dtype)
