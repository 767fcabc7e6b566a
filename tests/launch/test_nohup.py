"""`nohup stoker train` continues when the terminal closes; without nohup the run ends in order."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.launch.local import handled_signals
from stoker.trainer.runtime.outcome import Outcome, read_ending
from tests.launch.runs import command, last_step, overrides, rank_pids, started, wait_until

SIGHUP_BIT = 1 << (signal.SIGHUP - 1)


def ignores_hangup(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [ignored] = [line.split()[1] for line in lines if line.startswith("SigIgn")]
    return bool(int(ignored, 16) & SIGHUP_BIT)


@pytest.mark.long
def test_a_hangup_that_is_ignored_stays_ignored_in_launcher_and_ranks(home: Path) -> None:
    run = RunDirectory(home / "nohup")
    words = overrides(
        run.path, home / "text", "steps=100000", "checkpoint.every=0", "launch.nproc=1", "batch.micro_size=8"
    )
    with started(home, ["nohup", *command("train", *words)]) as process:
        wait_until(lambda: last_step(run.path) >= 1, process, 120.0)
        ranks = list(rank_pids(run.path).values())
        assert ranks and all(map(ignores_hangup, [process.pid, *ranks]))
        for pid in (process.pid, *ranks):
            os.kill(pid, signal.SIGHUP)
        reached = last_step(run.path)
        wait_until(lambda: last_step(run.path) >= reached + 20, process, 120.0)
        run.stop.touch()
        process.communicate(timeout=120)
    ending = read_ending(run, 1)
    assert process.returncode == 0 and ending is not None and ending.outcome is Outcome.STOPPED


@pytest.fixture
def hangup() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def test_the_launcher_handles_signals_that_are_not_ignored(hangup: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert handled_signals() == ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGHUP"]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert handled_signals() == ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1"]
