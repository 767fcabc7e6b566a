"""Rotary position embedding (Su et al. 2021, RoFormer, section 3.2) in the layout of Hugging Face's models.

Channel i of a head is paired with channel i + head_dim / 2, so published weights fit without a permutation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stoker.conf.schema import RopeParameters

FAST, SLOW = 32.0, 1.0  # turns between which yarn blends, where a config has none


def frequencies(head_dim: int, rope: RopeParameters, device: torch.device | None = None) -> Tensor:
    """Radians per position of each channel pair: fp32 `[head_dim / 2]`.

    With rope_type linear all waves are slowed down by the factor. With llama3 those longer than the original context
    are, waves that fit into it often are unchanged, and those between are blended (Llama 3.1's reference code,
    `apply_scaling`). With longrope each has a factor of its own (Ding et al. 2024), that of the original context.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    if rope.rope_type == "longrope":
        return 1.0 / (torch.tensor(rope.short_factor, device=device) * rope.rope_theta**exponents)
    radians = 1.0 / rope.rope_theta**exponents
    if rope.rope_type == "default":
        return radians
    if rope.rope_type == "linear":
        assert rope.factor is not None
        return radians / rope.factor
    if rope.rope_type == "yarn":
        return _yarn(radians, rope)
    assert rope.rope_type == "llama3", rope.rope_type  # the other types and missing values are refused at a start
    factor, low, high = rope.factor, rope.low_freq_factor, rope.high_freq_factor
    assert factor is not None and low is not None and high is not None
    assert rope.original_max_position_embeddings is not None
    turns = rope.original_max_position_embeddings * radians / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return radians * (kept + (1.0 - kept) / factor)


def _yarn(radians: Tensor, rope: RopeParameters) -> Tensor:
    """Waves of many turns in the original context are kept, those of few are slowed down (Peng et al. 2023, 3.2)."""
    pairs, context = radians.numel(), rope.original_max_position_embeddings
    assert rope.factor is not None and context is not None

    def pair_of(turns: float) -> float:
        return pairs * math.log(context / (turns * 2 * math.pi)) / math.log(rope.rope_theta)

    first = max(math.floor(pair_of(rope.beta_fast or FAST)), 0)
    last = min(math.ceil(pair_of(rope.beta_slow or SLOW)), 2 * pairs - 1)
    width = last - first or 0.001
    slowed = ((torch.arange(pairs, dtype=torch.float32, device=radians.device) - first) / width).clamp(0.0, 1.0)
    return radians / rope.factor * slowed + radians * (1.0 - slowed)


def table_scale(rope: RopeParameters) -> float:
    """The factor of the tables, and so of queries and keys."""
    if rope.rope_type == "longrope":
        assert rope.attention_factor is not None
        return rope.attention_factor
    if rope.rope_type != "yarn":
        return 1.0
    if rope.mscale and rope.mscale_all_dim:
        return _grown(rope, rope.mscale) / _grown(rope, rope.mscale_all_dim)
    return _grown(rope, 1.0)


def latent_scale(rope: RopeParameters) -> float:
    """The factor of the scores of latent attention (DeepSeek-V2's code)."""
    return _grown(rope, rope.mscale_all_dim) ** 2 if rope.rope_type == "yarn" and rope.mscale_all_dim else 1.0


def _grown(rope: RopeParameters, by: float) -> float:
    assert rope.factor is not None
    return 1.0 if rope.factor <= 1 else 0.1 * by * math.log(rope.factor) + 1.0


def rotary_tables(positions: Tensor, radians: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of positions `[rows, seq_len]` for `rotate`: fp32 `[rows, seq_len, 1, head_dim]`."""
    angles = (positions.to(torch.float32)[..., None] * radians)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def in_halves(x: Tensor) -> Tensor:
    """Channels that are paired with their neighbour, `[..., head_dim]`, in the order that `rotate` pairs."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """`x` `[rows, seq_len, heads, head_dim]` turned by the tables' angles, in fp32 inside.

    Tables of fewer channels turn the first of a head.
    """
    turning = cos.shape[-1]
    if turning < x.shape[-1]:
        return torch.cat([rotate(x[..., :turning], cos, signed_sin), x[..., turning:]], -1)
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, swapped, signed_sin).to(x.dtype)
