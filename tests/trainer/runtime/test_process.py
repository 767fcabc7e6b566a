from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stoker.trainer.runtime.process import (
    LAUNCH_VARIABLE,
    LAUNCHER_VARIABLE,
    Phase,
    Phases,
    launch_id,
    read_stamps,
)


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


def test_a_rank_whose_launcher_has_died_ends_before_it_imports_torch(tmp_path: Path) -> None:
    environment = {**os.environ, LAUNCHER_VARIABLE: "1", "PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, "-P", "-m", "stoker.trainer"]
    orphan = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    imported = {line.rpartition("|")[2].strip() for line in orphan.stderr.splitlines()}
    assert orphan.returncode == 1 and "stoker.trainer.runtime.process" in imported
    assert not imported & {"torch", "numpy", "stoker.trainer.main"}


def test_a_launch_keeps_its_name_over_restarts_and_a_start_by_hand_is_a_launch_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv(LAUNCH_VARIABLE, raising=False)
    assert launch_id() != launch_id()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch_id() == launch_id() and str(os.getppid()) in launch_id()
    monkeypatch.setenv(LAUNCH_VARIABLE, "ours")
    assert launch_id() == "ours"
