"""Fifteen random faults over one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.trainer.runtime.outcome import read_beginning, read_ending
from tests.launch.runs import write_text
from tests.launch.soak import HANG_SECONDS, KINDS, Soak


@pytest.mark.long
def test_a_run_survives_everything_bitwise_and_every_second_of_it_is_booked(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    soak = Soak(tmp_path, faults=15, seed=7)
    soak.execute()
    assert sum(soak.struck.values()) == 15 and set(soak.struck) == set(KINDS)
    spent = soak.check()
    first, last = read_beginning(soak.run, 1), read_ending(soak.run, soak.run.attempt_numbers()[-1])
    assert first is not None and last is not None
    assert last.time - first.time < spent.total < soak.seconds
    assert all(spent.seconds[book] > 0 for book in ("training", "data", "checkpoint", "startup", "lost"))
    assert spent.seconds["down"] > HANG_SECONDS * soak.struck["hang"], "who hangs does not train"
