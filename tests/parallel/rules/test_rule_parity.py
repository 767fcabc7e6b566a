"""Muon, LAMB and Lion on a spread of layouts compute what their papers' rules compute on whole parameters."""

from __future__ import annotations

import pytest

from stoker.parallel.layout import Layout
from tests.extent import some
from tests.parallel.parity import Case, assert_parity

RULES = ("muon", "lamb", "lion")
# Of four rows of queries and two kv heads: tp 4 shares kv heads between neighbours, and the vocabulary of 50 is divided
# by no tp.
LAYOUTS = [
    (Layout(1, 2, zero=3), Case(8)),
    (Layout(2), Case(2)),
    (Layout(cp=2), Case(4, tied=True)),
    (Layout(tp=2), Case(4)),
    (Layout(1, 2, zero=1), Case(4, tied=True)),
    (Layout(pp=2), Case(4, tied=True)),
    (Layout(cp=2, zero=3), Case(4)),  # ZeRO shards over cp
    (Layout(1, 2, zero=2), Case(4)),
    (Layout(tp=2), Case(4, tied=True, sequence=False)),
    (Layout(), Case(4)),
]
OF_FOUR = [
    (Layout(2, 2, zero=2), Case(4)),
    (Layout(1, 2, 2, zero=3), Case(4, tied=True)),
    (Layout(tp=4), Case(4)),
    (Layout(1, 4, zero=1), Case(2)),
    (Layout(2, 1, 2), Case(4)),
    (Layout(1, 2, 1, 2, 2), Case(2, tied=True)),
    (Layout(1, 1, 2, 2), Case(4, "interleaved", tied=True)),
]


def cases(case: Case) -> list[Case]:
    return [Case(case.micro, case.schedule, case.tied, rule, case.sequence) for rule in RULES]


SPREAD = [
    pytest.param(*each, marks=pytest.mark.long) if each[0].cp > 1 or each[0].tp > 1 else each
    for each in some(LAYOUTS, 3)
]  # fmt: skip


@pytest.mark.parametrize(("layout", "case"), SPREAD, ids=str)
def test_rules_on_one_and_two_ranks(layout: Layout, case: Case) -> None:
    assert_parity(layout, cases(case))


@pytest.mark.long
@pytest.mark.parametrize(("layout", "case"), some(OF_FOUR, 4), ids=str)
def test_rules_on_four_ranks(layout: Layout, case: Case) -> None:
    assert_parity(layout, cases(case))
