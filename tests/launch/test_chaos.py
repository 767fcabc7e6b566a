"""A few episodes of benchmarks/chaos.py, for indexed and for streamed data, and of its double starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.trainer.runtime.outcome import read_beginning, read_ending
from tests.launch import chaos
from tests.launch.double_starts import started_twice

pytestmark = pytest.mark.long


def test_an_indexed_run_survives_a_few_disturbances_and_every_second_of_it_is_booked(tmp_path: Path) -> None:
    kinds = ("rank", "hang", "launcher", "mid-save")
    found = chaos.Chaos(tmp_path, episodes=4, seed=2, data="jsonl", kinds=kinds)
    found.execute()
    assert set(found.struck) == set(kinds)
    spent = found.check()
    first, last = read_beginning(found.run, 1), read_ending(found.run, found.run.attempt_numbers()[-1])
    assert first is not None and last is not None
    assert last.time - first.time < spent.total < found.seconds
    assert all(spent.seconds[book] > 0 for book in ("training", "data", "checkpoint", "startup", "lost"))
    assert spent.seconds["down"] > chaos.HANG_SECONDS, "a rank that hangs does not train"


@pytest.mark.full
def test_a_streamed_run_survives_a_few_more(tmp_path: Path) -> None:
    kinds = ("reader", "clock", "damage", "copy", "disk full")
    found = chaos.Chaos(tmp_path, episodes=5, seed=1, data="tar", kinds=kinds)
    found.execute()
    assert sum(found.struck.values()) == 5
    found.check()


@pytest.mark.full
def test_of_two_launchers_of_one_run_exactly_one_trains(tmp_path: Path) -> None:
    found = started_twice(tmp_path, [0.0, 1.0, 2.5])
    assert sum(found.values()) == 3 and found["the first had finished"] < 2, found
