"""All factorisations of 4 ranks and some of 8 compute one process's run."""

from __future__ import annotations

import pytest

from stoker.parallel.layout import Layout
from tests.extent import some
from tests.parallel.parity import OF_EIGHT, Case, assert_every_case, assert_parity, layouts


@pytest.mark.long
@pytest.mark.parametrize("layout", some(list(layouts(4)), 4), ids=str)
def test_every_layout_computes_what_one_process_computes(layout: Layout) -> None:
    assert_every_case(layout)


@pytest.mark.full
@pytest.mark.parametrize(("layout", "case"), OF_EIGHT, ids=str)
def test_eight_ranks_compute_what_one_process_computes(layout: Layout, case: Case) -> None:
    assert_parity(layout, [case])
