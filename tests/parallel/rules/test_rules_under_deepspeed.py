"""Rules over DeepSpeed's flat ranges, of which three rectangles make one part of a matrix."""

from __future__ import annotations

import itertools

import pytest

from stoker.parallel.layout import Layout
from tests.extent import some
from tests.parallel.parity import Case
from tests.parallel.test_deepspeed import assert_parity

TWO = [
    (Layout(1, 2, zero=2), Case(4, optimizer="muon")),
    (Layout(1, 2, zero=3), Case(8, optimizer="lamb")),
    (Layout(2), Case(4, tied=True, optimizer="muon")),
    (Layout(pp=2, zero=1), Case(2, "gpipe", tied=True, optimizer="lamb")),
    *itertools.product(
        [Layout(tp=2), Layout(1, 2, zero=1)], [Case(8, tied=True, optimizer=n) for n in ("muon", "lion")]
    ),
]


@pytest.mark.long
def test_rules_compute_the_same_under_deepspeed_on_two_ranks() -> None:
    assert_parity(2, some(TWO, 2))


@pytest.mark.full
def test_rules_compute_the_same_under_deepspeed_on_four_ranks() -> None:
    of_four = [Layout(1, 2, 2, zero=1), Layout(2, 2, zero=2), Layout(1, 4, zero=3), Layout(tp=4)]
    assert_parity(4, [(layout, Case(4, optimizer=n)) for layout in of_four for n in ("muon", "lamb", "lion")])
