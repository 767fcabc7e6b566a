from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stoker.data import mixture as mixture_module
from stoker.data.mixture import WEIGHT_UNITS, Mixture, mix, whole_weights

# Weights that make deep trees, where errors add up, are as likely as plain ones.
weights = st.one_of(
    st.lists(st.integers(1, 100), min_size=2, max_size=12),
    st.lists(st.integers(0, 24).map(lambda power: 1 << power), min_size=2, max_size=20),
    st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=12).map(whole_weights),
)
row_numbers = st.one_of(st.integers(0, 10_000), st.integers(0, 10**15))


def endless(*wanted: int) -> Mixture:
    return mix([(0, wanted)], [None] * len(wanted))


@given(weights, row_numbers, st.integers(1, 5000))
def test_any_batch_is_within_three_rows_of_the_weights(wanted, first, size):
    mixture = endless(*wanted)
    got = np.array(mixture.counts(first + size)) - mixture.counts(first)
    assert got.sum() == size and got.min() >= 0
    for count, weight in zip(got.tolist(), wanted, strict=True):
        assert abs(count * sum(wanted) - weight * size) <= 3 * sum(wanted)


@given(weights | st.integers(2, 300).map(lambda count: [1] * count))
def test_the_tree_promises_that_for_every_batch_there_is(wanted):
    def worst(node: mixture_module._Node, off: float) -> float:
        """What a batch may be off at `node`, itself off by `off`; see the module's first lines."""
        below = [worst(child, 1 + off * child.weight / max(1, node.weight)) for child in node.children or ()]
        return max([off, *below])

    assert worst(mixture_module._tree(tuple(wanted)), 0.0) < 3


@given(weights, row_numbers)
def test_rows_of_every_source_come_in_order_and_none_is_left_out(wanted, first):
    mixture = endless(*wanted)
    sources, numbers = mixture.assign(np.arange(first, first + 500))
    expected = list(mixture.counts(first))
    for source, number in zip(sources.tolist(), numbers.tolist(), strict=True):
        assert number == expected[source]
        expected[source] += 1
    assert tuple(expected) == mixture.counts(first + 500)


@given(weights)
def test_the_share_of_a_long_run_is_the_weight(wanted):
    counts = endless(*wanted).counts(100_000)
    for count, weight in zip(counts, wanted, strict=True):
        assert abs(count / 100_000 - weight / sum(wanted)) < 1e-4


def test_nothing_drifts_at_the_quadrillionth_row():
    wanted = (1, 3, 5)
    mixture = endless(*wanted)
    period = 9 * 10**14
    assert mixture.counts(period) == (10**14, 3 * 10**14, 5 * 10**14)
    sources, numbers = mixture.assign(np.arange(9))
    later, later_numbers = mixture.assign(np.arange(period, period + 9))
    assert sources.tolist() == later.tolist()
    assert (later_numbers - numbers).tolist() == [mixture.counts(period)[source] for source in sources]


@example(14_348_907, 9_999_991, 10**17 - 3)  # where floating point is off, of the whole row number
@example(536_870_912, 536_870_911, 1_073_741_822)  # and of what is left of it after the first division
@given(st.integers(1, 1 << 29), st.integers(1, 1 << 29), st.integers(0, 10**17))
def test_counts_are_exact_whole_numbers(left, right, row):
    large, small = max(left, right + 1), min(left, right)  # the heavier is on the left
    taken = (row * large + (large + small) // 2) // (large + small)
    assert endless(large, small).counts(row) == (taken, row - taken)


@given(weights, st.integers(0, 3000), st.data())
def test_a_change_of_weights_keeps_earlier_rows_and_each_sources_order(wanted, at, data):
    new = data.draw(st.lists(st.integers(0, 50), min_size=len(wanted), max_size=len(wanted)).filter(any))
    before, after = endless(*wanted), mix([(0, wanted), (at + 1, new)], [None] * len(wanted))
    rows = np.arange(at + 1)
    assert [part.tolist() for part in before.assign(rows)] == [part.tolist() for part in after.assign(rows)]
    sources, numbers = after.assign(np.arange(at + 300))
    for source in range(len(wanted)):
        mine = numbers[sources == source]
        assert mine.tolist() == list(range(len(mine)))
    got = np.array(after.counts(at + 301)) - after.counts(at + 1)
    assert all(abs(count - 300 * weight / sum(new)) <= 3 for count, weight in zip(got, new, strict=True))


def test_a_source_without_further_rows_leaves_and_the_others_continue():
    mixture = mix([(0, (1, 1, 2))], [5, None, None])
    sources, numbers = mixture.assign(np.arange(400))
    assert numbers[sources == 0].tolist() == [0, 1, 2, 3, 4]
    left = np.flatnonzero(sources == 0)[-1]
    assert left < 24
    later = sources[left + 1 : left + 301]
    assert abs((later == 1).sum() - 100) <= 3 and abs((later == 2).sum() - 200) <= 3


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=6))
def test_data_that_all_end_give_every_row_of_every_source_once(sources):
    wanted, limits = zip(*sources, strict=True)
    mixture = mix([(0, wanted)], limits)
    assert mixture.total_rows == sum(limits) and mixture.counts(sum(limits)) == limits
    pairs = np.stack(mixture.assign(np.arange(sum(limits)))).T.tolist()
    assert sorted(pairs) == [[source, row] for source, limit in enumerate(limits) for row in range(limit)]


def test_a_phase_may_bring_a_source_in_and_leave_one_out():
    mixture = mix([(0, (1, 0)), (10, (0, 1)), (20, (1, 0))], [None, None])
    sources, numbers = mixture.assign(np.arange(30))
    assert sources.tolist() == [0] * 10 + [1] * 10 + [0] * 10
    assert numbers.tolist() == [*range(10), *range(10), *range(10, 20)]


def test_weights_of_nothing_are_refused():
    with pytest.raises(ValueError, match="a source with a weight above 0"):
        endless(0, 0)


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=200))
def test_whole_weights_are_the_shares(shares):
    whole = whole_weights(shares)
    assert sum(whole) <= 1 << 31 and min(whole) >= 1
    for weight, share in zip(whole, shares, strict=True):
        assert abs(weight / sum(whole) - share / sum(shares)) < 200 / WEIGHT_UNITS


def test_temperature_lifts_small_sources():
    assert np.allclose(np.array(whole_weights([1, 4, 16], 2.0)) / WEIGHT_UNITS, [1 / 7, 2 / 7, 4 / 7])
    assert whole_weights([1.0, 0.0])[1] == 0


def test_hundreds_of_sources_are_each_read_in_order():
    mixture = mix([(0, whole_weights([1.0 + k % 17 for k in range(500)]))], [None] * 500)
    first = 10**12
    sources, numbers = mixture.assign(np.arange(first, first + 2048))
    before = mixture.counts(first)
    for source in np.unique(sources).tolist():
        mine = numbers[sources == source]
        assert mine.tolist() == list(range(before[source], before[source] + len(mine)))
