"""A rank that makes no progress is named, with the phase it is in and its stack, and the attempt is ended."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.outcome import Outcome, read_ending
from tests.launch.runs import (
    command,
    finish,
    kill,
    last_step,
    overrides,
    rank_pids,
    started,
    steps_of,
    train_here,
    wait_until,
    wait_until_gone,
    write_text,
)

HANG = ["steps=12", "checkpoint.every=4", "launch.hang_seconds=3", "launch.max_restarts=2"]
FAULT = "faults=[{at: 6, rank: 1, do: hang}]"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hangs")
    write_text(folder / "text")
    train_here(folder, overrides(folder / "undisturbed", folder / "text", *HANG))
    return folder


@pytest.mark.long
def test_a_rank_that_hangs_is_named_and_the_run_continues_bitwise(home: Path) -> None:
    run = home / "hangs"
    status, output = finish(home, command("train", *overrides(run, home / "text", *HANG, FAULT)))
    assert status == 0, output
    wait_until_gone(home)
    directory = RunDirectory(run)
    ending = read_ending(directory, 1)
    assert ending is not None and (ending.outcome, ending.rank, ending.step) == (Outcome.HUNG, 1, 6)
    assert "rank 1 on " in ending.message and "in Python, asleep" in ending.message
    assert "sleep_for_ever" in ending.message and output.count("innermost Python frame") == 1
    assert "waits for other ranks" in (directory.attempt(1) / "hang.txt").read_text()
    for rank in range(2):
        assert "most recent call first" in directory.stacks(1, rank).read_text()
        entries = json.loads(directory.flight(1, rank).read_text())["entries"]
        assert any("gloo" in entry["profiling_name"] for entry in entries)
    assert directory.attempt_numbers() == [1, 2]
    assert steps_of(run) == steps_of(home / "undisturbed")


@pytest.mark.full
def test_a_rank_stopped_by_a_signal_is_distinguished_from_a_hanging_one(home: Path) -> None:
    run = home / "stopped"
    words = [
        "steps=400",
        "schedule.total_steps=12",
        "launch.hang_seconds=3",
        "launch.max_restarts=0",
        "parallel.zero=0",
    ]
    with started(home, command("train", *overrides(run, home / "text", *words))) as process:
        wait_until(lambda: last_step(run) >= 3, process)
        kill(rank_pids(run)[0], signal.SIGSTOP)
        output, _ = process.communicate(timeout=40)
        wait_until_gone(home)
    assert process.returncode == 1
    assert "rank 0 on " in output and "stopped by a signal (SIGSTOP)" in output
    assert "waits for other ranks" in output, "for what backward has begun to reduce, under ZeRO 0"
    ending = read_ending(RunDirectory(run), 1)
    assert ending is not None and (ending.outcome, ending.rank) == (Outcome.HUNG, 0)


@pytest.mark.full
def test_under_a_foreign_torchrun_a_process_beside_the_ranks_does_the_same(home: Path) -> None:
    run = home / "torchrun"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, "--max-restarts", "1", "-m", "stoker.trainer", *overrides(run, home / "text", *HANG, FAULT)]
    status, output = finish(home, words)
    assert status == 0, output
    wait_until_gone(home)
    ending = read_ending(RunDirectory(run), 1)
    assert ending is not None and (ending.outcome, ending.rank) == (Outcome.HUNG, 1)
    assert output.count("innermost Python frame") == 1 and "rank 1 on " in output
    assert steps_of(run) == steps_of(home / "undisturbed")
