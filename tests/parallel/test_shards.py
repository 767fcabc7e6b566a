"""Chunks: arithmetic that everything which leaves an engine rests on."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from stoker.parallel.shards import flat_range, whole


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape of up to four dims, and a range of its elements that may be empty or all of them."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    start, stop = sorted(draw(st.integers(0, math.prod(shape))) for _ in range(2))
    return shape, start, stop


@given(ranges())
def test_the_rectangles_of_a_flat_range_are_its_elements_in_their_order(
    range_: tuple[tuple[int, ...], int, int],
) -> None:
    shape, start, stop = range_
    tensor = torch.arange(math.prod(shape)).view(shape)
    found = flat_range(shape, start, stop)
    assert all(chunk.numel > 0 for chunk in found)
    elements = [int(e) for chunk in found for e in tensor[chunk.within(whole(shape))].flatten()]
    assert elements == list(range(start, stop))


@given(ranges())
def test_a_flat_range_is_few_rectangles(range_: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = range_
    assert len(flat_range(shape, start, stop)) <= max(1, 2 * len(shape) - 1)
