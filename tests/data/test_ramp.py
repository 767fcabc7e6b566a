"""Rows under `batch.ramp`: the same sequences in the same order on any ranks, through resumes, and past steps."""

from __future__ import annotations

from contextlib import closing

import pytest

from stoker.conf.ramp import Ramp
from stoker.data import EndOfData, IndexedLoader
from stoker.data.ramp import RampedRows
from tests.data.plans import NumberPlan

RAMP = Ramp(((2, 24.0), (4, 80.0), (6, float("inf"))), 4)
SIZES = [2, 2, 2, 4, 4, 4, 4, 6, 6]


def opened(rank: int = 0, dp: int = 1, total: int | None = None, workers: int = 0) -> RampedRows:
    return RampedRows(IndexedLoader(NumberPlan(total), RAMP.unit, rank, dp, workers=workers, prefetch=2), RAMP)


def rows_of(stream: RampedRows) -> list[int]:
    return stream.next().tokens[:, 0].tolist()


@pytest.mark.parametrize(("dp", "workers"), [(1, 0), (2, 0), (2, 1)])
def test_steps_grow_and_read_every_sequence_in_its_order(dp: int, workers: int) -> None:
    streams = [opened(rank, dp, workers=workers) for rank in range(dp)]
    seen = 0
    for size in SIZES:
        found = sorted(row for stream in streams for row in rows_of(stream))
        assert found == list(range(seen, seen + size))
        seen += size
        assert all(stream.row == seen and stream.metrics()["batch_size"] == size for stream in streams)
    for stream in streams:
        stream.close()


def test_a_state_continues_on_other_ranks_in_the_middle_of_the_ramp() -> None:
    with closing(opened()) as first:
        for _ in range(4):
            first.next()
        state = first.state()
    assert state["step"] == 4 and state["row"] == 10
    with closing(opened(1, 2)) as second:
        second.load_state(state)
        assert second.state() == state
        assert rows_of(second) == [11, 13] and second.state()["step"] == 5
        second.pass_over(8)
        assert second.row == 22 and rows_of(second) == [23, 25, 27]
    other = RampedRows(IndexedLoader(NumberPlan(), 3), Ramp(((3, 12.0), (6, float("inf"))), 4))
    with pytest.raises(ValueError, match="has read 10 sequences, no multiple of the 3"):
        other.load_state(state)


def test_data_that_end_within_a_step_end_before_it() -> None:
    with closing(opened(total=13)) as stream:
        for _ in range(4):
            assert not stream.exhausted
            stream.next()
        assert stream.exhausted
        with pytest.raises(EndOfData):
            stream.next()
