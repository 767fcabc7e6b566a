from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stoker.conf.ramp import Ramp, ramp_of, unit_rows
from stoker.conf.schema import BatchConfig, Config


def test_a_batch_grows_with_the_step_that_begins_behind_the_tokens() -> None:
    config = Config(seq_len=10, batch=BatchConfig(size=12, ramp=[[4, 100], [8, 250]]))
    ramp = ramp_of(config)
    assert [ramp.size(step) for step in range(1, 9)] == [4, 4, 4, 8, 8, 12, 12, 12]
    assert [ramp.rows_before(step) for step in range(1, 9)] == [0, 4, 8, 12, 20, 28, 40, 52]
    assert ramp.unit == unit_rows(config) == 4
    assert [ramp.steps_of(rows) for rows in (0, 3, 4, 11, 12, 19, 20, 28, 39, 40)] == [0, 0, 1, 2, 3, 3, 4, 5, 5, 6]


def test_without_a_ramp_every_step_is_as_large() -> None:
    ramp = ramp_of(Config(batch=BatchConfig(size=12)))
    assert ramp.unit == ramp.size(1) == ramp.size(10**6) == 12 and ramp.rows_before(5) == 48 and ramp.steps_of(49) == 4


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    limits=st.lists(st.integers(1, 400), min_size=3, max_size=3, unique=True),
    length=st.integers(1, 7),
)
def test_any_ramp_counts_each_sequence_once(sizes: list[int], limits: list[int], length: int) -> None:
    *before, last = sizes
    ramp = Ramp((*zip(before, map(float, sorted(limits)), strict=False), (last, float("inf"))), length)
    rows = 0
    for step in range(1, 60):
        assert ramp.rows_before(step) == rows and ramp.size(step) % ramp.unit == 0
        wanted = next((size for size, tokens in ramp.stages if rows * length < tokens), last)
        assert ramp.size(step) == wanted
        rows += ramp.size(step)
        assert ramp.steps_of(rows) == step and ramp.steps_of(rows - 1) == step - 1
