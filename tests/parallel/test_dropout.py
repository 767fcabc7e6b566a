"""Masks of dropout: numbers of a published generator, the same for any share of tokens and channels."""

from __future__ import annotations

import pytest
import torch

from stoker.parallel.batch import Batch
from stoker.parallel.tensor.axis import TensorAxis
from stoker.parallel.tensor.dropout import Dropout, TokenNumbers, dropped

BITS = (1 << 64) - 1
KEY = -0x123456789ABCDEF


def split_mix_64(state: int) -> int:
    """The next number of the reference code's `next`, in whole numbers."""
    z = (state + 0x9E3779B97F4A7C15) & BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & BITS
    return z ^ (z >> 31)


def test_the_reference_code_of_this_test_is_the_published_one() -> None:
    gamma, found = 0x9E3779B97F4A7C15, []
    for number in range(3):
        found.append(split_mix_64((1234567 + number * gamma) & BITS))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]  # known for seed 1234567


def test_a_channel_is_dropped_by_sixteen_bits_of_its_number() -> None:
    tokens = torch.tensor([0, 1, 7, 5_000_000_011])
    threshold, gamma = 20_000, 0x9E3779B97F4A7C15
    found = dropped(tokens, KEY, 0, 13, threshold)
    for row, token in enumerate(tokens.tolist()):
        state = split_mix_64(((token - 1) * gamma + KEY) & BITS)
        for channel in range(13):
            word = split_mix_64((state + channel // 4 * gamma) & BITS)
            bits = word >> 16 * (channel % 4) & 0xFFFF
            signed = bits - 0x10000 if bits >= 0x8000 else bits
            assert found[row, channel] == (signed + 0x8000 < threshold), (token, channel)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_as_many_are_dropped_as_the_probability_is(probability: float) -> None:
    threshold = round(probability * 65536)
    masks = dropped(torch.arange(2000), KEY, 0, 500, threshold).double()
    sigma = (probability * (1 - probability) / masks.numel()) ** 0.5
    assert abs(masks.mean().item() - threshold / 65536) < 5 * sigma
    for dim, count in ((0, 2000), (1, 500)):  # of each channel, and of each token
        means = masks.mean(dim)
        assert (means - probability).abs().max() < 6 * (probability * (1 - probability) / count) ** 0.5
    for a, b in ((masks[1:], masks[:-1]), (masks[:, 1:], masks[:, :-1]), (masks[:, 4:], masks[:, :-4])):
        correlation = ((a - probability) * (b - probability)).mean() / (probability * (1 - probability))
        assert abs(correlation) < 5 / a.numel() ** 0.5


def test_any_share_of_tokens_and_channels_is_a_slice() -> None:
    tokens = torch.arange(100, 180)
    every = dropped(tokens, KEY, 0, 70, 30_000)
    for start, stop in ((0, 1), (3, 5), (8, 24), (35, 70)):
        assert torch.equal(dropped(tokens[7:31], KEY, start, stop, 30_000), every[7:31, start:stop])
    other = dropped(tokens, KEY + 1, 0, 70, 30_000)
    assert 0.3 < (other == every).double().mean() < 0.7


def test_the_rest_is_kept_as_it_is_and_scaled_by_the_share_that_is_kept() -> None:
    tokens = TokenNumbers()
    dropout = Dropout(0.25, 3, "layers.0.mlp.down", tokens, range(6))
    x = torch.rand(2, 4, 6) + 1
    with tokens.of(torch.arange(8).view(2, 4)):
        found = dropout(x)
        assert torch.equal(dropout(x.flatten(0, 1)), found.flatten(0, 1))
    assert torch.equal(found, x.where(found != 0, 0.0)) and 0 < (found == 0).sum() < 40
    assert dropout.scale == pytest.approx(1 / 0.75)


def test_rows_of_unknown_tokens_are_refused() -> None:
    tokens = TokenNumbers()
    dropout = Dropout(0.25, 3, "layers.0.mlp.down", tokens, range(6))
    with pytest.raises(ValueError, match="was not given"):
        dropout(torch.ones(8, 6))
    with tokens.of(torch.arange(8).view(2, 4)):
        for shape in ((4, 2, 6), (5, 6)):
            with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down takes activations .* adapter\.dropout=0 works"):
                dropout(torch.ones(shape))
        tokens.axis = TensorAxis(None, 2, 1, None, "", True)  # type: ignore[arg-type]
        assert tokens.rows_of(torch.ones(4, 6), "").tolist() == [4, 5, 6, 7]


def test_tokens_are_numbered_by_their_sequence_in_the_run() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    batch = Batch(tokens, tokens, tokens, tokens.int()).numbered(first=10, rank=1, ranks=2)
    assert batch.numbers is not None
    assert batch.numbers.tolist() == [[33, 34, 35], [39, 40, 41]]  # sequences 11 and 13
