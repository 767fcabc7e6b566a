from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stoker.data.shuffle import permute

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**63)
epochs = st.integers(0, 10**6)


@given(sizes, seeds, epochs)
def test_an_epoch_holds_every_row_exactly_once(size, seed, epoch):
    assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


@given(sizes, seeds, epochs, st.data())
def test_a_row_read_separately_equals_the_row_in_a_batch(size, seed, epoch, data):
    index = data.draw(st.integers(0, size - 1))
    assert permute(np.array([index]), size, seed, epoch)[0] == permute(np.arange(size), size, seed, epoch)[index]


@given(st.integers(30, 3000), seeds, epochs)
def test_the_next_epoch_and_another_seed_have_other_orders(size, seed, epoch):
    order = permute(np.arange(size), size, seed, epoch)
    assert not np.array_equal(order, permute(np.arange(size), size, seed, epoch + 1))
    assert not np.array_equal(order, permute(np.arange(size), size, seed + 1, epoch))


def test_sizes_beyond_32_bits_stay_in_range_and_one_to_one():
    size = 3 * 10**12 + 7
    found = permute(np.arange(size - 5000, size), size, 1, 2)
    assert found.min() >= 0 and found.max() < size and len(set(found.tolist())) == 5000


def test_every_place_is_equally_likely():
    """Chi-square of 10 x 10 (row, place) pairs over 4000 epochs: 81 degrees of freedom, 150 is beyond 5 sigma."""
    counts = np.zeros((10, 10))
    for epoch in range(4000):
        counts[np.arange(10), permute(np.arange(10), 10, 0, epoch)] += 1
    assert ((counts - 400) ** 2 / 400).sum() < 150


def test_consecutive_elements_are_separated():
    order = permute(np.arange(10_000), 10_000, 0, 0)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert (abs(np.diff(order)) < 10).mean() < 0.01


def test_the_order_is_pinned():
    """A run resumed with a later version must find the rows it left. Change this only with a new fingerprint."""
    assert permute(np.arange(12), 12, 0, 0).tolist() == [9, 6, 3, 11, 2, 5, 0, 7, 1, 4, 10, 8]
    assert permute(np.arange(3), 10**12, 1, 2).tolist() == [533129382892, 263137051907, 606476154324]
