"""Rotary embedding by its definition."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from stoker.conf.schema import RopeParameters
from stoker.models.rope import frequencies, rotary_tables, rotate


@given(first=st.integers(0, 500), shift=st.integers(0, 500), apart=st.integers(0, 100))
def test_scores_depend_only_on_the_distance(first: int, shift: int, apart: int) -> None:
    generator = torch.Generator().manual_seed(first)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator) for _ in range(2))
    radians = frequencies(16, RopeParameters())

    def score(position: int) -> torch.Tensor:
        at, other = (rotary_tables(torch.tensor([[n]]), radians) for n in (position + apart, position))
        return (rotate(q, *at) * rotate(k, *other)).sum()

    torch.testing.assert_close(score(first), score(first + shift), rtol=1e-3, atol=1e-3)


def test_channel_i_turns_with_channel_i_plus_half() -> None:
    radians = frequencies(4, RopeParameters(rope_theta=100.0))
    torch.testing.assert_close(radians, torch.tensor([1.0, 0.1]))
    x = torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 1, 1, 4)
    turned = rotate(x, *rotary_tables(torch.tensor([[3]]), radians)).flatten()
    expected = [math.cos(3), -2 * math.sin(0.3), math.sin(3), 2 * math.cos(0.3)]
    torch.testing.assert_close(turned, torch.tensor(expected))


def test_scaling_slows_long_waves_only() -> None:
    plain = frequencies(128, RopeParameters(rope_theta=500000.0))
    scaled = frequencies(128, RopeParameters("llama3", 500000.0, 8.0, 1.0, 4.0, 8192))
    waves = 2 * math.pi / plain
    torch.testing.assert_close(scaled[waves < 8192 / 4], plain[waves < 8192 / 4])
    torch.testing.assert_close(scaled[waves > 8192], plain[waves > 8192] / 8)
    between = (waves > 8192 / 4) & (waves < 8192)
    assert between.any()
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


def test_angles_are_fp32_for_bf16_activations() -> None:
    x = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = rotary_tables(torch.tensor([[4001]]), frequencies(16, RopeParameters()))
    turned = rotate(x, *tables)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), *tables).bfloat16())
