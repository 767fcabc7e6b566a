from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from stoker.trainer.runtime.process import Phase, Phases, read_stamps


def test_phases_stamp_the_step_and_add_up_seconds(tmp_path: Path) -> None:
    stamp = tmp_path / "rank-0.stamp"
    phase = Phases(stamp)
    phase(7, Phase.DATA)
    time.sleep(0.02)
    phase(8, Phase.UPDATE)
    step, name, at, pid, _host, first_step = stamp.read_text().split()
    assert (step, name, int(pid), first_step) == ("8", "update", os.getpid(), "7")
    assert abs(float(at) - time.time()) < 5
    seconds = phase.take_seconds()
    assert seconds[Phase.DATA] >= 0.02
    assert Phase.DATA not in phase.take_seconds()


def test_stamps_are_read_back_and_half_ones_left_out(tmp_path: Path) -> None:
    Phases(tmp_path / "rank-0.stamp")(7, Phase.DATA)
    (tmp_path / "rank-1.stamp").write_text("")
    (stamp,) = read_stamps(tmp_path).values()
    assert (stamp.step, stamp.phase, stamp.pid) == (7, Phase.DATA, os.getpid())


def test_a_stamp_of_an_unknown_phase_is_named(tmp_path: Path) -> None:
    (tmp_path / "rank-3.stamp").write_text("7 dreaming 1.0 1 host 1")
    with pytest.raises(ValueError, match=r"rank-3\.stamp: .* no phase 'dreaming', but start, open_data, "):
        read_stamps(tmp_path)
