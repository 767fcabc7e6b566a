from __future__ import annotations

import os
import time
from pathlib import Path

from stoker.trainer.runtime.process import Phases, read_stamps


def test_phases_stamp_the_step_and_add_up_seconds(tmp_path: Path) -> None:
    stamp = tmp_path / "rank-0.stamp"
    phase = Phases(stamp)
    phase(7, "data")
    time.sleep(0.02)
    phase(8, "update")
    step, name, at, pid, _host, first_step = stamp.read_text().split()
    assert (step, name, int(pid), first_step) == ("8", "update", os.getpid(), "7")
    assert abs(float(at) - time.time()) < 5
    seconds = phase.take_seconds()
    assert seconds["data"] >= 0.02
    assert "data" not in phase.take_seconds()


def test_stamps_are_read_back_and_half_ones_left_out(tmp_path: Path) -> None:
    Phases(tmp_path / "rank-0.stamp")(7, "data")
    (tmp_path / "rank-1.stamp").write_text("")
    (stamp,) = read_stamps(tmp_path).values()
    assert (stamp.step, stamp.phase, stamp.pid) == (7, "data", os.getpid())
