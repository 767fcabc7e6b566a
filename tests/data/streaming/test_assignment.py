"""Assigning, without data: windows of made-up sizes."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.data.streaming.assignment import (
    UNCOUNTED,
    Assignment,
    Count,
    Terms,
    assign,
    from_json,
    nothing_assigned,
    to_json,
)

NEED, PERIOD = 10, 4


def run_to_the_end(
    sizes: Sequence[int], streams: int, overlap: int, resume_every: int | None = None
) -> list[list[list]]:
    """The amounts (window, place) in the rows of each stream, taken row by row until every stream has ended."""
    terms = Terms(streams, len(sizes), len(sizes), NEED, overlap)
    assigned, rows = nothing_assigned(streams), 0
    found: list[list[list]] = [[] for _ in range(streams)]
    full = np.full(streams, PERIOD)
    while True:
        if rows % PERIOD == 0 and assigned.tail is None:
            assigned = assign(
                assigned, terms, np.full(streams, rows), full, 2 * full, lambda pairs: count(sizes, pairs)
            )
        if resume_every and rows % resume_every == 0:
            state = json.loads(json.dumps(to_json(assigned)))
            assert to_json(from_json(state)) == state
            assigned = from_json(state)
        if assigned.rows is not None and rows * streams >= assigned.rows:
            return found
        for stream in range(streams):
            if assigned.rows is None or rows * streams + stream < assigned.rows:
                at = rows if assigned.tail is None else rows - assigned.tail.first // streams
                found[stream].append(amounts(assigned, stream, at * NEED, NEED + overlap))
        rows += 1


def count(sizes: Sequence[int], pairs: Sequence[tuple[int, int]]) -> dict[int, Count]:
    return {window: Count(sizes[window], documents=1, tokens=sizes[window]) for _, window in pairs}


def amounts(assigned: Assignment, stream: int, at: int, most: int) -> list[tuple[int, int]]:
    counted = [segment for segment in assigned.queues[stream] if segment.end != UNCOUNTED]
    laid = [(s.window, place) for s in counted for place in range(s.begin, s.end)]
    begin = at - int(assigned.begins[stream])
    assert begin >= 0
    return laid[begin : begin + most]


sizes_of_windows = st.lists(st.one_of(st.just(0), st.integers(0, 150)), min_size=1, max_size=60).filter(any)


@settings(deadline=None)
@given(sizes_of_windows, st.sampled_from([1, 2, 3, 8]), st.sampled_from([0, 1]))
def test_the_rows_of_all_streams_tile_windows_of_any_size(sizes, streams, overlap):
    found = run_to_the_end(sizes, streams, overlap)
    taken = [amount for rows in found for row in rows for amount in row[:NEED]]
    held = [(window, place) for window, size in enumerate(sizes) for place in range(size)]
    if overlap:  # the very last token of all is only ever a label
        assert len(set(taken)) == len(taken)
        assert len(held) - len(set(taken)) <= 1
        labels = [amount for rows in found for row in rows for amount in row[1:]]
        assert set(taken) | set(labels) == set(held) or len(held) == 1
    else:
        assert sorted(taken) == held


@settings(deadline=None)
@given(sizes_of_windows, st.sampled_from([1, 3, 8]), st.sampled_from([0, 1]))
def test_lanes_end_within_a_row_of_each_other_and_only_the_last_row_is_not_full(sizes, streams, overlap):
    found = run_to_the_end(sizes, streams, overlap)
    assert max(map(len, found)) - min(map(len, found)) <= 1
    partial = [row for rows in found for row in rows if len(row) < NEED + overlap]
    assert len(partial) <= 1


@settings(deadline=None)
@given(sizes_of_windows, st.sampled_from([2, 5]), st.integers(1, 5))
def test_a_state_stored_and_loaded_at_any_row_changes_nothing(sizes, streams, every):
    assert run_to_the_end(sizes, streams, 1, resume_every=every) == run_to_the_end(sizes, streams, 1)


def test_lanes_read_on_without_a_seam_until_the_rest_is_divided():
    sizes = [random.Random(0).randrange(20, 90) for _ in range(200)]
    found = run_to_the_end(sizes, 4, 1)
    for rows in found:
        for row, following in itertools.pairwise(rows):
            if row[-1] == following[0]:
                continue
            assert following[0][0] >= 180  # only at the very end
            break
    unbroken = [sum(a[-1] == b[0] for a, b in itertools.pairwise(rows)) for rows in found]
    assert min(unbroken) > 200


def test_windows_are_dealt_in_lane_order_and_one_period_ahead():
    terms = Terms(3, None, 100, NEED, 1)
    ones = np.full(3, 1)
    asked = []

    def count(pairs):
        asked.append(list(pairs))
        return {window: Count(50) for _, window in pairs}

    first = assign(nothing_assigned(3), terms, 0 * ones, 4 * ones, 8 * ones, count)
    assert asked == [[(0, 0), (1, 1), (2, 2)]]
    assert [[s.window for s in queue] for queue in first.queues] == [[0, 3], [1, 4], [2, 5]]
    assert first.uncounted == [(0, 3), (1, 4), (2, 5)]  # to be read during the period, and counted after it
    second = assign(first, terms, 4 * ones, 4 * ones, 8 * ones, count)
    assert asked[1:] == [[(0, 3), (1, 4), (2, 5)]]
    assert second.uncounted == [(0, 6), (1, 7), (2, 8)]  # 10 + 50 amounts are held, and 81 wanted for two periods


def test_a_source_without_anything_to_read_is_refused():
    terms = Terms(2, None, 5, NEED, 1)
    ones = np.ones(2, np.int64)
    with pytest.raises(ValueError, match="a whole epoch of 5 windows holds no row"):
        assign(
            nothing_assigned(2), terms, 0 * ones, ones, ones, lambda pairs: {window: Count(0) for _, window in pairs}
        )
