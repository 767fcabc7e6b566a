"""Initial weights are normal numbers, and the same bits on every processor."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from stoker.parallel.normal import normal, quantile

RECORDED = "9e8e86bc9ba27e57b86802f119bb6b0e8bacf0be2e9350d4bccd3a4f50abcb65"
COUNT = 1_000_003


def digest(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def test_the_numbers_are_recorded() -> None:
    """Another digest is another run from the same seed."""
    assert digest(normal(COUNT, 7)) == RECORDED


@pytest.mark.long
def test_without_vector_instructions_the_bits_are_the_same() -> None:
    program = f"from tests.parallel.test_normal import *; print(digest(normal({COUNT}, 7)))"
    plain = {"ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F"}
    ran = subprocess.run([sys.executable, "-c", program], env=os.environ | plain, capture_output=True, text=True)
    assert ran.stdout.strip() == RECORDED, ran.stderr


def test_each_key_has_different_numbers_and_fewer_are_the_first_of_more() -> None:
    assert torch.equal(normal(9, 3), normal(10, 3)[:9])
    assert not torch.equal(normal(9, 3), normal(9, 4))
    assert normal(0, 3).shape == (0,)


@pytest.mark.long
def test_they_are_normal() -> None:
    """Moments, the distribution function (Kolmogorov and Smirnov) and the tails, of sixteen million."""
    drawn = torch.cat([normal(1 << 20, key) for key in range(16)]).double()
    count = len(drawn)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((drawn**power).mean()) - moment) < 4 * math.sqrt(variance / count), power
    ordered = drawn.sort().values
    below = 0.5 * torch.erfc(-ordered / math.sqrt(2))
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((below - steps[:-1]).abs().max(), (below - steps[1:]).abs().max())
    assert float(distance) * math.sqrt(count) < 1.63, "a chance of 1%"
    for far in (3.0, 4.0, 4.5):
        expected = count * math.erfc(far / math.sqrt(2))
        assert abs(int((drawn.abs() > far).sum()) - expected) < 4 * math.sqrt(expected), far


def test_adjacent_numbers_and_halves_are_independent() -> None:
    drawn = normal(1 << 20, 11).double()
    for lag in (1, 2, 128):
        assert abs(float((drawn[lag:] * drawn[:-lag]).mean())) < 4 / math.sqrt(len(drawn)), lag
    assert abs(float((drawn[lag:] ** 2 * drawn[:-lag] ** 2).mean()) - 1) < 4 * math.sqrt(8 / len(drawn))


@pytest.mark.parametrize("p", [2.0**-32, 1e-8, 1e-3, 0.05, 0.075, 0.1, 0.4, 0.5])
def test_the_quantile_is_the_inverse_of_the_distribution_function(p: float) -> None:
    assert 0.5 * math.erfc(-quantile(p, math.log(p)) / math.sqrt(2)) == pytest.approx(p, rel=1e-12)
