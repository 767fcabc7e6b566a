"""Fifteen random faults over one run."""

from __future__ import annotations

from pathlib import Path

from tests.launch.runs import write_text
from tests.launch.soak import KINDS, Soak


def test_a_run_survives_everything_bitwise(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    soak = Soak(tmp_path, faults=15, seed=7)
    soak.execute()
    assert sum(soak.struck.values()) == 15 and set(soak.struck) == set(KINDS)
    soak.check()
